"""A small corpus, tokenizer and recipe for scripts/pretrain.py, and how to run it in other processes."""

import contextlib
import json
import multiprocessing
import os
import resource
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from complexity_deep.workflow.data.text_sources import embedded_documents
from complexity_deep.workflow.data.tokenizer_training import train_bpe
from support import REPOSITORY, run_command

ROW = 48


def small_texts() -> list[str]:
    """60 texts of the standard library, of at most 600 characters."""
    return [text[:600] for text in islice(embedded_documents(), 60)]


def small_tokenizer():
    """A tokenizer of 300 tokens for `small_texts`."""
    return train_bpe(iter(small_texts()), vocab_size=300, model_max_length=ROW)


def write_corpus(folder: Path, texts: list[str]) -> None:
    """Three jsonl files in a new folder, to be read with a pattern."""
    folder.mkdir(parents=True)
    for shard in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[shard::3]]
        (folder / f"{shard}.jsonl").write_text("".join(lines))


def write_recipe(folder: Path, shape: dict, **options) -> Path:
    """A recipe of a few seconds for a tiny model and all that it names, in `folder`; returns its path."""
    texts = small_texts()
    write_corpus(folder / "text", texts)
    small_tokenizer().save_pretrained(folder / "tokenizer")
    tiny = json.loads((REPOSITORY / "configs" / "tiny.json").read_text())
    (folder / "model.json").write_text(json.dumps({**tiny, "vocab_size": None, "num_hidden_layers": 2, **shape}))
    recipe = {
        "model_config": str(folder / "model.json"),
        "tokenizer": str(folder / "tokenizer"),
        "sources": [f"{folder}/text/*.jsonl"],
        "held_out_fraction": 0.2,
        "held_out_rows": 8,
        "row_length": ROW,
        "shuffle_buffer": 7,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "use_cpu": True,
        "report_to": "none",
        **options,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def start(
    log: Path,
    *options: object,
    file_limit: int | None = None,
    environment: dict[str, str] | None = None,
    as_on_gpus: bool = False,
):
    """The script in a new process, forked from one that has done the imports.

    What it prints goes to `log`, and the rows of every forward and backward pass, with their step, to `log`.rows.
    `file_limit` bytes is the most that it may write into one file. See `take_cpu_for_gpus` for `as_on_gpus`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretraining", "complexity_deep.scripts.pretrain"])
    process = context.Process(target=_run, args=(log, options, file_limit, environment or {}, as_on_gpus))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # for the imports of the first start
        process.start()
    return process


def take_cpu_for_gpus() -> None:
    """Let accelerate take gloo processes on the CPU for GPUs, and count how often FSDP2 gathers weights.

    accelerate turns to FSDP and DeepSpeed, and Trainer to bf16, only where they found an accelerator. These choices
    aside, everything is as on GPUs: the shipped config, the wrapping of the model, gathering weights for a checkpoint.
    """
    PartialState._prepare_backend = lambda self, *arguments: ("gloo", DistributedType.MULTI_GPU)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    gather = fsdp.foreach_all_gather

    def count(*arguments, **options):
        count.calls += 1
        return gather(*arguments, **options)

    count.calls = 0
    fsdp.foreach_all_gather = count


def _run(log: Path, options: tuple, file_limit: int | None, environment: dict[str, str], as_on_gpus: bool) -> None:
    os.environ.update(environment)
    if as_on_gpus:
        take_cpu_for_gpus()
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own; matters to DataLoader workers
    torch.set_num_threads(1)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    plain_step = transformers.Trainer.training_step

    def recorded_step(trainer, model, inputs, *arguments, **more):
        rows.write(json.dumps([trainer.state.global_step, inputs["input_ids"].tolist()]) + "\n")
        rows.flush()
        return plain_step(trainer, model, inputs, *arguments, **more)

    transformers.Trainer.training_step = recorded_step
    with open(log, "w") as output, open(f"{log}.rows", "w") as rows:
        os.dup2(output.fileno(), 2)
        with contextlib.redirect_stdout(output):
            run_command("pretrain", *options)
            if as_on_gpus:
                print(f"weights gathered {fsdp.foreach_all_gather.calls} times")


def finish(process, log: Path, exitcode: int = 0) -> str:
    """Wait for the end of a `start`ed process and return what it printed."""
    process.join(500)
    assert process.exitcode == exitcode, log.read_text()
    return log.read_text()


def documents_in(rows: list[dict], eos: int) -> list[tuple]:
    """The whole documents of consecutive rows."""
    flat = [token for row in rows for token in row["input_ids"]]
    ends = [index + 1 for index, token in enumerate(flat) if token == eos]
    return [tuple(flat[start:end]) for start, end in zip([0, *ends], ends)]
