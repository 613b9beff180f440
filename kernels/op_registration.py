"""Operators of PyTorch made of our functions, and the shortest way to call them.

Each copy of this code in a process has a namespace of its own. Every checkpoint brings its copy. When one name is
registered twice, torch frees the first operator, and the model that was loaded first goes on calling it: it then runs
the code of another version, or reads freed memory.
"""

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_COPY = (__package__ or "").removesuffix(".kernels")
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # what `torch.autograd.grad(is_grads_batched=True)` passes


def _own_library() -> torch.library.Library:
    """The library of this copy. A module that is imported anew under its old name gets a namespace with a number."""
    name = "complexity_deep" if _COPY == "complexity_deep" else f"complexity_deep_{zlib.crc32(_COPY.encode()):08x}"
    for number in range(1000):
        try:
            return torch.library.Library(f"{name}_{number}" if number else name, "DEF")
        except RuntimeError:  # only one library may define a namespace
            continue
    raise RuntimeError(f"The namespace {name} of torch.library is taken a thousand times.")


_LIBRARY = _own_library()
NAMESPACE = _LIBRARY.ns


class Operator:
    """A function that computes on the GPU, as an operator that compilers and transforms can handle.

    PyTorch's dispatcher takes about as long to call an operator written in Python as a kernel takes to be launched. So
    a call in eager mode on ordinary tensors goes to the function directly, or to an `autograd.Function` of it where
    there are gradients to take. All other calls go through the dispatcher: tracing, `torch.func`, tensor subclasses,
    and dispatch modes such as selective checkpointing.
    """

    def __init__(self, name: str, function: Callable, mutates_args: tuple[str, ...]):
        self.name, self.function = f"{NAMESPACE}::{name}", function
        self.autograd: Any = None  # a class of `autograd.Function`, where the operator has a gradient
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates_args))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self.op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args):
        if torch.compiler.is_compiling() or not is_ordinary(args):
            return self.op(*args)
        if self.autograd is not None and torch.is_grad_enabled():
            for x in args:
                if isinstance(x, Tensor) and x.requires_grad:
                    return self.autograd.apply(*args)
        return self.function(*args)

    def register_fake(self, fake: Callable) -> Callable:
        """`fake(*args)` gives outputs of the right shape, dtype and device, with any content."""
        return torch.library.register_fake(self.name, fake, lib=_LIBRARY)

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As `torch.library.register_autograd`; holds for both ways of calling."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=_LIBRARY)
        function = self.function

        class Function(torch.autograd.Function):
            # Not the form with a `setup_context` of its own, for which PyTorch inspects a signature at every call.
            @staticmethod
            def forward(ctx, *args):
                output = function(*args)
                setup_context(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx, *grads):
                return backward(ctx, *grads)

        Function.__name__ = Function.__qualname__ = self.name.replace("::", "_")  # what anomaly mode and graphs show
        self.autograd = Function


def custom_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable], Operator]:
    """Make a function of tensors an `Operator` of this copy, `name` without a namespace."""
    return lambda function: Operator(name, function, mutates_args)


def is_ordinary(args: tuple) -> bool:
    """Whether a call with `args` means no more than to compute: no subclass, mode or transform has a say in it."""
    for x in args:
        if isinstance(x, Tensor) and (type(x) not in PLAIN_TENSORS or x.is_meta or _is_batched(x)):
            return False
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    return not is_transformed()


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode AD is at work, which cannot look into an operator of ours.

    A transform would fail at the operator. Forward mode would pass it without a derivative and without an error.
    """
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def differentiable_gradients(function: Callable, inputs: tuple, grads: tuple) -> list[Tensor | None]:
    """Gradients that can be differentiated again, for a backward under `create_graph=True`.

    Args:
        function: plain PyTorch, from `inputs` to a tensor or a tuple of tensors.
        inputs: tensors or None. grads: gradient of each output, or None.

    Returns: the gradient of each input, None where it needs none.
    """
    # The gradients stop at views of the inputs instead of running on into the graph that the inputs come from.
    views = [None if x is None else x.view_as(x) for x in inputs]
    outputs = function(*views)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    wanted = [x for x in views if x is not None and x.requires_grad]
    pairs = [(y, grad) for y, grad in zip(outputs, grads) if grad is not None and y.requires_grad]
    if not wanted or not pairs:
        return [None] * len(views)
    outputs, grads = zip(*pairs)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in views]
