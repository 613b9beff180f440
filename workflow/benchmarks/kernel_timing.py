"""GPU times of kernels, and the random inputs that they run on."""

import torch
import triton

QUANTILES = [0.5, 0.2, 0.8]


def normal(*shape, scale=1.0):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale


def time_call(function, repeat=100):
    return triton.testing.do_bench(function, warmup=25, rep=repeat, quantiles=QUANTILES)


def time_graph(calls, loops: int = 4) -> list[float]:
    """Median, 20 % and 80 % quantile of one call's GPU time, in ms, by replays of a CUDA graph.

    The graph runs all of `calls` in turn, `loops` times. Several calls on tensors of their own keep the cache from
    being measured.
    """
    for call in [*calls, *calls]:
        call()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    # The default stream cannot be captured; `graph` then takes one of its own.
    with torch.cuda.graph(graph, stream=None if stream == torch.cuda.default_stream() else stream):
        for call in calls * loops:
            call()
    return [ms / loops / len(calls) for ms in time_call(graph.replay)]
