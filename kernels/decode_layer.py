"""A decoder layer for a few new tokens in Triton.

T tokens (one per row of the batch), H hidden size, N = (A + 2K) D columns of q, k and v, C controller width, E experts,
I width of one expert. m is the guidance of the layer below, and m' that of the layer above:

    qkv     = RMSNorm(x) [Wq ‖ Wk ‖ Wv]ᵀ + m [Uq ‖ Uk ‖ Uv]ᵀ          decode_qkv_kernel
    q, k    = RoPE(RMSNorm(.));  k and v into a static cache           decode_rope_kernel
    attention over the cache                                           decode_attention.py
    h       = attention Woᵀ                                            decode_linear_kernel
    z, mu_l = SiLU(W_in [h, v] + b_in), mu + W_mu h                    decode_controller_kernel
    v', h', r', m' as in fused_dynamics.py;  x' = x + h'               decode_update_kernel
    e       = argmax(base_logit onehot(expert) + mu_l W_routerᵀ)
    a       = act(gate[e] n) * (up[e] n),  n = RMSNorm(x')             decode_gate_up_kernel
    x''     = x' + down[e] a                                           decode_down_kernel

A shared expert takes programs of its own in the last two. Without mu and dynamics, x' = x + h comes from
decode_linear_kernel. Value embeddings are added to v by decode_value_kernel.

The time is that of reading the weights: 67 MB a layer of the 1.5b shape, 16 us of an H200's memory. A program holds a
few whole weight rows in registers. The kernels are chained by programmatic dependent launch, so that a kernel's rows
are on their way while the kernel before it still runs. Every program that needs a norm computes it again, from x in the
cache. The rows of an expert are fetched for the expert of the routing table, and again in the rare case that mu
overrides it. Sums for the second norm and for the router come in parts from the kernel that makes x', and are added in
a fixed order. Results are rounded to the model's dtype where the modules round, and sums are fp32. There is no
backward, because generation needs no gradient.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the guard lets a checkpoint that ships this file load where there is no Triton
    raise

from .decode_attention import STRIDES, launch_decode_attention
from .fused_dynamics import MAX_BETA, SHARE, clamp_velocity
from .kernel_launch import cdiv, kernel, next_power_of_2, on_its_device, pdl_options, strides_of, wait
from .mu_guided_qkv import locate_projection
from .op_registration import custom_op
from .token_routed_gemm import activate

# Rows of the batch. On an H100, 1, 2 and 4 rows take 53, 67 and 90 us a layer here, and 84, 97 and 111 us in the other
# kernels. With 8 rows the other kernels are faster.
MAX_ROWS = 4
MAX_EXPERTS = 32  # that mu may choose among, for every program of decode_gate_up_kernel scores them all
MAX_WIDTH = 16384  # a weight row must fit in registers
ROW_BYTES = 16384  # weights that a program holds at once
UPDATE_COLUMNS = 16  # columns of the hidden state in one program of decode_update_kernel


@triton.jit
def _rows(ptr, o_n, o_k, N, K):
    """Weight rows o_n of a row-major [N, K] matrix: [BN, BK], zero outside."""
    at = o_n[:, None].to(tl.int64) * K + o_k[None, :]
    return tl.load(ptr + at, mask=(o_n < N)[:, None] & (o_k < K)[None, :], other=0.0)


@triton.jit
def _vector(ptr, o_k, K):
    return tl.load(ptr + o_k, mask=o_k < K, other=0.0).to(tl.float32)


@triton.jit
def _times(weight, x):
    """weight [BN, BK] times x [BK] -> [BN], in fp32."""
    return tl.sum(weight.to(tl.float32) * x[None, :], axis=1)


@triton.jit
def _rms_norm(x, weight, rstd, dtype: tl.constexpr):
    return (x * rstd * weight).to(dtype).to(tl.float32)


@kernel()
def decode_qkv_kernel(
    x_ptr, norm_ptr, guidance_ptr, q_ptr, k_ptr, v_ptr, mu_q_ptr, mu_k_ptr, mu_v_ptr, out_ptr,
    T, H, Q, KV, eps, HAS_MU: tl.constexpr, PDL: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [T, Q + 2 KV]; a program owns BN rows of one of the three projections and of its guidance."""
    is_q, is_k, block, column, N = locate_projection(Q, KV, BN)
    o_n, o_k = block * BN + tl.arange(0, BN), tl.arange(0, BK)
    w = _rows(tl.where(is_q, q_ptr, tl.where(is_k, k_ptr, v_ptr)), o_n, o_k, N, H)
    if HAS_MU:
        u = _rows(tl.where(is_q, mu_q_ptr, tl.where(is_k, mu_k_ptr, mu_v_ptr)), o_n, o_k, N, H)
    norm = _vector(norm_ptr, o_k, H)
    wait(PDL)
    dtype = out_ptr.dtype.element_ty
    for t in range(T):
        x = _vector(x_ptr + t * H, o_k, H)
        n = _rms_norm(x, norm, tl.rsqrt(tl.sum(x * x, 0) / H + eps), dtype)
        acc = _times(w, n)
        if HAS_MU:
            acc += _times(u, _vector(guidance_ptr + t * H, o_k, H))
        tl.store(out_ptr + t * (Q + 2 * KV) + column + o_n, acc.to(dtype), mask=o_n < N)


