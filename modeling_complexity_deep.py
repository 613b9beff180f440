"""Complexity-Deep (v0.13.0): a decoder with token-routed experts, mu-guided attention and INL dynamics.

Four states pass from layer to layer: the residual stream x, the velocity v (zero before layer 0), and from the layer
below its guidance m and the highway R (none before layer 0). A layer computes, with n = RMSNorm(x):

    q, k, v'  = n W + m W_mu                    then RMS norm over the head and RoPE for q and k
    h         = Attention(q, k, v') W_o
    mu        = mu_0 + h W_mu_proj              the equilibrium of this layer, which depends on the context
    alpha, beta, gate = sigmoid, min(softplus, 2), sigmoid of W_out SiLU(W_in [h, v] + b_in) + b_out
    v         = clamp(alpha v - beta (h - mu), -10, 10)
    x         = x + h + dt gate v
    R         = R + mu;  m = mu + 0.1 R         the highway, and the guidance of the layer above
    expert    = argmax(10 onehot(token_to_expert[id]) + mu W_router)
    x         = x + SwiGLU_expert(RMSNorm(x))

INL is the name that the preprint gives these dynamics. v, mu, R and m are states of one position and restart at layer
0, so decoding carries no more than a key/value cache.

All of the mathematics stands here, in plain PyTorch, in the order of the layer. Methods marked `@accelerated(name)`
have a fast path in accelerated_complexity_deep.py that computes the same.

Shapes: B batch, S sequence, T = B * S tokens, H hidden size, A query heads, K key/value heads, D head dim,
C controller width, E experts, I width of one expert, V token ids.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .accelerated_complexity_deep import KernelsMixin, accelerated
from .checkpoint_complexity_deep import CheckpointMixin, nearly_zero, to_model_names, trains_mu
from .compatibility_complexity_deep import (
    CACHE_NAME,
    accepts_both_cache_names,
    causal_mask,
    check_unknown_arguments,
    select_positions,
    split_like_values,
    update_cache,
)
from .configuration_complexity_deep import ComplexityDeepConfig
from .continuous_batching_complexity_deep import ContinuousBatchingMixin
from .kernels.grouped_linear import experts_one_by_one, grouped_linear, in_token_order, takes_grouped_linear
from .kernels.kernel_reference import BETA_LIMIT, HIGHWAY_SHARE, VELOCITY_LIMIT, routing_plan_reference
from .registration_complexity_deep import register_classes
from .routing_complexity_deep import RoutingPlan, TokenRoutingMixin, VocabularyMixin, new_routing_table
from .speculation_complexity_deep import SpeculationMixin
from .training_graph_complexity_deep import without_cache_in_training


@dataclass
class ComplexityDeepModelOutputWithPast(BaseModelOutputWithPast):
    """Base model output; the last four fields come with `output_router_logits`, `output_expert_ids` and so on.

    router_logits: per layer [T, E], the scores that mu routing takes the argmax of. expert_ids: per layer [B, S] int64.
    velocities, mus: per layer [B, S, H], the velocity after that layer and the mu of that layer.
    """

    router_logits: tuple[Tensor, ...] | None = None
    expert_ids: tuple[Tensor, ...] | None = None
    velocities: tuple[Tensor, ...] | None = None
    mus: tuple[Tensor, ...] | None = None


@dataclass
class ComplexityDeepCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Language-model output; the last four fields are those of `ComplexityDeepModelOutputWithPast`."""

    router_logits: tuple[Tensor, ...] | None = None
    expert_ids: tuple[Tensor, ...] | None = None
    velocities: tuple[Tensor, ...] | None = None
    mus: tuple[Tensor, ...] | None = None


