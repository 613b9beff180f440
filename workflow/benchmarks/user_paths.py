"""What people get who call a model as its page says: `generate`, a forward, a step of Trainer's, the first call.

Everything is bf16 on one GPU with the settings a model comes with, every model in the same run. Rows of a case compare
among each other. Hosts differ from machine to machine, so their milliseconds do not.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from complexity_deep.workflow.benchmarks.model_speed import (
    COMPILERS,
    build,
    decode_steps,
    peers,
    release,
    training_step,
    zipf_ids,
)
from complexity_deep.workflow.benchmarks.results import measured_row
from complexity_deep.workflow.benchmarks.timing import timed
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.provenance import REPOSITORY
from complexity_deep.workflow.training.chunked_loss import use_chunked_loss

PROMPT, NEW_TOKENS = 128, 64
FORWARDS = ((1, 16), (1, 128), (1, 512), (1, 2048), (32, 128), (8, 2048))
SMALL_SHAPES = {"30m": (32, 1024), "150m": (16, 1024), "350m": (16, 1024)}
SHORTEST, LONGEST, SETTLED = 64, 1023, 8  # tokens of a row that changes its length; steps until all is compiled
REQUESTS, LONGEST_PROMPT = 128, 511


def generate_rows(shape: str, name: str, config, repeats: int) -> list[dict]:
    """A decode step of `generate`, with the cache that it takes by itself and with a static one."""
    model, rows = build(config, "cuda", "sdpa").eval(), []
    for cache in ("default", "static"):
        for batch in (1, 8, 32, 128):
            ids = zipf_ids(config.vocab_size, batch, PROMPT, device="cuda")
            steps = decode_steps(model, ids, NEW_TOKENS, repeats, "cuda", cache == "static")
            rows.append(measured_row("users", f"{shape} generate, {cache} cache, batch {batch}", name, steps, batch))
    return rows


@torch.no_grad()
def forward_rows(shape: str, name: str, config, repeats: int) -> list[dict]:
    """A forward pass, eager, on all that a tokenizer gives for rows of one length; the host's time for a layer."""
    model, rows = build(config, "cuda", "sdpa").eval(), []

    def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
        ids = zipf_ids(config.vocab_size, batch, length, device="cuda")
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    for batch, length in FORWARDS:
        given = tokens(batch, length)
        times = timed(lambda given=given: model(**given), 2 * repeats, "cuda", warmup=4)
        rows.append(measured_row("users", f"{shape} forward {batch}x{length}", name, times, batch * length))
    count = 5 * repeats
    new = iter([tokens(1, 100 + index) for index in range(2 * count + 6)])
    middle = 103 + count // 2  # of the lengths that are timed, after three that warm up
    times = timed(lambda: model(**next(new)), count, "cuda", warmup=3)
    rows.append(measured_row("users", f"{shape} forward 1x100 and on, each length once", name, times, middle))
    times = [took / config.num_hidden_layers for took in host_times(lambda: model(**next(new)), count)]
    rows.append(
        measured_row("users", f"{shape} host time of a layer, each length once", name, times, middle + count + 3)
    )
    return rows


def host_times(call: Callable, repeats: int) -> list[float]:
    """Milliseconds until each call returns, while the GPU may still be working; it has nothing else to do before."""
    times = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return times[3:]


def train_rows(shape: str, name: str, config, repeats: int, sizes=((1, 2048), (8, 2048)), autocast=False) -> list[dict]:
    """Training steps: eager, compiled as a whole, and compiled by layers with a loss in chunks, as by pretrain.py."""
    rows = []
    for compiler in COMPILERS:
        for batch, length in sizes:
            torch.manual_seed(0)
            model = build(config, "cuda", "sdpa", torch.float32 if autocast else None).train()
            if compiler == "compiled by layers":
                use_chunked_loss(model)
            ids = zipf_ids(config.vocab_size, batch, length, device="cuda")
            step = training_step(model, "cuda", compiler, autocast)
            times = timed(lambda step=step, ids=ids: step(input_ids=ids, labels=ids), 2 * repeats, "cuda", warmup=4)
            if not torch.isfinite(step(input_ids=ids, labels=ids)):
                raise InputError(f"{name} trains to a loss that is not finite: no figure is reported.")
            case = f"{shape} train {batch}x{length}, {compiler}"
            case += ", chunked loss" if compiler == "compiled by layers" else ""
            case += ", autocast" if autocast else ""
            rows.append(measured_row("users", case, name, times, batch * length))
            del model, step
            release()
    return rows


def small_rows(shape: str, name: str, config, repeats: int) -> list[dict]:
    """Training steps of the smaller shapes, fp32 weights under bf16 autocast; those of `config` are not looked at."""
    rows = []
    for small, size in SMALL_SHAPES.items():
        config = peers(str(REPOSITORY / f"configs/{small}.json"), name)[name]
        rows += train_rows(small, name, config, repeats, (size,), autocast=True)
    return rows


