"""The products of token-routed experts in plain PyTorch, for any dtype, size and device.

T tokens (batch * sequence), E experts, K and N the input and output width of a product.

`grouped_linear` is one operator with a gradient of every order: tokens stand sorted by expert, and each expert
multiplies its own rows. Two kinds of call cannot take an operator of ours and go to `experts_one_by_one` instead:
weights in a quantizer's own tensor class, and transforms of `torch.func`.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .op_registration import custom_op, is_transformed


@custom_op("grouped_linear")
def _grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    bounds = offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            torch.mm(x[start:end], weight[expert].T, out=out[start:end])
    out[bounds[-1] :] = 0
    return out


@_grouped_linear.register_fake
def _(x, weight, offsets):
    return x.new_empty(x.shape[0], weight.shape[1])


@custom_op("grouped_linear_backward")
def _grouped_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; an expert without tokens gets zeros."""
    grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
    bounds = offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            torch.mm(grad[start:end], weight[expert], out=grad_x[start:end])
            torch.mm(grad[start:end].T, x[start:end], out=grad_weight[expert])
    grad_x[bounds[-1] :] = 0
    return grad_x, grad_weight


@_grouped_linear_backward.register_fake
def _(grad, x, weight, offsets):
    return torch.empty_like(x), torch.empty_like(weight)


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grouped_linear_grad(ctx, grad):
    return *_grouped_linear_backward(grad.contiguous(), *ctx.saved_tensors), None


def _grouped_linear_second_grad(ctx, grad_of_grad_x, grad_of_grad_weight):
    """The two gradients are linear in each of grad, x and weight, so the same operators give their gradients."""
    grad, x, weight, offsets = ctx.saved_tensors
    grad_of_grad = _grouped_linear(grad_of_grad_x, weight, offsets) + _grouped_linear(x, grad_of_grad_weight, offsets)
    return grad_of_grad, *_grouped_linear_backward(grad, grad_of_grad_x, grad_of_grad_weight, offsets), None


_grouped_linear.register_autograd(_grouped_linear_grad, setup_context=_save_for_backward)
_grouped_linear_backward.register_autograd(_grouped_linear_second_grad, setup_context=_save_for_backward)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which `weight` is multiplied: that of autocast where it is on, else its own."""
    device = weight.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # "meta" knows no autocast
        return torch.get_autocast_dtype(device)
    return weight.dtype


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """A linear layer whose rows of `x` each use the weight of their own expert.

    Args:
        x: [T, K], rows sorted by expert. weight: [E, N, K]; its dtype, or that of autocast, is used for the product.
        offsets: [E+1] int32; rows offsets[e] .. offsets[e+1]-1 belong to expert e. Rows from offsets[E] on belong to
            no expert on this device (expert parallelism computes them elsewhere) and give zeros.

    Returns: [T, N], differentiable in x and weight any number of times.
    """
    dtype = compute_dtype(weight)
    return _grouped_linear(x.to(dtype), weight.to(dtype), offsets)


def in_token_order(x: Tensor, order: Tensor) -> Tensor:
    """Undo `x[order]`: x [T, ...], order [T]."""
    return torch.empty_like(x).index_copy(0, order.long(), x)


def is_quantized(weight: Tensor) -> bool:
    """Whether the weight is of a quantizer's own tensor class, such as torchao's, which only PyTorch's operators take.

    A `DTensor` is of PyTorch's own and no quantized weight.
    """
    return is_traceable_wrapper_subclass(weight) and type(weight).__module__.split(".")[0] != "torch"


def takes_grouped_linear(*weights: Tensor) -> bool:
    """Whether an operator of ours can multiply these weights here and now."""
    return not is_transformed() and not any(is_quantized(weight) for weight in weights)


def experts_one_by_one(
    x: Tensor, expert_ids: Tensor, gate_up_proj: Tensor, down_proj: Tensor, act_fn: Callable
) -> Tensor:
    """The gated MLP of each token's expert, y[t] = down[e] (act(gate[e] x[t]) * (up[e] x[t])), by PyTorch's operators.

    Args:
        x: [T, H]. expert_ids: [T]; a token whose id is no expert's gives zeros.
        gate_up_proj: [E, 2I, H], gate rows first. down_proj: [E, H, I]; both may be quantized.
        act_fn: the activation; it must give zero for zero.

    Returns: [T, H]; of the dtype of x for quantized weights, else of that of the products.
    """
    if is_transformed():
        return _masked_experts(x, expert_ids, gate_up_proj, down_proj, act_fn)
    out = torch.zeros_like(x)
    for expert in range(down_proj.shape[0]):
        tokens = torch.nonzero(expert_ids == expert).flatten()
        if len(tokens):
            gate, up = F.linear(x[tokens], gate_up_proj[expert]).chunk(2, dim=-1)
            result = F.linear(act_fn(gate) * up, down_proj[expert])
            out = out.index_copy(0, tokens, result.to(out.dtype))
    return out


def _masked_experts(x, expert_ids, gate_up_proj, down_proj, act_fn) -> Tensor:
    """Every expert sees every token, those of other experts as zeros.

    This costs E times the work. In return no shape depends on the values, so that `vmap` can look into it.
    """
    dtype = compute_dtype(gate_up_proj)
    x, gate_up_proj, down_proj = x.to(dtype), gate_up_proj.to(dtype), down_proj.to(dtype)
    out = torch.zeros_like(x)
    for expert in range(down_proj.shape[0]):
        own = torch.where((expert_ids == expert)[:, None], x, 0)
        gate, up = F.linear(own, gate_up_proj[expert]).chunk(2, dim=-1)  # each [T, I]
        out = out + F.linear(act_fn(gate) * up, down_proj[expert])
    return out
