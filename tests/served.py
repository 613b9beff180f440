"""scripts/serve.py in a process of its own, with a tiny model whose words are "w0", "w1" and so on."""

import contextlib
import multiprocessing
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from complexity_deep.scripts import serve  # once, before the processes are forked
from complexity_deep.workflow.command import run_script
from support import tiny_model, tiny_tokenizer

CONTEXT = 2048
# A message of words becomes words; a conversation that the assistant begins is refused.
TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('a user must begin') }}{% endif %}"
    "{% for message in messages %}w4 {{ message.content }} w5 {% endfor %}{% if add_generation_prompt %}w6{% endif %}"
)


def save_tiny(folder: Path, **shape) -> Path:
    """A random model whose greedy answers vary and do not end by themselves, and a tokenizer with a chat template."""
    shape = {"max_position_embeddings": CONTEXT, "tie_word_embeddings": False, "eos_token_id": None, **shape}
    tiny_model(std=0.15, **shape).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


class Served:
    """A running server. `url` is where it listens, and `log` what it has printed."""

    def __init__(self, folder: Path, log: Path, *options: str):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["served"])
        arguments = ["serve.py", str(folder), *options, "--port", "0", "--device", "cpu"]
        self.log_file = log
        self.process = context.Process(target=_run, args=(log, arguments))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # for the imports of the first start
            self.process.start()
        deadline = time.monotonic() + 300
        while not (found := re.search(r"at (http://\S+:\d+)", self.log)):
            assert self.process.is_alive() and time.monotonic() < deadline, self.log
            time.sleep(0.05)
        self.url = found[1]

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def _run(log: Path, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    sys.argv[:] = arguments
    with open(log, "w", buffering=1) as output:
        os.dup2(output.fileno(), 2)
        with contextlib.redirect_stderr(output):
            run_script(serve.main, serve.parse_args())
