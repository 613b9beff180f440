"""The fast paths: Triton kernels that stand in for methods of the model's modules, by registered name.

kernels_implementation    "eager" | "triton"                        what `ACCELERATED` holds under that name
experts_implementation    "eager" | "cggr" | the library's own      the library's registry of experts

The modeling file holds all of the mathematics in plain PyTorch, and marks with `@accelerated(name)` the methods that
have a fast path. A fast path calls the plain method wherever it does not apply, so that a model can be moved, cast,
hooked, quantized or adapted at any time. This file imports nothing from the modeling file.

CGGR stands for Contiguous Group GEMM Routing: the tokens of one expert stand together and are multiplied at once.
"""

import contextlib
import functools
import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, StaticCache, StaticLayer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from .kernels.grouped_linear import compute_dtype, takes_grouped_linear
from .kernels.kernel_reference import routing_plan_reference
from .kernels.op_registration import PLAIN_TENSORS, is_ordinary, is_transformed
from .routing_complexity_deep import ROUTING_PLANS, RoutingPlan

try:
    from .kernels.decode_attention import decode_attention
    from .kernels.decode_layer import (
        MAX_EXPERTS,
        MAX_ROWS,
        MAX_WIDTH,
        decode_attend,
        decode_layer_tail,
        decode_plain_tail,
        decode_qkv,
    )
    from .kernels.first_call import compile_layer_kernels
    from .kernels.fused_dynamics import MAX_CONTROLLER, inl_dynamics_block
    from .kernels.layer_tail import MAX_HIDDEN, layer_tail
    from .kernels.mu_guided_qkv import mu_guided_qkv, qk_norm_rope
    from .kernels.routing_plan import MAX_ROUTED, mu_route
    from .kernels.routing_plan import routing_plan as triton_routing_plan
    from .kernels.token_routed_gemm import token_classes, token_routed_mlp
except ImportError:  # Triton is not installed, and "eager" is all there is
    TRITON_DEVICES: tuple[str, ...] = ()
else:
    # In Triton's interpreter the kernels run on the CPU, for tests.
    TRITON_DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)

if TYPE_CHECKING:  # what the mixin of this file is mixed into
    from transformers import PreTrainedModel
else:
    PreTrainedModel = object

logger = logging.get_logger(__name__)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "mu_to_q", "mu_to_k", "mu_to_v")
_BIASED = ("controller_in", "controller_out")  # the only linear modules of ours that have a bias
CUDNN_LENGTH = 1024  # tokens of a row from which on cuDNN's attention may compute "sdpa"
FEW_TOKENS = (2, 16, 32)  # the kernels of few tokens are compiled for up to so many
_ACTIVATION_MODULES = ("torch.nn.modules.activation", "transformers.activations")
# Class of an activation -> the name that the kernels know it by.
_ACTIVATIONS = {type(ACT2FN[name]): name for name in ("swish", "silu", "gelu", "relu")}
COMPILED_MODULES = "torch._dynamo.eval_frame"  # where the class is that torch.compile puts around a module
# First layer of a model -> kind of call -> numbers of tokens whose kernels are compiled.
_COMPILED_AHEAD: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

# kernels_implementation -> name of a marked method -> the function that stands in for it.
ACCELERATED: dict[str, dict[str, Callable]] = {"eager": {}}
# Model -> its CUDA graphs, one dictionary for each kind of pass. `set_cuda_graphs(False)` empties them.
_RECORDINGS: list[weakref.WeakKeyDictionary] = []


def recordings_by_model() -> weakref.WeakKeyDictionary:
    """A place for the CUDA graphs of one kind of pass, by model; they go with the model, or when it may have none."""
    _RECORDINGS.append(weakref.WeakKeyDictionary())
    return _RECORDINGS[-1]


def has_recordings(model) -> bool:
    """Whether any pass of this model is recorded."""
    return any(bool(getattr(recordings.get(model), "recorded", None)) for recordings in _RECORDINGS)


