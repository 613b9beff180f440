"""Registration of custom operators. Each copy of this code in a process has a namespace of its own.

Every checkpoint brings its copy of the code. When one name is registered twice, torch frees the first operator, and the
model that was loaded first goes on calling it: it then runs the code of another version, or reads freed memory.
"""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

_COPY = (__package__ or "").removesuffix(".kernels")
NAMESPACE = "complexity_deep" if _COPY == "complexity_deep" else f"complexity_deep_{zlib.crc32(_COPY.encode()):08x}"


def custom_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable:
    """`torch.library.custom_op` of this copy: `name` without a namespace."""
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=mutates_args)


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
    inputs = [None if x is None else x.view_as(x) for x in inputs]
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    pairs = [(y, grad) for y, grad in zip(outputs, grads) if grad is not None and y.requires_grad]
    if not wanted or not pairs:
        return [None] * len(inputs)
    outputs, grads = zip(*pairs)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]
