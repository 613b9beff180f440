"""Who computes what: PyTorch or Triton, chosen by registered name and never by a branch in a module's forward.

kernels_implementation    "eager" | "triton"                        projections with RoPE, dynamics, decoding
experts_implementation    "eager" | "cggr" | the library's own      the token-routed experts
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.cache_utils import Cache, StaticCache, StaticLayer
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from .kernels.kernel_reference import (
    inl_update_reference,
    masked_experts_reference,
    qk_norm_rope_reference,
    routing_plan_reference,
    token_routed_mlp_reference,
)

try:
    from .kernels.decode_attention import decode_attention
    from .kernels.decode_layer import (
        MAX_CONTROLLER,
        MAX_EXPERTS,
        MAX_ROWS,
        MAX_WIDTH,
        decode_attend,
        decode_layer_tail,
        decode_qkv,
    )
    from .kernels.fused_dynamics import inl_dynamics_block
    from .kernels.mu_guided_qkv import mu_guided_qkv, qk_norm_rope
    from .kernels.token_routed_gemm import routing_plan, token_routed_mlp
except ImportError:  # Triton is not installed: "eager" is what there is
    TRITON_DEVICES = ()
else:
    # In the interpreter the kernels run on the CPU, for tests.
    TRITON_DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)

logger = logging.get_logger(__name__)


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


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode AD is at work, which cannot look into an operator of ours.

    It would stop at the operator, or, in forward mode, pass it without a derivative.
    """
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_unhooked(*modules: nn.Module) -> bool:
    """Whether nothing else happens when the modules are called: no offloading, parallel or recording hook."""
    return all(
        not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)  # accelerate and tensor parallelism replace it
        for module in modules
    )


def _is_plain_linear(*modules: nn.Module) -> bool:
    """Whether the weights may be used directly: no adapter, quantization, offloading or parallel hook on any module."""
    return is_unhooked(*modules) and all(
        type(module) is nn.Linear and type(module.weight) in (nn.Parameter, Tensor) for module in modules
    )


def eager_qkv_forward(attention: nn.Module, hidden_states: Tensor, mu: Tensor | None, cos: Tensor, sin: Tensor):
    """Mu-guided projections, QK norm and RoPE through the modules themselves, so that adapters on them count.

    hidden_states, mu: [B, S, H]; mu is None below the first guided layer. cos, sin: [B or 1, S, D].
    Returns query [B, S, A, D], key and value [B, S, K, D].
    """

    def project(projection: nn.Module, guidance: str) -> Tensor:
        states = projection(hidden_states)
        if mu is not None:
            states = states + getattr(attention, guidance)(mu)
        return states.view(*states.shape[:-1], -1, attention.head_dim)  # [B, S, heads, D]

    query, key = project(attention.q_proj, "mu_to_q"), project(attention.k_proj, "mu_to_k")
    value = project(attention.v_proj, "mu_to_v")
    if attention.q_norm is not None:
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = qk_norm_rope_reference(query, key, None, None, cos, sin, 0.0)
    return query, key, value


def eager_dynamics_forward(dynamics: nn.Module, hidden_states: Tensor, velocity: Tensor, mu_residual: Tensor | None):
    """One dynamics step through the modules themselves; all tensors [B, S, H]. Returns (h', v', mu, m, R')."""
    mu = dynamics.mu + dynamics.mu_proj(hidden_states)
    controller_hidden = F.silu(dynamics.controller_in(torch.cat((hidden_states, velocity), dim=-1)))  # [B, S, C]
    controls = dynamics.controller_out(controller_hidden).chunk(3, dim=-1)  # alpha, beta, gate, each [B, S, H]
    hidden_states, velocity, guidance, mu_residual = inl_update_reference(
        hidden_states, velocity, mu_residual, *controls, mu, dynamics.dt
    )
    return hidden_states, velocity, mu, guidance, mu_residual


