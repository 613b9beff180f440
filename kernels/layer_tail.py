"""What a decoder layer does after attention as one autograd node: dynamics, residual, norm, routing, experts, residual.

    h', v', m, r', mu_l = dynamics(h, v, r)                  fused_dynamics.py; h is the output of attention
    x' = x + h';  n = RMSNorm(x')                            add_norm_kernel, which keeps 1 / rms
    e  = argmax(base_logit onehot(expert) + mu_l W_routerᵀ)  routing_plan.py
    y  = x' + MLP_e(n)                                       token_routed_gemm.py

In eager mode a module, an operator and a node of autograd each cost the host about as much as a launch. A compiler has
none of these costs, and fuses the small operations itself, so that this path is for eager mode alone.

B batch, S sequence, T = B S tokens, H hidden size. The residual stream x may have another dtype than the rest.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton.language as tl
except ImportError:  # the guard lets a checkpoint that ships this file load where there is no Triton
    raise

from .fused_dynamics import _inl_dynamics_block, _inl_dynamics_block_backward
from .kernel_launch import kernel, next_power_of_2, on_its_device
from .kernel_reference import inl_dynamics_block_reference, token_routed_mlp_reference
from .op_registration import custom_op, differentiable_gradients
from .routing_plan import mu_route, routing_plan
from .token_routed_gemm import token_routed_mlp_backward, token_routed_mlp_forward

MAX_HIDDEN = 16384  # a row must fit in registers
BACKWARD_PROGRAMS = 528  # each sums the weight's gradient over its tokens; fixed, so that results repeat on any device


@kernel()
def add_norm_kernel(
    x_ptr, h_ptr, weight_ptr, sum_ptr, normed_ptr, rstd_ptr, H, eps, BH: tl.constexpr
):  # fmt: skip
    """sum = x + h, normed = RMSNorm(sum) [T, H], rstd [T]; one token in each program."""
    token, o_h = tl.program_id(0).to(tl.int64), tl.arange(0, BH)
    mask, at = o_h < H, token * H + o_h
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x = (x + tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + at, x, mask=mask)
    x = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / H + eps)
    tl.store(rstd_ptr + token, rstd)
    weight = tl.load(weight_ptr + o_h, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed_ptr + at, (x * rstd * weight).to(normed_ptr.dtype.element_ty), mask=mask)


@kernel("T")
def add_norm_bwd_kernel(
    dnormed_ptr, dsum_ptr, sum_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_ptr, T, H, BH: tl.constexpr
):  # fmt: skip
    """dx [T, H], of x and of h alike, and dweight [programs, H]; dsum is what reaches the sum by another way."""
    o_h = tl.arange(0, BH)
    mask = o_h < H
    weight = tl.load(weight_ptr + o_h, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([BH], tl.float32)
    first = tl.program_id(0)
    for offset in range(0, T - first, tl.num_programs(0)):
        token = first.to(tl.int64) + offset
        at = token * H + o_h
        rstd = tl.load(rstd_ptr + token)
        x = tl.load(sum_ptr + at, mask=mask, other=0.0).to(tl.float32) * rstd
        grad = tl.load(dnormed_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dweight += grad * x
        grad *= weight
        grad = rstd * (grad - x * (tl.sum(grad * x, 0) / H))
        grad += tl.load(dsum_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, grad.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + tl.program_id(0) * H + o_h, dweight, mask=mask)


def _tile(hidden: int) -> dict:
    BH = next_power_of_2(hidden)
    return {"BH": BH, "num_warps": 4 if BH <= 2048 else 8}


def _add_norm(x: Tensor, h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x + h in the dtype of x, its norm in that of h, 1 / rms [T])."""
    H = x.shape[-1]
    T = x.numel() // H
    total, normed = torch.empty_like(x), torch.empty_like(h)
    rstd = torch.empty(T, dtype=torch.float32, device=x.device)
    add_norm_kernel.launch((T,), x, h, weight, total, normed, rstd, H, eps, **_tile(H))
    return total, normed, rstd