class ComplexityDeepRMSNorm(nn.Module):
    """RMSNorm in at least fp32 (fp64 stays fp64), rounded once at the end; the published code rounds at every step."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype == self.weight.dtype:
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)
        # Under autocast the two dtypes differ. PyTorch would compute the same, but warn that it has no kernel for it.
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        normed = F.rms_norm(hidden_states.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)
        return normed.to(hidden_states.dtype)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class ComplexityDeepFrozenWeights(nn.Module):
    """Matrices [out, in] that no gradient can reach (published checkpoints hold some): saved and loaded, never trained.

    They are buffers, so that they stay out of the optimizer and of DDP's wait for gradients, also after
    `from_pretrained`, which turns `requires_grad` on for every parameter. They are no modules, because adapters and
    quantizers look for linear modules by type and by name, and would adapt or convert what never takes part.
    """

    def __init__(self, **shapes: tuple[int, int]):
        super().__init__()
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def forward(self, name: str, input: Tensor) -> Tensor:
        """The matrix `name` applied to `input` [..., in]: [..., out]."""
        # Cast, because FSDP2's mixed precision leaves buffers as they are.
        return F.linear(input, getattr(self, name).to(input.dtype))


class ComplexityDeepRotaryEmbedding(nn.Module):
    """RoPE tables (cos, sin) [B, S, D], always built in fp32 from the config and then cast, never from a file."""

    inv_freq: Tensor

    def __init__(self, config: ComplexityDeepConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]  # type: ignore[index]
        inv_freq, self.attention_scaling = self._rope_init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _rope_init(self, config, device=None):
        if self.rope_type == "default":
            return self.compute_default_rope_parameters(config, device)
        return ROPE_INIT_FUNCTIONS[self.rope_type](config, device)

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **kwargs) -> tuple[Tensor, float]:
        """Inverse frequencies theta^(-2j/D) [D/2] in fp32, and the attention scaling (none)."""
        dim = config.hidden_size // config.num_attention_heads
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponent, 1.0

    def _apply(self, fn, recurse=True):
        has_values = not self.inv_freq.is_meta
        super()._apply(fn, recurse)
        # `.half()` and its like would round the frequencies, which moves every far position; `to_empty` has none.
        if not (has_values and self.inv_freq.dtype == torch.float32) and not self.inv_freq.is_meta:
            self.inv_freq, self.attention_scaling = self._rope_init(self.config, self.inv_freq.device)
            self.original_inv_freq, self.max_seq_len_cached = self.inv_freq.clone(), self.original_max_seq_len
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        # Positions come from where the ids are, which under a device map need not be the device of `x`.
        angles = position_ids.to(x.device)[..., None].float() * self.inv_freq.to(x.device).float()  # [B, S, D/2]
        angles = torch.cat((angles, angles), dim=-1)  # [B, S, D]
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [B, S, heads, D] by the tables [B or 1, S, D]; the two halves of a head are the coordinates."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # [B or 1, S, 1, D]
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def repeat_kv(hidden_states: Tensor, n_rep: int) -> Tensor:
    """[B, K, S, D] -> [B, K * n_rep, S, D]; kv head g serves the query heads g * n_rep .. (g + 1) * n_rep - 1."""
    return hidden_states if n_rep == 1 else hidden_states.repeat_interleave(n_rep, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    key, value = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling  # [B, A, S, S_kv]
    if attention_mask is not None:
        scores = scores + attention_mask
    # At least fp32, but an fp64 model keeps fp64.
    probabilities = F.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    probabilities = F.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), probabilities  # [B, S, A, D]


class ComplexityDeepAttention(nn.Module):
    """Grouped-query attention whose queries, keys and values are biased by the guidance of the layer below."""

    def __init__(self, config: ComplexityDeepConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.sliding_window = config.sliding_window
        self.is_causal = True

        hidden, kv = config.hidden_size, config.num_key_value_heads * self.head_dim
        self.k_proj = nn.Linear(hidden, kv, bias=False)
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, kv, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj.writes_residual = True  # see scaled_residual_init
        if config.use_mu_guidance:
            if layer_idx == 0:  # there is no layer below; published checkpoints hold its guidance weights all the same
                shapes = {"mu_to_k": (kv, hidden), "mu_to_q": (hidden, hidden), "mu_to_v": (kv, hidden)}
                self.frozen = ComplexityDeepFrozenWeights(**shapes)
            else:
                self.mu_to_k = nn.Linear(hidden, kv, bias=False)
                self.mu_to_q = nn.Linear(hidden, hidden, bias=False)
                self.mu_to_v = nn.Linear(hidden, kv, bias=False)
        self.q_norm = ComplexityDeepRMSNorm(self.head_dim, config.qk_norm_eps) if config.use_qk_norm else None
        self.k_norm = ComplexityDeepRMSNorm(self.head_dim, config.qk_norm_eps) if config.use_qk_norm else None
        self.value_embedding = None
        if layer_idx in (config.value_embedding_layers or ()):
            self.value_embedding = nn.Embedding(config.vocab_size, kv)
            self.value_gate = nn.Linear(hidden, config.num_key_value_heads, bias=False)
            self.value_gate.starts_at_zero = True  # 2 sigmoid(0) = 1: every gate starts open

    @accelerated("attention")
    def forward(
        self,
        hidden_states: Tensor,
        guidance: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        token_ids: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states, guidance [B, S, H], (cos, sin) [B or 1, S, D] -> (output [B, S, H], attention weights)."""
        query, key, value = self.heads(hidden_states, guidance, position_embeddings, token_ids)
        if cache is not None:
            key, value = update_cache(cache, key, value, self, kwargs)
        # vLLM reads the source of this method. It wants one such look-up in it, and one call of what was looked up.
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        attn_output = attn_output.reshape(*hidden_states.shape[:2], -1).contiguous()  # [B, S, A * D]
        return self.o_proj(attn_output), attn_weights

    def heads(self, hidden_states, guidance, position_embeddings, token_ids=None) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, A, S, D], key and value [B, K, S, D], with value embeddings where the layer has them."""
        query, key, value = self.project(hidden_states, guidance, *position_embeddings)
        if self.value_embedding is not None:
            embedded = self.embedded_values(hidden_states if guidance is None else guidance, token_ids)
            value = value + split_like_values(embedded, value)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    @accelerated("projections")
    def project(
        self, hidden_states: Tensor, guidance: Tensor | None, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projections with guidance, QK norm and RoPE: query [B, S, A, D], key and value [B, S, K, D]."""
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if guidance is not None:
            query = query + self.mu_to_q(guidance)
            key = key + self.mu_to_k(guidance)
            value = value + self.mu_to_v(guidance)
        query, key, value = (states.unflatten(-1, (-1, self.head_dim)) for states in (query, key, value))
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)  # type: ignore[misc]
        return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value

    def embedded_values(self, gated_by: Tensor, token_ids: Tensor) -> Tensor:
        """What the token ids [B, S] themselves add to the values, [B, S, K, D]: a vector per id and a gate per head."""
        gate = 2 * torch.sigmoid(self.value_gate(gated_by))  # [B, S, K]
        embedded = self.value_embedding(token_ids)  # type: ignore[misc]
        return gate[..., None] * embedded.unflatten(-1, (-1, self.head_dim))