def _runs_on_triton(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors; all else goes to their PyTorch twins, so a model can move freely."""
    return not is_transformed() and all(x.device.type in TRITON_DEVICES and x.dtype != torch.float64 for x in tensors)


def triton_qkv_forward(attention: nn.Module, hidden_states: Tensor, mu: Tensor | None, cos: Tensor, sin: Tensor):
    """`eager_qkv_forward` as one product over [x, mu] and one norm-and-RoPE kernel, where the weights are plain."""
    names = ("q_proj", "k_proj", "v_proj", *(("mu_to_q", "mu_to_k", "mu_to_v") if mu is not None else ()))
    modules = [getattr(attention, name) for name in names]
    if not _runs_on_triton(hidden_states) or not _is_plain_linear(*modules):
        return eager_qkv_forward(attention, hidden_states, mu, cos, sin)
    qkv = mu_guided_qkv(hidden_states, mu, tuple(module.weight for module in modules))
    return _split_heads(attention, qkv, cos, sin)


def _split_heads(attention: nn.Module, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, S, (A + 2K) D] -> query [B, S, A, D], key and value [B, S, K, D], after QK norm and RoPE."""
    heads = qkv.view(*qkv.shape[:-1], -1, attention.head_dim)  # [B, S, A + 2K, D]
    kv_heads = attention.k_proj.out_features // attention.head_dim
    query, key, value = heads.split((heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    norms = (None, None, 0.0)
    if attention.q_norm is not None:
        norms = attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps
    query, key = qk_norm_rope(query, key, *norms[:2], cos, sin, norms[2])
    return query, key, value


def _dynamics_weights(dynamics: nn.Module) -> tuple:
    """What the kernels take of the module, in their order: mu, its projection, the controller, the step size."""
    inner, outer = dynamics.controller_in, dynamics.controller_out
    return dynamics.mu, dynamics.mu_proj.weight, inner.weight, inner.bias, outer.weight, outer.bias, dynamics.dt


def triton_dynamics_forward(dynamics: nn.Module, hidden_states: Tensor, velocity: Tensor, mu_residual: Tensor | None):
    """`eager_dynamics_forward` as one fused kernel and its matrix products, where the weights are plain."""
    modules = dynamics.mu_proj, dynamics.controller_in, dynamics.controller_out
    if not _runs_on_triton(hidden_states) or not _is_plain_linear(*modules):
        return eager_dynamics_forward(dynamics, hidden_states, velocity, mu_residual)
    hidden_states, velocity, guidance, mu_residual, mu = inl_dynamics_block(
        hidden_states, velocity, mu_residual, *_dynamics_weights(dynamics)
    )
    return hidden_states, velocity, mu, guidance, mu_residual


def library_attention_forward(attention_interface: Callable, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
    """Whatever `attn_implementation` names."""
    return attention_interface(*args, **kwargs)


def _takes_decode_attention(attention: nn.Module, attention_mask: Tensor | None) -> bool:
    """Whether decode_attention.py computes what the model's `attn_implementation` would."""
    drops_out = attention.training and attention.attention_dropout > 0
    if attention.config._attn_implementation != "sdpa" or drops_out:
        return False
    return attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)


def triton_attention_forward(
    attention_interface: Callable,
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """`library_attention_forward`; under "sdpa", a step of one token without gradient takes the decode kernel.

    query [B, A, S, D], key and value [B, K, L, D]. Returns [B, S, A, D] and the library's attention weights or None.
    """
    is_step = query.shape[2] == 1 and not query.requires_grad and _takes_decode_attention(attention, attention_mask)
    if is_step and _runs_on_triton(query, key, value):
        return decode_attention(query, key, value, attention_mask, scaling), None
    return attention_interface(attention, query, key, value, attention_mask, scaling=scaling, **kwargs)


class RoutingPlan(NamedTuple):
    """Tokens sorted by expert, computed once per forward where all layers route alike.

    order [T] int32: token at each sorted position. offsets [E + 1] int32: where each expert's rows begin and end.
    """

    order: Tensor
    offsets: Tensor


PLANNED_TOGETHER = 4096  # experts of all layers in one sort; its kernels hold a count of each in registers


def layer_routing_plans(make_plan: Callable, expert_ids: Tensor, num_experts: int) -> list[RoutingPlan]:
    """Plans of layers that route differently, expert_ids [L, T], sorted together: layer l has experts l E .. l E + E-1.

    The sort is stable, so that the rows of one layer stand together, and each layer's plan is a part of the whole.
    """
    plans, tokens = [], expert_ids.shape[1]
    for group in expert_ids.split(max(1, PLANNED_TOGETHER // num_experts)):
        shift = torch.arange(len(group), device=group.device)[:, None] * num_experts
        order, offsets = make_plan((group + shift).flatten(), len(group) * num_experts)
        for layer in range(len(group)):
            first, expert = layer * tokens, layer * num_experts
            own_offsets = offsets[expert : expert + num_experts + 1] - first
            plans.append(RoutingPlan(order[first : first + tokens] - first, own_offsets))
    return plans


def _planned_experts_forward(experts, hidden_states, top_k_index, top_k_weights, routing_plan, make_plan, mlp):
    """Run `mlp` with one expert per token, the shape that a token-routed layer always has."""
    dtype, device = experts.gate_up_proj.dtype, hidden_states.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # "meta" knows no autocast
        dtype = torch.get_autocast_dtype(device)
    weights = experts.gate_up_proj.to(dtype), experts.down_proj.to(dtype)
    expert_ids, activation = top_k_index.flatten(), experts.config.hidden_act
    if is_transformed():
        out = masked_experts_reference(hidden_states.to(dtype), *weights, expert_ids, activation)
    else:
        routing_plan = routing_plan or RoutingPlan(*make_plan(expert_ids, experts.num_experts))
        out = mlp(hidden_states.to(dtype), *weights, *routing_plan, activation)
    # The routing weights are ones; they carry a gradient only for a router that learns.
    return out * top_k_weights.to(dtype) if top_k_weights.requires_grad else out


def eager_experts_forward(experts, hidden_states, top_k_index, top_k_weights, routing_plan=None) -> Tensor:
    """Sorted tokens and one product per expert in PyTorch: any dtype, size and device.

    hidden_states [T, H]; top_k_index [T, 1], where num_experts means "on another rank"; top_k_weights [T, 1].
    """
    if _is_quantized(experts.gate_up_proj) or _is_quantized(experts.down_proj):
        return _quantized_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    return _planned_experts_forward(
        experts,
        hidden_states,
        top_k_index,
        top_k_weights,
        routing_plan,
        routing_plan_reference,
        token_routed_mlp_reference,
    )


def _is_quantized(weight: Tensor) -> bool:
    """Whether the weight is a tensor that holds others, such as torchao's, which only PyTorch's own operators take."""
    return is_traceable_wrapper_subclass(weight) and type(weight).__module__.split(".")[0] != "torch"  # no DTensor


def _quantized_experts_forward(experts, hidden_states, top_k_index, top_k_weights) -> Tensor:
    """One linear product per expert with its slice of the quantized weights, which brings its own arithmetic.

    Shapes as in `eager_experts_forward`; the result has the dtype of `hidden_states`.
    """
    out, ids = torch.zeros_like(hidden_states), top_k_index.flatten()
    for expert in range(experts.num_experts):
        tokens = torch.nonzero(ids == expert).flatten()
        if len(tokens):
            gate, up = F.linear(hidden_states[tokens], experts.gate_up_proj[expert]).chunk(2, dim=-1)
            result = F.linear(experts.act_fn(gate) * up, experts.down_proj[expert])
            out = out.index_copy(0, tokens, result.to(out.dtype))
    return out * top_k_weights.to(out.dtype) if top_k_weights.requires_grad else out


def cggr_experts_forward(experts, hidden_states, top_k_index, top_k_weights, routing_plan=None) -> Tensor:
    """`eager_experts_forward` by the Triton grouped GEMM. Quantized experts, or those of other ranks, go to PyTorch."""
    is_split = getattr(experts, "_is_expert_parallel", False)
    is_quantized = _is_quantized(experts.gate_up_proj) or _is_quantized(experts.down_proj)
    if is_split or is_quantized or not _runs_on_triton(hidden_states, experts.gate_up_proj):
        return eager_experts_forward(experts, hidden_states, top_k_index, top_k_weights, routing_plan)
    return _planned_experts_forward(
        experts, hidden_states, top_k_index, top_k_weights, routing_plan, _cggr_plan, token_routed_mlp
    )


def _cggr_plan(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    make = routing_plan if _runs_on_triton(expert_ids) else routing_plan_reference
    return make(expert_ids, num_experts)


def eager_layer_forward(layer: nn.Module, *args, **kwargs):
    """The layer module by module."""
    return layer.module_forward(*args, **kwargs)


def _takes_decode_kernels(layer: nn.Module, hidden_states: Tensor, mu: Tensor | None) -> bool:
    """Whether decode_layer.py computes this layer: few rows of one new token, no gradient, the published parts, plain.

    Every module whose forward is passed over must be of our own class or a plain linear, and without hooks.
    """
    rows, length, hidden = hidden_states.shape
    if torch.is_grad_enabled() or length != 1 or rows > MAX_ROWS or not _runs_on_triton(hidden_states):
        return False
    attention, dynamics, mlp = layer.self_attn, layer.dynamics, layer.mlp
    experts = getattr(mlp, "experts", None)
    if experts is None or dynamics is None or not hasattr(dynamics, "controller_in") or mlp.shared_expert is not None:
        return False
    if attention.value_embedding is not None:
        return False
    own = [attention, dynamics, mlp, experts, layer.input_layernorm, layer.post_attention_layernorm]
    own += [module for module in (mlp.mu_router, attention.q_norm, attention.k_norm) if module is not None]
    linear = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linear += [dynamics.mu_proj, dynamics.controller_in, dynamics.controller_out]
    if mu is not None:
        linear += [attention.mu_to_q, attention.mu_to_k, attention.mu_to_v]
    is_plain = _is_plain_linear(*linear) and is_unhooked(*own)
    if not is_plain or any(type(module).__module__ != type(layer).__module__ for module in own):
        return False
    weights = [module.weight for module in (*linear, *own[4:])]
    weights += [dynamics.mu, dynamics.controller_in.bias, dynamics.controller_out.bias]
    weights += [experts.gate_up_proj, experts.down_proj]
    return (
        all(type(weight) in (nn.Parameter, Tensor) and weight.dtype == hidden_states.dtype for weight in weights)
        and all(weight.is_contiguous() for weight in weights)
        and experts.config._experts_implementation == "cggr"
        and not getattr(experts, "_is_expert_parallel", False)
        and not torch.is_autocast_enabled(hidden_states.device.type)
        and experts.num_experts <= MAX_EXPERTS
        and dynamics.controller_in.out_features <= MAX_CONTROLLER
        and max(hidden, attention.q_proj.out_features, experts.down_proj.shape[2]) <= MAX_WIDTH
    )


def plain_static_layer(cache: Cache | None, layer_idx: int) -> StaticLayer | None:
    """A layer of a static cache whose update is no more than writing keys and values in place, or None."""
    if type(cache) is not StaticCache or cache.offloading:
        return None
    layer = cache.layers[layer_idx]
    return layer if type(layer) is StaticLayer and layer.is_initialized else None


def _decode_cache_layer(
    attention: nn.Module, cache: Cache | None, mask: Tensor | None, hidden_states: Tensor
) -> StaticLayer | None:
    """The static cache that the decode kernels write, if it and the mask fit the rows and the dtype of the step."""
    layer = plain_static_layer(cache, attention.layer_idx)
    if layer is None or mask is None or not _takes_decode_attention(attention, mask):
        return None
    rows, length = layer.keys.shape[0], layer.keys.shape[2]
    has_rows = rows == hidden_states.shape[0] and mask.shape[0] in (1, rows) and mask.shape[1:] == (1, 1, length)
    return layer if has_rows and layer.keys.dtype == hidden_states.dtype else None


def triton_layer_forward(layer: nn.Module, hidden_states, velocity, guidance, mu_residual, **kwargs):
    """`eager_layer_forward`; a step of few new tokens runs in the fused kernels around the attention."""
    mu = guidance if layer.use_mu_guidance else None
    if not _takes_decode_kernels(layer, hidden_states, mu):
        return layer.module_forward(hidden_states, velocity, guidance, mu_residual, **kwargs)
    expert_ids, (cos, sin) = kwargs.pop("expert_ids"), kwargs.pop("position_embeddings")
    kwargs.pop("routing_plan", None)  # for one token it is not worth following
    attention, dynamics, experts, router = layer.self_attn, layer.dynamics, layer.mlp.experts, layer.mlp.mu_router
    B, _, H = hidden_states.shape  # one token in each row
    flat = lambda x: None if x is None else x.reshape(B, -1).contiguous()  # noqa: E731
    qkv = decode_qkv(
        flat(hidden_states),
        layer.input_layernorm.weight,
        layer.input_layernorm.eps,
        flat(mu),
        attention.q_proj.weight,
        attention.k_proj.weight,
        attention.v_proj.weight,
        attention.mu_to_q.weight if mu is not None else None,
        attention.mu_to_k.weight if mu is not None else None,
        attention.mu_to_v.weight if mu is not None else None,
    )
    mask = kwargs.get("attention_mask")
    cache = _decode_cache_layer(attention, kwargs.get("cache"), mask, hidden_states)
    if cache is not None:
        norms = (None, None, 0.0)
        if attention.q_norm is not None:
            norms = attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps
        stored = cache.keys, cache.values, cache.cumulative_length
        attn_output = decode_attend(qkv, *norms, cos, sin, *stored, mask, attention.scaling)
    else:
        heads = _split_heads(attention, qkv.view(B, 1, -1), cos, sin)
        attn_output, _ = attention.attend(*heads, **kwargs)
    states = decode_layer_tail(
        flat(attn_output),
        flat(hidden_states),
        flat(velocity),
        flat(mu_residual),
        expert_ids.flatten(),
        attention.o_proj.weight,
        *_dynamics_weights(dynamics),
        layer.post_attention_layernorm.weight,
        layer.post_attention_layernorm.eps,
        None if router is None else router.weight,
        0.0 if router is None else router.base_logit,
        experts.gate_up_proj,
        experts.down_proj,
        experts.config.hidden_act,
    )
    return tuple(x.view(B, 1, H) for x in states)


class Kernels(NamedTuple):
    """The functions behind one `kernels_implementation`."""

    qkv: Callable
    dynamics: Callable
    attention: Callable
    layer: Callable


KERNELS = {"eager": Kernels(eager_qkv_forward, eager_dynamics_forward, library_attention_forward, eager_layer_forward)}
# Experts implementations that take a routing plan, and the function that makes it.
ROUTING_PLANS: dict[str, Callable] = {"eager": routing_plan_reference}
if TRITON_DEVICES:
    KERNELS["triton"] = Kernels(
        triton_qkv_forward, triton_dynamics_forward, triton_attention_forward, triton_layer_forward
    )
    ROUTING_PLANS["cggr"] = _cggr_plan
    ALL_EXPERTS_FUNCTIONS.register("cggr", cggr_experts_forward)


def default_kernels_implementation() -> str:
    """`"triton"` where there are a CUDA device and Triton, else `"eager"`."""
    if not torch.cuda.is_available():
        return "eager"
    if "triton" not in KERNELS:
        logger.warning_once("Triton is not installed: this model runs on plain PyTorch operations, which are slower.")
    return "triton" if "triton" in KERNELS else "eager"


class ComplexityDeepEmbeddingByHeads(TensorParallelLayer):
    """Tensor parallelism of a value embedding: every rank looks up its own heads' part of each vector.

    Of the library's styles, "colwise" did this before 5.24 and is for linear layers since; "embedding_colwise" gathers.
    """

    def shard_param(self, module, param, mesh):
        whole = module._parameters[param]
        shard = distribute_tensor(whole, mesh, [Shard(1)], src_data_rank=None)
        module._parameters[param] = nn.Parameter(shard, requires_grad=whole.requires_grad)

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
        return (DTensor.from_local(args[0], mesh, [Replicate()], run_check=False), *args[1:]), kwargs

    def transform_output_post_forward(self, module, output, mesh):
        return output.to_local()


ALL_PARALLEL_STYLES.register("embedding_by_heads", ComplexityDeepEmbeddingByHeads())
