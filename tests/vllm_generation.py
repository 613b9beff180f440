"""vLLM gives the greedy tokens of `generate`, for the models that vllm_models.py has written. `make test-vllm` runs it.

    python -I tests/vllm_generation.py FOLDER [--only modulo dense commands]

This runs in an environment with vLLM and without this package: models load with the code that their folders bring. Each
runs in vLLM twice, eagerly and compiled, and gets prompts of many lengths at once, in parts where they are long. What a
model is there for must matter for its tokens, so that a comparison could fail: mu overrides experts, and other tables,
no window, or weights of zero in a part, give other answers. The commands of docs/inference.md serve one of the models,
where the two machines are two processes of this one.
"""

import argparse
import importlib.util
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

# Read when vLLM is imported. A process that is forked would inherit PyTorch's threads, and wait for them.
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn", "VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
import transformers
import vllm
from transformers import AutoModelForCausalLM

NEW_TOKENS = 24
PARTS = ("mu_router", "shared_expert", "value_embedding", "mu_to_", "mu_proj")
DOCUMENTED = Path(__file__).resolve().parents[1] / "docs" / "inference.md"
# The command `vllm`, which looks for a distribution of that name. The CPU build is called vllm-cpu.
COMMAND = """
from importlib import metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


def random_prompts(vocab_size: int) -> list[list[int]]:
    """32 prompts of 1 to 125 tokens."""
    draw = random.Random(0)
    return [[draw.randrange(3, vocab_size) for _ in range(1 + 4 * index)] for index in range(32)]


def generate(model, prompts: list[list[int]]) -> list[list[int]]:
    """The greedy tokens of `generate`, one prompt after the other."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]


