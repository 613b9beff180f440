"""Kernel cases of `scripts/benchmark.py kernels`: one new token per row, with a static cache.

GPU time only (CUDA graph), the 1.5b shape, a cache of L positions of which half are in use. Attention stands beside the
library's SDPA, which repeats keys and values for every query head first, as transformers does when there is a mask. A
whole decoder layer stands beside the same layer module by module, on the other Triton kernels and in PyTorch; the bytes
are those of the weights that one token reads.
"""

import functools

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from complexity_deep import accelerated_complexity_deep as accelerated
from complexity_deep.kernels.decode_attention import decode_attention
from complexity_deep.workflow.benchmarks.kernel_timing import normal, time_graph
from complexity_deep.workflow.provenance import REPOSITORY

HEADS, KEY_HEADS, HEAD_DIM = 16, 8, 128


def sdpa(query, key, value, mask, scale):
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2)


@torch.no_grad()
def decode_attention_rows(batch: int, length: int, sets: int = 3) -> list[dict]:
    mask = (torch.arange(length, device="cuda") < length // 2).expand(batch, 1, 1, length).contiguous()
    shapes = [(batch, HEADS, 1, HEAD_DIM), *[(batch, KEY_HEADS, length, HEAD_DIM)] * 2]
    inputs = [[*(normal(*shape) for shape in shapes), mask, HEAD_DIM**-0.5] for _ in range(sets)]
    rows = []
    for name, function in {"this": decode_attention, "repeat + sdpa": sdpa}.items():
        times = time_graph([functools.partial(function, *one) for one in inputs])
        keys = {"op": f"decode attention, cache of {length}", "variant": name, "tokens": batch, "pass": "forward"}
        rows.append(keys | dict(zip(("ms", "low", "high"), times)))
    return rows


@torch.no_grad()
def decode_layer_rows(batch: int, length: int = 512, layers: int = 8) -> list[dict]:
    """Time of one layer: that of `layers` different ones, which do not fit the L2 together, over their number."""
    path = REPOSITORY / "configs/1.5b.json"
    config = AutoConfig.from_pretrained(path, num_hidden_layers=layers, vocab_size=1024)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = StaticCache(config=config, max_cache_len=length)
    model(torch.zeros(batch, length // 2, dtype=torch.int64, device="cuda"), cache=cache)
    seen = (torch.arange(length, device="cuda") <= length // 2).expand(batch, 1, 1, length).contiguous()
    x = normal(batch, 1, config.hidden_size)
    position_embeddings = model.model.rotary_emb(x, torch.full((batch, 1), length // 2, device="cuda"))
    shared = {"expert_ids": torch.arange(batch, device="cuda").view(-1, 1) % config.num_experts, "routing_plan": None}
    shared |= {"position_embeddings": position_embeddings, "attention_mask": seen, "cache": cache}

    used = [layer.cumulative_length for layer in cache.layers]

    def step():
        torch._foreach_zero_(used)
        torch._foreach_add_(used, length // 2)
        states = x, torch.zeros_like(x), None, None
        for layer in model.model.layers:
            states = layer(*states, **shared)

    active = model.parameter_counts()["active"] - model.model.embed_tokens.weight.numel()
    rows, max_rows = [], accelerated.MAX_ROWS
    for name, kernels, most in (
        ("this", "triton", max_rows),
        ("by module", "triton", 0),
        ("PyTorch, experts in Triton", "eager", 0),
    ):
        model.set_kernels_implementation(kernels)
        accelerated.MAX_ROWS = most
        times = [time / layers for time in time_graph([step])]
        keys = {"op": "decode layer", "variant": name, "tokens": batch, "pass": "forward"}
        rows.append(keys | dict(zip(("ms", "low", "high"), times)) | {"gb_per_s": active / layers * 2 / times[0] / 1e6})
    accelerated.MAX_ROWS = max_rows
    return rows