class ComplexityDeepDynamics(nn.Module):
    """INL dynamics: a learned equilibrium mu, and a damped velocity that pulls the attention output towards it."""

    def __init__(self, config: ComplexityDeepConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.dt = config.dynamics_dt
        hidden, controller = config.hidden_size, config.dynamics_controller_hidden
        if trains_mu(config, layer_idx):
            self.mu = nn.Parameter(torch.zeros(hidden))
            self.mu_proj = nn.Linear(hidden, hidden, bias=False)
            self.mu_proj.starts_at_zero = True
        else:
            self.register_buffer("mu", torch.zeros(hidden))
            self.frozen = ComplexityDeepFrozenWeights(mu_proj=(hidden, hidden))
        if config.use_dynamics:
            self.controller_in = nn.Linear(2 * hidden, controller)
            self.controller_out = nn.Linear(controller, 3 * hidden)
            self.controller_out.starts_at_zero = True

    @accelerated("dynamics")
    def forward(self, hidden_states: Tensor, velocity: Tensor, highway: Tensor | None) -> tuple[Tensor, ...]:
        """The attention output, velocity and highway -> (output, velocity, mu, guidance, highway), each [B, S, H]."""
        projected = self.mu_proj(hidden_states) if hasattr(self, "mu_proj") else self.frozen("mu_proj", hidden_states)
        mu = self.mu + projected
        if self.config.use_dynamics:
            hidden_states, velocity = self.pull(hidden_states, velocity, mu)
        highway = mu if highway is None else highway + mu
        guidance = mu + HIGHWAY_SHARE * highway
        return hidden_states, velocity, mu, guidance, highway

    def pull(self, hidden_states: Tensor, velocity: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        """One step towards mu: (hidden_states, velocity), each [B, S, H]."""
        # Cast, because autocast to fp16 in a bf16 model makes both dtypes, which PyTorch does not concatenate.
        states = torch.cat((hidden_states, velocity.to(hidden_states.dtype)), dim=-1)
        controller_hidden = F.silu(self.controller_in(states))  # [B, S, C]
        alpha, beta, gate = self.controller_out(controller_hidden).chunk(3, dim=-1)  # each [B, S, H]
        alpha, gate, beta = torch.sigmoid(alpha), torch.sigmoid(gate), torch.clamp(F.softplus(beta), max=BETA_LIMIT)
        velocity = torch.clamp(alpha * velocity - beta * (hidden_states - mu), -VELOCITY_LIMIT, VELOCITY_LIMIT)
        return hidden_states + self.dt * gate * velocity, velocity


class ComplexityDeepRoutingTable(nn.Module):
    """The expert that each token id selects: `token_to_expert` [V] int64, or [L, V] with a table for each layer.

    A module of its own, because accelerate gives a device to modules and parameters, not to buffers beside them.
    """

    def __init__(self, config: ComplexityDeepConfig):
        super().__init__()
        self.register_buffer("token_to_expert", new_routing_table(config))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, S] -> experts [B, S], or [L, B, S], int64."""
        return self.token_to_expert[..., ids]


class ComplexityDeepMuRouter(nn.Module):
    """Lets mu override the expert that the token id selects: argmax of base_logit * onehot(expert) + mu W^T.

    The argmax passes no gradient, so the weight is a buffer, unless `mu_router_gradient` gives it a straight-through
    gradient. Ties go to the lowest expert.
    """

    def __init__(self, config: ComplexityDeepConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.base_logit = config.mu_router_base_logit
        self.learns = config.mu_router_gradient
        weight = torch.zeros(config.num_experts, config.hidden_size)
        if self.learns:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    def forward(self, mu: Tensor, expert_ids: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """mu [T, H], expert_ids [T] -> (scores [T, E], weights [T] that are ones, or None, expert ids [T])."""
        # Cast, because FSDP2's mixed precision leaves buffers as they are.
        logits = F.linear(mu, self.weight.to(mu.dtype))  # [T, E]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Not F.one_hot, which looks at the values and so does not run under vmap(grad).
        is_expert = expert_ids[:, None] == torch.arange(self.num_experts, device=expert_ids.device)
        scores = self.base_logit * is_expert.to(logits.dtype) + logits
        expert_ids = scores.argmax(dim=-1)
        if not self.learns:
            return scores, None, expert_ids
        chosen = scores.softmax(dim=-1).gather(-1, expert_ids[:, None]).squeeze(-1)
        return scores, 1.0 + (chosen - chosen.detach()), expert_ids  # ones, exactly: the forward stays bit-identical


@use_experts_implementation
class ComplexityDeepExperts(nn.Module):
    r"""Experts as 3D weights: gate_up_proj [E, 2I, H] (gate rows first), down_proj [E, H, I].

    The forward below is `experts_implementation="eager"`: any dtype, size and device. "cggr" (Contiguous Group GEMM
    Routing) runs the Triton kernels. "batched_mm" and "grouped_mm" are the library's own. Quantizers that look for
    linear layers leave these weights as they are. torchao takes them by name, and then both of our implementations
    multiply one expert at a time by PyTorch's operators:

        int8 = Int8WeightOnlyConfig(version=2)
        linear = r"re:.*(_proj|mu_to_[qkv]|controller_in|controller_out)\.weight"
        experts = r"re:.*\.experts\.(gate_up|down)_proj"
        quantization_config = TorchAoConfig(FqnToConfig({linear: int8, experts: int8}))

    The rest stays in the model's dtype: embedding and head, norms, biases, mu, the mu router, layer 0's guidance.
    """

    def __init__(self, config: ComplexityDeepConfig):
        super().__init__()
        self.num_experts = config.num_experts
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        routing_plan: RoutingPlan | None = None,
    ) -> Tensor:
        """hidden_states [T, H], expert of each token top_k_index [T, 1], its weight top_k_weights [T, 1] -> [T, H].

        A token whose expert lies on another rank has the id num_experts and gives zeros.
        """
        expert_ids = top_k_index.flatten()  # [T]
        if takes_grouped_linear(self.gate_up_proj, self.down_proj):
            order, offsets = routing_plan or routing_plan_reference(expert_ids, self.num_experts)
            states = hidden_states[order]  # [T, H], sorted by expert
            gate, up = grouped_linear(states, self.gate_up_proj, offsets).chunk(2, dim=-1)  # each [T, I]
            states = grouped_linear(self.act_fn(gate) * up, self.down_proj, offsets)  # [T, H]
            states = in_token_order(states, order)
        else:
            weights = self.gate_up_proj, self.down_proj
            states = experts_one_by_one(hidden_states, expert_ids, *weights, self.act_fn)
        return states * top_k_weights.to(states.dtype)


class ComplexityDeepMLP(nn.Module):
    """Dense gated MLP: down(act(gate x) * up x)."""

    def __init__(self, config: ComplexityDeepConfig, intermediate_size: int | None = None):
        super().__init__()
        intermediate_size = intermediate_size or config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.down_proj.writes_residual = True
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class ComplexityDeepTokenRoutedMLP(nn.Module):
    """One SwiGLU expert per token, chosen by the token id and, through mu, by its context."""

    def __init__(self, config: ComplexityDeepConfig):
        super().__init__()
        self.config = config
        self.experts = ComplexityDeepExperts(config)
        self.mu_router = ComplexityDeepMuRouter(config) if config.use_mu_routing else None
        shared = config.shared_expert_intermediate_size
        self.shared_expert = ComplexityDeepMLP(config, shared) if shared else None

    @accelerated("mlp")
    def forward(
        self, hidden_states: Tensor, mu: Tensor | None, expert_ids: Tensor, routing_plan: RoutingPlan | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden_states, mu [B, S, H], expert_ids of the table [B, S] -> (output [B, S, H], experts taken [B, S])."""
        shape = hidden_states.shape
        tokens, chosen, weights = hidden_states.reshape(-1, shape[-1]), expert_ids.reshape(-1), None  # [T, H], [T]
        if self.mu_router is not None:
            _, weights, chosen = self.mu_router(mu.reshape(-1, shape[-1]), chosen)  # type: ignore[union-attr]
        if weights is None:
            weights = tokens.new_ones(1).expand(tokens.shape[0])
        # Expert parallelism renumbers the experts, so that a plan made before does not hold.
        is_split = getattr(self.experts, "_is_expert_parallel", False)  # transformers 5.17 has no such mark
        plan = {"routing_plan": routing_plan} if routing_plan and not is_split else {}
        out = self.experts(tokens, chosen[:, None], weights[:, None].to(tokens.dtype), **plan).to(hidden_states.dtype)
        out = out.reshape(shape)
        if self.shared_expert is not None:
            out = out + self.shared_expert(hidden_states)
        return out, chosen.reshape(expert_ids.shape)


class ComplexityDeepDecoderLayer(GradientCheckpointingLayer):
    """Attention, the dynamics on its output, and the MLP."""

    def __init__(self, config: ComplexityDeepConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.use_mu_guidance = config.use_mu_guidance and layer_idx > 0  # also in a copy of layer 0
        # An eps of 1 bounds a large mu, and leaves alone a small one, such as that of a new model.
        self.mu_norm = nn.RMSNorm(config.hidden_size, 1.0, elementwise_affine=False) if config.use_mu_norm else None
        self.self_attn = ComplexityDeepAttention(config, layer_idx)
        self.dynamics = ComplexityDeepDynamics(config, layer_idx) if config.has_mu else None
        self.mlp = ComplexityDeepTokenRoutedMLP(config) if config.is_routed else ComplexityDeepMLP(config)
        self.input_layernorm = ComplexityDeepRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = ComplexityDeepRMSNorm(config.hidden_size, config.rms_norm_eps)

    @accepts_both_cache_names
    @accelerated("layer")
    def forward(
        self,
        hidden_states: Tensor,
        velocity: Tensor,
        guidance: Tensor | None,
        highway: Tensor | None,
        expert_ids: Tensor | None = None,
        routing_plan: RoutingPlan | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """hidden_states, velocity, guidance and highway, each [B, S, H] -> the same four.

        guidance and highway are None below layer 0, and in a model that has no mu. expert_ids: [B, S] of the routing
        table. `kwargs` are those of the attention.
        """
        normed = self.input_layernorm(hidden_states)
        attn_output, _ = self.self_attn(normed, self.guide(guidance), **kwargs)
        mu = None
        if self.dynamics is not None:
            attn_output, velocity, mu, guidance, highway = self.dynamics(attn_output, velocity, highway)
        hidden_states = hidden_states + attn_output

        normed = self.post_attention_layernorm(hidden_states)
        if self.config.is_routed:  # an adapter or a compiler may have put a class of its own around the MLP
            mlp_output, _ = self.mlp(normed, mu, expert_ids, routing_plan)
        else:
            mlp_output = self.mlp(normed)
        return hidden_states + mlp_output, velocity, guidance, highway

    def guide(self, guidance: Tensor | None) -> Tensor | None:
        """What attention takes of the guidance of the layer below, [B, S, H] in its dtype."""
        if guidance is None or not self.use_mu_guidance:
            return None
        return guidance if self.mu_norm is None else self.mu_norm(guidance).to(guidance.dtype)


class ComplexityDeepPreTrainedModel(CheckpointMixin, KernelsMixin, VocabularyMixin, PreTrainedModel):
    """What all Complexity-Deep models share: loading, saving, initialisation, and what the library asks of a class."""

    config_class = ComplexityDeepConfig
    config: ComplexityDeepConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ComplexityDeepDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]
    _can_record_outputs = {
        "hidden_states": OutputRecorder(ComplexityDeepDecoderLayer, index=0),
        "attentions": OutputRecorder(ComplexityDeepAttention, index=1),
        "router_logits": OutputRecorder(ComplexityDeepMuRouter, index=0),
        "expert_ids": OutputRecorder(ComplexityDeepTokenRoutedMLP, index=1),
        "velocities": OutputRecorder(ComplexityDeepDynamics, index=1),
        "mus": OutputRecorder(ComplexityDeepDynamics, index=2),
    }

    def __init__(self, config: ComplexityDeepConfig, *inputs, **kwargs):
        if not hasattr(config, "dynamics_dt"):  # remote code may hold the class twice, so no isinstance
            raise ValueError(f"{type(self).__name__} needs a ComplexityDeepConfig, but got a {type(config).__name__}.")
        ComplexityDeepConfig.settle(config)  # what callers and `from_pretrained` have set since it was made
        super().__init__(config, *inputs, **kwargs)
        kernels = getattr(config, "_kernels_implementation", None)
        config._kernels_implementation = self.get_correct_kernels_implementation(kernels)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        config, std = self.config, self.config.initializer_range
        residual_std = std / math.sqrt(2 * config.num_hidden_layers) if config.scaled_residual_init else std
        if isinstance(module, ComplexityDeepExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=residual_std)
        elif getattr(module, "writes_residual", False):
            init.normal_(module.weight, mean=0.0, std=residual_std)
        elif getattr(module, "starts_at_zero", False):
            init.constant_(module.weight, nearly_zero(module.weight.dtype))
        elif isinstance(module, ComplexityDeepMuRouter):
            init.zeros_(module.weight)
        elif isinstance(module, ComplexityDeepFrozenWeights):
            for weight in module.buffers():
                init.zeros_(weight)
        elif isinstance(module, ComplexityDeepDynamics):
            init.zeros_(module.mu)
            if config.use_dynamics:
                # As its weights start at zero, the controller has the values of the config, whatever the input.
                start = torch.tensor(
                    [
                        math.log(config.dynamics_alpha / (1 - config.dynamics_alpha)),
                        math.log(math.expm1(config.dynamics_beta)),
                        math.log(config.dynamics_gate / (1 - config.dynamics_gate)),
                    ]
                )
                init.copy_(module.controller_out.bias, start.repeat_interleave(config.hidden_size))
        elif isinstance(module, ComplexityDeepRoutingTable):
            init.copy_(module.token_to_expert, new_routing_table(config))

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters: `total` in the published layout, `trained`, and `active` for one token.

        `total` counts what the published checkpoints hold, also the weights that no gradient reaches; `active` leaves
        out the experts that a token does not pass through and all rows but one of a value embedding. A tied embedding
        counts once.
        """
        trained = sum(parameter.numel() for parameter in self.parameters())
        buffers = [(name, buffer) for name, buffer in self.named_buffers() if buffer.is_floating_point()]
        frozen = sum(buffer.numel() for name, buffer in buffers if not name.endswith("inv_freq"))
        experts = sum(
            parameter.numel()
            for module in self.modules()
            if isinstance(module, ComplexityDeepExperts)
            for parameter in module.parameters()
        )
        idle = experts - experts // self.config.num_experts
        tables = [embedding.weight for _, embedding in self.value_embeddings()]
        idle += sum(table.numel() - table.shape[1] for table in tables)
        return {"total": trained + frozen, "trained": trained, "active": trained + frozen - idle}


class ComplexityDeepModel(TokenRoutingMixin, ComplexityDeepPreTrainedModel):
    """Token embedding, decoder layers and final norm."""

    def __init__(self, config: ComplexityDeepConfig):
        super().__init__(config)
        # No padding_idx: in the published model the pad row is an ordinary row with a gradient.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ComplexityDeepDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = ComplexityDeepRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = ComplexityDeepRotaryEmbedding(config)
        if config.is_routed:
            self.routing_table = ComplexityDeepRoutingTable(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """`load_state_dict` also takes the names of files: Trainer resumes by it."""
        to_model_names(state_dict, self.config, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @accepts_both_cache_names
    @without_cache_in_training
    @merge_with_config_defaults
    @capture_outputs
    @accelerated("model")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        routing_ids: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ComplexityDeepModelOutputWithPast:
        """
        Args:
            input_ids: [B, S] token ids. inputs_embeds: [B, S, H], instead of `input_ids`.
            attention_mask: [B, S], 1 where there is a token. position_ids: [B or 1, S]; positions that restart within
                a row (with neither attention_mask nor cache) separate packed documents.
            routing_ids: [B, S] token ids that choose the experts and value embeddings, instead of `input_ids` or of the
                embedding rows nearest to `inputs_embeds`.

        `output_hidden_states`, `output_attentions`, `output_router_logits`, `output_expert_ids`, `output_velocities`
        and `output_mus` add the per-layer tensors to the output. Raises `ValueError` for ids that are no token ids, and
        for unknown arguments that carry a cache, a mask or positions.
        """
        check_unknown_arguments(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if input_ids is not None:
            self.check_token_ids(input_ids, "input_ids")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # Before there are a cache and positions of our own: both would change what the library takes a row for.
        attention_mask = causal_mask(self.config, hidden_states, attention_mask, cache, position_ids)
        if position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + past_length)[None]
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        layers = self.config.num_hidden_layers  # early-exit generation lowers it for a while
        value_layers = self.config.value_embedding_layers or ()
        expert_ids: list[Tensor | None] = [None] * layers
        routing_plans: Sequence[RoutingPlan | None] = [None] * layers
        if self.config.is_routed or value_layers:
            token_ids = self.routing_token_ids(input_ids, hidden_states, routing_ids)
        if self.config.is_routed:
            expert_ids = self.expert_ids_by_layer(token_ids)
            routing_plans = self.routing_plans(expert_ids)

        velocity, guidance, highway = torch.zeros_like(hidden_states), None, None
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for index, layer in enumerate(self.layers[:layers]):
            hidden_states, velocity, guidance, highway = layer(
                hidden_states,
                velocity,
                guidance,
                highway,
                expert_ids=expert_ids[index],
                routing_plan=routing_plans[index],
                attention_mask=attention_mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                use_cache=use_cache,
                **{CACHE_NAME: cache},
                **({"token_ids": token_ids} if value_layers else {}),
                **kwargs,
            )
        return ComplexityDeepModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE_NAME: cache},
        )


class ComplexityDeepForCausalLM(
    ContinuousBatchingMixin, SpeculationMixin, ComplexityDeepPreTrainedModel, GenerationMixin
):
    """Complexity-Deep with a language-model head, tied to the embedding by default."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ComplexityDeepConfig):
        super().__init__(config)
        self.model = ComplexityDeepModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @accepts_both_cache_names
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        routing_ids: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ComplexityDeepCausalLMOutputWithPast:
        """
        The inputs of `ComplexityDeepModel.forward`, and:

        Args:
            labels: [B, S] token ids, -100 where there is no loss; shifted here, mean over the kept tokens (or a sum
                over `num_items_in_batch`).
            logits_to_keep: number of last positions, 1D positions, 2D positions per row, or a 2D bool mask.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            routing_ids=routing_ids,
            **kwargs,
        )
        logits = self.lm_head(select_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return ComplexityDeepCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            expert_ids=outputs.expert_ids,
            velocities=outputs.velocities,
            mus=outputs.mus,
        )


class ComplexityDeepForSequenceClassification(GenericForSequenceClassification, ComplexityDeepPreTrainedModel):
    """Complexity-Deep with a classification head on the last token that is not padding."""

    def __init__(self, config: ComplexityDeepConfig):
        # The generic constructor would look the base model up in AutoModel, which does not know remote code.
        ComplexityDeepPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = ComplexityDeepModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class ComplexityDeepForTokenClassification(GenericForTokenClassification, ComplexityDeepPreTrainedModel):
    """Complexity-Deep with a classification head on every token."""

    def __init__(self, config: ComplexityDeepConfig):
        ComplexityDeepPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = ComplexityDeepModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)  # the library's default
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class ComplexityDeepForQuestionAnswering(GenericForQuestionAnswering, ComplexityDeepPreTrainedModel):
    """Complexity-Deep with a head that scores every token as start and as end of the answer."""

    def __init__(self, config: ComplexityDeepConfig):
        ComplexityDeepPreTrainedModel.__init__(self, config)
        self.model = ComplexityDeepModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


DeepForCausalLM = ComplexityDeepForCausalLM  # name in the published package

register_classes()

__all__ = [
    "ComplexityDeepForCausalLM",
    "ComplexityDeepForQuestionAnswering",
    "ComplexityDeepForSequenceClassification",
    "ComplexityDeepForTokenClassification",
    "ComplexityDeepModel",
    "ComplexityDeepPreTrainedModel",
    "DeepForCausalLM",
]
