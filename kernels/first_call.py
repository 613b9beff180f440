"""The kernels of a decoder layer, compiled all at once before its first call.

Triton compiles a kernel when it is first launched, which takes about a second, and a layer has some twenty. Their
compilers work outside of Python's lock, so that many can run at a time. A kernel is compiled for dtypes, for sizes of
the model, and for tiles that depend on the number of tokens. `token_classes` has a number for each choice of tiles.
"""

import torch
from torch import Tensor

from .decode_attention import launch_decode_attention
from .decode_layer import MAX_EXPERTS, MAX_ROWS, decode_attend, decode_layer_tail, decode_plain_tail, decode_qkv
from .fused_dynamics import MAX_CONTROLLER, _inl_dynamics_block, _inl_dynamics_block_backward
from .kernel_launch import compiling_ahead
from .layer_tail import MAX_HIDDEN, _add_norm, _add_norm_backward
from .mu_guided_qkv import _mu_guided_qkv, _qk_norm_rope, _qk_norm_rope_backward
from .routing_plan import MAX_ROUTED, mu_route, routing_plan
from .token_routed_gemm import token_routed_mlp_backward, token_routed_mlp_forward


class _Layer:
    """Operators of one layer on tensors without content, on the device "meta"."""

    def __init__(self, config, dtype: torch.dtype, compute_dtype: torch.dtype):
        self.config, self.dtype, self.compute = config, dtype, compute_dtype
        self.hidden = config.hidden_size
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = self.hidden // self.heads
        self.experts, self.width = config.num_experts, config.moe_intermediate_size
        self.controller = config.dynamics_controller_hidden
        self.kv = self.kv_heads * self.head_dim

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.compute, device="meta")

    def projections(self) -> tuple[Tensor, ...]:
        return tuple(self.empty(rows, self.hidden) for rows in (self.hidden, self.kv, self.kv) * 2)

    def guidances(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """What attention takes besides x, of its shape: nothing in layer 0, and in all layers of some models."""
        return (x, None) if self.config.use_mu_guidance else (None,)

    def norm_and_tables(self, length: int) -> tuple:
        """Weights of the norms of queries and keys, cos, sin and eps."""
        weight = self.empty(self.head_dim, dtype=self.dtype) if self.config.use_qk_norm else None
        tables = (self.empty(1, length, self.head_dim, dtype=self.dtype) for _ in range(2))
        return weight, weight, *tables, self.config.qk_norm_eps if self.config.use_qk_norm else 0.0

    def dynamics_weights(self) -> tuple[Tensor, ...]:
        """Those of `inl_dynamics_block`, from mu on."""
        hidden, controller = self.hidden, self.controller
        shapes = (hidden,), (hidden, hidden), (controller, 2 * hidden), (controller,), (3 * hidden, controller)
        return *(self.empty(*shape) for shape in shapes), self.empty(3 * hidden)

    def expert_weights(self) -> tuple[Tensor, Tensor]:
        gate_up = self.empty(self.experts, 2 * self.width, self.hidden)
        return gate_up, self.empty(self.experts, self.hidden, self.width)

    def attention(self, tokens: int, trains: bool) -> None:
        x = self.empty(tokens, self.hidden)
        for given in self.guidances(x):
            weights = self.projections()
            _mu_guided_qkv.function(x, given, *weights[:3], *(weights[3:] if given is not None else (None,) * 3))
        heads = self.empty(1, tokens, self.heads + 2 * self.kv_heads, self.head_dim)
        query, key = heads[:, :, : self.heads], heads[:, :, self.heads : self.heads + self.kv_heads]
        arguments = self.norm_and_tables(tokens)
        _qk_norm_rope.function(query, key, *arguments)
        if trains:
            grads = (self.empty(1, x.shape[1], tokens, self.head_dim).transpose(1, 2) for x in (query[0], key[0]))
            _qk_norm_rope_backward.function(*grads, query, key, *arguments)

    def dynamics(self, tokens: int, trains: bool) -> None:
        weights = self.dynamics_weights()
        h, v, highway, mu = (self.empty(tokens, self.hidden) for _ in range(4))
        z_pre, z = (self.empty(tokens, self.controller) for _ in range(2))
        for given in (highway, None):
            _inl_dynamics_block.function(h, v, given, *weights, self.config.dynamics_dt)
        if trains:
            grads = h, v, h, highway, None  # of a layer with another one above; the last layer gets that of h alone
            saved = h, v, mu, z_pre, z, *weights[1:3], *weights[4:]
            for given, has_highway in ((grads, True), (grads, False), ((h, None, None, None, None), True)):
                _inl_dynamics_block_backward.function(*given, *saved, self.config.dynamics_dt, has_highway)

    def norm(self, trains: bool) -> None:
        x, h = self.empty(1, self.hidden, dtype=self.dtype), self.empty(1, self.hidden)
        weight, rstd = self.empty(self.hidden, dtype=self.dtype), self.empty(1, dtype=torch.float32)
        _add_norm(x, h, weight, self.config.rms_norm_eps)
        if trains:
            _add_norm_backward.function(h, x, x, weight, rstd)

    def route(self, tokens: int) -> None:
        if self.config.use_mu_routing and self.experts <= MAX_ROUTED:
            mu, router = self.empty(tokens, self.hidden), self.empty(self.experts, self.hidden)
            mu_route.function(mu, router, self.empty(tokens, dtype=torch.int64), self.config.mu_router_base_logit)
        routing_plan.function(self.empty(tokens, dtype=torch.int64), self.experts)

    def experts_of(self, tokens: int, trains: bool) -> None:
        x, weights, activation = self.empty(tokens, self.hidden), self.expert_weights(), self.config.hidden_act
        plan = self.empty(tokens, dtype=torch.int32), self.empty(self.experts + 1, dtype=torch.int32)
        token_routed_mlp_forward.function(x, *weights, *plan, activation, trains)
        if trains:
            gate_up = self.empty(tokens, 2 * self.width)
            token_routed_mlp_backward.function(x, x, gate_up, *weights, *plan, activation, True, True, True)

    def cache(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and mask of a static cache whose length no kernel is compiled for."""
        shape = rows, self.kv_heads, 1024, self.head_dim
        return self.empty(*shape), self.empty(*shape), self.empty(1, 1, 1, shape[2], dtype=torch.bool)

    def decode(self, rows: int) -> None:
        """A step of one new token in each of few rows, by the kernels of a whole layer."""
        x, weights = self.empty(rows, self.hidden), self.projections()
        norm, eps = self.empty(self.hidden), self.config.rms_norm_eps
        query_norm, key_norm, cos, sin, norm_eps = self.norm_and_tables(1)
        keys, values, mask = self.cache(rows)
        used, ids = self.empty(dtype=torch.int64), self.empty(rows, dtype=torch.int64)
        mlp = [*self.expert_weights(), self.config.hidden_act]
        if width := self.config.shared_expert_intermediate_size:
            mlp += [self.empty(*shape) for shape in ((width, self.hidden), (width, self.hidden), (self.hidden, width))]
        layers: list[tuple[Tensor, ...]] = [()]  # those without value embeddings, and those with
        if self.config.value_embedding_layers:
            gate, table = self.empty(self.kv_heads, self.hidden), self.empty(self.config.vocab_size, self.kv)
            layers.append((ids, gate, table))
        for given in self.guidances(x):
            guided = weights[3:] if given is not None else (None,) * 3
            for embedded in layers:
                decode_qkv.function(x, norm, eps, given, *weights[:3], *guided, *embedded)
        if self.config.use_dynamics:
            dynamics = *self.dynamics_weights(), self.config.dynamics_dt
            router = self.empty(self.experts, self.hidden) if self.config.use_mu_routing else None
            base_logit = self.config.mu_router_base_logit if self.config.use_mu_routing else 0.0
            for highway in (x, None):
                states = x, x, x, highway, ids, weights[0]
                decode_layer_tail.function(*states, *dynamics, norm, eps, router, base_logit, *mlp)
        else:
            decode_plain_tail.function(x, x, ids, weights[0], norm, eps, *mlp)
        qkv, scale = self.empty(rows, self.hidden + 2 * self.kv), self.head_dim**-0.5
        decode_attend.function(qkv, query_norm, key_norm, norm_eps, cos, sin, keys, values, used, mask, scale)

    def decode_attention(self, rows: int) -> None:
        keys, values, mask = self.cache(rows)
        query = self.empty(rows, 1, self.heads, self.head_dim).transpose(1, 2)
        launch_decode_attention(query, keys, values, mask, self.head_dim**-0.5)


def compile_layer_kernels(
    config,
    counts: list[int],
    rows: int,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device: torch.device,
    trains: bool,
    experts: bool,
) -> None:
    """Compile what the layers of a model will launch.

    Args:
        config: a ComplexityDeepConfig. counts: numbers of tokens. rows: of a batch that is to be decoded, or 0.
        dtype: of the residual stream. compute_dtype: that of autocast, where it is on, else `dtype`. device: CUDA.
        trains: whether with gradients, and then without decoding. experts: whether the experts run on these kernels.
    """
    layer = _Layer(config, dtype, compute_dtype)
    has_dynamics = config.use_dynamics and layer.controller <= MAX_CONTROLLER
    with torch.cuda.device(device), torch.no_grad(), compiling_ahead():
        if layer.hidden <= MAX_HIDDEN:
            layer.norm(trains)
        for tokens in [*counts, rows] if rows else counts:
            layer.attention(tokens, trains)
            if has_dynamics:
                layer.dynamics(tokens, trains)
            if experts:
                layer.route(tokens)
                layer.experts_of(tokens, trains)
        if rows:
            layer.decode_attention(rows)
            is_routed_by_few = not config.use_mu_routing or config.num_experts <= MAX_EXPERTS
            if rows <= MAX_ROWS and experts and is_routed_by_few and (has_dynamics or not config.has_mu):
                layer.decode(rows)