@kernel("ids_ptr")
def decode_value_kernel(
    x_ptr, norm_ptr, guidance_ptr, ids_ptr, gate_ptr, table_ptr, qkv_ptr, A, K, D, H, eps,
    PDL: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """v of qkv [T, (A + 2K) D] += 2 sigmoid(gate m) table[id]: one head of one row. gate [K, H], table [V, K D]."""
    t, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d, o_k = tl.arange(0, BD), tl.arange(0, BK)
    dtype = qkv_ptr.dtype.element_ty
    added = _vector(table_ptr + tl.load(ids_ptr + t) * K * D + head * D, o_d, D)
    weight = _vector(gate_ptr + head * H, o_k, H)
    wait(PDL)
    if guidance_ptr is not None:
        m = _vector(guidance_ptr + t * H, o_k, H)
    else:
        x = _vector(x_ptr + t * H, o_k, H)
        m = _rms_norm(x, _vector(norm_ptr, o_k, H), tl.rsqrt(tl.sum(x * x, 0) / H + eps), dtype)
    logit = tl.sum(weight * m, 0).to(dtype).to(tl.float32)
    gate = (2.0 * (1.0 / (1.0 + tl.exp(-logit))).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    at = qkv_ptr + (t * (A + 2 * K) + A + K + head) * D
    value = _vector(at, o_d, D) + (gate * added).to(dtype).to(tl.float32)
    tl.store(at + o_d, value.to(dtype), mask=o_d < D)


@kernel("L", "cos_stride_b", *STRIDES[2:])
def decode_rope_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, used_ptr, q_out_ptr, keys_ptr, values_ptr,
    A, K, L, half, eps, cos_stride_b, k_stride_b, k_stride_h, k_stride_l, v_stride_b, v_stride_h, v_stride_l,
    UNIT: tl.constexpr, PDL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One head of one row: q to q_out [T, A, D]; k and v to position `used` of keys and values [T, K, L, D].

    Strides of k and v are in units of UNIT.
    """
    k_stride_b, k_stride_h, k_stride_l = k_stride_b * UNIT, k_stride_h * UNIT, k_stride_l * UNIT
    v_stride_b, v_stride_h, v_stride_l = v_stride_b * UNIT, v_stride_h * UNIT, v_stride_l * UNIT
    t, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    is_q, is_k = head < A, (head >= A) & (head < A + K)
    o_d = tl.arange(0, BD)
    cos_ptr += t * cos_stride_b
    sin_ptr += t * cos_stride_b
    cos1, cos2 = _vector(cos_ptr, o_d, half), _vector(cos_ptr + half, o_d, half)
    sin1, sin2 = _vector(sin_ptr, o_d, half), _vector(sin_ptr + half, o_d, half)
    used = tl.load(used_ptr)
    k_at = keys_ptr + t * k_stride_b + (head - A) * k_stride_h + used * k_stride_l
    v_at = values_ptr + t * v_stride_b + (head - A - K) * v_stride_h + used * v_stride_l
    out = tl.where(is_q, q_out_ptr + (t * A + head) * 2 * half, tl.where(is_k, k_at, v_at))
    wait(PDL)
    x_ptr = qkv_ptr + (t * (A + 2 * K) + head) * 2 * half
    x1, x2 = _vector(x_ptr, o_d, half), _vector(x_ptr + half, o_d, half)
    if is_q | is_k:
        if q_weight_ptr is not None:
            weight_ptr = tl.where(is_q, q_weight_ptr, k_weight_ptr)
            rstd = tl.rsqrt((tl.sum(x1 * x1, 0) + tl.sum(x2 * x2, 0)) / (2 * half) + eps)
            x1 *= rstd * _vector(weight_ptr, o_d, half)
            x2 *= rstd * _vector(weight_ptr + half, o_d, half)
        x1, x2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
    if used >= L:  # a full cache takes no token: NaN in the queries shows it, as an error on the device would
        x1 = tl.full([BD], float("nan"), tl.float32)
    if is_q | (used < L):
        dtype = q_out_ptr.dtype.element_ty
        tl.store(out + o_d, x1.to(dtype), mask=o_d < half)
        tl.store(out + half + o_d, x2.to(dtype), mask=o_d < half)


@kernel()
def decode_linear_kernel(
    x_ptr, w_ptr, residual_ptr, out_ptr, parts_ptr, T, N, K, PDL: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [T, N] = x [T, K] wᵀ. A residual [T, N] is added; then parts [T, programs, 2] begin with sum(out²)."""
    o_n, o_k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    w = _rows(w_ptr, o_n, o_k, N, K)
    wait(PDL)
    dtype = out_ptr.dtype.element_ty
    for t in range(T):
        out = _times(w, _vector(x_ptr + t * K, o_k, K)).to(dtype)
        if residual_ptr is not None:
            out = (_vector(residual_ptr + t * N, o_n, N) + out.to(tl.float32)).to(dtype)
            square = out.to(tl.float32) * out.to(tl.float32)
            part = parts_ptr + (t * tl.num_programs(0) + tl.program_id(0)) * 2
            tl.store(part, tl.sum(square, 0))
        tl.store(out_ptr + t * N + o_n, out, mask=o_n < N)


@kernel()
def decode_controller_kernel(
    h_ptr, v_ptr, mu_ptr, w_mu_ptr, w_in_ptr, b_in_ptr, z_ptr, mu_out_ptr, T, H, C,
    PDL: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """mu_out [T, H] = mu + W_mu h; the last programs: z [T, C] = SiLU(W_in [h, v] + b_in), one row each."""
    o_k = tl.arange(0, BK)
    mu_blocks = tl.cdiv(H, BN)
    dtype = z_ptr.dtype.element_ty
    if tl.program_id(0) < mu_blocks:
        o_n = tl.program_id(0) * BN + tl.arange(0, BN)
        w = _rows(w_mu_ptr, o_n, o_k, H, H)
        bias = _vector(mu_ptr, o_n, H)
        wait(PDL)
        for t in range(T):
            acc = _times(w, _vector(h_ptr + t * H, o_k, H)) + bias
            tl.store(mu_out_ptr + t * H + o_n, acc.to(dtype), mask=o_n < H)
    else:
        row = tl.program_id(0) - mu_blocks
        w_h = _vector(w_in_ptr + row * 2 * H, o_k, H)
        w_v = _vector(w_in_ptr + row * 2 * H + H, o_k, H)
        b_in = tl.load(b_in_ptr + row).to(tl.float32)
        wait(PDL)
        for t in range(T):
            products = w_h * _vector(h_ptr + t * H, o_k, H) + w_v * _vector(v_ptr + t * H, o_k, H)
            z = (tl.sum(products, 0) + b_in).to(dtype).to(tl.float32)
            tl.store(z_ptr + t * C + row, (z / (1.0 + tl.exp(-z))).to(dtype))


@kernel()
def decode_update_kernel(
    x_ptr, h_ptr, v_ptr, highway_ptr, z_ptr, mu_ptr, w_ptr, b_ptr, router_ptr,
    x_out_ptr, v_out_ptr, guidance_out_ptr, highway_out_ptr, parts_ptr,
    T, H, C, E, dt, HAS_HIGHWAY: tl.constexpr, ROUTED: tl.constexpr, PDL: tl.constexpr,
    BH: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """x' = x + h', v', m', r' [T, H]; parts [T, blocks, 1 + BE]: this block's share of sum(x'²), of mu_l W_routerᵀ."""
    o_h, o_c, o_e = tl.program_id(0) * BH + tl.arange(0, BH), tl.arange(0, BC), tl.arange(0, BE)
    mask = o_h < H
    w_alpha, w_beta = _rows(w_ptr, o_h, o_c, H, C), _rows(w_ptr + H * C, o_h, o_c, H, C)
    w_gate = _rows(w_ptr + 2 * H * C, o_h, o_c, H, C)
    b_alpha, b_beta, b_gate = _vector(b_ptr, o_h, H), _vector(b_ptr + H, o_h, H), _vector(b_ptr + 2 * H, o_h, H)
    if ROUTED:
        router = _rows(router_ptr, o_e, o_h, E, H)  # [BE, BH]
    wait(PDL)
    dtype = x_out_ptr.dtype.element_ty
    for t in range(T):
        z = _vector(z_ptr + t * C, o_c, C)
        alpha = 1.0 / (1.0 + tl.exp(-_times(w_alpha, z) - b_alpha))
        gate = 1.0 / (1.0 + tl.exp(-_times(w_gate, z) - b_gate))
        beta = tl.minimum(_times(w_beta, z) + b_beta, 20.0, propagate_nan=tl.PropagateNan.ALL)  # no overflow
        beta = tl.minimum(tl.log(1.0 + tl.exp(beta)), MAX_BETA, propagate_nan=tl.PropagateNan.ALL)
        at = t * H + o_h
        h, mu = _vector(h_ptr + t * H, o_h, H), _vector(mu_ptr + t * H, o_h, H)
        v = clamp_velocity(alpha * _vector(v_ptr + t * H, o_h, H) - beta * (h - mu))
        h = (h + dt * gate * v).to(dtype).to(tl.float32)
        highway = mu
        if HAS_HIGHWAY:
            highway += _vector(highway_ptr + t * H, o_h, H)
        x = (_vector(x_ptr + t * H, o_h, H) + h).to(dtype)
        tl.store(x_out_ptr + at, x, mask=mask)
        tl.store(v_out_ptr + at, v.to(dtype), mask=mask)
        tl.store(highway_out_ptr + at, highway.to(dtype), mask=mask)
        tl.store(guidance_out_ptr + at, (mu + SHARE * highway).to(dtype), mask=mask)
        x = x.to(tl.float32)
        part = parts_ptr + (t * tl.num_programs(0) + tl.program_id(0)) * (1 + BE)
        tl.store(part, tl.sum(x * x, 0))
        if ROUTED:
            tl.store(part + 1 + o_e, _times(router, mu))


@kernel("expert_ptr")
def decode_gate_up_kernel(
    x_ptr, norm_ptr, parts_ptr, expert_ptr, weight_ptr, shared_gate_ptr, shared_up_ptr,
    act_ptr, shared_act_ptr, chosen_ptr, blocks, H, inter, shared, E, eps, base_logit,
    ACTIVATION: tl.constexpr, ROUTED: tl.constexpr, PDL: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """act [T, I] and chosen [T], the expert that mu routing takes; weight [E, 2I, H]; parts of x' [T, blocks, 1 + BE].

    The last programs: shared_act [T, S] of the shared expert, whose gate and up are [S, H].
    """
    t, block = tl.program_id(1), tl.program_id(0)
    o_k, o_p, o_e = tl.arange(0, BK), tl.arange(0, BP), tl.arange(0, BE)
    base = tl.load(expert_ptr + t).to(tl.int32)
    size = inter.to(tl.int64) * H
    gate_ptr, up_ptr, out_ptr = weight_ptr + base * 2 * size, weight_ptr + (base * 2 + 1) * size, act_ptr + t * inter
    width, is_own = inter, True
    if shared_gate_ptr is not None:
        own = tl.cdiv(inter, BN)
        is_own = block < own
        block = tl.where(is_own, block, block - own)
        gate_ptr, up_ptr = tl.where(is_own, gate_ptr, shared_gate_ptr), tl.where(is_own, up_ptr, shared_up_ptr)
        out_ptr = tl.where(is_own, out_ptr, shared_act_ptr + t * shared)
        width = tl.where(is_own, inter, shared)
    o_n = block * BN + tl.arange(0, BN)
    gate_rows, up_rows = _rows(gate_ptr, o_n, o_k, width, H), _rows(up_ptr, o_n, o_k, width, H)
    norm = _vector(norm_ptr, o_k, H)
    wait(PDL)
    dtype = act_ptr.dtype.element_ty
    parts_ptr += t * blocks * (1 + BE)
    squares = tl.sum(tl.load(parts_ptr + o_p * (1 + BE), mask=o_p < blocks, other=0.0), 0)
    n = _rms_norm(_vector(x_ptr + t * H, o_k, H), norm, tl.rsqrt(squares / H + eps), dtype)
    if ROUTED:
        at = parts_ptr + 1 + o_p[:, None] * (1 + BE) + o_e[None, :]
        logits = tl.sum(tl.load(at, mask=(o_p < blocks)[:, None], other=0.0), 0).to(dtype).to(tl.float32)  # [BE]
        scores = tl.where(o_e == base, base_logit, 0.0) + logits
        scores = tl.where(scores == scores, scores, float("inf"))  # NaN counts as the largest, as in torch
        expert = tl.argmax(tl.where(o_e < E, scores, float("-inf")), 0)  # ties: the lowest
        if (expert != base) & is_own:
            gate_rows = _rows(weight_ptr + expert * 2 * size, o_n, o_k, inter, H)
            up_rows = _rows(weight_ptr + (expert * 2 + 1) * size, o_n, o_k, inter, H)
        if tl.program_id(0) == 0:
            tl.store(chosen_ptr + t, expert)
    value, _ = activate(_times(gate_rows, n), ACTIVATION)
    tl.store(out_ptr + o_n, (value * _times(up_rows, n)).to(dtype), mask=o_n < width)


@kernel("expert_ptr")
def decode_down_kernel(
    x_ptr, act_ptr, shared_act_ptr, expert_ptr, chosen_ptr, weight_ptr, shared_ptr, out_ptr, H, inter, shared,
    ROUTED: tl.constexpr, PDL: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """out [T, H] = x + down[chosen] act (+ shared down [H, S] times its act); weight [E, H, I]."""
    t = tl.program_id(1)
    o_n, o_k, o_s = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, BS)
    base = tl.load(expert_ptr + t).to(tl.int32)
    size = inter.to(tl.int64) * H
    rows = _rows(weight_ptr + base * size, o_n, o_k, H, inter)
    if shared_ptr is not None:
        shared_rows = _rows(shared_ptr, o_n, o_s, H, shared)
    wait(PDL)
    if ROUTED:
        expert = tl.load(chosen_ptr + t)
        if expert != base:
            rows = _rows(weight_ptr + expert * size, o_n, o_k, H, inter)
    dtype = out_ptr.dtype.element_ty
    out = _times(rows, _vector(act_ptr + t * inter, o_k, inter)).to(dtype).to(tl.float32)
    if shared_ptr is not None:
        out += _times(shared_rows, _vector(shared_act_ptr + t * shared, o_s, shared)).to(dtype).to(tl.float32)
        out = out.to(dtype).to(tl.float32)
    tl.store(out_ptr + t * H + o_n, (_vector(x_ptr + t * H, o_n, H) + out).to(dtype), mask=o_n < H)


def _rows_config(rows: int, columns: int, matrices: int, itemsize: int) -> tuple[int, dict]:
    """Programs and tile of a kernel that holds some rows of each of `matrices` matrices in registers."""
    BK = max(16, next_power_of_2(columns))
    BN = max(1, min(16, ROW_BYTES // (BK * itemsize * matrices)))
    return cdiv(rows, BN), {"BN": BN, "BK": BK, "num_warps": 4}


@custom_op("decode_qkv")
@on_its_device
def decode_qkv(
    x: Tensor, norm_weight: Tensor, eps: float, guidance: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    mu_q: Tensor | None, mu_k: Tensor | None, mu_v: Tensor | None,
    ids: Tensor | None = None, value_gate: Tensor | None = None, value_embedding: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The normed residual stream and the guidance through the six projections, with value embeddings.

    x: residual stream [T, H]; guidance: [T, H] or None. norm_weight: [H], with its eps. q, k, v and mu_q, mu_k, mu_v:
    [out, H]; without guidance the last three are None. ids: token ids [T], with value_gate [K, H] and value_embedding
    [V, KV]; or None, all three. All are contiguous, and all but ids of one dtype.

    Returns: [T, Q + 2 KV], the columns of q, k and v side by side.
    """
    (T, H), Q, KV = x.shape, q.shape[0], k.shape[0]
    out, ids = x.new_empty(T, Q + 2 * KV), None if ids is None else ids.long()  # see `decode_layer_tail`
    _, tile = _rows_config(Q, H, 1 if guidance is None else 2, x.element_size())
    decode_qkv_kernel.launch(
        (cdiv(Q, tile["BN"]) + 2 * cdiv(KV, tile["BN"]),),
        x, norm_weight, guidance, q, k, v, mu_q, mu_k, mu_v, out, T, H, Q, KV, eps,
        HAS_MU=guidance is not None, **tile, **pdl_options(x.device),
    )  # fmt: skip
    if ids is not None and value_gate is not None:
        K = value_gate.shape[0]
        D = KV // K
        decode_value_kernel.launch(
            (T, K),
            x, norm_weight, guidance, ids, value_gate, value_embedding, out, Q // D, K, D, H, eps,
            BD=next_power_of_2(D), BK=next_power_of_2(H), num_warps=4, **pdl_options(x.device),
        )  # fmt: skip
    return out


@decode_qkv.register_fake
def _(x, norm_weight, eps, guidance, q, k, v, *_):
    return x.new_empty(x.shape[0], q.shape[0] + 2 * k.shape[0])


@custom_op("decode_attend", mutates_args=("keys", "values", "used"))
@on_its_device
def decode_attend(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor,
    keys: Tensor, values: Tensor, used: Tensor, mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """QK norm and RoPE of one new token per row, its place in a static cache, and attention over the cache.

    qkv: [T, (A + 2K) D]. q_weight, k_weight: [D] or None (no norm), with their eps. cos, sin: [T or 1, 1, D].
    keys, values: [T, K, L, D], and used: int64 scalar, how many positions are in use; all three change in place.
    mask: bool [T or 1, 1, 1, L], True where a position is seen (the new one included), or None. scale: of the scores.

    Returns: heads side by side [T, A D]; NaN where the cache is full.
    """
    (T, K, L, D), cos, sin = keys.shape, cos.contiguous(), sin.contiguous()
    A = qkv.shape[1] // D - 2 * K
    query = qkv.new_empty(T, A, 1, D)
    unit, strides = strides_of(keys, values)
    decode_rope_kernel.launch(
        (T, A + 2 * K),
        qkv, q_weight, k_weight, cos, sin, used, query, keys, values, A, K, L, D // 2, eps,
        0 if cos.shape[0] == 1 else cos.stride(0), *strides,
        UNIT=unit, BD=next_power_of_2(D // 2), num_warps=1, **pdl_options(qkv.device),
    )  # fmt: skip
    return launch_decode_attention(query, keys, values, mask, scale, used).view(T, A * D)


@decode_attend.register_fake
def _(qkv, q_weight, k_weight, eps, cos, sin, keys, values, used, mask, scale):
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3])


def _launch_mlp(
    x: Tensor, parts: Tensor, norm_weight: Tensor, eps: float, expert_ids: Tensor, router: Tensor | None,
    base_logit: float, gate_up_proj: Tensor, down_proj: Tensor, activation: str,
    shared_gate: Tensor | None, shared_up: Tensor | None, shared_down: Tensor | None,
) -> Tensor:  # fmt: skip
    """x'' [T, H] of x', int64 ids, and parts [T, blocks, 1 + BE] of x's sum of squares and of the router's logits."""
    (T, H), (E, _, inter), shared = x.shape, down_proj.shape, 0 if shared_down is None else shared_down.shape[1]
    act, shared_act, out = x.new_empty(T, inter), x.new_empty(T, shared), torch.empty_like(x)
    chosen = torch.empty(T if router is not None else 0, dtype=torch.int32, device=x.device)
    options = {"ROUTED": router is not None} | pdl_options(x.device)
    blocks, BE = parts.shape[1], parts.shape[2] - 1
    programs, tile = _rows_config(inter, H, 2, x.element_size())
    decode_gate_up_kernel.launch(
        (programs + cdiv(shared, tile["BN"]), T),
        x, norm_weight, parts, expert_ids, gate_up_proj, shared_gate, shared_up,
        act, shared_act, chosen, blocks, H, inter, shared, E, eps, base_logit,
        ACTIVATION=activation, BE=BE, BP=next_power_of_2(blocks), **tile, **options,
    )  # fmt: skip
    widths = [max(16, next_power_of_2(width)) for width in (inter, shared)]
    programs, tile = _rows_config(H, widths[0] + (widths[1] if shared else 0), 1, x.element_size())
    tile |= {"BK": widths[0], "BS": widths[1]}
    weights = down_proj, shared_down
    decode_down_kernel.launch(
        (programs, T), x, act, shared_act, expert_ids, chosen, *weights, out, H, inter, shared, **tile, **options
    )
    return out


@custom_op("decode_layer_tail")
@on_its_device
def decode_layer_tail(
    attention: Tensor, x: Tensor, velocity: Tensor, highway: Tensor | None, expert_ids: Tensor, o_proj: Tensor,
    mu: Tensor, mu_proj: Tensor, controller_in: Tensor, controller_in_bias: Tensor,
    controller_out: Tensor, controller_out_bias: Tensor, dt: float, norm_weight: Tensor, eps: float,
    router: Tensor | None, base_logit: float, gate_up_proj: Tensor, down_proj: Tensor, activation: str,
    shared_gate: Tensor | None = None, shared_up: Tensor | None = None, shared_down: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What a decoder layer does after attention: output projection, dynamics, residual, norm, routing, experts.

    attention: heads side by side [T, A D]. x: residual stream [T, H]. velocity: [T, H]. highway: [T, H] or None.
    expert_ids: [T] integers, those of the routing table. o_proj: [H, A D].
    mu, mu_proj, controller_in .. controller_out_bias, dt: as in `inl_dynamics_block`.
    norm_weight: [H], with its eps. router: [E, H], with base_logit; None where mu overrides no expert.
    gate_up_proj: [E, 2I, H]. down_proj: [E, H, I]. shared_gate, shared_up: [S, H], shared_down: [H, S], or None, all
    three. All tensors are contiguous, and all but expert_ids of one dtype.

    Returns: (x'', velocity', guidance of the layer above, highway'), each [T, H].
    """
    # Ids are cast before the first of the kernels, for a later one reads them before it waits for the one before it.
    (T, H), C, E, expert_ids = x.shape, controller_in.shape[0], down_proj.shape[0], expert_ids.long()
    options, itemsize = pdl_options(x.device), x.element_size()
    h, mu_l, x_mid, velocity_out, guidance_out, highway_out = (torch.empty_like(x) for _ in range(6))
    z = x.new_empty(T, C)
    programs, tile = _rows_config(H, attention.shape[1], 1, itemsize)
    decode_linear_kernel.launch(
        (programs,), attention, o_proj, None, h, None, T, H, attention.shape[1], **tile, **options
    )
    programs, tile = _rows_config(H, H, 1, itemsize)
    controller = h, velocity, mu, mu_proj, controller_in, controller_in_bias, z, mu_l
    decode_controller_kernel.launch((programs + C,), *controller, T, H, C, **tile, **options)
    BE, blocks = 1 if router is None else next_power_of_2(E), cdiv(H, UPDATE_COLUMNS)
    parts = torch.empty(T, blocks, 1 + BE, dtype=torch.float32, device=x.device)
    decode_update_kernel.launch(
        (blocks,),
        x, h, velocity, highway, z, mu_l, controller_out, controller_out_bias, router,
        x_mid, velocity_out, guidance_out, highway_out, parts, T, H, C, E, dt,
        HAS_HIGHWAY=highway is not None, BH=UPDATE_COLUMNS, BC=next_power_of_2(C), BE=BE, num_warps=4,
        ROUTED=router is not None, **options,
    )  # fmt: skip
    weights = gate_up_proj, down_proj, activation, shared_gate, shared_up, shared_down
    out = _launch_mlp(x_mid, parts, norm_weight, eps, expert_ids, router, base_logit, *weights)
    return out, velocity_out, guidance_out, highway_out


@decode_layer_tail.register_fake
def _(attention, x, *_):
    return tuple(torch.empty_like(x) for _ in range(4))


@custom_op("decode_plain_tail")
@on_its_device
def decode_plain_tail(
    attention: Tensor, x: Tensor, expert_ids: Tensor, o_proj: Tensor, norm_weight: Tensor, eps: float,
    gate_up_proj: Tensor, down_proj: Tensor, activation: str,
    shared_gate: Tensor | None = None, shared_up: Tensor | None = None, shared_down: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What a decoder layer without mu and dynamics does after attention; arguments as in `decode_layer_tail`.

    Returns: x'' [T, H].
    """
    (T, H), options, expert_ids = x.shape, pdl_options(x.device), expert_ids.long()  # see `decode_layer_tail`
    programs, tile = _rows_config(H, attention.shape[1], 1, x.element_size())
    x_mid, parts = torch.empty_like(x), torch.empty(T, programs, 2, dtype=torch.float32, device=x.device)
    decode_linear_kernel.launch(
        (programs,), attention, o_proj, x, x_mid, parts, T, H, attention.shape[1], **tile, **options
    )
    weights = gate_up_proj, down_proj, activation, shared_gate, shared_up, shared_down
    return _launch_mlp(x_mid, parts, norm_weight, eps, expert_ids, None, 0.0, *weights)


@decode_plain_tail.register_fake
def _(attention, x, *_):
    return torch.empty_like(x)
