"""Plain PyTorch twins of every kernel: they define what the Triton kernels compute.

They run in any floating dtype, on any device, without a host synchronisation in the graph, and are what the
model uses wherever Triton is not (`experts_implementation="eager"`, `kernels_implementation="eager"`).

Vocabulary: T tokens (batch * sequence), H hidden size, I width of one expert, E experts, C controller width.

Index arrays of a routing plan
    order    [T]   int32  order[r] = token whose row stands at sorted position r (stable: by expert, then by token)
    offsets  [E+1] int32  rows offsets[e] .. offsets[e+1]-1 of the sorted order belong to expert e
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .op_registration import custom_op

ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu, "relu": F.relu}


def routing_plan_reference(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort tokens by expert: `expert_ids` [T] integers in 0..num_experts-1 -> (`order`, `offsets`), both int32."""
    sorted_ids, order = torch.sort(expert_ids, stable=True)
    bounds = torch.arange(num_experts + 1, device=expert_ids.device, dtype=expert_ids.dtype)
    return order.int(), torch.searchsorted(sorted_ids, bounds, out_int32=True)


@custom_op("grouped_linear")
def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`x` [T, K] in sorted order, `weight` [E, N, K], `offsets` [E+1] -> [T, N]; row r uses its own expert's weight.

    Rows from offsets[E] on belong to no expert here (expert parallelism sends them elsewhere) and give zeros.
    """
    out = x.new_empty(x.shape[0], weight.shape[1])
    bounds = offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            torch.mm(x[start:end], weight[expert].T, out=out[start:end])
    out[bounds[-1] :] = 0
    return out


@grouped_linear.register_fake
def _(x, weight, offsets):
    return x.new_empty(x.shape[0], weight.shape[1])


@custom_op("grouped_linear_backward")
def grouped_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `grouped_linear` with respect to `x` and `weight`; an expert without tokens gets zeros."""
    grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
    bounds = offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            torch.mm(grad[start:end], weight[expert], out=grad_x[start:end])
            torch.mm(grad[start:end].T, x[start:end], out=grad_weight[expert])
    grad_x[bounds[-1] :] = 0
    return grad_x, grad_weight


@grouped_linear_backward.register_fake
def _(grad, x, weight, offsets):
    return torch.empty_like(x), torch.empty_like(weight)


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grouped_linear_grad(ctx, grad):
    return *grouped_linear_backward(grad.contiguous(), *ctx.saved_tensors), None


def _grouped_linear_second_grad(ctx, grad_of_grad_x, grad_of_grad_weight):
    """The two gradients are linear in each of grad, x and weight, so the same operators give their gradients."""
    grad, x, weight, offsets = ctx.saved_tensors
    grad_of_grad = grouped_linear(grad_of_grad_x, weight, offsets) + grouped_linear(x, grad_of_grad_weight, offsets)
    return grad_of_grad, *grouped_linear_backward(grad, grad_of_grad_x, grad_of_grad_weight, offsets), None


grouped_linear.register_autograd(_grouped_linear_grad, setup_context=_save_for_backward)
grouped_linear_backward.register_autograd(_grouped_linear_second_grad, setup_context=_save_for_backward)


def token_routed_mlp_reference(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, order: Tensor, offsets: Tensor, activation: str = "silu"
) -> Tensor:
    """Token-routed gated MLP: y[t] = down[e] (act(gate[e] x[t]) * (up[e] x[t])), e the expert of token t.

    Args:
        x: [T, H]. gate_up_proj: [E, 2I, H], gate rows first. down_proj: [E, H, I]. All of one floating dtype.
        order, offsets: the routing plan of `routing_plan_reference`.
        activation: one of `ACTIVATIONS`.

    Returns: [T, H] in token order.
    """
    return in_token_order(sorted_mlp_reference(x[order], gate_up_proj, down_proj, offsets, activation), order)


def sorted_mlp_reference(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, offsets: Tensor, activation: str
) -> Tensor:
    """`token_routed_mlp_reference` of tokens that are in sorted order already: [T, H] -> [T, H]."""
    gate, up = grouped_linear(x, gate_up_proj, offsets).chunk(2, dim=-1)  # each [T, I]
    return grouped_linear(ACTIVATIONS[activation](gate) * up, down_proj, offsets)


def in_token_order(x: Tensor, order: Tensor) -> Tensor:
    """Undo `x[order]`; `x` [T, ...], `order` [T]."""
    return torch.empty_like(x).index_copy(0, order.long(), x)