def setting(config, name: str):
    """A field of a configuration. By a dot it would pass through several functions of the library, in every layer."""
    if torch.compiler.is_compiling():  # which cannot trace the short way
        return getattr(config, name)
    return object.__getattribute__(config, "__dict__")[name]


def accelerated(name: str) -> Callable:
    """Mark a method of a module with a `config` as one that `ACCELERATED` may hold a fast path for, under `name`.

    The fast path is called as `fast(plain, module, *args, **kwargs)`. `plain` is the marked method as it was written.
    """

    def mark(plain: Callable) -> Callable:
        @functools.wraps(plain)
        def method(self, *args, **kwargs):
            fast = ACCELERATED[setting(self.config, "_kernels_implementation")].get(name)
            return plain(self, *args, **kwargs) if fast is None else fast(plain, self, *args, **kwargs)

        return method

    return mark


class KernelsMixin(PreTrainedModel):
    """`kernels_implementation` of every Complexity-Deep class, beside the library's `experts_implementation`."""

    takes_cuda_graphs = True  # see `set_cuda_graphs`

    @staticmethod
    def get_correct_kernels_implementation(requested: str | None) -> str:
        """`requested`, or the default of this machine for None; raises `ValueError` for an unknown name."""
        if requested is None:
            return default_kernels_implementation()
        if requested not in ACCELERATED:
            raise ValueError(f"kernels_implementation must be one of {', '.join(ACCELERATED)}, but is {requested!r}.")
        return requested

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        # The library's default, grouped_mm, does not run in every dtype and width.
        if requested_experts is None:
            requested_experts = "cggr" if default_kernels_implementation() == "triton" else "eager"
        return super().get_correct_experts_implementation(requested_experts)

    def set_kernels_implementation(self, kernels_implementation: str) -> None:
        """Choose who computes all but the experts: "eager" (PyTorch) or "triton", which alone has CUDA graphs."""
        for module in self.modules():
            if isinstance(module, KernelsMixin):
                module.config._kernels_implementation = self.get_correct_kernels_implementation(kernels_implementation)

    def set_cuda_graphs(self, enabled: bool) -> None:
        """Choose whether decode steps, repeated forward passes and training steps may be replayed as CUDA graphs.

        By default they may. `False` also frees the memory of the graphs that there are. The choice is not saved.
        """
        for module in self.modules():
            if isinstance(module, KernelsMixin):
                module.takes_cuda_graphs = enabled
                if not enabled:
                    module._free_recordings()

    def _free_recordings(self) -> None:
        for recordings in _RECORDINGS:
            recordings.pop(self, None)

    def _apply(self, fn, recurse=True):
        """What `to`, `cuda` and `cpu` do. Whoever moves a model away from a GPU may need the memory there."""
        before = self.device
        super()._apply(fn, recurse)
        if self.device != before:
            self._free_recordings()
        return self


def default_kernels_implementation() -> str:
    """`"triton"` where there are a CUDA device and Triton, else `"eager"`."""
    if not torch.cuda.is_available():
        return "eager"
    if "triton" not in ACCELERATED:
        logger.warning_once("Triton is not installed: this model runs on plain PyTorch operations, which are slower.")
    return "triton" if "triton" in ACCELERATED else "eager"


