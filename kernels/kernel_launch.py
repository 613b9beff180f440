"""What the launches of all kernels share: the launch itself, sizes, the right device, programmatic dependent launch.

A kernel launched with programmatic dependent launch (PDL, from Hopper on) starts while the one before it drains. It
calls `wait` before it reads what that one wrote, and before it writes what that one reads. It may load weights before,
because no kernel of a forward writes them.
"""

import contextlib
import functools
import operator
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
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


def strides_of(*tensors: Tensor) -> tuple[int, list[int]]:
    """A unit, and the strides of all dimensions but the last of `tensors` in it.

    The unit is a compile-time constant: with one of 16 elements, Triton knows that rows are aligned, whatever the
    strides are. They change with the length of rows and must not make Triton compile anew.
    """
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    unit = 1 if any(stride % 16 for stride in strides) else 16
    return unit, [stride // unit for stride in strides]


def inner_contiguous(x: Tensor) -> Tensor:
    """`x`, copied where its last dimension is not contiguous. Kernels read any other strides in place."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.lru_cache
def _cuda_properties(device: torch.device | int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major


def device_properties(device: torch.device) -> tuple[int, int]:
    """Multiprocessors and compute capability major of a device; (1, 0) under the interpreter.

    Tensors on the device "meta" stand for those of the current device while kernels are compiled ahead.
    """
    if device.type == "cuda" or _AHEAD.pool is not None:
        return _cuda_properties(device if device.type == "cuda" else _current_device())
    return 1, 0


def pdl_options(device: torch.device) -> dict:
    """Launch options of programmatic dependent launch: the kernel's PDL flag, and Triton's own."""
    return {"PDL": True, "launch_pdl": True} if device_properties(device)[1] >= 9 else {"PDL": False}


def on_its_device(function):
    """Make the device of the tensors the current one, on which Triton launches.

    The two may differ when a model is spread over several devices.
    """

    @functools.wraps(function)
    def wrapped(*args):
        first = args[0] if args[0] is not None else next(x for x in args if isinstance(x, Tensor))
        device = first.get_device()
        if device < 0 or device == _current_device():
            return function(*args)
        with torch.cuda.device(device):
            return function(*args)

    return wrapped


class Kernel:
    """A Triton kernel that, once compiled, is launched with little work on the host.

    Triton's own launch finds out for every argument what the kernel was compiled for, which takes longer than the
    launch. Here, that is one look-up: the dtypes of tensors, the values of the integers that Triton specialises (sizes
    of the model), and the compile-time constants. Integers named in `runtime`, such as the number of tokens, take no
    part: the kernel is compiled once for all their values. Tensors must begin at a multiple of 16 bytes, as all that
    PyTorch allocates do; others take Triton's own launch, and so does the interpreter. A tensor named in `runtime` may
    begin anywhere, as the ids of one layer among those of all do, and must always be of one dtype.
    """

    def __init__(self, function: Callable, runtime: tuple[str, ...]):
        self.jit = triton.jit(function, do_not_specialize=list(runtime))
        self.is_interpreted = not isinstance(self.jit, triton.JITFunction)
        self.names = list(self.jit.arg_names)
        annotations = function.__annotations__
        arguments = [index for index, name in enumerate(self.names) if name not in (*runtime, *annotations)]
        self.fixed = operator.itemgetter(*arguments)  # the arguments that it is compiled for, constants aside
        self.compiled: dict[tuple, tuple] = {}
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def launch(self, grid: tuple[int, ...], *args, **constants) -> None:
        """Launch on the current device and stream.

        Args:
            grid: one to three numbers of programs. args: the first arguments of the kernel, in its order.
            constants: its other arguments, which are compile-time constants, and Triton's options, in one order.
        """
        if self.is_interpreted:
            self.jit[grid](*args, **constants)
            return
        device = _current_device()
        pointers, parts = 0, [device, *constants.values()]
        for x in self.fixed(args):
            kind = type(x)
            if kind is Tensor or kind is torch.nn.Parameter:
                pointers |= x.data_ptr()
                parts.append(x.dtype)
            elif kind is int:
                parts.append(x)
            elif kind is TensorDescriptor:
                parts += [x.base.dtype, *x.block_shape]
            elif isinstance(x, Tensor):  # of a class of its own
                pointers |= x.data_ptr()
                parts.append(x.dtype)
            elif isinstance(x, float):  # one kernel for all values, such as those of a scheduled step size
                parts.append(kind)
            else:
                parts.append((kind, x))  # with the kind, because 1, 1.0 and True are equal
        key = tuple(parts)
        found = self.compiled.get(key)
        if _AHEAD.pool is not None:
            # Of an integer, Triton compiles for whether it is 1 or a multiple of 16.
            first = 1 + len(constants)
            numbers = [(x == 1, x % 16 == 0) if type(x) is int else x for x in key[first:]]
            name = self, *key[:first], *numbers
            if found is None and name not in _AHEAD.jobs:
                self.jit.device_caches[device]  # a dictionary that makes its entries: not from several threads at once
                _AHEAD.jobs[name] = device, _AHEAD.pool.submit(self._compile, device, grid, args, constants)
        elif found is None or pointers % 16:
            kernel = self.jit[grid](*args, **constants)
            if pointers % 16 == 0:
                values = [constants[name] for name in self.names[len(args) :]]
                self.compiled[key] = kernel.run, kernel.function, kernel.packed_metadata, values
        else:
            run, function, metadata, values = found
            # The three that are None would be Triton's hooks at launches, which its profiler uses.
            stream = _current_stream(device)
            run(*grid, *_ONES[len(grid) :], stream, function, metadata, None, None, None, *args, *values)

    def _compile(self, device: int, grid: tuple[int, ...], args: tuple, constants: dict) -> Any:
        """A compiled kernel, not yet loaded."""
        with torch.cuda.device(device):
            kernel = self.jit.warmup(*args, grid=grid, **constants)
            # Some releases of Triton compile what passes the arguments, in C. This one is left to Triton's cache of
            # files: they load all of them as modules of one name, and where two threads load at a time, either may get
            # the other's.
            triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)
            return kernel


_ONES = (1, 1, 1)
# What Triton itself asks; a PyTorch without CUDA has neither.
_current_device = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class _Ahead(threading.local):
    """What `compiling_ahead` compiles with, in the thread that it runs in."""

    pool: ThreadPoolExecutor | None = None
    jobs: dict[tuple, tuple[int, Future]] = {}  # of each: the device, and what compiles


_AHEAD = _Ahead()


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """Within it, launches have their kernels compiled for the current device, many at a time, and launch nothing.

    Tensors may be on the device "meta". It ends when all kernels are compiled, because the pool of threads waits for
    them. A kernel that does not compile is left to its first launch, which says so.
    """
    jobs = _AHEAD.jobs = {}
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as _AHEAD.pool:
        try:
            # On an empty cache a C compiler makes what Triton calls the driver with, which takes half a second.
            driver = _AHEAD.pool.submit(lambda: triton.runtime.driver.active)
            # The key of every compiled kernel has a hash of all of Triton, 400 MB. Triton keeps it, but threads that
            # begin together would each compute it, and wait for Python's lock after every megabyte.
            triton.runtime.cache.triton_key()
            with contextlib.suppress(Exception):  # the first launch says why there is none
                driver.result()
            yield
        finally:
            _AHEAD.pool, _AHEAD.jobs = None, {}
    for device, job in jobs.values():
        with contextlib.suppress(Exception), torch.cuda.device(device):
            job.result()[_ONES]  # loads it


def kernel(*runtime: str) -> Callable[[Callable], Kernel]:
    """Make a function in Triton's language a `Kernel`; `runtime` names what changes from call to call."""
    return lambda function: Kernel(function, runtime)