def length_rows(shape: str, name: str, config, repeats: int) -> list[dict]:
    """Eager training steps on four rows whose length changes from step to step, as without packing."""
    import triton

    model, compiled = build(config, "cuda", "sdpa").train(), []
    step, draw = training_step(model, "cuda", "eager"), random.Random(0)
    triton.knobs.runtime.jit_post_compile_hook = lambda **_: compiled.append(1)
    times = []
    for index in range(SETTLED + 5 * repeats):
        if index == SETTLED:
            compiled.clear()
        ids = zipf_ids(config.vocab_size, 4, draw.randint(SHORTEST, LONGEST), device="cuda")
        times += timed(lambda ids=ids: step(input_ids=ids, labels=ids), 1, "cuda", warmup=0)
    triton.knobs.runtime.jit_post_compile_hook = None
    case = f"{shape} train 4x{SHORTEST}..{LONGEST}, {len(compiled)} kernels compiled after step {SETTLED}"
    return [measured_row("users", case, name, times[SETTLED:], 2 * (SHORTEST + LONGEST))]


def first_rows(shape: str, name: str, config, repeats: int) -> list[dict]:
    """The first `generate` and the first training step of a process that has nothing compiled."""
    rows = []
    for what in ("generate", "training step"):
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            environment = os.environ | {"TRITON_CACHE_DIR": str(Path(folder, "triton"))}
            command = [sys.executable, "-m", "complexity_deep.workflow.benchmarks.first_call", folder, what]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"The process of the first {what} of {name} failed: {done.stderr.strip()[-500:]}")
        seconds = float(done.stdout.split()[-1])
        rows.append(measured_row("users", f"{shape} first {what}, nothing compiled", name, [seconds * 1e3], 1))
    return rows


def batching_rows(shape: str, name: str, config, repeats: int) -> list[dict]:
    """Continuous batching of requests of mixed lengths, as `generate_batch` does it by itself."""
    model, draw = build(config, "cuda", "sdpa").eval(), random.Random(0)
    ids = zipf_ids(config.vocab_size, REQUESTS, LONGEST_PROMPT, device="cpu").tolist()
    prompts = [row[: draw.randint(16, LONGEST_PROMPT)] for row in ids]
    options = GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=1, use_cache=True)
    times = timed(lambda: model.generate_batch(prompts, generation_config=options), 1, "cuda", warmup=1)
    case = f"{shape} generate_batch, {REQUESTS} requests of 16..{LONGEST_PROMPT}, 128 new tokens"
    return [measured_row("users", case, name, times, REQUESTS * 128)]


def operator_rows(shape: str, name: str, config, repeats: int) -> list[dict]:
    """The host's time for two operators of this model, forward and backward on tensors that give the GPU no work."""
    if name != "complexity-deep":
        return []
    from complexity_deep.kernels.fused_dynamics import inl_dynamics_block
    from complexity_deep.kernels.routing_plan import routing_plan
    from complexity_deep.kernels.token_routed_gemm import token_routed_mlp

    def leaf(*size: int) -> torch.Tensor:
        return (0.1 * torch.randn(size, device="cuda", dtype=torch.bfloat16)).requires_grad_()

    T, H, C, E, width = 64, 64, 16, 4, 64
    plan = routing_plan(torch.arange(T, device="cuda") % E, E)
    experts = leaf(T, H), leaf(E, 2 * width, H), leaf(E, H, width)
    dynamics = (
        leaf(T, H),
        leaf(T, H),
        leaf(T, H),
        leaf(H),
        leaf(H, H),
        leaf(C, 2 * H),
        leaf(C),
        leaf(3 * H, C),
        leaf(3 * H),
    )
    one = torch.ones(T, H, device="cuda", dtype=torch.bfloat16)

    def mlp():
        return [token_routed_mlp(*experts, *plan)]

    def block():
        return inl_dynamics_block(*dynamics, 0.1)[:4]

    rows = []
    for label, call, leaves in (("token_routed_mlp", mlp, experts), ("inl_dynamics_block", block, dynamics)):
        times = host_times(call, 20 * repeats)
        rows.append(measured_row("users", f"host time of {label}, forward", name, times, T))
        both = lambda call=call, leaves=leaves: torch.autograd.grad(y := call(), leaves, [one] * len(y))  # noqa: E731
        rows.append(
            measured_row("users", f"host time of {label}, forward+backward", name, host_times(both, 20 * repeats), T)
        )
    return rows


PARTS = {
    "generate": generate_rows,
    "forward": forward_rows,
    "train": train_rows,
    "small": small_rows,
    "lengths": length_rows,
    "first": first_rows,
    "batching": batching_rows,
    "operators": operator_rows,
}


def benchmark_users(model_config: str, *, parts: list[str], repeats: int, only: str | None = None) -> list[dict]:
    """Rows of results for `parts` of PARTS, for every model or the one named `only`; this model first in each case.

    Raises `InputError` without a CUDA device, for a config that does not load and for a loss that is not finite.
    """
    if not torch.cuda.is_available():
        raise InputError("`users` measures what people get on a GPU, and there is no CUDA device here.")
    shape, rows = Path(model_config).stem, []
    todo = [(part, name, config) for part in parts for name, config in peers(model_config, only).items()]
    for part, name, config in tqdm(todo, desc="users", file=sys.stderr):
        torch.manual_seed(0)
        rows += PARTS[part](shape, name, config, repeats)
        release()
    cases = list(dict.fromkeys(row["case"] for row in rows))
    return sorted(rows, key=lambda row: cases.index(row["case"]))
