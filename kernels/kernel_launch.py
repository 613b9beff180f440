"""What the launches of all kernels share: sizes, the right device, programmatic dependent launch (PDL) from Hopper on.

A kernel launched with PDL starts while the one before it drains. It calls `wait` before it reads what that one wrote,
and before it writes what that one reads. It may load weights before, because no kernel of a forward writes them.
"""

import functools

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the guard lets a checkpoint that ships this file load where there is no Triton
    raise


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until the kernel before has ended, and only then let the next one start.

    When the next one starts, all kernels before this one are therefore over.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's takes microseconds on the host, where a layer of a decode step needs a dozen."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is not less than n >= 1."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache
def device_properties(device: torch.device) -> tuple[int, int]:
    """Multiprocessors and compute capability major of a device; (1, 0) under the interpreter."""
    if device.type != "cuda":
        return 1, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major


def pdl_options(device: torch.device) -> dict:
    """Launch options of programmatic dependent launch: the kernel's PDL flag, and Triton's own."""
    return {"PDL": True, "launch_pdl": True} if device_properties(device)[1] >= 9 else {"PDL": False}


def on_its_device(function):
    """Make the device of the tensors the current one, on which Triton launches.

    The two may differ when a model is spread over several devices.
    """

    @functools.wraps(function)
    def wrapped(*args):
        with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
            return function(*args)

    return wrapped
