"""Mu-guided QKV in Triton: the six projections as one product, then QK norm and RoPE in one pass.

T tokens (batch B * sequence S), H hidden size, A query heads, K key/value heads, D head dim, N = (A + 2K) D.

    qkv = x [Wq ‖ Wk ‖ Wv]ᵀ + m [Uq ‖ Uk ‖ Uv]ᵀ            [T, N]; m the guidance; W, U stored [out, in], ‖ stacks rows
    n   = w * u / sqrt(mean(u², last axis) + eps)           u one head of q or k; n = u where there is no weight w
    y   = n * cos + [-n_second ‖ n_first] * sin             rotate-half RoPE

`mu_guided_qkv` is the first line, one inner axis of 2H. For few tokens, mu_guided_qkv_few_kernel reads all six weights
where they lie; the library's GEMM would want them joined. For many tokens on Hopper there is mu_guided_qkv_kernel, a
TMA GEMM that walks x and then m without joining them. All else goes to the library's GEMM. Saved for backward: x, m and
the weights.

`qk_norm_rope` is the other two lines and equals `qk_norm_rope_reference`. It reads q and k as strided views of qkv and
writes [B, S, heads, D]; a program takes a few tokens with all their heads, so cos and sin are read once. It computes in
fp32 and rounds once. Saved for backward: the views of q and k; the norm is recomputed. The gradients of the two norm
weights grow in registers and are summed over programs in a fixed order (no atomics).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # the guard lets a checkpoint that ships this file load where there is no Triton
    raise

from .kernel_launch import (
    cdiv,
    device_properties,
    inner_contiguous,
    kernel,
    next_power_of_2,
    on_its_device,
    pdl_options,
    strides_of,
    wait,
)
from .kernel_reference import qk_norm_rope_reference
from .op_registration import custom_op, differentiable_gradients

FEW_TOKENS = 32  # up to here reading the weights is all that takes time
# From here on our GEMM is faster than the library's two: 66 against 73 us at 1024 tokens, 734 against 842 us at 16384
# (H200).
MANY_TOKENS = 1024
# Programs that walk over the tokens, by sweep on an H200; fixed, so that results do not depend on the device. One warp
# each: a token's heads are 6 to 12 KB, and more warps exchange more than they load.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 65535, 2112
STRIDES = [f"{x}_stride_{dim}" for x in ("q", "k", "dq", "dk") for dim in "bsa"]  # of the kernels of qk_norm_rope


@triton.jit
def _dot_rows(acc, x_ptr, w_ptr, o_t, o_n, T, N, H, BK: tl.constexpr):
    """acc [BT, BN] += x [BT, H] w[o_n]ᵀ, w row-major [N, H]."""
    o_k = tl.arange(0, BK)
    x_at = x_ptr + o_t[:, None] * H + o_k[None, :]  # [BT, BK]
    w_at = w_ptr + o_n[:, None].to(tl.int64) * H + o_k[None, :]  # [BN, BK]
    for k in range(0, H, BK):
        m_k = (o_k < H - k)[None, :]
        x = tl.load(x_at + k, mask=(o_t < T)[:, None] & m_k, other=0.0)
        w = tl.load(w_at + k, mask=(o_n < N)[:, None] & m_k, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def locate_projection(Q, KV, BN: tl.constexpr):
    """The part of this program: whether it has rows of q, and whether of q or k, neither being v; its block of BN rows;
    the column of out where its projection begins; the number of rows of that projection."""
    pid = tl.program_id(0)
    q_blocks, kv_blocks = tl.cdiv(Q, BN), tl.cdiv(KV, BN)
    is_q, is_k = pid < q_blocks, pid < q_blocks + kv_blocks
    block = tl.where(is_q, pid, tl.where(is_k, pid - q_blocks, pid - q_blocks - kv_blocks))
    return is_q, is_k, block, tl.where(is_q, 0, tl.where(is_k, Q, Q + KV)), tl.where(is_q, Q, KV)


@kernel("T")
def mu_guided_qkv_few_kernel(
    x_ptr, guidance_ptr, q_ptr, k_ptr, v_ptr, mu_q_ptr, mu_k_ptr, mu_v_ptr, out_ptr,
    T, H, Q, KV, HAS_MU: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [T, Q + 2 KV]; a program owns BN rows of one of the three projections."""
    is_q, is_k, block, column, N = locate_projection(Q, KV, BN)
    w_ptr = tl.where(is_q, q_ptr, tl.where(is_k, k_ptr, v_ptr))
    o_t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    o_n = block * BN + tl.arange(0, BN)
    acc = _dot_rows(tl.zeros([BT, BN], tl.float32), x_ptr, w_ptr, o_t, o_n, T, N, H, BK)
    if HAS_MU:
        mu_ptr = tl.where(is_q, mu_q_ptr, tl.where(is_k, mu_k_ptr, mu_v_ptr))
        acc = _dot_rows(acc, guidance_ptr, mu_ptr, o_t, o_n, T, N, H, BK)
    at = out_ptr + o_t[:, None] * (Q + 2 * KV) + column + o_n[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(o_t < T)[:, None] & (o_n < N)[None, :])


