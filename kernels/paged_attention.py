"""Attention over the paged key/value cache of continuous batching, in Triton.

N new tokens of several sequences lie side by side. A query heads, K key/value heads (A = R K), D head dim. The cache is
a row of slots, each of which holds the keys or the values of one token in one layer [K, D], and a sequence's slots lie
anywhere in it.

    slot[p]   = index[cu_k[s] + p]  or  block_table[s, p // page] page + p % page       position p of sequence s
    out[i, a] = softmax_p(scale q[i, a] . k[slot[p], a // R] where p <= position of i) v[slot[p], a // R]

`paged_attention` takes sequences with any numbers of new tokens (prompts, parts of prompts, single tokens) and an index
of slots. A program takes BQ new tokens of one sequence with all R query heads of one key/value head.

`paged_decode_attention` takes one new token of each sequence and a block table. As in decode_attention.py, a program
takes a part of the positions, and a second kernel joins the parts. The new token's key and value come from the
projections, so that the program that writes them to the cache need not be waited for.

The kernels read all lengths on the device, so that a CUDA graph of a launch holds for other lengths. They compute in
fp32 and round once. There is no backward, because generation needs no gradient.

| argument | shape | meaning |
|---|---|---|
| cu_q, cu_k | [S + 1] int32 | where new tokens, and all tokens, of each sequence begin; the end repeats for padding |
| index | [total tokens] int64 | slots of all positions of all sequences |
| write_index | [N] int64 | slots of the new tokens |
| block_table | [S, pages] int32 | pages of each sequence in order |
"""

import torch
from torch import Tensor

try:
    import triton.language as tl
except ImportError:  # the guard lets a checkpoint that ships this file load where there is no Triton
    raise

from .decode_attention import LOG2_E, MAX_PARTS, PROGRAMS, join_parts_kernel
from .kernel_launch import cdiv, inner_contiguous, kernel, next_power_of_2, on_its_device, pdl_options, wait

BLOCK_L = 64  # positions that a program takes at once
BLOCK_M = 64  # rows of a tile of `paged_attention`: new tokens times the query heads of one key/value head


@kernel()
def store_kv_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, index_ptr, D, width,
    k_stride_n, k_stride_h, v_stride_n, v_stride_h, PDL: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """One new token: its keys and values [K, D] into their slot."""
    wait(PDL)
    n, o_w = tl.program_id(0).to(tl.int64), tl.arange(0, BW)
    m_w, h, o_d = o_w < width, o_w // D, o_w % D
    slot = tl.load(index_ptr + n).to(tl.int64) * width + o_w
    k = tl.load(k_ptr + n * k_stride_n + h * k_stride_h + o_d, mask=m_w)
    v = tl.load(v_ptr + n * v_stride_n + h * v_stride_h + o_d, mask=m_w)
    tl.store(k_cache_ptr + slot, k.to(k_cache_ptr.dtype.element_ty), mask=m_w)
    tl.store(v_cache_ptr + slot, v.to(v_cache_ptr.dtype.element_ty), mask=m_w)


