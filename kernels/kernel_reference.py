"""What each kernel computes, in plain PyTorch: the specification that tests compare the Triton kernels with.

The functions run in any floating dtype and on any device. A model at work uses them too: `routing_plan_reference` sorts
tokens where Triton is not, and the others are differentiated where a second derivative is asked for.

Vocabulary: T tokens (batch * sequence), H hidden size, I width of one expert, E experts, C controller width.

Index arrays of a routing plan
    order    [T]   int32  order[r] = token whose row stands at sorted position r (stable: by expert, then by token)
    offsets  [E+1] int32  rows offsets[e] .. offsets[e+1]-1 of the sorted order belong to expert e
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .grouped_linear import grouped_linear, in_token_order

ACTIVATIONS: dict[str, Callable] = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu, "relu": F.relu}
VELOCITY_LIMIT = 10.0  # the velocity of the dynamics stays within plus and minus this
BETA_LIMIT = 2.0  # the largest pull of the dynamics towards mu
HIGHWAY_SHARE = 0.1  # how much of the highway, the sum of mu over the layers, the guidance of the next layer holds


def routing_plan_reference(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort tokens by expert: `expert_ids` [T] integers -> (`order`, `offsets`), both int32.

    Ids of num_experts and above, which belong to no expert on this device, come last and within no offsets.
    """
    sorted_ids, order = torch.sort(expert_ids, stable=True)
    bounds = torch.arange(num_experts + 1, device=expert_ids.device, dtype=expert_ids.dtype)
    return order.int(), torch.searchsorted(sorted_ids, bounds, out_int32=True)


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


def inl_dynamics_block_reference(
    hidden_states: Tensor,
    velocity: Tensor,
    highway: Tensor | None,
    mu: Tensor,
    mu_proj_weight: Tensor,
    controller_in_weight: Tensor,
    controller_in_bias: Tensor,
    controller_out_weight: Tensor,
    controller_out_bias: Tensor,
    dt: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of the INL dynamics and the mu highway (published v0.13.0, arithmetic in the model's dtype).

    mu_l = mu + W_mu h;  z = SiLU(W_in [h, v] + b_in)
    (alpha, beta, gate) = sigmoid, min(softplus, 2), sigmoid of the three H-blocks of W_out z + b_out
    v' = clamp(alpha v - beta (h - mu_l), -10, 10);  h' = h + dt gate v'
    highway' = highway + mu_l;  guidance = mu_l + 0.1 highway'

    Args:
        hidden_states: h [..., H], the attention output. velocity: v [..., H]. highway: [..., H], or None for zero.
        mu: [H]. mu_proj_weight: [H, H]. controller_in_weight: [C, 2H], columns for h first. controller_in_bias: [C].
        controller_out_weight: [3H, C]. controller_out_bias: [3H]. dt: step size.

    Returns: (h', v', guidance for the layer above, highway', mu_l of this layer), each [..., H].
    """
    h_and_v = torch.cat((hidden_states, velocity), dim=-1)
    z = F.silu(F.linear(h_and_v, controller_in_weight, controller_in_bias))  # [..., C]
    mu = mu + F.linear(hidden_states, mu_proj_weight)
    alpha, beta, gate = F.linear(z, controller_out_weight, controller_out_bias).chunk(3, dim=-1)
    alpha, gate = torch.sigmoid(alpha), torch.sigmoid(gate)
    beta = torch.clamp(F.softplus(beta), max=BETA_LIMIT)
    velocity = alpha * velocity - beta * (hidden_states - mu)
    velocity = torch.clamp(velocity, min=-VELOCITY_LIMIT, max=VELOCITY_LIMIT)
    hidden_states = hidden_states + dt * gate * velocity
    highway = mu if highway is None else highway + mu
    return hidden_states, velocity, mu + HIGHWAY_SHARE * highway, highway, mu


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
