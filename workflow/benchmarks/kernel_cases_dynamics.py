"""Kernel cases of `scripts/benchmark.py kernels`: dynamics and mu-guided QKV beside PyTorch.

Every function returns rows {"op", "variant", "tokens", "pass", "ms", "low", "high", "bytes"}: median and 20/80 %
quantiles in milliseconds, and the memory a forward leaves behind for its backward. All are GPU times: replays of a CUDA
graph, since launches from Python take longer than most of these kernels; few tokens run over several weight sets, so
that the cache is not measured.
"""

import functools

import torch
import torch.nn.functional as F

from complexity_deep.kernels.fused_dynamics import inl_dynamics_block
from complexity_deep.kernels.kernel_reference import inl_dynamics_block_reference, qk_norm_rope_reference
from complexity_deep.kernels.mu_guided_qkv import mu_guided_qkv, qk_norm_rope
from complexity_deep.workflow.benchmarks.kernel_timing import normal, time_graph

HEADS, KEY_HEADS, HEAD_DIM, EPS = 16, 8, 128, 1e-6


def saved_bytes(function, inputs, tokens):
    """Bytes of the tensors a forward saves for its backward, parameters (what has no token axis) left out."""
    parameters = {x.untyped_storage().data_ptr() for x in inputs if x is not None and tokens not in x.shape}
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = function(*inputs)  # alive while counting, so that no address is used twice
    del outputs
    return sum(size for address, size in saved.items() if address not in parameters)


def row(op, variant, tokens, what, times, bytes_=None):
    ms, low, high = times
    names = {"op": op, "variant": variant, "tokens": tokens, "pass": what}
    return names | {"ms": ms, "low": low, "high": high, "bytes": bytes_}


