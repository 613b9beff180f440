"""Every kernel beside its peers, at the shapes of the models."""

import functools
import sys

import torch
from tqdm import tqdm

import complexity_deep  # noqa: F401 (registers the architecture)
from complexity_deep.workflow.benchmarks.results import measured_row
from complexity_deep.workflow.command import InputError


def benchmark_kernels(device: str) -> list[dict]:
    """Rows of results for every kernel and its peers. Raises `InputError` without a CUDA device."""
    if not device.startswith("cuda"):
        raise InputError("The kernels need a CUDA device.")
    from complexity_deep.workflow.benchmarks.kernel_cases_decode import decode_attention_rows, decode_layer_rows
    from complexity_deep.workflow.benchmarks.kernel_cases_dynamics import (
        dynamics_decode_rows,
        dynamics_rows,
        qkv_decode_rows,
        qkv_rows,
    )
    from complexity_deep.workflow.benchmarks.kernel_cases_experts import cggr_rows

    torch.manual_seed(0)
    sizes = (1, 32, 512, 4096, 16384, 65536)
    cases = [functools.partial(cggr_rows, tokens) for tokens in sizes]
    cases += [functools.partial(cggr_rows, 65536, experts, only=["cggr"]) for experts in (64, 256)]
    cases += [dynamics_rows, qkv_rows]
    cases += [functools.partial(rows, tokens) for rows in (dynamics_decode_rows, qkv_decode_rows) for tokens in (1, 32)]
    cases += [functools.partial(decode_attention_rows, *shape) for shape in ((1, 512), (32, 512), (32, 4096))]
    cases += [functools.partial(decode_layer_rows, batch) for batch in (1, 2, 4)]
    measured = [entry for case in tqdm(cases, desc="kernels", file=sys.stderr) for entry in case()]
    return [
        measured_row(
            "kernels",
            f"{entry['op']}, {entry['tokens']} tokens, {entry['pass']}",
            entry["variant"],
            [entry["ms"]],
            entry["tokens"],
            entry.get("flops", 0),
            p20_ms=entry["low"],
            p80_ms=entry["high"],
            **({"peak_gib": entry["bytes"] / 2**30} if entry.get("bytes") else {}),
            **({"gb_per_s": entry["gb_per_s"]} if "gb_per_s" in entry else {}),
        )
        for entry in measured
    ]