@custom_op("add_norm_backward")
@on_its_device
def _add_norm_backward(
    dnormed: Tensor, dsum: Tensor, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x + h, and so of each, and of the norm's weight."""
    T, H = rstd.shape[0], total.shape[-1]
    programs = min(T, BACKWARD_PROGRAMS)
    dx, dweight = torch.empty_like(total), torch.empty(programs, H, dtype=torch.float32, device=total.device)
    add_norm_bwd_kernel.launch((programs,), dnormed, dsum, total, weight, rstd, dx, dweight, T, H, **_tile(H))
    return dx, dweight.sum(0).to(weight.dtype)


@_add_norm_backward.register_fake
def _(dnormed, dsum, total, weight, rstd):
    return torch.empty_like(total), torch.empty_like(weight)


def _forward(x, h, velocity, highway, weights, norm_weight, experts, router, expert_ids, plan, settings, keep):
    """(y, v', guidance, highway'), and what backward needs."""
    dt, eps, base_logit, activation = settings
    h, velocity, guidance, highway, mu, z_pre, z = _inl_dynamics_block.function(h, velocity, highway, *weights, dt)
    total, normed, rstd = _add_norm(x, h, norm_weight, eps)
    if router is not None:
        expert_ids = mu_route.function(mu.view(-1, mu.shape[-1]), router, expert_ids, base_logit)
    if plan is None:
        plan = routing_plan.function(expert_ids, experts[1].shape[0])
    out, x_sorted, gate_up = token_routed_mlp_forward.function(normed, *experts, *plan, activation, keep)
    return (total + out, velocity, guidance, highway), (mu, z_pre, z, total, rstd, x_sorted, gate_up, *plan)


class _LayerTail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, velocity, highway, *rest):
        weights, norm_weight, experts = rest[:6], rest[6], rest[7:9]
        router, expert_ids, plan, ctx.settings = rest[9:]
        arguments = x, h, velocity, highway, weights, norm_weight, experts, router, expert_ids, plan, ctx.settings
        outputs, kept = _forward(*arguments, True)
        ctx.has_highway = highway is not None
        ctx.save_for_backward(x, h, velocity, *kept, *weights, norm_weight, *experts)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, dy, dvelocity, dguidance, dhighway):
        x, h, velocity, mu, z_pre, z, total, rstd, x_sorted, gate_up, order, offsets, *weights = ctx.saved_tensors
        dynamics, norm_weight, experts = weights[:6], weights[6], weights[7:]
        dt, _, _, activation = ctx.settings
        if dy is None:
            dy = torch.zeros_like(x)
        if torch.is_grad_enabled():
            grads = dy, dvelocity, dguidance, dhighway
            return *_second_order(ctx, x, h, velocity, weights, order, offsets, grads), None, None, None, None
        dy, needs = dy.contiguous(), ctx.needs_input_grad
        dnormed, dgate_up, ddown = token_routed_mlp_backward(
            dy.to(h.dtype), x_sorted, gate_up, *experts, order, offsets, activation, True, *needs[11:13]
        )
        dx, dnorm = _add_norm_backward(dnormed, dy, total, norm_weight, rstd)
        above = dx.to(h.dtype), dvelocity, dguidance, dhighway, None
        saved = h, velocity, mu, z_pre, z, *dynamics[1:3], *dynamics[4:]
        dh, dv, dr, *dweights = _inl_dynamics_block_backward(*above, *saved, dt, ctx.has_highway)
        dexperts = [grad if need else None for grad, need in zip((dgate_up, ddown), needs[11:13])]
        return dx, dh, dv, dr if ctx.has_highway else None, *dweights, dnorm, *dexperts, None, None, None, None


def _second_order(ctx, x, h, velocity, weights, order, offsets, grads) -> list[Tensor | None]:
    dt, eps, _, activation = ctx.settings

    def plain(x, h, velocity, highway, *weights):
        *dynamics, norm_weight, gate_up, down = weights
        states = inl_dynamics_block_reference(h, velocity, highway, *dynamics, dt)  # type: ignore[call-arg]
        h, velocity, guidance, highway, _ = states
        x = x + h
        normed = F.rms_norm(x, norm_weight.shape, norm_weight.to(x.dtype), eps).to(h.dtype)
        out = token_routed_mlp_reference(normed.flatten(0, -2), gate_up, down, order, offsets, activation)
        return x + out.view_as(x), velocity, guidance, highway

    # The highway is not saved. Everything is linear in it, so that zeros in its place give the same gradients.
    highway = torch.zeros_like(h, requires_grad=True) if ctx.has_highway else None
    return differentiable_gradients(plain, (x, h, velocity, highway, *weights), grads)


@on_its_device
def layer_tail(
    x: Tensor,
    h: Tensor,
    velocity: Tensor,
    highway: Tensor | None,
    dynamics: tuple[Tensor, ...],
    norm_weight: Tensor,
    experts: tuple[Tensor, Tensor],
    router: Tensor | None,
    expert_ids: Tensor,
    plan: tuple[Tensor, Tensor] | None,
    settings: tuple[float, float, float, str],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A decoder layer after attention.

    Args:
        x: residual stream [B, S, H], before attention. h: output of attention, velocity, highway or None: [B, S, H].
        dynamics: mu, its projection and the controller, as `inl_dynamics_block` takes them.
        norm_weight: [H]. experts: gate_up_proj [E, 2I, H], down_proj [E, H, I].
        router: [E, H], or None where mu overrides no expert. expert_ids: [T] integers, those of the routing table.
        plan: order [T] and offsets [E+1] of the tokens by expert, or None to sort them here; None with a router.
        settings: step size dt, eps of the norm, base logit of the router, activation.

        h, velocity, highway, dynamics, experts and router are of one dtype. All tensors are contiguous.

    Returns: (y in the dtype of x, velocity', guidance of the layer above, highway'), each [B, S, H].
    """
    tensors = x, h, velocity, highway, *dynamics, norm_weight, *experts
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in tensors):
        return _LayerTail.apply(*tensors, router, expert_ids, plan, settings)
    arguments = dynamics, norm_weight, experts, router, expert_ids, plan, settings
    return _forward(x, h, velocity, highway, *arguments, False)[0]