@kernel("T", "x_at")
def mu_guided_qkv_kernel(
    x_desc, w_desc, out_desc, T, N, H, x_at, PROGRAMS: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [T, N] = [x ‖ m] [W ‖ U]ᵀ; x_desc [2, T, H] holds x (at x_at) and m; w_desc [2N, H] is W over U."""
    blocks_t, blocks_n = tl.cdiv(T, BT), tl.cdiv(N, BN)
    steps = H // BK
    for tile in tl.range(tl.program_id(0), blocks_t * blocks_n, PROGRAMS):
        first = tile // (GROUP * blocks_n) * GROUP  # GROUP row blocks share the columns' weights in the cache
        rows = tl.minimum(blocks_t - first, GROUP)
        i_t = first + tile % rows
        i_n = tile % (GROUP * blocks_n) // rows
        acc = tl.zeros([BT, BN], tl.float32)
        for step in range(2 * steps):
            source = step // steps  # first x with W, then m with U
            k = (step - source * steps) * BK
            x = x_desc.load([source ^ x_at, i_t * BT, k]).reshape(BT, BK)
            w = w_desc.load([source * N + i_n * BN, k])
            acc = tl.dot(x, w.T, acc)
        out_desc.store([i_t * BT, i_n * BN], acc.to(out_desc.dtype))


@triton.jit
def _load_half(ptr, stride_head, o_a, o_d, A, half):
    """[BA, BD] of one half of the heads of one token, in fp32."""
    mask = (o_a < A)[:, None] & (o_d < half)[None, :]
    return tl.load(ptr + o_a[:, None] * stride_head + o_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_half(ptr, stride_head, x, o_a, o_d, A, half):
    mask = (o_a < A)[:, None] & (o_d < half)[None, :]
    tl.store(ptr + o_a[:, None] * stride_head + o_d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_vector(ptr, o_d, half):
    """The two halves of a [D] vector, each [1, BD]."""
    first = tl.load(ptr + o_d, mask=o_d < half, other=0.0).to(tl.float32)
    second = tl.load(ptr + half + o_d, mask=o_d < half, other=0.0).to(tl.float32)
    return first[None, :], second[None, :]


@triton.jit
def _norm_rope_fwd(
    x_ptr, stride_head, y_ptr, w_ptr, cos1, cos2, sin1, sin2, A, half, eps, BA: tl.constexpr, BD: tl.constexpr
):
    o_d = tl.arange(0, BD)
    for head in range(tl.program_id(1) * BA, A, tl.num_programs(1) * BA):
        o_a = head + tl.arange(0, BA)
        x1 = _load_half(x_ptr, stride_head, o_a, o_d, A, half)
        x2 = _load_half(x_ptr + half, stride_head, o_a, o_d, A, half)
        if w_ptr is not None:
            w1, w2 = _load_vector(w_ptr, o_d, half)
            rstd = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * half) + eps)[:, None]
            x1, x2 = x1 * rstd * w1, x2 * rstd * w2
        _store_half(y_ptr, 2 * half, x1 * cos1 - x2 * sin1, o_a, o_d, A, half)
        _store_half(y_ptr + half, 2 * half, x2 * cos2 + x1 * sin2, o_a, o_d, A, half)


@kernel("T", "S", *STRIDES[:6], "cos_stride_b")
def qk_norm_rope_fwd_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    T, S, A, K, half, eps, q_stride_b, q_stride_s, q_stride_a, k_stride_b, k_stride_s, k_stride_a, cos_stride_b,
    UNIT: tl.constexpr, PDL: tl.constexpr, BA: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Strides of q and k are in units of UNIT elements; `cos_stride_b` is 2 `half` S, or 0 for one table."""
    wait(PDL)
    q_stride_b, q_stride_s, q_stride_a = q_stride_b * UNIT, q_stride_s * UNIT, q_stride_a * UNIT
    k_stride_b, k_stride_s, k_stride_a = k_stride_b * UNIT, k_stride_s * UNIT, k_stride_a * UNIT
    first = tl.program_id(0)
    for offset in range(0, T - first, tl.num_programs(0)):
        token = first.to(tl.int64) + offset
        b, s = token // S, token % S
        rotary = b * cos_stride_b + s * 2 * half
        cos1, cos2 = _load_vector(cos_ptr + rotary, tl.arange(0, BD), half)
        sin1, sin2 = _load_vector(sin_ptr + rotary, tl.arange(0, BD), half)
        _norm_rope_fwd(
            q_ptr + b * q_stride_b + s * q_stride_s, q_stride_a, q_out_ptr + token * A * 2 * half,
            q_weight_ptr, cos1, cos2, sin1, sin2, A, half, eps, BA, BD,
        )  # fmt: skip
        _norm_rope_fwd(
            k_ptr + b * k_stride_b + s * k_stride_s, k_stride_a, k_out_ptr + token * K * 2 * half,
            k_weight_ptr, cos1, cos2, sin1, sin2, K, half, eps, BK, BD,
        )  # fmt: skip


@triton.jit
def _norm_rope_bwd(
    dy_ptr, dy_stride, x_ptr, stride_head, dx_ptr, w_ptr, dw1, dw2, cos1, cos2, sin1, sin2, A, half, eps,
    BA: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes dx of one token's heads; returns dw1, dw2 [BA, BD] with this token added (the caller sums over heads)."""
    o_d = tl.arange(0, BD)
    for head in range(0, A, BA):
        o_a = head + tl.arange(0, BA)
        dy1 = _load_half(dy_ptr, dy_stride, o_a, o_d, A, half)
        dy2 = _load_half(dy_ptr + half, dy_stride, o_a, o_d, A, half)
        dx1, dx2 = dy1 * cos1 + dy2 * sin2, dy2 * cos2 - dy1 * sin1
        if w_ptr is not None:
            x1 = _load_half(x_ptr, stride_head, o_a, o_d, A, half)
            x2 = _load_half(x_ptr + half, stride_head, o_a, o_d, A, half)
            w1, w2 = _load_vector(w_ptr, o_d, half)
            rstd = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * half) + eps)[:, None]
            x1, x2 = x1 * rstd, x2 * rstd
            dw1 += dx1 * x1
            dw2 += dx2 * x2
            dx1, dx2 = dx1 * w1, dx2 * w2
            mean = ((tl.sum(dx1 * x1, 1) + tl.sum(dx2 * x2, 1)) / (2 * half))[:, None]
            dx1, dx2 = rstd * (dx1 - x1 * mean), rstd * (dx2 - x2 * mean)
        _store_half(dx_ptr, 2 * half, dx1, o_a, o_d, A, half)
        _store_half(dx_ptr + half, 2 * half, dx2, o_a, o_d, A, half)
    return dw1, dw2