def run_engine(folder: Path, prompts: list[list[int]], compiled: bool) -> list[list[int]]:
    """The greedy tokens of vLLM, all prompts at once."""
    engine = vllm.LLM(
        str(folder),
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=not compiled,
        max_num_batched_tokens=256,  # fewer than the prompts have together, so that steps of both kinds mix
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    engine.llm_engine.engine_core.shutdown()
    return [list(answer.outputs[0].token_ids) for answer in answers]


def differing(some: list[list[int]], others: list[list[int]]) -> int:
    return sum(a != b for a, b in zip(some, others, strict=True))


def overridden(model, texts: list[list[int]]) -> float:
    """The share of tokens, over all layers, that mu takes to another expert than the table's."""
    shares = []
    for text in texts:
        ids = torch.tensor([text])
        tables = model.model.token_to_expert.expand(model.config.num_hidden_layers, -1)
        taken = model(ids, output_expert_ids=True).expert_ids
        shares += [(experts != table[ids]).float().mean() for experts, table in zip(taken, tables, strict=True)]
    return float(torch.stack(shares).mean())


def variants(model):
    """Yield the names of wrong models, while `model` is that one."""
    for part in PARTS:
        weights = [weight for name, weight in model.state_dict().items() if part in name and "layers.0" not in name]
        if weights:
            kept = [weight.clone() for weight in weights]
            for weight in weights:
                weight.zero_()
            yield f"{part} of zeros"
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
    if (window := model.config.sliding_window) is not None:
        model.config.sliding_window = None
        yield "no window"
        model.config.sliding_window = window
    if model.config.is_routed:
        table = model.model.token_to_expert
        kept = table.clone()
        table.copy_((table + 1) % model.config.num_experts)
        yield "the next expert"
        if table.ndim == 2:
            table.copy_(kept[:1].expand_as(kept))
            yield "one table"
        table.copy_(kept)


def load(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    return model


@torch.no_grad()
def check_model(folder: Path) -> None:
    model = load(folder)
    prompts = random_prompts(model.config.vocab_size)
    expected = generate(model, prompts)
    assert len(set(map(tuple, expected))) > 16 and sum(len(set(answer)) for answer in expected) > 4 * len(expected)
    if model.config.is_routed:
        share = overridden(model, [ids + answer for ids, answer in zip(prompts, expected, strict=True)])
        assert share > 0.1, f"mu overrides the expert of {share:.1%} of the tokens only"
        print(f"{folder.name}: mu overrides the expert of {share:.0%} of the tokens", flush=True)
    some = slice(None, None, 4)
    for name in variants(model):
        changed = differing(generate(model, prompts[some]), expected[some])
        assert changed, f"{folder.name}: {name} gives the same answers, so that this model shows nothing about it"
        print(f"{folder.name}: {name} changes {changed} of {len(prompts[some])} answers", flush=True)
    for compiled in (False, True):
        wrong = differing(run_engine(folder, prompts, compiled), expected)
        how = "compiled" if compiled else "eager"
        assert not wrong, f"{folder.name}: vLLM, {how}, gives {wrong} of {len(prompts)} answers that differ"
        print(f"{folder.name}: vLLM, {how}, gives all {len(prompts)} answers of `generate`", flush=True)


def documented_servers() -> list[list[list[str]]]:
    """The options of the servers of docs/inference.md, and of each of the machines that one runs on."""
    blocks = DOCUMENTED.read_text(encoding="utf-8").split("```bash\n")[1:]
    servers = [
        [shlex.split(line)[2:] for line in block.split("```")[0].splitlines()]
        for block in blocks
        if block.startswith("vllm serve ")
    ]
    assert [len(machines) for machines in servers] == [1, 2], servers
    return servers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask_server(machines: list[list[str]], folder: Path, prompts: list[list[int]], log) -> list[list[int]]:
    """The greedy tokens of a server that the documented options start, on the CPU of this machine."""
    port, meeting = free_port(), free_port()
    processes = []
    try:
        for rank, (_, *options) in enumerate(machines):
            if "--master-addr" in options:
                options[options.index("--master-addr") + 1] = "127.0.0.1"
                options += ["--master-port", str(meeting)]
            options += ["--dtype", "float32", "--enforce-eager", "--served-model-name", "model"]
            options += [] if "--headless" in options else ["--host", "127.0.0.1", "--port", str(port)]
            # The CPU build binds a process to cores of its own, and sees no second machine.
            core = {"VLLM_CPU_OMP_THREADS_BIND": str(rank % os.cpu_count())} if len(machines) > 1 else {}
            command = [sys.executable, "-c", COMMAND, "serve", str(folder), *options]
            environment = os.environ | core
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        deadline = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                alive = all(process.poll() is None for process in processes)
                assert alive and time.monotonic() < deadline, Path(log.name).read_text()[-3000:]
                time.sleep(1)
        body = {"model": "model", "prompt": prompts, "max_tokens": NEW_TOKENS, "temperature": 0.0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        choices = json.load(urllib.request.urlopen(request, timeout=300))["choices"]
        return [choice["token_ids"] for choice in sorted(choices, key=lambda choice: choice["index"])]
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@torch.no_grad()
def check_commands(folder: Path) -> None:
    """The servers of the page: on one machine, and on two that share every layer by tensor parallelism."""
    model = load(folder)
    prompts = random_prompts(model.config.vocab_size)
    expected = generate(model, prompts)
    for machines in documented_servers():
        with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
            wrong = differing(ask_server(machines, folder, prompts, log), expected)
        where = f"{len(machines)} machine{'s' if len(machines) > 1 else ''}"
        assert not wrong, f"`vllm serve` on {where} gives {wrong} of {len(prompts)} answers that differ"
        print(f"{folder.name}: `vllm serve` on {where} gives all {len(prompts)} answers of `generate`", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that vllm_models.py has written")
    parser.add_argument("--only", nargs="+", metavar="NAME", help='names of models, or "commands"')
    arguments = parser.parse_args()
    assert importlib.util.find_spec("complexity_deep") is None, "models must load with the code that they bring"
    names = sorted(path.name for path in arguments.folder.iterdir())
    chosen = arguments.only or ["commands", *names]
    assert set(chosen) <= {*names, "commands"}, f"there are only {', '.join(names)} and commands"
    for name in chosen:
        if name == "commands":
            check_commands(arguments.folder / "exported-balanced-shared")
        else:
            check_model(arguments.folder / name)
    versions = f"vLLM {vllm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"{', '.join(chosen)}: {versions}")


if __name__ == "__main__":
    main()