def _runs_on_triton(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors."""
    for x in tensors:
        if x.device.type not in TRITON_DEVICES or x.dtype == torch.float64:
            return False
    return not is_transformed()


def is_unhooked(*modules: nn.Module) -> bool:
    """Whether nothing else happens when the modules are called: no offloading, parallel or recording hook."""
    for module in modules:
        state = module.__dict__
        # accelerate and tensor parallelism replace `forward`
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or ("forward" in state and type(module).__module__ != COMPILED_MODULES)
        ):
            return False
    return not _has_any_global_hook()


def _plain_weights(*modules: Any, biased: bool = False) -> list[Tensor] | None:
    """The weights of linear modules, or None if they may not be used directly.

    They may be used where no module has an adapter, quantized weights, or a hook of offloading or parallelism, and all
    have a bias as `biased` says: a caller may have given a module one, or taken it away.
    """
    weights = []
    for module in modules:
        if type(module) is not nn.Linear or not is_unhooked(module):
            return None
        if (module._parameters["bias"] is not None) != biased:
            return None
        weight = module.weight
        if type(weight) not in PLAIN_TENSORS:
            return None
        weights.append(weight)
    return weights


def triton_projections(
    plain: Callable, attention: nn.Module, hidden_states: Tensor, guidance: Tensor | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention's `project` as one product over [hidden states, guidance] and one norm-and-RoPE kernel."""
    names = _PROJECTIONS if guidance is not None else _PROJECTIONS[:3]
    weights = _plain_weights(*(attention._modules[name] for name in names))
    if weights is None or not _runs_on_triton(hidden_states) or not _has_own_norms(attention):
        return plain(attention, hidden_states, guidance, cos, sin)
    qkv = mu_guided_qkv(hidden_states, guidance, weights)
    return _split_heads(attention, qkv, cos, sin)


def _split_heads(attention: nn.Module, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, S, (A + 2K) D] -> query [B, S, A, D], key and value [B, S, K, D], after QK norm and RoPE."""
    heads = qkv.view(*qkv.shape[:-1], -1, attention.head_dim)  # [B, S, A + 2K, D]
    kv_heads = attention.k_proj.out_features // attention.head_dim
    query, key, value = heads.split((heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    query_weight, key_weight, eps = _norm_weights(attention)
    query, key = qk_norm_rope(query, key, query_weight, key_weight, cos, sin, eps)
    return query, key, value


def _has_own_norms(attention: nn.Module) -> bool:
    """Whether the norms of queries and keys are as the model was made with, of one epsilon, or neither exists."""
    norms, origin = (attention.q_norm, attention.k_norm), type(attention).__module__
    if None in norms:
        return norms == (None, None)
    is_own = all(type(norm).__module__ == origin for norm in norms) and is_unhooked(*norms)
    return is_own and norms[0].eps == norms[1].eps


def _norm_weights(attention: nn.Module) -> tuple[Tensor | None, Tensor | None, float]:
    """The weights of the query and the key norm, and their epsilon; None where there is no norm."""
    if attention.q_norm is None:
        return None, None, 0.0
    return attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps


def triton_dynamics(
    plain: Callable, dynamics: nn.Module, hidden_states: Tensor, velocity: Tensor, highway: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward of the dynamics as one fused kernel and its matrix products."""
    if not (setting(dynamics.config, "use_dynamics") and _runs_on_triton(hidden_states) and _is_plain(dynamics)):
        return plain(dynamics, hidden_states, velocity, highway)
    hidden_states, velocity, guidance, highway, mu = inl_dynamics_block(
        hidden_states, velocity, highway, *_dynamics_weights(dynamics)
    )
    return hidden_states, velocity, mu, guidance, highway


def _is_plain(dynamics: nn.Module) -> bool:
    """Whether the linear modules are there and plain: that of mu without a bias, those of the controller with one."""
    linear = dynamics._modules
    controller = [linear.get(name) for name in _BIASED]
    return _plain_weights(linear.get("mu_proj")) is not None and _plain_weights(*controller, biased=True) is not None


def _dynamics_weights(dynamics: nn.Module) -> tuple:
    """What the kernels take of the module, in their order: mu, its projection, the controller, the step size."""
    inner, outer = dynamics.controller_in, dynamics.controller_out
    return dynamics.mu, dynamics.mu_proj.weight, inner.weight, inner.bias, outer.weight, outer.bias, dynamics.dt


def _is_decode_step(attention: nn.Module, hidden_states: Tensor, mask: Tensor | None, cache) -> bool:
    """Whether decode_attention.py computes the attention of this call: one new token per row and no gradient.

    It stands for the library's "sdpa" with a mask of booleans over the keys. The cache of continuous batching, which is
    no `Cache`, needs an attention function of its own.
    """
    return (
        hidden_states.shape[1] == 1
        and not torch.is_grad_enabled()
        and attention.config._attn_implementation == "sdpa"
        and not (attention.training and attention.attention_dropout > 0)
        and (mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1))
        and (cache is None or isinstance(cache, Cache))
        and _runs_on_triton(hidden_states)
    )


