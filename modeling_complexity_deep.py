"""Complexity-Deep (v0.13.0): a decoder with token-routed experts, mu-guided attention and INL dynamics.

Per layer, with x the residual stream, v the velocity (0 before layer 0), m the guidance of the layer below:

    q, k, v'  = n W + m W_mu                    n = RMSNorm(x); then RMS norm over the head and RoPE for q and k
    h         = Attention(q, k, v') W_o
    mu        = mu_0 + h W_mu_proj              contextual equilibrium
    alpha, beta, gate = sigmoid, min(softplus, 2), sigmoid of W_out SiLU(W_in [h, v] + b_in) + b_out
    v         = clamp(alpha v - beta (h - mu), -10, 10)
    x         = x + h + dt gate v
    expert    = argmax(10 onehot(token_to_expert[id]) + mu W_router)
    x         = x + SwiGLU_expert(RMSNorm(x))
    R         = R + mu;  m = mu + 0.1 R         the mu highway: guidance for the layer above

v, mu, R and m are per position and restart at layer 0, so a plain key/value cache is all that decoding carries.
Shapes: B batch, S sequence, T = B * S tokens, H hidden size, D head dim, E experts, I width of one expert, V ids.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    packed_sequence_mask_function,
)
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

from .checkpoint_complexity_deep import CheckpointMixin, nearly_zero, renamed_tensors, trains_mu
from .compatibility_complexity_deep import (
    CACHE_NAME,
    accepts_both_cache_names,
    check_unknown_arguments,
    update_cache,
)
from .configuration_complexity_deep import ComplexityDeepConfig
from .decode_graph_complexity_deep import DecodeGraphMixin
from .implementations_complexity_deep import (
    KERNELS,
    ROUTING_PLANS,
    ComplexityDeepFrozenWeights,
    RoutingPlan,
    default_kernels_implementation,
    eager_experts_forward,
    is_transformed,
    layer_routing_plans,
)
from .registration_complexity_deep import register_classes
from .routing_complexity_deep import balanced_routing, new_routing_table


@dataclass
class ComplexityDeepModelOutputWithPast(BaseModelOutputWithPast):
    """Base model output; the last four fields come with `output_router_logits`, `output_expert_ids` and so on.

    router_logits: per layer [T, E], the scores that mu routing takes the argmax of. expert_ids: per layer [B, S] int64.
    velocities, mus: per layer [B, S, H], velocity after and mu of that layer.
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
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class ComplexityDeepRotaryEmbedding(nn.Module):
    """RoPE tables (cos, sin) [B, S, D], always built in fp32 from the config and then cast, never from a file."""

    def __init__(self, config: ComplexityDeepConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
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
        super()._apply(fn, recurse)
        # `.half()` and its like would round the frequencies, which moves every far position.
        if self.inv_freq.dtype != torch.float32 and self.inv_freq.device.type != "meta":
            inv_freq, self.attention_scaling = self._rope_init(self.config, self.inv_freq.device)
            self.inv_freq, self.original_inv_freq = inv_freq, inv_freq.clone()
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        # Positions come from where the ids are, which under a device map need not be the device of `x`.
        angles = position_ids.to(x.device)[..., None].float() * self.inv_freq.to(x.device).float()  # [B, S, D/2]
        angles = torch.cat((angles, angles), dim=-1)  # [B, S, D]
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


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
    """Grouped-query attention whose queries, keys and values are guided by mu of the layer below."""

    def __init__(self, config: ComplexityDeepConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_first = layer_idx == 0  # not compared in forward: a compiled layer would be compiled for every index
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

    def forward(
        self,
        hidden_states: Tensor,
        mu: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        token_ids: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        project = KERNELS[self.config._kernels_implementation].qkv
        query, key, value = project(self, hidden_states, mu, *position_embeddings)
        if self.value_embedding is not None:
            value = value + self._embedded_values(hidden_states if mu is None else mu, token_ids).to(value.dtype)
        attn_output, attn_weights = self.attend(query, key, value, attention_mask, cache, **kwargs)
        return self.o_proj(attn_output), attn_weights

    def _embedded_values(self, gated_by: Tensor, token_ids: Tensor) -> Tensor:
        """What the token ids [B, S] themselves add to the values, [B, S, K, D]: a vector per id and a gate per head."""
        gate = 2 * torch.sigmoid(self.value_gate(gated_by))  # [B, S, K]
        return gate[..., None] * self.value_embedding(token_ids).unflatten(-1, (-1, self.head_dim))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask, cache=None, **kwargs):
        """query [B, S, A, D], key and value [B, S, K, D] -> (heads side by side [B, S, A * D], attention weights)."""
        shape = query.shape
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [B, heads, S, D]
        if cache is not None:
            key, value = update_cache(cache, key, value, self.layer_idx, kwargs)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = KERNELS[self.config._kernels_implementation].attention(
            attention_interface,
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
        return attn_output.reshape(*shape[:2], -1).contiguous(), attn_weights  # [B, S, A * D]


class ComplexityDeepDynamics(nn.Module):
    """INL dynamics: a learned equilibrium mu and a damped velocity that pulls the attention output towards it."""

    def __init__(self, config: ComplexityDeepConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.dt = config.dynamics_dt
        hidden, controller = config.hidden_size, config.dynamics_controller_hidden
        if trains_mu(config, layer_idx):
            self.mu = nn.Parameter(torch.zeros(hidden))
            self.mu_proj = nn.Linear(hidden, hidden, bias=False)
        else:
            self.register_buffer("mu", torch.zeros(hidden))
            self.frozen = ComplexityDeepFrozenWeights(mu_proj=(hidden, hidden))
        if config.use_dynamics:
            self.controller_in = nn.Linear(2 * hidden, controller)
            self.controller_out = nn.Linear(controller, 3 * hidden)

    def forward(self, hidden_states: Tensor, velocity: Tensor, mu_residual: Tensor | None):
        """Returns (h', velocity', mu, m, R'), each [B, S, H]: m is the guidance for the layer above, R' the highway."""
        if self.config.use_dynamics:
            dynamics_forward = KERNELS[self.config._kernels_implementation].dynamics
            return dynamics_forward(self, hidden_states, velocity, mu_residual)
        projected = self.mu_proj(hidden_states) if hasattr(self, "mu_proj") else self.frozen("mu_proj", hidden_states)
        mu = self.mu + projected
        mu_residual = mu if mu_residual is None else mu_residual + mu
        return hidden_states, velocity, mu, mu + 0.1 * mu_residual, mu_residual


@use_experts_implementation
class ComplexityDeepExperts(nn.Module):
    r"""Experts as 3D weights: gate_up_proj [E, 2I, H] (gate rows first), down_proj [E, H, I].

    The forward below is `experts_implementation="eager"`: any dtype, size and device. "cggr" runs the Triton kernels,
    "batched_mm" and "grouped_mm" are the library's own. Quantizers that look for linear layers leave these weights as
    they are; torchao takes them by name, and then both of our implementations run one product per expert in PyTorch:

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

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, routing_plan=None) -> Tensor:
        """hidden_states [T, H], top_k_index [T, 1] (an id of num_experts means "not here"), top_k_weights [T, 1]."""
        return eager_experts_forward(self, hidden_states, top_k_index, top_k_weights, routing_plan)


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


class ComplexityDeepMLP(nn.Module):
    """Dense gated MLP: down(act(gate x) * up x)."""

    def __init__(self, config: ComplexityDeepConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.down_proj.writes_residual = True
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


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


class ComplexityDeepTokenRoutedMLP(nn.Module):
    """One SwiGLU expert per token, chosen by the token id and, through mu, by its context."""

    def __init__(self, config: ComplexityDeepConfig):
        super().__init__()
        self.experts = ComplexityDeepExperts(config)
        self.mu_router = ComplexityDeepMuRouter(config) if config.use_mu_routing else None
        shared = config.shared_expert_intermediate_size
        self.shared_expert = ComplexityDeepMLP(config, shared) if shared else None

    def forward(
        self, hidden_states: Tensor, mu: Tensor | None, expert_ids: Tensor, routing_plan: RoutingPlan | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden_states, mu [B, S, H], expert_ids [B, S] -> (output [B, S, H], expert ids [B, S] after mu's say)."""
        shape = hidden_states.shape
        tokens, chosen, weights = hidden_states.reshape(-1, shape[-1]), expert_ids.reshape(-1), None  # [T, H], [T]
        if self.mu_router is not None:
            _, weights, chosen = self.mu_router(mu.reshape(-1, shape[-1]), chosen)
        if weights is None:
            weights = tokens.new_ones(1).expand(tokens.shape[0])
        # Expert parallelism renumbers the experts, so a plan made before it does not hold.
        is_split = getattr(self.experts, "_is_expert_parallel", False)  # transformers 5.17 has no such mark
        plan = {"routing_plan": routing_plan} if routing_plan and not is_split else {}
        out = self.experts(tokens, chosen[:, None], weights[:, None].to(tokens.dtype), **plan).to(hidden_states.dtype)
        out = out.reshape(shape)
        if self.shared_expert is not None:
            out = out + self.shared_expert(hidden_states)
        return out, chosen.reshape(expert_ids.shape)


class ComplexityDeepDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: ComplexityDeepConfig, layer_idx: int):
        super().__init__()
        self.self_attn = ComplexityDeepAttention(config, layer_idx)
        needs_mu = config.use_dynamics or config.use_mu_guidance or (config.is_routed and config.use_mu_routing)
        self.dynamics = ComplexityDeepDynamics(config, layer_idx) if needs_mu else None
        self.mlp = (
            ComplexityDeepTokenRoutedMLP(config)
            if config.is_routed
            else ComplexityDeepMLP(config, config.intermediate_size)
        )
        self.input_layernorm = ComplexityDeepRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = ComplexityDeepRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.config = config
        self.use_mu_guidance = config.use_mu_guidance

    @accepts_both_cache_names
    def forward(self, *args, **kwargs) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """`module_forward`, by whatever `kernels_implementation` names."""
        return KERNELS[self.config._kernels_implementation].layer(self, *args, **kwargs)

    def module_forward(
        self,
        hidden_states: Tensor,
        velocity: Tensor,
        guidance: Tensor | None,
        mu_residual: Tensor | None,
        expert_ids: Tensor | None = None,
        routing_plan: RoutingPlan | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """hidden_states, velocity, guidance m, highway R, each [B, S, H] -> the same four; `kwargs` are attention's."""
        mu_below = guidance if self.use_mu_guidance else None
        attn_output, _ = self.self_attn(self.input_layernorm(hidden_states), mu_below, **kwargs)
        mu = None
        if self.dynamics is not None:
            attn_output, velocity, mu, guidance, mu_residual = self.dynamics(attn_output, velocity, mu_residual)
        hidden_states = hidden_states + attn_output

        normed = self.post_attention_layernorm(hidden_states)
        if isinstance(self.mlp, ComplexityDeepTokenRoutedMLP):
            mlp_output, _ = self.mlp(normed, mu, expert_ids, routing_plan)
        else:
            mlp_output = self.mlp(normed)
        return hidden_states + mlp_output, velocity, guidance, mu_residual


class ComplexityDeepPreTrainedModel(CheckpointMixin, PreTrainedModel):
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
        if not config.use_sliding_window:  # `from_pretrained` sets its overrides after the config has looked at both
            config.sliding_window = None
        super().__init__(config, *inputs, **kwargs)
        if getattr(config, "_kernels_implementation", None) is None:
            config._kernels_implementation = default_kernels_implementation()
        self.get_correct_kernels_implementation(config._kernels_implementation)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        # The library's default, grouped_mm, does not run in every dtype and width.
        if requested_experts is None:
            requested_experts = "cggr" if default_kernels_implementation() == "triton" else "eager"
        return super().get_correct_experts_implementation(requested_experts)

    @staticmethod
    def get_correct_kernels_implementation(requested: str) -> str:
        if requested not in KERNELS:
            raise ValueError(f"kernels_implementation must be one of {', '.join(KERNELS)}, but is {requested!r}.")
        return requested

    def set_kernels_implementation(self, kernels_implementation: str) -> None:
        """Choose who computes dynamics and mu-guided projections: `"eager"` (PyTorch) or `"triton"` (on CUDA)."""
        for module in self.modules():
            if isinstance(module, ComplexityDeepPreTrainedModel):
                module.config._kernels_implementation = self.get_correct_kernels_implementation(kernels_implementation)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        config, std = self.config, self.config.initializer_range
        residual_std = std / math.sqrt(2 * config.num_hidden_layers) if config.scaled_residual_init else std
        starts_at_zero = getattr(module, "starts_at_zero", False)
        if isinstance(module, ComplexityDeepExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=residual_std)
        elif getattr(module, "writes_residual", False):
            init.normal_(module.weight, mean=0.0, std=residual_std)
        elif isinstance(module, ComplexityDeepMuRouter) or starts_at_zero:
            init.zeros_(module.weight)
        elif isinstance(module, ComplexityDeepFrozenWeights):
            for weight in module.buffers():
                init.zeros_(weight)
        elif isinstance(module, ComplexityDeepDynamics):
            init.zeros_(module.mu)
            if hasattr(module, "mu_proj"):
                init.constant_(module.mu_proj.weight, nearly_zero(module.mu_proj.weight.dtype))
            if config.use_dynamics:
                # With such weights the controller starts exactly at the values of the config, whatever the input.
                init.constant_(module.controller_out.weight, nearly_zero(module.controller_out.weight.dtype))
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

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resize the vocabulary, and with it value embeddings and routing table.

        Old ids keep their expert. New ones get id mod E, or with `routing_per_layer` a random expert in each layer.
        """
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        base, config = self.base_model, self.config
        for attention in (layer.self_attn for layer in base.layers):
            if attention.value_embedding is not None:
                attention.value_embedding = self._get_resized_embeddings(attention.value_embedding, config.vocab_size)
        if config.is_routed:
            table = new_routing_table(config, extends=True).to(base.token_to_expert.device)
            kept = min(table.shape[-1], base.token_to_expert.shape[-1])
            table[..., :kept] = base.token_to_expert[..., :kept]
            base.token_to_expert = table
        return embeddings

    def balance_routing(self, token_counts: Tensor) -> None:
        """Rebuild the routing table of a new model from corpus counts [V], so that every expert sees as many tokens.

        Raises `ValueError` for counts of another length than the vocabulary, or a model without experts.
        """
        table = self.base_model.token_to_expert if self.config.is_routed else None
        if table is None or len(token_counts) != table.shape[-1]:
            raise ValueError(
                f"balance_routing needs a token-routed model and one count for each of its {self.config.vocab_size} "
                f"token ids, but got {len(token_counts)} counts."
            )
        counts, layers = torch.as_tensor(token_counts), self.config.num_hidden_layers
        if self.config.routing_per_layer:
            tables = [balanced_routing(counts, self.config.num_experts, seed=layer) for layer in range(layers)]
            table.copy_(torch.stack(tables))
        else:
            table.copy_(balanced_routing(counts, self.config.num_experts))
        self.config.routing = "balanced"

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters: `total` in the published layout, `trained`, and `active` for one token.

        `total` counts what the published checkpoints hold, also the weights that no gradient reaches; `active` leaves
        out the experts that a token does not pass through and all rows but one of a value embedding. A tied embedding
        counts once.
        """
        trained = sum(parameter.numel() for parameter in self.parameters())
        frozen = sum(
            buffer.numel()
            for name, buffer in self.named_buffers()
            if buffer.is_floating_point() and not name.endswith("inv_freq")
        )
        experts = sum(
            parameter.numel()
            for module in self.modules()
            if isinstance(module, ComplexityDeepExperts)
            for parameter in module.parameters()
        )
        idle = experts - experts // self.config.num_experts
        value_embeddings = [layer.self_attn.value_embedding for layer in self.base_model.layers]
        idle += sum(table.weight.numel() - table.embedding_dim for table in value_embeddings if table is not None)
        return {"total": trained + frozen, "trained": trained, "active": trained + frozen - idle}


class ComplexityDeepModel(ComplexityDeepPreTrainedModel):
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

    @property
    def token_to_expert(self) -> Tensor | None:
        """The routing table [V] int64, or None for a model without experts. It may be written in place or replaced."""
        return self.routing_table.token_to_expert if self.config.is_routed else None

    @token_to_expert.setter
    def token_to_expert(self, table: Tensor) -> None:
        self.routing_table.token_to_expert = table

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """`load_state_dict` also takes the names of files: Trainer resumes by it."""
        for old, new in renamed_tensors(self.config).items():
            if prefix + old in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_ids(self, ids: Tensor, name: str) -> None:
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name} must be int64 or int32 token ids, but has dtype {ids.dtype}.")
        # On the CPU the look-up is free; on a device it would stall the queue. Where ids have no values that Python may
        # look at (tracing, FakeTensor, vmap) it cannot be done.
        has_values = type(ids) is Tensor and not torch.compiler.is_compiling() and not is_transformed()
        if has_values and ids.device.type == "cpu" and ids.numel():
            smallest, largest = ids.aminmax()
            if smallest < 0 or largest >= self.config.vocab_size:
                raise ValueError(
                    f"{name} holds token id {int(largest if smallest >= 0 else smallest)}, but the vocabulary has ids "
                    f"0 to {self.config.vocab_size - 1}; check that the tokenizer belongs to this model."
                )

    @torch.no_grad()
    def nearest_token_ids(self, inputs_embeds: Tensor) -> Tensor:
        """Ids [B, S] of the embedding rows nearest to `inputs_embeds` [B, S, H]; an unmodified row gives its own id.

        True differences in at least fp32, since the shortcut |w|^2 - 2 e.w cannot tell close rows apart. The lowest id
        wins between equal rows.
        """
        dtype = torch.promote_types(inputs_embeds.dtype, torch.float32)
        weight = self.embed_tokens.weight
        if weight.device.type == "meta":  # offloaded: only a call of the module brings the rows in
            weight = self.embed_tokens(torch.arange(self.config.vocab_size, device=inputs_embeds.device))
        weight = weight.to(inputs_embeds.device, dtype)
        rows = inputs_embeds.reshape(-1, inputs_embeds.shape[-1]).to(dtype)
        # 1024 rows at a time: [1024, V] distances stay small whatever the batch.
        exact = "donot_use_mm_for_euclid_dist"
        nearest = [torch.cdist(part, weight, compute_mode=exact).argmin(dim=-1) for part in rows.split(1024)]
        return torch.cat(nearest).reshape(inputs_embeds.shape[:-1])

    def _token_ids(self, input_ids: Tensor | None, inputs_embeds: Tensor, routing_ids: Tensor | None) -> Tensor:
        """Ids [B, S] that choose experts and value embeddings: `routing_ids`, `input_ids` or the nearest embedding."""
        if routing_ids is not None:
            if routing_ids.shape != inputs_embeds.shape[:-1]:
                raise ValueError(
                    f"routing_ids must have the [batch, sequence] shape of the input, "
                    f"{tuple(inputs_embeds.shape[:-1])}, but has {tuple(routing_ids.shape)}."
                )
            self._check_ids(routing_ids, "routing_ids")
        else:
            routing_ids = input_ids if input_ids is not None else self.nearest_token_ids(inputs_embeds)
        return routing_ids

    def expert_ids_by_layer(self, token_ids: Tensor) -> list[Tensor]:
        """Expert of each token before mu's say, [B, S] for each layer, from the token ids [B, S]."""
        experts, layers = self.routing_table(token_ids), self.config.num_hidden_layers
        return list(experts[:layers]) if self.config.routing_per_layer else [experts] * layers

    def _routing_plans(self, expert_ids: list[Tensor]) -> list[RoutingPlan | None]:
        """The plan of each layer, or none where mu has its say first; all are made at once."""
        make_plan = ROUTING_PLANS.get(self.config._experts_implementation)
        if make_plan is None or self.config.use_mu_routing or is_transformed():
            return [None] * len(expert_ids)
        if self.config.routing_per_layer:
            return layer_routing_plans(make_plan, torch.stack(expert_ids).flatten(1), self.config.num_experts)
        return [RoutingPlan(*make_plan(expert_ids[0].flatten(), self.config.num_experts))] * len(expert_ids)

    @accepts_both_cache_names
    @merge_with_config_defaults
    @capture_outputs
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
                a row (and no attention_mask) separate packed documents.
            routing_ids: [B, S] token ids that choose the experts and value embeddings, instead of `input_ids` or of the
                embedding rows nearest to `inputs_embeds`.

        `output_hidden_states`, `output_attentions`, `output_router_logits`, `output_expert_ids`, `output_velocities`
        and `output_mus` add the per-layer tensors to the output.
        """
        check_unknown_arguments(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            if input_ids.ndim != 2:
                raise ValueError(f"input_ids must be [batch, sequence], but has shape {tuple(input_ids.shape)}.")
            self._check_ids(input_ids, "input_ids")
            inputs_embeds = self.embed_tokens(input_ids)
        # The mask comes before the cache: with a cache in hand the library takes a packed row for one document. It is
        # made before the default positions: given any, the library looks for packed rows, at a host synchronisation.
        is_first = attention_mask is None and cache is None
        is_plain = is_first and position_ids is None
        # Plain causal rows need no mask with SDPA; under compile the library makes one and loses the fast kernel.
        if not (is_plain and self.config._attn_implementation == "sdpa" and self.config.sliding_window is None):
            make_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
            documents = {"position_ids": position_ids}
            if is_first and self.config._attn_implementation == "flex_attention":
                documents = _document_mask(position_ids, inputs_embeds)
            attention_mask = make_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                **{CACHE_NAME: cache},
                **documents,
            )
        if position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length)[None]
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        # Early-exit generation lowers num_hidden_layers for a while.
        layers = self.config.num_hidden_layers
        value_layers = self.config.value_embedding_layers or ()
        expert_ids = routing_plans = [None] * layers
        if self.config.is_routed or value_layers:
            token_ids = self._token_ids(input_ids, inputs_embeds, routing_ids)
        if self.config.is_routed:
            expert_ids = self.expert_ids_by_layer(token_ids)
            routing_plans = self._routing_plans(expert_ids)

        hidden_states, guidance, mu_residual = inputs_embeds, None, None
        velocity = torch.zeros_like(hidden_states)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for index, layer in enumerate(self.layers[:layers]):
            hidden_states, velocity, guidance, mu_residual = layer(
                hidden_states,
                velocity,
                guidance,
                mu_residual,
                expert_ids=expert_ids[index],
                routing_plan=routing_plans[index],
                attention_mask=attention_mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                use_cache=use_cache,
                **{CACHE_NAME: cache},
                **({"token_ids": token_ids} if index in value_layers else {}),
                **kwargs,
            )
        return ComplexityDeepModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE_NAME: cache},
        )


class ComplexityDeepForCausalLM(DecodeGraphMixin, ComplexityDeepPreTrainedModel, GenerationMixin):
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
        logits = self.lm_head(_select_positions(outputs.last_hidden_state, logits_to_keep))
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

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, routing_ids: Tensor | None = None, **kwargs
    ):
        """Carry `routing_ids` [B, prompt] through generation: generated tokens are routed by their own ids."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if routing_ids is not None:
            if routing_ids.ndim != 2:
                raise ValueError(f"routing_ids must be [batch, prompt], but has shape {tuple(routing_ids.shape)}.")
            cache = model_inputs.get(CACHE_NAME)
            start = int(cache.get_seq_length()) if cache is not None else 0
            step_ids, step_embeds = model_inputs["input_ids"], model_inputs.get("inputs_embeds")
            length = (step_ids if step_embeds is None else step_embeds).shape[1]
            given = routing_ids[:, start : start + length]
            if given.shape[1] < length:
                given = torch.cat((given, step_ids[:, given.shape[1] :]), dim=1)
            model_inputs["routing_ids"] = given
        return model_inputs


def _document_mask(position_ids: Tensor | None, inputs_embeds: Tensor) -> dict:
    """Arguments that separate packed documents. The library would wait for the GPU to say whether there are any."""
    if position_ids is None:
        return {}
    document = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)  # (B or 1, S)
    return {"and_mask_function": packed_sequence_mask_function(document.expand(len(inputs_embeds), -1))}


def _select_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Positions of `hidden_states` [B, S, H] whose logits are wanted (the library has this only from 5.23 on)."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim == 2:
        if logits_to_keep.dtype == torch.bool:
            return hidden_states[logits_to_keep]
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]


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