@kernel("T", "S", *STRIDES, "cos_stride_b")
def qk_norm_rope_bwd_kernel(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, dw_ptr,
    T, S, A, K, half, eps, q_stride_b, q_stride_s, q_stride_a, k_stride_b, k_stride_s, k_stride_a,
    dq_stride_b, dq_stride_s, dq_stride_a, dk_stride_b, dk_stride_s, dk_stride_a, cos_stride_b,
    UNIT: tl.constexpr, BA: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    q_stride_b, q_stride_s, q_stride_a = q_stride_b * UNIT, q_stride_s * UNIT, q_stride_a * UNIT
    k_stride_b, k_stride_s, k_stride_a = k_stride_b * UNIT, k_stride_s * UNIT, k_stride_a * UNIT
    dq_stride_b, dq_stride_s, dq_stride_a = dq_stride_b * UNIT, dq_stride_s * UNIT, dq_stride_a * UNIT
    dk_stride_b, dk_stride_s, dk_stride_a = dk_stride_b * UNIT, dk_stride_s * UNIT, dk_stride_a * UNIT
    o_d = tl.arange(0, BD)
    dq1 = tl.zeros([BA, BD], tl.float32)
    dq2 = tl.zeros([BA, BD], tl.float32)
    dk1 = tl.zeros([BK, BD], tl.float32)
    dk2 = tl.zeros([BK, BD], tl.float32)
    first = tl.program_id(0)
    for offset in range(0, T - first, tl.num_programs(0)):
        token = first.to(tl.int64) + offset
        b, s = token // S, token % S
        rotary = b * cos_stride_b + s * 2 * half
        cos1, cos2 = _load_vector(cos_ptr + rotary, o_d, half)
        sin1, sin2 = _load_vector(sin_ptr + rotary, o_d, half)
        dq1, dq2 = _norm_rope_bwd(
            dq_out_ptr + b * dq_stride_b + s * dq_stride_s, dq_stride_a,
            q_ptr + b * q_stride_b + s * q_stride_s, q_stride_a, dq_ptr + token * A * 2 * half,
            q_weight_ptr, dq1, dq2, cos1, cos2, sin1, sin2, A, half, eps, BA, BD,
        )  # fmt: skip
        dk1, dk2 = _norm_rope_bwd(
            dk_out_ptr + b * dk_stride_b + s * dk_stride_s, dk_stride_a,
            k_ptr + b * k_stride_b + s * k_stride_s, k_stride_a, dk_ptr + token * K * 2 * half,
            k_weight_ptr, dk1, dk2, cos1, cos2, sin1, sin2, K, half, eps, BK, BD,
        )  # fmt: skip
    dw_ptr += tl.program_id(0) * 4 * half + o_d  # dw [programs, 2, D]
    tl.store(dw_ptr, tl.sum(dq1, 0), mask=o_d < half)
    tl.store(dw_ptr + half, tl.sum(dq2, 0), mask=o_d < half)
    tl.store(dw_ptr + 2 * half, tl.sum(dk1, 0), mask=o_d < half)
    tl.store(dw_ptr + 3 * half, tl.sum(dk2, 0), mask=o_d < half)


def _head_blocks(query: Tensor, key: Tensor) -> dict:
    """Tile sizes: all heads of a token at once, up to 16."""
    power = next_power_of_2
    BA, BK, BD = min(16, power(query.shape[2])), min(16, power(key.shape[2])), power(query.shape[3] // 2)
    return {"BA": BA, "BK": BK, "BD": BD}


@custom_op("qk_norm_rope")
@on_its_device
def _qk_norm_rope(
    query: Tensor, key: Tensor, query_weight: Tensor | None, key_weight: Tensor | None,
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, S, A, D), K = query.shape, key.shape[2]
    query, key, cos, sin = inner_contiguous(query), inner_contiguous(key), cos.contiguous(), sin.contiguous()
    q_out, k_out = query.new_empty(B, S, A, D), key.new_empty(B, S, K, D)
    blocks = _head_blocks(query, key)
    groups = 1
    if B * S <= FEW_TOKENS:  # too few tokens to fill the chip: their heads are spread over programs
        groups = min(8, blocks["BA"])
        blocks |= {"BA": max(1, blocks["BA"] // groups), "BK": max(1, blocks["BK"] // groups)}
    unit, strides = strides_of(query, key)
    qk_norm_rope_fwd_kernel.launch(
        (min(B * S, FORWARD_PROGRAMS), groups),
        query, key, query_weight, key_weight, cos, sin, q_out, k_out, B * S, S, A, K, D // 2, eps,
        *strides, 0 if cos.shape[0] == 1 else S * D,
        UNIT=unit, **blocks, num_warps=1, **pdl_options(query.device),
    )  # fmt: skip
    return q_out, k_out


@_qk_norm_rope.register_fake
def _(query, key, query_weight, key_weight, cos, sin, eps):
    return query.new_empty(query.shape), key.new_empty(key.shape)


@custom_op("qk_norm_rope_backward")
@on_its_device
def _qk_norm_rope_backward(
    dq: Tensor, dk: Tensor, query: Tensor, key: Tensor, query_weight: Tensor | None, key_weight: Tensor | None,
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (B, S, A, D), K = query.shape, key.shape[2]
    dq, dk, query, key = (inner_contiguous(x) for x in (dq, dk, query, key))
    cos, sin = cos.contiguous(), sin.contiguous()
    programs = min(B * S, BACKWARD_PROGRAMS)
    dq_in, dk_in = query.new_empty(B, S, A, D), key.new_empty(B, S, K, D)
    dw = torch.empty(programs, 2, D, dtype=torch.float32, device=query.device)
    unit, strides = strides_of(query, key, dq, dk)
    qk_norm_rope_bwd_kernel.launch(
        (programs,),
        dq, dk, query, key, query_weight, key_weight, cos, sin, dq_in, dk_in, dw, B * S, S, A, K, D // 2, eps,
        *strides, 0 if cos.shape[0] == 1 else S * D, UNIT=unit, **_head_blocks(query, key), num_warps=1,
    )  # fmt: skip
    dw = dw.sum(0)
    # A weight that is absent has no gradient, but an operator must return a tensor.
    dw = (query.new_empty(0) if w is None else x.to(w.dtype, copy=True) for w, x in zip((query_weight, key_weight), dw))
    return dq_in, dk_in, *dw


@_qk_norm_rope_backward.register_fake
def _(dq, dk, query, key, query_weight, key_weight, cos, sin, eps):
    # In the dtype of the weights, which under autocast stay fp32 while queries and keys do not.
    dw = (query.new_empty(0) if w is None else torch.empty_like(w) for w in (query_weight, key_weight))
    return query.new_empty(query.shape), key.new_empty(key.shape), *dw


def _save_qk(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _qk_grad(ctx, dq, dk):
    saved = ctx.saved_tensors  # read once: activation checkpointing unpacks them only once
    query_weight, key_weight, cos, sin = saved[2:]
    if torch.is_grad_enabled():
        norm_rope = lambda q, k, w_q, w_k: qk_norm_rope_reference(q, k, w_q, w_k, cos, sin, ctx.eps)  # noqa: E731
        return *differentiable_gradients(norm_rope, saved[:4], (dq, dk)), None, None, None
    dq, dk, dq_weight, dk_weight = _qk_norm_rope_backward(dq, dk, *saved, ctx.eps)
    dq_weight, dk_weight = None if query_weight is None else dq_weight, None if key_weight is None else dk_weight
    return dq, dk, dq_weight, dk_weight, None, None, None


_qk_norm_rope.register_autograd(_qk_grad, setup_context=_save_qk)


def _fits_hopper(x: Tensor, guidance: Tensor | None, columns: int) -> bool:
    """Whether mu_guided_qkv_kernel applies and fills the chip; elsewhere the library's GEMM is faster."""
    return (
        device_properties(x.device)[1] == 9 and torch.version.cuda is not None
        and guidance is not None and (x.data_ptr() != guidance.data_ptr() or x.is_meta)
        and (x.data_ptr() | guidance.data_ptr()) % 16 == 0
        and x.dtype != torch.float32 and x.shape[0] >= MANY_TOKENS and x.shape[1] % 64 == 0 and columns % 256 == 0
    )  # fmt: skip


def _few_tile(tokens: int, dtype: torch.dtype) -> dict | None:
    """Tile of mu_guided_qkv_few_kernel, or None where the library's GEMM is faster."""
    if tokens <= FEW_TOKENS:
        BK = 64 if dtype == torch.float32 else 256
        return {"BT": 16 if tokens <= 16 else 32, "BN": 16, "BK": BK, "num_warps": 2, "num_stages": 4}
    if tokens < MANY_TOKENS and dtype != torch.float32:
        return {"BT": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 4}
    return None


def _launch_hopper(x: Tensor, guidance: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """`weights` [2N, H]. One descriptor spans x and guidance where they lie: its outer stride is their distance."""
    (T, H), N = x.shape, out.shape[1]
    BT, BN, BK = 128, 256, 64
    low, high = sorted((x, guidance), key=Tensor.data_ptr)
    distance = (high.data_ptr() - low.data_ptr()) // x.element_size()
    programs = device_properties(x.device)[0]
    mu_guided_qkv_kernel.launch(
        (programs,),
        TensorDescriptor(low, [2, T, H], [distance, H, 1], [1, BT, BK]),
        TensorDescriptor(weights, [2 * N, H], [H, 1], [BN, BK]),
        TensorDescriptor(out, [T, N], [N, 1], [BT, BN]),
        T, N, H, int(low is not x), PROGRAMS=programs, BT=BT, BN=BN, BK=BK, GROUP=8, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


@custom_op("mu_guided_qkv")
@on_its_device
def _mu_guided_qkv(
    x: Tensor, guidance: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    mu_q: Tensor | None, mu_k: Tensor | None, mu_v: Tensor | None,
) -> Tensor:  # fmt: skip
    shape, Q, KV = x.shape, q.shape[0], k.shape[0]
    x, guidance = (None if y is None else y.view(-1, shape[-1]) for y in (x, guidance))
    T, H = x.shape
    out = x.new_empty(T, Q + 2 * KV)
    whole = out.view(*shape[:-1], -1)
    if _fits_hopper(x, guidance, out.shape[1]):
        _launch_hopper(x, guidance, torch.cat((q, k, v, mu_q, mu_k, mu_v)), out)
        return whole
    tile = _few_tile(T, x.dtype)
    if tile is None:  # accumulating costs less than joining x and guidance
        torch.mm(x, torch.cat((q, k, v)).T, out=out)
        if guidance is not None:
            out.addmm_(guidance, torch.cat((mu_q, mu_k, mu_v)).T)
        return whole
    mu_guided_qkv_few_kernel.launch(
        (cdiv(Q, tile["BN"]) + 2 * cdiv(KV, tile["BN"]), cdiv(T, tile["BT"])),
        x, guidance, q, k, v, mu_q, mu_k, mu_v, out, T, H, Q, KV,
        HAS_MU=guidance is not None, **tile,
    )  # fmt: skip
    return whole


@_mu_guided_qkv.register_fake
def _(x, guidance, q, k, v, mu_q, mu_k, mu_v):
    return x.new_empty(*x.shape[:-1], q.shape[0] + 2 * k.shape[0])


@custom_op("mu_guided_qkv_backward")
@on_its_device
def _mu_guided_qkv_backward(
    grad: Tensor, x: Tensor, guidance: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    mu_q: Tensor | None, mu_k: Tensor | None, mu_v: Tensor | None, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x and guidance [..., H], of [q ‖ k ‖ v] and [mu_q ‖ mu_k ‖ mu_v] [N, H]; empty where not wanted."""
    shape, grad = x.shape, grad.view(-1, grad.shape[-1])
    x, guidance = (None if y is None else y.view(-1, shape[-1]) for y in (x, guidance))
    dguidance, dw, dw_mu = (x.new_empty(0) for _ in range(3))
    dx = grad @ torch.cat((q, k, v))
    if guidance is not None:
        dguidance = (grad @ torch.cat((mu_q, mu_k, mu_v))).view(shape)
    if weight_grads:
        dw = grad.T @ x
        dw_mu = dw_mu if guidance is None else grad.T @ guidance
    return dx.view(shape), dguidance, dw, dw_mu


@_mu_guided_qkv_backward.register_fake
def _(grad, x, guidance, q, k, v, mu_q, mu_k, mu_v, weight_grads):
    N = grad.shape[-1] if weight_grads else 0
    dw = (x.new_empty(N, x.shape[-1]) if wanted else x.new_empty(0) for wanted in (N, N and guidance is not None))
    return x.new_empty(x.shape), x.new_empty(0 if guidance is None else guidance.shape), *dw


def _plain_qkv(x, guidance, q, k, v, mu_q, mu_k, mu_v):
    out = F.linear(x, torch.cat((q, k, v)))
    return out if guidance is None else out + F.linear(guidance, torch.cat((mu_q, mu_k, mu_v)))


def _save_qkv(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.sizes = [w.shape[0] for w in inputs[2:5]]
    ctx.has_guidance = inputs[1] is not None


def _qkv_grad(ctx, grad):
    saved = ctx.saved_tensors
    if torch.is_grad_enabled():
        return tuple(differentiable_gradients(_plain_qkv, saved, (grad,)))
    weight_grads = any(ctx.needs_input_grad[2:8])  # a frozen base model skips half of the work
    dx, dguidance, dw, dw_mu = _mu_guided_qkv_backward(grad.contiguous(), *saved, weight_grads)
    none = (None,) * 3
    dw = dw.split(ctx.sizes) if weight_grads else none
    dw_mu = dw_mu.split(ctx.sizes) if weight_grads and ctx.has_guidance else none
    return dx, dguidance if ctx.has_guidance else None, *dw, *dw_mu


_mu_guided_qkv.register_autograd(_qkv_grad, setup_context=_save_qkv)


def qk_norm_rope(
    query: Tensor, key: Tensor, query_weight: Tensor | None, key_weight: Tensor | None,
    cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Equals `qk_norm_rope_reference`.

    Args:
        query: [B, S, A, D]. key: [B, S, K, D]; both may be strided views, one head being contiguous.
        query_weight, key_weight: [D] or None (no norm). cos, sin: [B or 1, S, D], without gradient.

    Returns: query [B, S, A, D] and key [B, S, K, D], rotated, contiguous.
    """
    if query.ndim != 4 or key.ndim != 4 or query.shape[-1] != key.shape[-1] or query.shape[-1] % 2:
        raise ValueError(f"qk_norm_rope needs [B, S, heads, even D], got {tuple(query.shape)} and {tuple(key.shape)}")
    return _qk_norm_rope(query, key, query_weight, key_weight, cos, sin, eps)


def mu_guided_qkv(x: Tensor, guidance: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
    """[x ‖ guidance] times the six projections.

    Args:
        x: [..., H]. guidance: [..., H], or None (layer 0; the last three weights are then not used).
        weights: [out, H] each: q, k, v, mu_to_q, mu_to_k, mu_to_v; k and v of one size. Under autocast all tensors are
            brought to its dtype, else they must be of one.

    Returns: [..., (A + 2K) D], the columns of q, k and v side by side. Raises `ValueError` for different dtypes.
    """
    device, count = x.device.type, 3 if guidance is None else 6
    tensors = [x, guidance, *weights[:count]]
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = [None if y is None else y.to(dtype) for y in tensors]
    found = {y.dtype for y in tensors if y is not None}
    if len(found) > 1:
        raise ValueError(f"mu_guided_qkv needs one dtype, got {sorted(map(str, found))}")
    return _mu_guided_qkv(*(None if y is None else y.contiguous() for y in tensors), *(None,) * (6 - count))