@kernel("S")
def paged_attention_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, index_ptr, cu_q_ptr, cu_k_ptr, out_ptr, scale, S, K, R, D,
    q_stride_n, q_stride_a, PDL: tl.constexpr,
    BQ: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BQ new tokens of one sequence and the R query heads of one key/value head; out [N, A, D].

    Sequence s has the tiles from cu_q[s] // BQ + s on, which leaves room for its last, incomplete one.
    """
    wait(PDL)
    tile, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s, above = 0, S
    while above - s > 1:
        middle = (s + above) // 2
        is_before = tl.load(cu_q_ptr + middle) // BQ + middle <= tile
        s, above = tl.where(is_before, middle, s), tl.where(is_before, above, middle)
    q_start, q_end = tl.load(cu_q_ptr + s), tl.load(cu_q_ptr + s + 1)
    k_start, k_end = tl.load(cu_k_ptr + s).to(tl.int64), tl.load(cu_k_ptr + s + 1)
    first = q_start + (tile - (q_start // BQ + s)) * BQ
    if first < q_end:
        o_m, o_l, o_d = tl.arange(0, BQ * BR), tl.arange(0, BL), tl.arange(0, BD)
        token, m_d = first + o_m // BR, o_d < D
        past = (k_end - k_start).to(tl.int32) - (q_end - q_start)  # positions of the cache before the new tokens
        last_seen = past + token - q_start  # of each row
        m_q = ((token < q_end) & (o_m % BR < R))[:, None] & m_d[None, :]
        head = h * R + o_m % BR
        q_at = q_ptr + token.to(tl.int64)[:, None] * q_stride_n + head[:, None] * q_stride_a + o_d[None, :]
        q = tl.load(q_at, mask=m_q, other=0.0).to(k_cache_ptr.dtype.element_ty)
        top, total = tl.full([BQ * BR], float("-inf"), tl.float32), tl.zeros([BQ * BR], tl.float32)
        acc = tl.zeros([BQ * BR, BD], tl.float32)
        length = past + tl.minimum(first + BQ, q_end) - q_start
        for start in range(0, length, BL):
            position = start + o_l
            seen = position < length
            slot = tl.load(index_ptr + k_start + position, mask=seen, other=0).to(tl.int64)
            at = (slot[:, None] * K + h) * D + o_d[None, :]
            m_kv = seen[:, None] & m_d[None, :]
            k = tl.load(k_cache_ptr + at, mask=m_kv, other=0.0)  # [BL, BD]
            v = tl.load(v_cache_ptr + at, mask=m_kv, other=0.0)
            scores = tl.dot(q, k.T, input_precision="ieee") * (scale * LOG2_E)  # [BQ BR, BL]
            scores = tl.where(position[None, :] <= last_seen[:, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))  # finite: every row sees position 0
            weights, rescale = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
            top, total = new_top, total * rescale + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        out_at = out_ptr + (token.to(tl.int64)[:, None] * K * R + head[:, None]) * D + o_d[None, :]
        tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=m_q)


@kernel("table_stride")
def paged_decode_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, table_ptr, cu_k_ptr, out_ptr, parts_ptr, stats_ptr,
    scale, K, R, D, page, table_stride,
    q_stride_n, q_stride_a, k_stride_n, k_stride_h, v_stride_n, v_stride_h,
    PDL: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A part of the positions of one sequence and key/value head; out [N, A, D] if there is one part.

    Else parts [N, A, parts, D], not yet divided by the sums, and stats [N, A, parts, 2]: maximum (base 2), sum. The
    first part also has the new token, and writes its key and value to the cache.
    """
    wait(PDL)
    n, h = (tl.program_id(0) // K).to(tl.int64), (tl.program_id(0) % K).to(tl.int64)
    part, num_parts = tl.program_id(1), tl.num_programs(1)
    o_r, o_l, o_d = tl.arange(0, BR), tl.arange(0, BL), tl.arange(0, BD)
    m_r, m_d = o_r < R, o_d < D
    past = tl.load(cu_k_ptr + n + 1) - tl.load(cu_k_ptr + n) - 1  # -1 in a row of padding
    table_ptr += n * table_stride
    heads = h * R + o_r
    q_at = q_ptr + n * q_stride_n + heads[:, None] * q_stride_a + o_d[None, :]
    q = tl.load(q_at, mask=m_r[:, None] & m_d[None, :], other=0.0)

    has_new = tl.where(part == 0, past, -1) >= 0
    m_new = o_d < tl.where(has_new, D, 0)
    new_k = tl.load(k_ptr + n * k_stride_n + h * k_stride_h + o_d, mask=m_new, other=0.0)
    new_v = tl.load(v_ptr + n * v_stride_n + h * v_stride_h + o_d, mask=m_new, other=0.0)
    if has_new:
        slot = tl.load(table_ptr + past // page).to(tl.int64) * page + past % page
        at = (slot * K + h) * D + o_d
        tl.store(k_cache_ptr + at, new_k.to(k_cache_ptr.dtype.element_ty), mask=m_d)
        tl.store(v_cache_ptr + at, new_v.to(v_cache_ptr.dtype.element_ty), mask=m_d)
    score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * (scale * LOG2_E)
    top = tl.where(has_new, score, float("-inf"))
    total = tl.where(has_new, 1.0, 0.0) + tl.zeros([BR], tl.float32)
    acc = tl.zeros([BR, BD], tl.float32) + new_v.to(tl.float32)[None, :]

    q = q.to(k_cache_ptr.dtype.element_ty)
    length = tl.cdiv(tl.cdiv(tl.maximum(past, 0), BL), num_parts) * BL
    for start in range(part * length, tl.minimum(part * length + length, past), BL):
        position = start + o_l
        seen = position < past
        slot = tl.load(table_ptr + position // page, mask=seen, other=0).to(tl.int64) * page + position % page
        at = (slot[:, None] * K + h) * D + o_d[None, :]
        m_kv = seen[:, None] & m_d[None, :]
        k = tl.load(k_cache_ptr + at, mask=m_kv, other=0.0)  # [BL, BD]
        v = tl.load(v_cache_ptr + at, mask=m_kv, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee") * (scale * LOG2_E)  # [BR, BL]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights, rescale = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
        top, total = new_top, total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")

    row = (n * K * R + heads) * num_parts + part
    mask = m_r[:, None] & m_d[None, :]
    if num_parts == 1:
        acc /= tl.maximum(total, 1e-30)[:, None]  # padding gives zeros
        tl.store(out_ptr + row[:, None] * D + o_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(parts_ptr + row[:, None] * D + o_d[None, :], acc, mask=mask)
        tl.store(stats_ptr + row * 2, top, mask=m_r)
        tl.store(stats_ptr + row * 2 + 1, total, mask=m_r)


def _check(query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    N, A, D = query.shape
    K = key.shape[1]
    is_cache = key_cache.shape[1:] == (K, D) and key_cache.is_contiguous() and value_cache.is_contiguous()
    if key.shape != (N, K, D) or value.shape != key.shape or A % K or not is_cache:
        raise ValueError(
            "Paged attention needs query [N, A, D], key and value [N, K, D] with A a multiple of K, and contiguous "
            f"caches [slots, K, D], got {', '.join(str(tuple(x.shape)) for x in (query, key, value, key_cache))}."
        )


@torch.compiler.disable  # as the library's own paths over this cache
@on_its_device
def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    index: Tensor,
    write_index: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
) -> Tensor:
    """Write new keys and values to the cache, and attend causally; any number of new tokens in each sequence.

    Args:
        query: [N, A, D]. key, value: [N, K, D], of the new tokens. key_cache, value_cache: [slots, K, D] contiguous.
        index: [cu_k[-1] or more] int64, slots of all positions, those of the new tokens included.
        write_index: [N] int64, slots of the new tokens; tokens of padding need slots that nobody reads.
        cu_q, cu_k: [S + 1] int32, where sequences begin and end. scale: factor of the scores.

    Returns: [N, A, D], zeros for tokens after cu_q[-1]. Raises `ValueError` for other shapes.
    """
    _check(query, key, value, key_cache, value_cache)
    query, key, value = (inner_contiguous(x) for x in (query, key, value))
    (N, A, D), K, S = query.shape, key.shape[1], len(cu_q) - 1
    options = pdl_options(query.device)
    store_kv_kernel.launch(
        (N,),
        key, value, key_cache, value_cache, write_index, D, K * D, *key.stride()[:2], *value.stride()[:2],
        BW=next_power_of_2(K * D), num_warps=4, **options,
    )  # fmt: skip
    BR = next_power_of_2(A // K)
    BQ = max(1, BLOCK_M // BR)
    out = torch.zeros(N, A, D, dtype=query.dtype, device=query.device)
    paged_attention_kernel.launch(
        (N // BQ + S, K),
        query, key_cache, value_cache, index, cu_q, cu_k, out, scale, S, K, A // K, D, *query.stride()[:2],
        BQ=BQ, BR=BR, BL=BLOCK_L, BD=max(16, next_power_of_2(D)), num_warps=4, **options,
    )  # fmt: skip
    return out


@torch.compiler.disable  # as the library's own paths over this cache
@on_its_device
def paged_decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    page: int,
    cu_k: Tensor,
    scale: float,
) -> Tensor:
    """Write each sequence's new key and value to the cache, and attend; one new token in each sequence.

    Args:
        query: [N, A, D]. key, value: [N, K, D]. key_cache, value_cache: [slots, K, D] contiguous.
        block_table: [N, pages] int32, pages of `page` slots; entries past a sequence's end are not read.
        cu_k: [N + 1] int32, where sequences begin and end, the new token included; rows of padding have no token.
        scale: factor of the scores.

    Returns: [N, A, D], zeros for rows of padding. Raises `ValueError` for other shapes.
    """
    _check(query, key, value, key_cache, value_cache)
    query, key, value = (inner_contiguous(x) for x in (query, key, value))
    (N, A, D), K = query.shape, key.shape[1]
    parts = max(1, min(cdiv(block_table.shape[1] * page, BLOCK_L), PROGRAMS // (N * K), MAX_PARTS))
    out = torch.empty(N, A, D, dtype=query.dtype, device=query.device)
    acc = torch.empty(N, A, parts, D, dtype=torch.float32, device=query.device) if parts > 1 else out
    stats = torch.empty(N, A, parts, 2, dtype=torch.float32, device=query.device) if parts > 1 else out
    BD, options = max(16, next_power_of_2(D)), pdl_options(query.device)  # 16 is the least that tl.dot takes
    paged_decode_kernel.launch(
        (N * K, parts),
        query, key, value, key_cache, value_cache, block_table, cu_k, out, acc, stats,
        scale, K, A // K, D, page, block_table.stride(0),
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        BR=max(16, next_power_of_2(A // K)), BL=BLOCK_L, BD=BD, num_warps=4, **options,
    )  # fmt: skip
    if parts > 1:
        join_parts_kernel.launch(
            (N * A,), acc, stats, out, parts, D, BP=next_power_of_2(MAX_PARTS), BD=BD, num_warps=4, **options
        )
    return out