def _may_leave_out_cudnn(attention: nn.Module, hidden_states: Tensor) -> bool:
    """Whether PyTorch's "sdpa" has other kernels than cuDNN's for these rows, and would lose little by them."""
    return (
        not torch.compiler.is_compiling()
        and hidden_states.shape[1] < CUDNN_LENGTH
        and attention.config._attn_implementation == "sdpa"
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.backends.cuda.mem_efficient_sdp_enabled()  # which takes any mask
        and torch.backends.cuda.flash_sdp_enabled()  # which takes fewer key heads than queries, as the other does not
        and _runs_on_triton(hidden_states)
    )


@contextlib.contextmanager
def _without_cudnn():
    """On an H100 PyTorch prefers cuDNN, which makes a plan for each new shape. The host makes it while the GPU waits,
    and rows of text have a new length in nearly every step."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def triton_attention(
    plain: Callable,
    attention: nn.Module,
    hidden_states: Tensor,
    guidance: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    cache=None,
    token_ids: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """The forward of attention: for one new token per row, without gradient, and for short rows without cuDNN."""
    if not _is_decode_step(attention, hidden_states, attention_mask, cache):
        arguments = hidden_states, guidance, position_embeddings, attention_mask
        with _without_cudnn() if _may_leave_out_cudnn(attention, hidden_states) else contextlib.nullcontext():
            return plain(attention, *arguments, cache=cache, token_ids=token_ids, **kwargs)
    query, key, value = attention.heads(hidden_states, guidance, position_embeddings, token_ids)
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    attn_output = decode_attention(query, key, value, attention_mask, attention.scaling)  # [B, 1, A, D]
    return attention.o_proj(attn_output.flatten(2)), None


def _is_plain_tree(module: nn.Module, origin: str, dtype: torch.dtype) -> bool:
    """Whether the module and all below it are of ours, linear or an activation, unhooked, with weights of `dtype`.

    `origin` is the name of the modeling file. This runs for every layer of every step, so it looks at each module once.
    """
    kind = type(module)
    if kind is not nn.Linear and kind.__module__ not in (origin, *_ACTIVATION_MODULES):
        return False
    if not is_unhooked(module):
        return False
    for tensors in (module._parameters, module._buffers):
        for x in tensors.values():
            if x is not None and not _is_plain_weight(x, dtype):
                return False
    for name, child in module._modules.items():
        if child is None or (name == "value_embedding" and type(child) is nn.Embedding):  # looked at on its own
            continue
        if type(child) is nn.Linear and (child._parameters["bias"] is None) == (name in _BIASED):
            return False  # a caller has given it one, or taken it away
        if not _is_plain_tree(child, origin, dtype):
            return False
    return True


def _is_plain_weight(weight: Tensor, dtype: torch.dtype) -> bool:
    return type(weight) in PLAIN_TENSORS and weight.dtype == dtype and weight.is_contiguous()


def _takes_decode_kernels(layer: nn.Module, hidden_states: Tensor, mask: Tensor | None, cache) -> bool:
    """Whether decode_layer.py computes this layer: few rows of one new token, no gradient, plain modules.

    Such a layer has dynamics, or neither these nor mu. The kernels pass over the forward of every module of the layer
    but `mu_norm`, so that each must be plain.
    """
    attention, dynamics, mlp = layer.self_attn, layer.dynamics, layer.mlp
    experts: Any = getattr(mlp, "experts", None)
    parts = (attention, mlp, experts) if dynamics is None else (attention, dynamics, mlp, experts)
    if any(type(part).__module__ != type(layer).__module__ for part in parts):
        return False  # None, or the class of an adapter or of the caller, which need not have the attributes of ours
    # A compiled program holds for what was asked while it was traced. The number of rows is asked about in steps of one
    # token only, so that a program for longer rows holds for any number of them.
    if not _is_decode_step(attention, hidden_states, mask, cache) or len(hidden_states) > MAX_ROWS:
        return False
    origin, dtype = type(layer).__module__, hidden_states.dtype
    return (
        (dynamics is None or layer.config.use_dynamics)
        and activation_of(experts) is not None
        and _has_own_norms(attention)
        and _is_plain_embedding(attention.value_embedding, dtype)
        and layer.config._experts_implementation == "cggr"
        and not getattr(experts, "_is_expert_parallel", False)
        and not torch.is_autocast_enabled(hidden_states.device.type)
        and _is_like_experts(mlp.shared_expert, experts, origin)
        and all(
            _is_plain_tree(part, origin, dtype)
            for part in layer._modules.values()
            if part is not None and part is not layer.mu_norm
        )
        and _fits_decode_kernels(attention, dynamics, mlp)
    )


def _is_plain_embedding(embedding: nn.Module | None, dtype: torch.dtype) -> bool:
    """Whether a call of the embedding is no more than a look-up in its weight; also if there is none."""
    if embedding is None:
        return True
    is_own = type(embedding) is nn.Embedding and is_unhooked(embedding) and embedding.max_norm is None
    return is_own and _is_plain_weight(embedding.weight, dtype)


def _is_like_experts(shared: nn.Module | None, experts: nn.Module, origin: str) -> bool:
    """Whether a shared expert, if there is one, is of our class and has the activation of the experts."""
    return shared is None or (type(shared).__module__ == origin and activation_of(shared) == activation_of(experts))


def _fits_decode_kernels(attention: nn.Module, dynamics: nn.Module | None, mlp: nn.Module) -> bool:
    """Whether the sizes are ones that the decode kernels take. All modules are plain: others may not have these."""
    widths = [attention.q_proj.in_features, attention.q_proj.out_features, mlp.experts.down_proj.shape[2]]
    if mlp.shared_expert is not None:
        widths.append(mlp.shared_expert.down_proj.in_features)
    return (
        max(widths) <= MAX_WIDTH
        and (dynamics is None or dynamics.controller_in.out_features <= MAX_CONTROLLER)
        and (mlp.mu_router is None or mlp.experts.num_experts <= MAX_EXPERTS)
    )


def plain_static_layer(cache: Cache | None, layer_idx: int) -> StaticLayer | None:
    """A layer of a static cache whose update is no more than writing keys and values in place, or None."""
    if not isinstance(cache, StaticCache) or type(cache).update is not StaticCache.update or cache.offloading:
        return None
    layer = cache.layers[layer_idx]
    return layer if type(layer) is StaticLayer and layer.is_initialized else None


def _decode_cache_layer(
    attention: nn.Module, cache: Cache | None, mask: Tensor | None, hidden_states: Tensor
) -> StaticLayer | None:
    """The static cache that the decode kernels write, if it and the mask fit the rows and the dtype of the step."""
    layer = plain_static_layer(cache, attention.layer_idx)
    if layer is None or mask is None:
        return None
    rows, length = layer.keys.shape[0], layer.keys.shape[2]
    has_rows = rows == hidden_states.shape[0] and mask.shape[0] in (1, rows) and mask.shape[1:] == (1, 1, length)
    return layer if has_rows and layer.keys.dtype == hidden_states.dtype else None


def _decode_heads(
    attention: nn.Module, qkv: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache, hidden_states: Tensor
) -> Tensor:
    """qkv [B, (A + 2K) D] of one new token per row -> attention's heads side by side [B, A D]."""
    layer = _decode_cache_layer(attention, cache, mask, hidden_states)
    if layer is not None:
        stored = layer.keys, layer.values, layer.cumulative_length
        return decode_attend(qkv, *_norm_weights(attention), cos, sin, *stored, mask, attention.scaling)
    heads = _split_heads(attention, qkv[:, None], cos, sin)
    query, key, value = (states.transpose(1, 2) for states in heads)  # [B, heads, 1, D]
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    return decode_attention(query, key, value, mask, attention.scaling).flatten(1)


