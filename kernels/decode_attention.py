"""Attention of one new token per row over a key/value cache, in Triton.

B rows, A query heads, K key/value heads (A = R K), L positions in the cache, D head dim.

    out[b, a] = softmax_l(scale q[b, a] . k[b, a // R, l] where mask[b, l]) v[b, a // R, l]

The time is that of reading the cache. So a program takes one key/value head with all R queries that it serves, over a
part of the positions, and a second kernel joins the parts. (The library's SDPA first copies keys and values R times
when there is a mask.) Blocks that the mask hides, such as the unused end of a static cache, are not read. The kernels
compute in fp32 and round once. There is no backward, because generation needs no gradient.
"""

import torch
from torch import Tensor

try:
    import triton.language as tl
except ImportError:  # the guard lets a checkpoint that ships this file load where there is no Triton
    raise

from .kernel_launch import cdiv, inner_contiguous, kernel, next_power_of_2, on_its_device, pdl_options, strides_of, wait
from .op_registration import custom_op

BLOCK_L = 64
PROGRAMS = 528  # four for each multiprocessor of an H200; fixed, so that results do not depend on the device
MAX_PARTS = 64  # the joining kernel holds all parts of a head in registers
LOG2_E = tl.constexpr(1.4426950408889634)  # the kernels take powers of 2
STRIDES = ("q_stride_b", "q_stride_a", *(f"{x}_stride_{dim}" for x in "kv" for dim in "bhl"))


