"""Kernel cases of `scripts/benchmark.py kernels`: attention of one new token beside the library's SDPA.

GPU time only (CUDA graph), the heads of the 1.5b shape, a static cache of L positions of which half are in use. The
library's call repeats keys and values for every query head first, as transformers does when there is a mask.
"""

import torch
import torch.nn.functional as F
from kernel_cases_experts import normal, time_graph

from complexity_deep.kernels.decode_attention import decode_attention

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
        times = time_graph(function, inputs)
        keys = {"op": f"decode attention, cache of {length}", "variant": name, "tokens": batch, "pass": "forward"}
        rows.append(keys | dict(zip(("ms", "low", "high"), times)))
    return rows