def _compile_ahead(layer: nn.Module, hidden_states: Tensor) -> None:
    """Compile the kernels of a model together before its first call, as one after another takes many seconds.

    They are those of this number of tokens and of a decode step. The first call with a number of tokens that takes
    other kernels compiles those of all numbers, so that rows of any further length find theirs compiled.
    """
    if hidden_states.device.type != "cuda" or not _runs_on_triton(hidden_states):
        return
    # A dispatch mode would see what is computed here, and other weights than plain ones launch other kernels.
    if not is_ordinary((hidden_states,)) or _plain_weights(layer.self_attn.q_proj) is None:
        return
    (rows, length), trains = hidden_states.shape[:2], torch.is_grad_enabled()
    experts = layer.config.num_experts
    counts = token_classes(experts)
    here = [count for count in counts if count <= rows * length][-1:]
    if not here and (trains or length > 1):
        here = [next(count for count in FEW_TOKENS if rows * length <= count)]
    kind = hidden_states.dtype, torch.is_autocast_enabled("cuda"), hidden_states.device.index, trains, trains or rows
    done = _COMPILED_AHEAD.setdefault(layer, {}).setdefault(kind, [])
    is_known = bool(done) and all(count in done for count in here)
    if is_known or torch.cuda.is_current_stream_capturing():
        return
    missing = sorted({*counts, *here} - {*done}) if done else here
    compile_layer_kernels(
        layer.config,
        missing,
        0 if trains or done else rows,
        hidden_states.dtype,
        torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden_states.dtype,
        hidden_states.device,
        trains=trains,
        experts=hasattr(layer.mlp, "experts") and layer.config._experts_implementation == "cggr",
    )
    done += [0, *missing]  # with 0, so that it is not empty where nothing was missing