@kernel("L", "length", *STRIDES, "mask_stride_b")
def decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, used_ptr, out_ptr, parts_ptr, stats_ptr, scale, K, R, L, D, length,
    q_stride_b, q_stride_a, k_stride_b, k_stride_h, k_stride_l, v_stride_b, v_stride_h, v_stride_l, mask_stride_b,
    UNIT: tl.constexpr, PDL: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Positions part * length .. (part + 1) * length - 1 of one key/value head; out [B, A, D] if there is one part.

    Else parts [B, A, parts, D], not yet divided by the sums, and stats [B, A, parts, 2]: maximum (base 2), sum. `used`,
    how many positions a static cache has in use, is one more afterwards. Strides but the mask's are in units of UNIT.
    """
    wait(PDL)
    q_stride_b, q_stride_a = q_stride_b * UNIT, q_stride_a * UNIT
    k_stride_b, k_stride_h, k_stride_l = k_stride_b * UNIT, k_stride_h * UNIT, k_stride_l * UNIT
    v_stride_b, v_stride_h, v_stride_l = v_stride_b * UNIT, v_stride_h * UNIT, v_stride_l * UNIT
    if used_ptr is not None and tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(used_ptr, tl.load(used_ptr) + 1)
    b, h = (tl.program_id(0) // K).to(tl.int64), (tl.program_id(0) % K).to(tl.int64)
    part, num_parts = tl.program_id(1), tl.num_programs(1)
    o_r, o_l, o_d = tl.arange(0, BR), tl.arange(0, BL), tl.arange(0, BD)
    m_r, m_d = o_r < R, o_d < D
    heads = h * R + o_r
    query = q_ptr + b * q_stride_b + heads[:, None] * q_stride_a + o_d[None, :]
    q = tl.load(query, mask=m_r[:, None] & m_d[None, :], other=0.0)
    top, total = tl.full([BR], float("-inf"), tl.float32), tl.zeros([BR], tl.float32)
    acc = tl.zeros([BR, BD], tl.float32)
    for start in range(part * length, tl.minimum(part * length + length, L), BL):
        position = start + o_l
        seen = position < L
        if mask_ptr is not None:
            seen = tl.load(mask_ptr + b * mask_stride_b + position, mask=seen, other=0) != 0
        if tl.max(seen.to(tl.int32)) > 0:
            m_kv = seen[:, None] & m_d[None, :]  # zero in place of what is not seen, as that may be NaN
            k_at = k_ptr + b * k_stride_b + h * k_stride_h + position.to(tl.int64)[:, None] * k_stride_l
            v_at = v_ptr + b * v_stride_b + h * v_stride_h + position.to(tl.int64)[:, None] * v_stride_l
            k = tl.load(k_at + o_d[None, :], mask=m_kv, other=0.0)  # [BL, BD]
            v = tl.load(v_at + o_d[None, :], mask=m_kv, other=0.0)
            scores = tl.dot(q, k.T, input_precision="ieee") * (scale * LOG2_E)  # [BR, BL]
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights, rescale = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
            top, total = new_top, total * rescale + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    head = (b * K * R + heads) * num_parts + part
    mask = m_r[:, None] & m_d[None, :]
    if num_parts == 1:
        acc /= tl.maximum(total, 1e-30)[:, None]  # a row that sees nothing gives zeros
        tl.store(out_ptr + head[:, None] * D + o_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(parts_ptr + head[:, None] * D + o_d[None, :], acc, mask=mask)
        tl.store(stats_ptr + head * 2, top, mask=m_r)
        tl.store(stats_ptr + head * 2 + 1, total, mask=m_r)


@kernel("num_parts")
def join_parts_kernel(
    parts_ptr, stats_ptr, out_ptr, num_parts, D, PDL: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr
):
    """One head: parts weighted by how far their maxima lie below the common one."""
    wait(PDL)
    head = tl.program_id(0).to(tl.int64)
    o_p, o_d = tl.arange(0, BP), tl.arange(0, BD)
    at = head * num_parts + o_p
    m_p, m_d = o_p < num_parts, o_d < D
    top = tl.load(stats_ptr + at * 2, mask=m_p, other=float("-inf"))
    total = tl.load(stats_ptr + at * 2 + 1, mask=m_p, other=0.0)
    parts = tl.load(parts_ptr + at[:, None] * D + o_d[None, :], mask=m_p[:, None] & m_d[None, :], other=0.0)
    weights = tl.exp2(top - tl.maximum(tl.max(top, 0), -1e30))  # parts that saw nothing weigh nothing
    out = tl.sum(parts * weights[:, None], 0) / tl.maximum(tl.sum(total * weights, 0), 1e-30)
    tl.store(out_ptr + head * D + o_d, out.to(out_ptr.dtype.element_ty), mask=m_d)


def _split(rows: int, positions: int) -> tuple[int, int]:
    """`positions` of B * K `rows` in parts: positions of a part, and how many parts."""
    parts = max(1, min(cdiv(positions, BLOCK_L), PROGRAMS // rows, MAX_PARTS))
    length = cdiv(cdiv(positions, BLOCK_L), parts) * BLOCK_L
    return length, cdiv(positions, length)


def decode_attention_variant(key: Tensor, value: Tensor) -> tuple:
    """What Triton compiles the kernels for, of key and value [B, K, L, D]: not L, but whether it is split."""
    B, K, L, D = key.shape
    aligned = strides_of(key, value)[0], key.data_ptr() % 16, value.data_ptr() % 16
    has_parts = _split(B * K, L)[1] > 1
    return B, K, D, key.dtype, value.dtype, key.device, key.stride(3), value.stride(3), has_parts, aligned


def launch_decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, used: Tensor | None = None
) -> Tensor:
    """`decode_attention` [B, 1, A, D]; `used`, the fill of a static cache, is counted up by one."""
    (B, A, _, D), (K, L) = query.shape, key.shape[1:3]
    query, key, value = (inner_contiguous(x) for x in (query, key, value))
    length, parts = _split(B * K, L)
    out = query.new_empty(B, 1, A, D)
    acc = torch.empty(B, A, parts, D, dtype=torch.float32, device=query.device) if parts > 1 else out
    stats = torch.empty(B, A, parts, 2, dtype=torch.float32, device=query.device) if parts > 1 else out
    BD, options = max(16, next_power_of_2(D)), pdl_options(query.device)  # 16 is the least that tl.dot takes
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    unit, strides = strides_of(query[:, :, 0], key, value)
    decode_attention_kernel.launch(
        (B * K, parts),
        query, key, value, mask, used, out, acc, stats, scale, K, A // K, L, D, length,
        *strides, 0 if mask is None or mask.shape[0] == 1 else L,
        UNIT=unit, BR=max(16, next_power_of_2(A // K)), BL=BLOCK_L, BD=BD, num_warps=4, **options,
    )  # fmt: skip
    if parts > 1:
        join_parts_kernel.launch(
            (B * A,), acc, stats, out, parts, D, BP=next_power_of_2(MAX_PARTS), BD=BD, num_warps=4, **options
        )
    return out


@custom_op("decode_attention")
@on_its_device
def _decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return launch_decode_attention(query, key, value, mask, scale)


@_decode_attention.register_fake
def _(query, key, value, mask, scale):
    B, A, S, D = query.shape
    return query.new_empty(B, S, A, D)


def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention of one new token per row; each key/value head serves a group of query heads.

    Args:
        query: [B, A, 1, D]. key, value: [B, K, L, D], strided as they lie in the cache.
        mask: bool [B or 1, 1, 1, L], True where a position is seen, or None. scale: factor of the scores.

    Returns: [B, 1, A, D]; zeros for a row that sees nothing. It has no gradient. Raises `ValueError` for other shapes.
    """
    fits = query.shape[2] == 1 and query.shape[1] % key.shape[1] == 0
    if mask is not None:
        fits = fits and mask.dtype == torch.bool and mask.shape[1:] == (1, 1, key.shape[2])
    if not fits:
        raise ValueError(
            "decode_attention needs query [B, A, 1, D], key and value [B, K, L, D] with A a multiple of K, and a bool "
            f"mask [B or 1, 1, 1, L] or none, got {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{None if mask is None else (tuple(mask.shape), mask.dtype)}"
        )
    return _decode_attention(query, key, value, mask, scale)