def on_side_stream(function):
    """Graphs with a backward need all that autograd does on the stream of the capture."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with torch.cuda.stream(torch.cuda.Stream()):
            return function(*args, **kwargs)

    return wrapped


def measure(op, variants, inputs, outputs_shape, tokens, backward=True):
    """Forward (no grad) and forward + backward (gradients of every input, random upstream) of each variant."""
    rows = []
    for name, function in variants.items():
        with torch.no_grad():
            rows.append(row(op, name, tokens, "forward", time_graph([functools.partial(function, *inputs)])))
        if backward:
            leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
            upstream = [normal(*shape) for shape in outputs_shape]
            kept = saved_bytes(function, leaves, tokens)
            step = functools.partial(forward_backward, function, leaves, upstream)
            rows.append(row(op, name, tokens, "forward+backward", time_graph([step]), kept))
    return rows


def forward_backward(function, leaves, upstream):
    outputs = [x for x in function(*leaves) if x is not None]
    torch.autograd.grad(outputs, [x for x in leaves if x is not None], upstream, allow_unused=True)


def block_inputs(tokens, H, C):
    rows = [normal(tokens, H) for _ in range(3)]
    shapes = [(H,), (H, H), (C, 2 * H), (C,), (3 * H, C), (3 * H,)]
    return [*rows, *(normal(*shape, scale=0.02) for shape in shapes)]


@on_side_stream
def dynamics_rows(tokens=16384, H=2048, C=64):
    """The dynamics module at a training size."""
    this = lambda *a: inl_dynamics_block(*a, 0.1)  # noqa: E731
    twin = lambda *a: inl_dynamics_block_reference(*a, 0.1)  # noqa: E731
    variants = {"this": this, "eager": twin, "compiled": torch.compile(twin, dynamic=False)}
    return measure("dynamics block + highway", variants, block_inputs(tokens, H, C), [(tokens, H)] * 5, tokens)


@on_side_stream
def dynamics_decode_rows(tokens=1, H=2048, C=64, sets=8):
    all_inputs = [block_inputs(tokens, H, C) for _ in range(sets)]
    rows = []
    with torch.no_grad():
        for name, function in {"this": inl_dynamics_block, "eager": inl_dynamics_block_reference}.items():
            times = time_graph([functools.partial(function, *inputs, 0.1) for inputs in all_inputs])
            rows.append(row("dynamics block + highway", name, tokens, "graph", times))
    return rows


def qkv_inputs(tokens, H):
    q, kv = HEADS * HEAD_DIM, KEY_HEADS * HEAD_DIM
    rows = [normal(1, tokens, H), normal(1, tokens, H)]
    angle = torch.randn(1, tokens, HEAD_DIM, device="cuda")
    tables = [angle.cos().bfloat16(), angle.sin().bfloat16()]
    weights = [normal(n, H, scale=0.02) for n in (q, kv, kv) * 2]
    return [*rows, normal(HEAD_DIM), normal(HEAD_DIM), *tables, *weights]


def _heads(qkv, q_weight, k_weight, cos, sin, op):
    q, kv = HEADS * HEAD_DIM, KEY_HEADS * HEAD_DIM
    query, key, value = qkv.split((q, kv, kv), dim=-1)
    query, key = query.unflatten(-1, (HEADS, HEAD_DIM)), key.unflatten(-1, (KEY_HEADS, HEAD_DIM))
    return *op(query, key, q_weight, k_weight, cos, sin, EPS), value


def qkv_this(x, m, q_weight, k_weight, cos, sin, *weights):
    return _heads(mu_guided_qkv(x, m, weights), q_weight, k_weight, cos, sin, qk_norm_rope)


def qkv_six_linears(x, m, q_weight, k_weight, cos, sin, *weights):
    qkv = torch.cat([F.linear(x, weights[i]) + F.linear(m, weights[i + 3]) for i in range(3)], -1)
    return _heads(qkv, q_weight, k_weight, cos, sin, qk_norm_rope_reference)


@on_side_stream
def qkv_rows(tokens=16384, H=2048):
    """Projection, QK norm and RoPE at a training size; the bare GEMM over ready-made operands is the ceiling."""
    inputs = qkv_inputs(tokens, H)
    q, kv = HEADS * HEAD_DIM, KEY_HEADS * HEAD_DIM
    shapes = [(1, tokens, HEADS, HEAD_DIM), (1, tokens, KEY_HEADS, HEAD_DIM), (1, tokens, kv)]
    op, x, weight = "mu qkv + norm + rope", normal(tokens, 2 * H), normal(q + 2 * kv, 2 * H, scale=0.02)
    bare = lambda *_: F.linear(x, weight)  # noqa: E731
    rows = measure(op, {"bare GEMM": bare}, inputs, [], tokens, False)
    variants = {"this": qkv_this, "eager": qkv_six_linears, "compiled": torch.compile(qkv_six_linears, dynamic=False)}
    rows += measure(op, variants, inputs, shapes, tokens)
    rows += measure(op, {"bare GEMM again": bare}, inputs, [], tokens, False)
    qkv = normal(1, tokens, q + 2 * kv)
    parts = [qkv, *inputs[2:6]]
    this = lambda *a: _heads(*a, qk_norm_rope)[:2]  # noqa: E731
    twin = torch.compile(lambda *a: _heads(*a, qk_norm_rope_reference)[:2], dynamic=False)
    return rows + measure("qk norm + rope", {"this": this, "compiled": twin}, parts, shapes[:2], tokens)


@on_side_stream
def qkv_decode_rows(tokens=1, H=2048, sets=4):
    all_inputs = [qkv_inputs(tokens, H) for _ in range(sets)]
    only_projection = {
        "this": lambda x, m, *rest: mu_guided_qkv(x, m, rest[4:]),
        "six linears": lambda x, m, *rest: [F.linear(x, rest[4 + i]) + F.linear(m, rest[7 + i]) for i in range(3)],
    }
    rows = []
    with torch.no_grad():
        for op, variants in {
            "mu qkv": only_projection, "mu qkv + norm + rope": {"this": qkv_this, "six linears": qkv_six_linears}
        }.items():  # fmt: skip
            for name, function in variants.items():
                times = time_graph([functools.partial(function, *inputs) for inputs in all_inputs])
                rows.append(row(op, name, tokens, "graph", times))
    return rows