def _takes_layer_tail(layer: nn.Module, hidden_states: Tensor) -> bool:
    """Whether layer_tail.py computes what this layer does after attention: eager mode, and plain modules.

    It passes over the forward of every module after attention.
    """
    modules = layer._modules
    dynamics, mlp, norm = modules.get("dynamics"), modules["mlp"], modules["post_attention_layernorm"]
    if (
        dynamics is None
        or not setting(layer.config, "use_dynamics")
        or "experts" not in mlp._modules
        or mlp._modules.get("shared_expert") is not None
    ):
        return False
    origin = type(layer).__module__
    return (
        all(type(module).__module__ == origin for module in (dynamics, mlp, norm))
        and is_unhooked(dynamics, mlp, norm)
        and _runs_expert_kernels(mlp, hidden_states)
        and is_ordinary((hidden_states, mlp.experts.gate_up_proj))
        and _is_plain(dynamics)
        and hidden_states.shape[-1] <= MAX_HIDDEN
        and dynamics.controller_in.out_features <= MAX_CONTROLLER
    )


def _attention_and_tail(
    layer: nn.Module,
    hidden_states: Tensor,
    velocity: Tensor,
    guidance: Tensor | None,
    highway: Tensor | None,
    expert_ids: Tensor,
    routing_plan: RoutingPlan | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward of a decoder layer: attention by its module, the rest by layer_tail.py."""
    normed = layer.input_layernorm(hidden_states)
    h, _ = layer.self_attn(normed, layer.guide(guidance), **kwargs)
    dynamics, experts, router = layer.dynamics, layer.mlp.experts, layer.mlp.mu_router
    weights = [*_dynamics_weights(dynamics)[:6], experts.gate_up_proj, experts.down_proj]
    weights.append(None if router is None else router.weight)
    dtype = compute_dtype(weights[-2])
    h, velocity, highway, *weights = (
        None if x is None else x.to(dtype).contiguous() for x in (h, velocity, highway, *weights)
    )
    norm = layer.post_attention_layernorm
    base_logit = 0.0 if router is None else router.base_logit
    settings = dynamics.dt, norm.eps, base_logit, activation_of(experts)
    plan = routing_plan if router is None else None
    ids = expert_ids.reshape(-1)
    arguments = weights[:6], norm.weight, weights[6:8], weights[8], ids, plan, settings
    return layer_tail(hidden_states.contiguous(), h, velocity, highway, *arguments)


def triton_layer(
    plain: Callable,
    layer: nn.Module,
    hidden_states: Tensor,
    velocity: Tensor,
    guidance: Tensor | None,
    highway: Tensor | None,
    expert_ids=None,
    **kwargs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward of a decoder layer; a step of one new token in each of few rows runs in a few fused kernels."""
    mask, cache = kwargs.get("attention_mask"), kwargs.get("cache")
    if not torch.compiler.is_compiling() and getattr(layer.self_attn, "layer_idx", None) == 0:
        _compile_ahead(layer, hidden_states)
    if not _takes_decode_kernels(layer, hidden_states, mask, cache):
        states = hidden_states, velocity, guidance, highway
        if _takes_layer_tail(layer, hidden_states):
            return _attention_and_tail(layer, *states, expert_ids, **kwargs)
        return plain(layer, *states, expert_ids, **kwargs)
    attention, dynamics, experts, router = layer.self_attn, layer.dynamics, layer.mlp.experts, layer.mlp.mu_router
    B, _, H = hidden_states.shape  # one token in each row; a routing plan would not be worth following
    flat = lambda x: None if x is None else x.reshape(B, -1).contiguous()  # noqa: E731
    guided_by = layer.guide(guidance)
    is_guided = guided_by is not None
    qkv = decode_qkv(
        flat(hidden_states),
        layer.input_layernorm.weight,
        layer.input_layernorm.eps,
        flat(guided_by),
        attention.q_proj.weight,
        attention.k_proj.weight,
        attention.v_proj.weight,
        attention.mu_to_q.weight if is_guided else None,
        attention.mu_to_k.weight if is_guided else None,
        attention.mu_to_v.weight if is_guided else None,
        *_value_weights(attention, kwargs),
    )
    cos, sin = kwargs["position_embeddings"]
    heads = _decode_heads(attention, qkv, cos, sin, mask, cache, hidden_states)
    norm, shared = layer.post_attention_layernorm, layer.mlp.shared_expert
    weights = [experts.gate_up_proj, experts.down_proj, activation_of(experts)]
    if shared is not None:
        weights += [shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight]
    ids, output = expert_ids.flatten().contiguous(), attention.o_proj.weight
    if dynamics is None:
        out = decode_plain_tail(heads, flat(hidden_states), ids, output, norm.weight, norm.eps, *weights)
        return out.view(B, 1, H), velocity, guidance, highway
    states = decode_layer_tail(
        heads,
        flat(hidden_states),
        flat(velocity),
        flat(highway),
        ids,
        output,
        *_dynamics_weights(dynamics),
        norm.weight,
        norm.eps,
        None if router is None else router.weight,
        0.0 if router is None else router.base_logit,
        *weights,
    )
    return tuple(x.view(B, 1, H) for x in states)


def _value_weights(attention: nn.Module, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Ids, gates and vectors of value embeddings for `decode_qkv`; nothing where there are none."""
    if attention.value_embedding is None:
        return ()
    return kwargs["token_ids"].flatten().contiguous(), attention.value_gate.weight, attention.value_embedding.weight


def triton_mlp(
    plain: Callable, mlp: nn.Module, hidden_states: Tensor, mu: Tensor | None, expert_ids: Tensor, routing_plan=None
) -> tuple[Tensor, Tensor]:
    """The forward of the token-routed MLP, with mu's choice of experts in one kernel.

    A compiler fuses the small operations of the plain forward itself.
    """
    if not _runs_expert_kernels(mlp, hidden_states):
        return plain(mlp, hidden_states, mu, expert_ids, routing_plan)
    experts, router, chosen = mlp.experts, mlp.mu_router, expert_ids.reshape(-1)
    if router is not None and mu is not None:
        mu = mu.detach().reshape(-1, mu.shape[-1]).contiguous()
        chosen = mu_route(mu, router.weight.to(mu.dtype).contiguous(), chosen.contiguous(), router.base_logit)
    out = cggr_experts_forward(experts, hidden_states, chosen, None, routing_plan).to(hidden_states.dtype)
    if mlp.shared_expert is not None:
        out = out + mlp.shared_expert(hidden_states)
    return out, chosen.view(expert_ids.shape)


def _runs_expert_kernels(mlp: nn.Module, hidden_states: Tensor) -> bool:
    """Whether kernels stand for the router by mu and the experts: in eager mode, with "cggr", for plain modules."""
    experts, router, origin = mlp._modules["experts"], mlp._modules.get("mu_router"), type(mlp).__module__
    return (
        not torch.compiler.is_compiling()
        and type(experts).__module__ == origin  # not an adapter's or a parametrization's class, with other attributes
        and experts.config._experts_implementation == "cggr"
        and is_unhooked(experts)
        and activation_of(experts) is not None
        and _takes_cggr(experts, hidden_states)
        and (
            router is None
            or (
                type(router).__module__ == origin
                and is_unhooked(router)
                and not router.learns
                and router.num_experts <= MAX_ROUTED
            )
        )
    )


def activation_of(experts: nn.Module) -> str | None:
    """The name by which kernels know what experts apply to their gate, or None where they cannot stand for it."""
    module = experts.act_fn
    return _ACTIVATIONS.get(type(module)) if is_unhooked(module) else None


def _takes_cggr(experts: nn.Module, hidden_states: Tensor) -> bool:
    """Whether the grouped GEMM takes the weights of these experts: all on this rank, and not quantized."""
    weights = experts.gate_up_proj, experts.down_proj
    is_split = getattr(experts, "_is_expert_parallel", False)
    return not is_split and _runs_on_triton(hidden_states, weights[0]) and takes_grouped_linear(*weights)


def cggr_experts_forward(
    experts: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor | None,
    routing_plan: RoutingPlan | None = None,
) -> Tensor:
    """The experts by the Triton grouped GEMM; quantized experts, and those of other ranks, go to the plain forward.

    hidden_states [..., H] of T tokens; top_k_index and top_k_weights [T, 1], because every token has one expert, or
    weights None for ones. Returns [..., H].
    """
    gate_up_proj, down_proj, activation = experts.gate_up_proj, experts.down_proj, activation_of(experts)
    if activation is None or not _takes_cggr(experts, hidden_states):
        plain = type(experts).forward.__wrapped__  # as it was before `use_experts_implementation`
        plan = {"routing_plan": routing_plan} if routing_plan is not None else {}
        return plain(experts, hidden_states, top_k_index, top_k_weights, **plan)
    if routing_plan is None:
        routing_plan = _cggr_plan(top_k_index.flatten(), experts.num_experts)
    dtype = compute_dtype(gate_up_proj)
    weights = gate_up_proj.to(dtype), down_proj.to(dtype)
    out = token_routed_mlp(hidden_states.to(dtype), *weights, *routing_plan, activation)
    # The routing weights are ones. They carry a gradient only for a router that learns.
    return out * top_k_weights.to(dtype) if top_k_weights is not None and top_k_weights.requires_grad else out


def _cggr_plan(expert_ids: Tensor, num_experts: int) -> RoutingPlan:
    make_plan = triton_routing_plan if _runs_on_triton(expert_ids) else routing_plan_reference
    return RoutingPlan(*make_plan(expert_ids, num_experts))


if TRITON_DEVICES:
    ACCELERATED["triton"] = {
        "projections": triton_projections,
        "attention": triton_attention,
        "dynamics": triton_dynamics,
        "layer": triton_layer,
        "mlp": triton_mlp,
    }
    ROUTING_PLANS["cggr"] = _cggr_plan
    ALL_EXPERTS_FUNCTIONS.register("cggr", cggr_experts_forward)
