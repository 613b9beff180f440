"""What the kernels of a decode step compute, in plain PyTorch. No model at work runs these functions.

T tokens, one for each row of the batch. H hidden size, A query heads, K key/value heads, D head dim, E experts, I width
of one expert, L positions in the cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from complexity_deep.kernels.kernel_reference import (
    inl_dynamics_block_reference,
    qk_norm_rope_reference,
    routing_plan_reference,
    token_routed_mlp_reference,
)


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
    guidance: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mu_q: Tensor | None,
    mu_k: Tensor | None,
    mu_v: Tensor | None,
    ids: Tensor | None = None,
    value_gate: Tensor | None = None,
    value_embedding: Tensor | None = None,
) -> Tensor:
    """The normed residual stream and the guidance through the six projections, with value embeddings.

    Args:
        x: residual stream [T, H]. norm_weight: [H], with its `eps`. guidance: [T, H] or None.
        q, k, v, mu_q, mu_k, mu_v: [out, H] each; without guidance the last three are None.
        ids: token ids [T], value_gate: [K, H], value_embedding: [V, K D], or None, all three.

    Returns: [T, (A + 2K) D], the columns of q, k and v side by side.
    """
    normed = F.rms_norm(x, norm_weight.shape, norm_weight, eps)
    projected = [F.linear(normed, weight) for weight in (q, k, v)]
    if guidance is not None:
        projected = [part + F.linear(guidance, weight) for part, weight in zip(projected, (mu_q, mu_k, mu_v))]
    if value_gate is not None:
        gate = 2 * torch.sigmoid(F.linear(normed if guidance is None else guidance, value_gate))  # [T, K]
        embedded = F.embedding(ids, value_embedding).unflatten(-1, (len(value_gate), -1))
        projected[2] = projected[2] + (gate[..., None] * embedded).flatten(1)
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
    velocity: Tensor,
    highway: Tensor | None,
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
    *shared: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a decoder layer does after attention: output projection, dynamics, residual, norm, routing, experts.

    Args:
        attention: heads side by side [T, A D]. x: residual stream [T, H]. velocity: [T, H]. highway: [T, H] or None.
        expert_ids: [T], those of the routing table. o_proj: [H, A D].
        mu, mu_proj, controller_in .. controller_out_bias, dt: as in `inl_dynamics_block_reference`.
        norm_weight: [H], with its `eps`. router: [E, H], with `base_logit`; None where mu overrides no expert.
        gate_up_proj: [E, 2I, H]. down_proj: [E, H, I]. shared: gate and up [S, H] and down [H, S] of a shared expert.

    Returns: (x'', velocity', guidance for the layer above, highway'), each [T, H].
    """
    h = F.linear(attention, o_proj)
    weights = mu, mu_proj, controller_in, controller_in_bias, controller_out, controller_out_bias
    h, velocity, guidance, highway, mu = inl_dynamics_block_reference(h, velocity, highway, *weights, dt)
    x = x + h
    normed = F.rms_norm(x, norm_weight.shape, norm_weight, eps)
    if router is not None:
        logits = F.linear(mu, router)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        expert_ids = (base_logit * F.one_hot(expert_ids.long(), len(router)) + logits).argmax(dim=-1)
    x = x + mlp_reference(normed, expert_ids, gate_up_proj, down_proj, activation, *shared)
    return x, velocity, guidance, highway


def decode_plain_tail_reference(
    attention: Tensor,
    x: Tensor,
    expert_ids: Tensor,
    o_proj: Tensor,
    norm_weight: Tensor,
    eps: float,
    *weights,
) -> Tensor:
    """What a layer without mu and dynamics does after attention: x'' [T, H]; arguments as above."""
    x = x + F.linear(attention, o_proj)
    return x + mlp_reference(F.rms_norm(x, norm_weight.shape, norm_weight, eps), expert_ids, *weights)


def mlp_reference(
    normed: Tensor,
    expert_ids: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: str,
    shared_gate: Tensor | None = None,
    shared_up: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> Tensor:
    """normed [T, H] through the expert of each token, and the shared one where there is one: [T, H]."""
    plan = routing_plan_reference(expert_ids, len(down_proj))
    out = token_routed_mlp_reference(normed, gate_up_proj, down_proj, *plan, activation)
    if shared_down is None:
        return out
    gate, up = F.linear(normed, shared_gate), F.linear(normed, shared_up)
    return out + F.linear(ACT2FN[activation](gate) * up, shared_down)