def masked_experts_reference(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, expert_ids: Tensor, activation: str = "silu"
) -> Tensor:
    """`token_routed_mlp_reference` by ordinary operations only: every expert sees every token, others' tokens as zeros.

    It costs E times the work, and in return every transform of `torch.func` and forward-mode AD can look into it.

    Args:
        x: [T, H]. gate_up_proj: [E, 2I, H], gate rows first. down_proj: [E, H, I]. All of one floating dtype.
        expert_ids: [T]; a token whose id is no expert's gives zeros. activation: one of `ACTIVATIONS`.

    Returns: [T, H].
    """
    out = torch.zeros_like(x)
    for expert in range(down_proj.shape[0]):
        own = torch.where((expert_ids == expert)[:, None], x, 0)  # every activation gives zero for zero
        gate, up = F.linear(own, gate_up_proj[expert]).chunk(2, dim=-1)  # each [T, I]
        out = out + F.linear(ACTIVATIONS[activation](gate) * up, down_proj[expert])
    return out


def inl_dynamics_block_reference(
    hidden_states: Tensor,
    velocity: Tensor,
    mu_residual: Tensor | None,
    mu: Tensor,
    mu_proj_weight: Tensor,
    controller_in_weight: Tensor,
    controller_in_bias: Tensor,
    controller_out_weight: Tensor,
    controller_out_bias: Tensor,
    dt: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`inl_dynamics_reference` with what comes before it: z = SiLU(W_in [h, v] + b_in) and mu + W_mu h.

    Args:
        hidden_states, velocity, mu_residual: h, v, R (or None), each [..., H].
        mu: [H]. mu_proj_weight: [H, H]. controller_in_weight: [C, 2H], columns for h first. controller_in_bias: [C].
        controller_out_weight: [3H, C]. controller_out_bias: [3H]. dt: step size.

    Returns: (h', v', m, R', mu of this layer), each [..., H].
    """
    h_and_v = torch.cat((hidden_states, velocity), dim=-1)
    controller_hidden = F.silu(F.linear(h_and_v, controller_in_weight, controller_in_bias))  # [..., C]
    mu = mu + F.linear(hidden_states, mu_proj_weight)
    controller_out = controller_out_weight, controller_out_bias
    states = inl_dynamics_reference(hidden_states, velocity, mu_residual, controller_hidden, mu, *controller_out, dt)
    return *states, mu


def inl_dynamics_reference(
    hidden_states: Tensor,
    velocity: Tensor,
    mu_residual: Tensor | None,
    controller_hidden: Tensor,
    mu: Tensor,
    controller_out_weight: Tensor,
    controller_out_bias: Tensor,
    dt: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of the INL dynamics and the mu highway (published v0.13.0, arithmetic in the model's dtype).

    (alpha, beta, gate) = sigmoid, min(softplus, 2), sigmoid of the three H-blocks of W_out z + b_out
    v' = clamp(alpha v - beta (h - mu), -10, 10);  h' = h + dt gate v';  R' = R + mu;  m = mu + 0.1 R'

    Args:
        hidden_states: h [..., H], the attention output. velocity: v [..., H]. mu_residual: R [..., H] or None.
        controller_hidden: z [..., C], after SiLU. mu: [..., H], contextual equilibrium of this layer.
        controller_out_weight: [3H, C]. controller_out_bias: [3H]. dt: step size.

    Returns: (h', v', m, R'), each [..., H].
    """
    alpha, beta, gate = F.linear(controller_hidden, controller_out_weight, controller_out_bias).chunk(3, dim=-1)
    return inl_update_reference(hidden_states, velocity, mu_residual, alpha, beta, gate, mu, dt)


def inl_update_reference(hidden_states, velocity, mu_residual, alpha, beta, gate, mu, dt):
    """The elementwise half of `inl_dynamics_reference`; `alpha`, `beta`, `gate` [..., H] are logits."""
    alpha, gate = torch.sigmoid(alpha), torch.sigmoid(gate)
    beta = torch.clamp(F.softplus(beta), max=2.0)
    velocity = torch.clamp(alpha * velocity - beta * (hidden_states - mu), min=-10.0, max=10.0)
    hidden_states = hidden_states + dt * gate * velocity
    mu_residual = mu if mu_residual is None else mu_residual + mu
    return hidden_states, velocity, mu + 0.1 * mu_residual, mu_residual


def qk_norm_rope_reference(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """RMS norm over the head dimension (where a weight is given), then rotate-half RoPE, of queries and keys.

    Args:
        query: [B, S, A, D]. key: [B, S, K, D]. query_weight, key_weight: [D] or None. cos, sin: [B or 1, S, D].

    Returns: query [B, S, A, D] and key [B, S, K, D], rotated.
    """
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # [B, S, 1, D]

    def one(states: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            states = F.rms_norm(states, weight.shape, weight, eps)
        first, second = states.chunk(2, dim=-1)
        return states * cos + torch.cat((-second, first), dim=-1) * sin

    return one(query, query_weight), one(key, key_weight)


def decode_attention_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one new token per row, each key/value head serving a group of query heads.

    Args:
        query: [B, A, 1, D]. key, value: [B, K, L, D]. mask: bool [B or 1, 1, 1, L] or None. scale: factor of scores.

    Returns: [B, 1, A, D]; zeros for a row that sees nothing.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.mT * scale  # [B, A, 1, L]
    if mask is None:
        return (scores.softmax(-1) @ value).transpose(1, 2)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2)


def decode_qkv_reference(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    m: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mu_q: Tensor | None,
    mu_k: Tensor | None,
    mu_v: Tensor | None,
) -> Tensor:
    """The normed residual stream and the guidance through the six projections.

    Args:
        x: residual stream [T, H]. norm_weight: [H], with its `eps`. m: guidance [T, H] or None (no mu weights then).
        q, k, v, mu_q, mu_k, mu_v: [out, H] each.

    Returns: [T, (A + 2K) D], the columns of q, k and v side by side.
    """
    normed = F.rms_norm(x, norm_weight.shape, norm_weight, eps)
    projected = [F.linear(normed, weight) for weight in (q, k, v)]
    if m is not None:
        projected = [part + F.linear(m, weight) for part, weight in zip(projected, (mu_q, mu_k, mu_v))]
    return torch.cat(projected, dim=-1)


def decode_attend_reference(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    used: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """QK norm and RoPE of one new token per row, its place in a static cache, and attention over the cache.

    Args:
        qkv: [T, (A + 2K) D]. q_weight, k_weight: [D] or None (no norm), with `eps`. cos, sin: [T or 1, 1, D].
        keys, values: [T, K, L, D], used: int64 scalar, the positions in use: all three change in place.
        mask: bool [T or 1, 1, 1, L], True where a position is seen (the new one included), or None. scale: of scores.

    Returns: heads side by side [T, A D].
    """
    T, K, _, D = keys.shape
    heads = qkv.view(T, 1, -1, D)
    query, key, value = heads.split((heads.shape[2] - 2 * K, K, K), dim=2)
    query, key = qk_norm_rope_reference(query, key, q_weight, k_weight, cos, sin, eps)
    keys.index_copy_(2, used.view(1), key.transpose(1, 2))
    values.index_copy_(2, used.view(1), value.transpose(1, 2))
    used.add_(1)
    return decode_attention_reference(query.transpose(1, 2), keys, values, mask, scale).reshape(T, -1)


def decode_layer_tail_reference(
    attention: Tensor,
    x: Tensor,
    v: Tensor,
    r: Tensor | None,
    expert_ids: Tensor,
    o_proj: Tensor,
    mu: Tensor,
    mu_proj: Tensor,
    controller_in: Tensor,
    controller_in_bias: Tensor,
    controller_out: Tensor,
    controller_out_bias: Tensor,
    dt: float,
    norm_weight: Tensor,
    eps: float,
    router: Tensor | None,
    base_logit: float,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: str = "silu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a decoder layer does after attention: output projection, dynamics, residual, norm, routing, experts.

    Args:
        attention: heads side by side [T, A D]. x, v, r: residual stream, velocity, highway (or None), each [T, H].
        expert_ids: [T], before mu's say. o_proj: [H, A D]. mu .. controller_out_bias, dt: as in
        `inl_dynamics_block_reference`. norm_weight: [H], with its `eps`. router: [E, H], or None (mu
        then has no say), with `base_logit`. gate_up_proj: [E, 2I, H]. down_proj: [E, H, I].

    Returns: (x'', v', m, R'), each [T, H].
    """
    h = F.linear(attention, o_proj)
    weights = mu, mu_proj, controller_in, controller_in_bias, controller_out, controller_out_bias
    h, v, m, r, mu = inl_dynamics_block_reference(h, v, r, *weights, dt)
    x = x + h
    normed = F.rms_norm(x, norm_weight.shape, norm_weight, eps)
    if router is not None:
        logits = F.linear(mu, router)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        expert_ids = (base_logit * F.one_hot(expert_ids.long(), len(router)) + logits).argmax(dim=-1)
    plan = routing_plan_reference(expert_ids, len(down_proj))
    return x + token_routed_mlp_reference(normed, gate_up_proj, down_proj, *plan, activation), v, m, r
