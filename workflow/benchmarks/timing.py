"""Times of steps, and the rates that a device reaches at best."""

import statistics
import time

import torch


def timed(step, repeats: int, device: str, warmup: int = 2) -> list[float]:
    """Milliseconds of each of `repeats` calls, by CUDA events on a GPU."""
    for _ in range(warmup):
        step()
    times = []
    for _ in range(repeats):
        if device.startswith("cuda"):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            step()
            times.append((time.perf_counter() - begin) * 1e3)
    return times


def ceilings(device: str) -> tuple[float, float]:
    """Measured matmul rate in TFLOP/s (bf16 on a GPU, sustained over half a second) and copy rate in GB/s."""
    cuda = device.startswith("cuda")
    n, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    matmul = statistics.median(timed(lambda: a @ b, 300 if cuda else 10, device)[-50:])
    source = torch.empty(2**30 if cuda else 2**26, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = statistics.median(timed(lambda: target.copy_(source), 20, device))
    return 2 * n**3 / matmul / 1e9, 2 * source.numel() / copy / 1e6
