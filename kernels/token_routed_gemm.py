"""CGGR, Contiguous Group GEMM Routing: the token-routed gated MLP as grouped GEMMs in Triton, forward and backward.

    y[t] = down[e] (act(gate[e] x[t]) * (up[e] x[t])),   e = expert of token t

Shapes: T tokens, H hidden size, I width of one expert, E experts. Weights are stored [out, in] per expert:
`gate_up_proj` [E, 2I, H] (gate rows first), `down_proj` [E, H, I].

Index arrays, made by routing_plan.py (one routing plan serves every layer that routes alike)
    order    [T]   int32  order[r] = token whose row stands at sorted position r (stable: by expert, then by token)
    offsets  [E+1] int32  rows offsets[e] .. offsets[e+1]-1 of the sorted order belong to expert e
A row tile is up to BLOCK_M sorted rows of one expert. There are never more than min(T, T // BLOCK_M + E) of them, so
grids are sized without asking the device; programs count the tiles from `offsets` and find a tile's expert there.

Forward                                        Backward
    a, gate_up = x[order] @ gate_up_proj[e].T      dgate_up, a      = dy[order] @ down_proj[e], through act(gate) * up
    y[order]   = a @ down_proj[e].T                ddown_proj[e]    = dy[order].T @ a
                                                   dx[order]        = dgate_up @ gate_up_proj[e]
                                                   dgate_up_proj[e] = dgate_up.T @ x[order]
Each line is one kernel. Saved for backward: x[order] [T, H] (in place of x), gate_up [T, 2I] (sorted), weights and
plan; a = act(gate) * up [T, I] is recomputed in the epilogue that reads gate_up anyway. No atomics: every sum has one
order, so results repeat bit for bit.

Three ways to read operands, chosen by shape. Up to DECODE_TOKENS tokens: two memory-bound kernels that hold weight rows
of the hit experts in registers. On Hopper with enough rows: TMA from sorted copies of x and dy, and a persistent grid
whose loads run ahead into the next tile (on an H200, copy plus TMA GEMM takes as long as gathering rows in the GEMM,
and backward needs the copy). Otherwise pointers; the forward GEMM then gathers rows itself unless the copy is kept.
"""

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # the guard lets a checkpoint that ships this file load where there is no Triton
    raise

from .grouped_linear import in_token_order
from .kernel_launch import cdiv, device_properties, kernel, next_power_of_2, on_its_device, pdl_options, wait
from .kernel_reference import sorted_mlp_reference
from .op_registration import custom_op, differentiable_gradients

ACTIVATIONS = ("silu", "swish", "gelu", "relu")
DECODE_TOKENS = 2  # H200: 7.5 and 10 us for 1 and 2 tokens; at 4, tensor-core tiles of 16 tokens win (19 against 21 us)
COPY_TOKENS = 1024  # with fewer, launching a copy of the sorted rows takes longer than gathering them in the GEMM
TMA_ROWS = 128  # tokens per expert; with fewer, small tiles read by pointers keep more of the card busy


@triton.jit
def _count_tiles(offsets, num_experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row tiles up to and including each expert [EXPERTS], and of all experts."""
    experts = tl.arange(0, EXPERTS)
    start = tl.load(offsets + experts, mask=experts < num_experts, other=0)
    end = tl.load(offsets + experts + 1, mask=experts < num_experts, other=0)
    tiles = tl.cdiv(end - start, BLOCK_M)
    return tl.cumsum(tiles), tl.sum(tiles)


@triton.jit
def _locate(offsets, last_tile, pid, num_m, num_n, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """Program -> expert, first row, end of the expert's rows, column tile; GROUP_M row tiles share weights in L2."""
    first = pid // (GROUP_M * num_n) * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    tile = first + pid % (GROUP_M * num_n) % size
    expert = tl.sum((last_tile <= tile).to(tl.int32))
    first_tile = tl.max(tl.where(last_tile <= tile, last_tile, 0))
    row = tl.load(offsets + expert) + (tile - first_tile) * BLOCK_M
    return expert, row, tl.load(offsets + expert + 1), pid % (GROUP_M * num_n) // size


@triton.jit
def _load(source, rows, col, stride, valid, end_col, COLS: tl.constexpr, EVEN: tl.constexpr):
    """Rows of a row-major matrix, columns col .. col+COLS-1; zero where not valid and, unless EVEN, past end_col."""
    cols = col + tl.arange(0, COLS)
    mask = valid[:, None] if EVEN else valid[:, None] & (cols < end_col)[None, :]
    return tl.load(source + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _halves(tile):
    """[M, N] -> its left and its right columns, each [M, N/2]."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """act(gate) and its derivative, in fp32."""
    if ACTIVATION == "relu":
        value = tl.maximum(gate, 0.0)
        derivative = tl.where(gate > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
        value = gate * cdf
        derivative = cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        value = gate * sigmoid
        derivative = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    return value, derivative


@kernel("num_rows")
def gather_rows_kernel(source, order, out, num_rows, size, PDL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[r] = source[order[r]], rows of `size`."""
    wait(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tokens = tl.load(order + rows, mask=rows < num_rows, other=0).to(tl.int64)
    mask = (rows < num_rows)[:, None] & (cols < size)[None, :]
    values = tl.load(source + tokens[:, None] * size + cols[None, :], mask=mask)
    tl.store(out + rows.to(tl.int64)[:, None] * size + cols[None, :], values, mask=mask)


@kernel()
def gate_up_fwd_kernel(
    x, weight, order, offsets, act_out, gate_up, num_experts, hidden, inter,
    EXPERTS: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr, GATHER: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """weight [E, 2I, H], x [T, H] (sorted, or by token if GATHER) -> sorted act_out [T, I], gate_up [T, 2I] if KEEP."""
    wait(PDL)
    last_tile, num_m = _count_tiles(offsets, num_experts, EXPERTS, BLOCK_M)
    num_n = tl.cdiv(inter, BLOCK_N)
    for pid in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=TMA):
        expert, row, end, tile_n = _locate(offsets, last_tile, pid, num_m, num_n, BLOCK_M, GROUP_M)
        rows, column = row + tl.arange(0, BLOCK_M), tile_n * BLOCK_N
        a_rows = tl.load(order + rows, mask=rows < end, other=0) if GATHER else rows
        # BLOCK_N gate rows, then the same BLOCK_N up rows: one product of twice the width serves both
        half = tl.arange(0, 2 * BLOCK_N)
        b_cols = column + half % BLOCK_N
        b_rows = (expert * 2 + half // BLOCK_N) * inter + b_cols
        acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for k in tl.range(0, hidden, BLOCK_K):
            if TMA and not GATHER:
                a = x.load([row, k])
            else:
                a = _load(x, a_rows, k, hidden, rows < end, hidden, BLOCK_K, EVEN_K)
            if TMA:
                b = tl.reshape(weight.load([expert * 2, column, k]), [2 * BLOCK_N, BLOCK_K])
            else:
                b = _load(weight, b_rows, k, hidden, b_cols < inter, hidden, BLOCK_K, EVEN_K)
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        gate, up = _halves(acc)
        value, _ = activate(gate, ACTIVATION)
        cols = column + tl.arange(0, BLOCK_N)
        mask = (rows < end)[:, None] & (cols < inter)[None, :]
        row_start = rows.to(tl.int64)[:, None] * inter
        tl.store(act_out + row_start + cols[None, :], (value * up).to(act_out.dtype.element_ty), mask=mask)
        if KEEP:
            pointers = gate_up + row_start * 2 + cols[None, :]
            tl.store(pointers, gate.to(gate_up.dtype.element_ty), mask=mask)
            tl.store(pointers + inter, up.to(gate_up.dtype.element_ty), mask=mask)


@kernel()
def routed_linear_kernel(
    a_source, weight, order, offsets, out, num_experts, in_size, out_size,
    EXPERTS: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out[order[r]] = W[e] a[r], a sorted; weight holds W, [E, out, in], or, TRANSPOSED, its transpose [E, in, out]."""
    wait(PDL)
    last_tile, num_m = _count_tiles(offsets, num_experts, EXPERTS, BLOCK_M)
    num_n = tl.cdiv(out_size, BLOCK_N)
    for pid in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=TMA):
        expert, row, end, tile_n = _locate(offsets, last_tile, pid, num_m, num_n, BLOCK_M, GROUP_M)
        rows, column = row + tl.arange(0, BLOCK_M), tile_n * BLOCK_N
        cols = column + tl.arange(0, BLOCK_N)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, in_size, BLOCK_K):
            if TMA:
                a = a_source.load([row, k])
            else:
                a = _load(a_source, rows, k, in_size, rows < end, in_size, BLOCK_K, EVEN_K)
            if TRANSPOSED:
                if TMA:
                    b = weight.load([expert * in_size + k, column])
                else:
                    inner = k + tl.arange(0, BLOCK_K)
                    b_rows = expert * in_size + inner
                    b = _load(weight, b_rows, column, out_size, inner < in_size, out_size, BLOCK_N, False)
                acc = tl.dot(a, b, acc, input_precision="ieee")
            else:
                if TMA:
                    b = weight.load([expert * out_size + column, k])
                else:
                    b = _load(weight, expert * out_size + cols, k, in_size, cols < out_size, in_size, BLOCK_K, EVEN_K)
                acc = tl.dot(a, b.T, acc, input_precision="ieee")
        tokens = tl.load(order + rows, mask=rows < end, other=0).to(tl.int64)
        mask = (rows < end)[:, None] & (cols < out_size)[None, :]
        tl.store(out + tokens[:, None] * out_size + cols[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gate_up_grad(grad, gate_up, act_out, grad_gate_up, rows, end, column, inter, ACTIVATION: tl.constexpr):
    """Gradient of act(gate) * up for one tile; writes it and the recomputed product."""
    cols = column + tl.arange(0, grad.shape[1])
    mask = (rows < end)[:, None] & (cols < inter)[None, :]
    row_start = rows.to(tl.int64)[:, None] * inter
    pointers = row_start * 2 + cols[None, :]
    gate = tl.load(gate_up + pointers, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + pointers + inter, mask=mask, other=0.0).to(tl.float32)
    value, derivative = activate(gate, ACTIVATION)
    dtype = grad_gate_up.dtype.element_ty
    tl.store(grad_gate_up + pointers, (grad * up * derivative).to(dtype), mask=mask)
    tl.store(grad_gate_up + pointers + inter, (grad * value).to(dtype), mask=mask)
    tl.store(act_out + row_start + cols[None, :], (value * up).to(dtype), mask=mask)


@kernel()
def gate_up_bwd_kernel(
    grad, weight, offsets, gate_up, act_out, grad_gate_up, num_experts, hidden, inter,
    EXPERTS: tl.constexpr, ACTIVATION: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """dy sorted [T, H], down_proj [E, H, I], gate_up [T, 2I] -> act_out [T, I] and grad_gate_up [T, 2I]."""
    wait(PDL)
    last_tile, num_m = _count_tiles(offsets, num_experts, EXPERTS, BLOCK_M)
    num_n = tl.cdiv(inter, BLOCK_N)
    for pid in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=TMA):
        expert, row, end, tile_n = _locate(offsets, last_tile, pid, num_m, num_n, BLOCK_M, GROUP_M)
        rows, column = row + tl.arange(0, BLOCK_M), tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, hidden, BLOCK_K):
            if TMA:
                a = grad.load([row, k])
                b = weight.load([expert * hidden + k, column])
            else:
                inner = k + tl.arange(0, BLOCK_K)
                a = _load(grad, rows, k, hidden, rows < end, hidden, BLOCK_K, EVEN_K)
                b = _load(weight, expert * hidden + inner, column, inter, inner < hidden, inter, BLOCK_N, False)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        # in quarters: the whole tile at once would need three times the registers of its accumulator
        left, right = _halves(acc)
        piece0, piece1 = _halves(left)
        piece2, piece3 = _halves(right)
        _gate_up_grad(piece0, gate_up, act_out, grad_gate_up, rows, end, column, inter, ACTIVATION)
        _gate_up_grad(piece1, gate_up, act_out, grad_gate_up, rows, end, column + BLOCK_N // 4, inter, ACTIVATION)
        _gate_up_grad(piece2, gate_up, act_out, grad_gate_up, rows, end, column + BLOCK_N // 2, inter, ACTIVATION)
        _gate_up_grad(piece3, gate_up, act_out, grad_gate_up, rows, end, column + BLOCK_N // 4 * 3, inter, ACTIVATION)


@kernel()
def weight_grad_bwd_kernel(
    left, right, left_tma, right_tma, offsets, out, size_m, size_n,
    TMA: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out[e] [M, N] = sum over the expert's rows r of left[r] [M] right[r] [N]; an expert without rows gets zeros."""
    num_m, num_n = tl.cdiv(size_m, BLOCK_M), tl.cdiv(size_n, BLOCK_N)
    wait(PDL)
    expert, pid = tl.program_id(0) // (num_m * num_n), tl.program_id(0) % (num_m * num_n)
    first = pid // (GROUP_M * num_n) * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    m = (first + pid % (GROUP_M * num_n) % size) * BLOCK_M
    n = pid % (GROUP_M * num_n) // size * BLOCK_N
    start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    whole = start + (end - start) // BLOCK_K * BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(start, whole, BLOCK_K):
        if TMA:
            a, b = left_tma.load([k, m]), right_tma.load([k, n])
        else:
            rows = k + tl.arange(0, BLOCK_K)
            a = _load(left, rows, m, size_m, rows < end, size_m, BLOCK_M, False)
            b = _load(right, rows, n, size_n, rows < end, size_n, BLOCK_N, False)
        acc = tl.dot(a.T, b, acc, input_precision="ieee")
    if whole < end:  # the last rows stand before those of the next expert, which TMA would read too
        rows = whole + tl.arange(0, BLOCK_K)
        a = _load(left, rows, m, size_m, rows < end, size_m, BLOCK_M, False)
        b = _load(right, rows, n, size_n, rows < end, size_n, BLOCK_N, False)
        acc = tl.dot(a.T, b, acc, input_precision="ieee")
    rows, cols = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    pointers = out + expert.to(tl.int64) * size_m * size_n + rows.to(tl.int64)[:, None] * size_n + cols[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(rows < size_m)[:, None] & (cols < size_n)[None, :])


@triton.jit
def _locate_hit(offsets, slot, num_experts, EXPERTS: tl.constexpr):
    """The slot-th expert that has rows: expert, first row, end of rows (both 0 where fewer experts are hit)."""
    experts = tl.arange(0, EXPERTS)
    start = tl.load(offsets + experts, mask=experts < num_experts, other=0)
    end = tl.load(offsets + experts + 1, mask=experts < num_experts, other=0)
    hit = (end > start).to(tl.int32)
    chosen = (tl.cumsum(hit) == slot + 1) & (hit > 0)
    return tl.sum(tl.where(chosen, experts, 0)), tl.sum(tl.where(chosen, start, 0)), tl.sum(tl.where(chosen, end, 0))


@kernel()
def gate_up_decode_kernel(
    x, weight, order, offsets, act_out, num_experts, hidden, inter,
    EXPERTS: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act_out [T, I], sorted: BLOCK_N gate and up rows of one hit expert stay in registers while its tokens pass."""
    wait(PDL)
    expert, start, end = _locate_hit(offsets, tl.program_id(1), num_experts, EXPERTS)
    if start < end:
        n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        row = expert * 2 * inter + n
        gate_rows = _load(weight, row, 0, hidden, n < inter, hidden, BLOCK_K, False)
        up_rows = _load(weight, row + inter, 0, hidden, n < inter, hidden, BLOCK_K, False)
        for r in range(start, end):
            token = tl.load(order + r).to(tl.int64)
            values = tl.load(x + token * hidden + k, mask=k < hidden, other=0.0).to(tl.float32)[None, :]
            value, _ = activate(tl.sum(gate_rows.to(tl.float32) * values, axis=1), ACTIVATION)
            value *= tl.sum(up_rows.to(tl.float32) * values, axis=1)
            tl.store(act_out + r * inter + n, value.to(act_out.dtype.element_ty), mask=n < inter)


@kernel()
def down_decode_kernel(
    act, weight, order, offsets, out, num_experts, hidden, inter,
    EXPERTS: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[order[r]] [H] = down_proj[e] act[r], in the same manner."""
    expert, start, end = _locate_hit(offsets, tl.program_id(1), num_experts, EXPERTS)
    if start < end:
        n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        weight_rows = _load(weight, expert * hidden + n, 0, inter, n < hidden, inter, BLOCK_K, False)
        if PDL:  # the weights are on their way before the first kernel has ended
            tl.extra.cuda.gdc_wait()
        for r in range(start, end):
            token = tl.load(order + r).to(tl.int64)
            values = tl.load(act + r * inter + k, mask=k < inter, other=0.0).to(tl.float32)[None, :]
            value = tl.sum(weight_rows.to(tl.float32) * values, axis=1)
            tl.store(out + token * hidden + n, value.to(out.dtype.element_ty), mask=n < hidden)


def _config(op: str, tokens: int, experts: int, dtype: torch.dtype, tma: bool) -> dict:
    """Tile sizes of one GEMM. Swept on one H200 (bf16, H 2048, I 1408, 4 experts, T 4 .. 16384)."""
    rows = tokens // experts
    pinned = os.environ.get("COMPLEXITY_DEEP_CGGR_CONFIG")  # BLOCK_M,BLOCK_N,BLOCK_K,num_warps,num_stages of every GEMM
    if pinned:
        tile = [int(size) for size in pinned.split(",")]
    elif dtype == torch.float32:
        tile = [64, 32, 32, 4, 2]  # no tensor cores in full fp32
    elif op == "weight_grad":
        if tma and rows <= 256:  # short contractions: a small BLOCK_K shortens the masked tail
            tile = [128, 128, 32, 4, 4]
        elif tma:
            tile = [128, 128, 64, 4, 3] if rows < 2048 else [128, 256, 64, 8, 3]
        else:
            tile = [64, 128, 32, 4, 3] if rows < 128 else [128, 128, 64, 8, 3]
    elif tma and tokens < 1024:
        tile = {"gate_up": [128, 64, 128, 8, 3], "gate_up_bwd": [64, 128, 64, 4, 5], "linear": [128, 128, 64, 4, 4]}[op]
    elif tma:
        tile = [128, 256, 64, 8, 3]
        if op == "gate_up":
            tile = [128, 128, 64, 8, 3]
        elif op == "gate_up_bwd" and (tokens < 8192 or rows < 512):
            tile = [128, 128, 64, 8, 4]
    elif rows <= 16:
        tile = [16, 32, 128, 4, 4]
    elif rows < 128:
        tile = [64, 64, 64, 4, 4]
    else:  # 96 KB of shared memory, which every Ampere card has
        tile = [128, 64, 64, 8, 3] if op == "gate_up" else [128, 128, 64, 8, 3]
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return dict(zip(names, tile)) | {"GROUP_M": 8}


def token_classes(experts: int) -> list[int]:
    """Numbers of tokens from 33 on, at least one for every choice of tiles that `_config` makes for so many."""
    per_expert = [1, 17, TMA_ROWS, 257, 512, 2048]  # tokens from which on another tile is taken, times experts
    counts = {33, COPY_TOKENS, 8192, *(experts * rows for rows in per_expert)}
    return sorted(count for count in counts if count >= 33)


def _use_tma(tokens: int, hidden: int, inter: int, experts: int, *tensors: Tensor) -> bool:
    """TMA path: a Hopper card (tiles fill its 227 KB), 2-byte elements, 16-byte aligned rows, whole tiles in K."""
    return (
        tokens >= TMA_ROWS * experts
        and device_properties(tensors[0].device)[1] == 9
        and tensors[0].element_size() == 2
        and hidden % 64 == 0
        and inter % 64 == 0
        and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    )


def _grid(tokens: int, experts: int, columns: int, config: dict, device: torch.device, tma: bool) -> tuple[int]:
    """Programs of a GEMM: one per tile; with TMA persistent ones, one per multiprocessor (four beside NCCL)."""
    tiles = min(tokens, tokens // config["BLOCK_M"] + experts) * cdiv(columns, config["BLOCK_N"])
    programs = device_properties(device)[0]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        programs *= 4  # a sum of gradients holds some multiprocessors: their programs would start after all others
    return (min(tiles, programs) if tma else tiles,)


def _matrix(tensor: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """TMA descriptor of a tensor flattened to rows of its last dimension."""
    return TensorDescriptor.from_tensor(tensor.view(-1, tensor.shape[-1]), [rows, cols])


def _gather_rows(source: Tensor, order: Tensor) -> Tensor:
    out = torch.empty_like(source)
    block = min(next_power_of_2(source.shape[1]), 2048)
    grid = (cdiv(source.shape[0], 2), cdiv(source.shape[1], block))
    gather_rows_kernel.launch(
        grid, source, order, out, *source.shape, ROWS=2, BLOCK=block, num_warps=8, **pdl_options(source.device)
    )
    return out


def _gate_up(x, weight, order, offsets, act_out, gate_up, activation, gather, tma):
    experts, inter, hidden = weight.shape[0], weight.shape[1] // 2, weight.shape[2]
    config = _config("gate_up", len(x), experts, x.dtype, tma)
    grid = _grid(len(x), experts, inter, config, x.device, tma)
    if tma:
        block = [2, config["BLOCK_N"], config["BLOCK_K"]]
        weight = TensorDescriptor.from_tensor(weight.view(-1, inter, hidden), block)
        x = x if gather else _matrix(x, config["BLOCK_M"], config["BLOCK_K"])
    gate_up_fwd_kernel.launch(
        grid,
        x, weight, order, offsets, act_out, gate_up, experts, hidden, inter,
        EXPERTS=next_power_of_2(experts), ACTIVATION=activation, KEEP=gate_up.numel() > 0, GATHER=gather,
        TMA=tma, EVEN_K=hidden % config["BLOCK_K"] == 0, **config, **pdl_options(act_out.device),
    )  # fmt: skip


def _routed_linear(a, weight, order, offsets, out, transposed, tma):
    experts, in_size, out_size = weight.shape[0], a.shape[1], out.shape[1]
    config = _config("linear", len(a), experts, a.dtype, tma)
    grid = _grid(len(a), experts, out_size, config, a.device, tma)
    if tma:
        rows, cols = ("BLOCK_K", "BLOCK_N") if transposed else ("BLOCK_N", "BLOCK_K")
        weight = _matrix(weight, config[rows], config[cols])
        a = _matrix(a, config["BLOCK_M"], config["BLOCK_K"])
    routed_linear_kernel.launch(
        grid,
        a, weight, order, offsets, out, experts, in_size, out_size, EXPERTS=next_power_of_2(experts),
        TRANSPOSED=transposed, TMA=tma, EVEN_K=in_size % config["BLOCK_K"] == 0, **config, **pdl_options(out.device),
    )  # fmt: skip


def _weight_grad(left, right, offsets, out, tma):
    experts, size_m, size_n = out.shape
    config = _config("weight_grad", len(left), experts, left.dtype, tma)
    grid = (experts * cdiv(size_m, config["BLOCK_M"]) * cdiv(size_n, config["BLOCK_N"]),)
    left_tma = _matrix(left, config["BLOCK_K"], config["BLOCK_M"]) if tma else left
    right_tma = _matrix(right, config["BLOCK_K"], config["BLOCK_N"]) if tma else right
    operands, options = (left, right, left_tma, right_tma), config | pdl_options(out.device)
    weight_grad_bwd_kernel.launch(grid, *operands, offsets, out, size_m, size_n, TMA=tma, **options)


def _decode(x, gate_up_proj, down_proj, order, offsets, act_out, out, activation):
    (tokens, hidden), (experts, _, inter) = x.shape, down_proj.shape
    slots, blocks = min(tokens, experts), (next_power_of_2(hidden), next_power_of_2(inter))
    rows = [max(1, 4096 // block) for block in blocks]  # 8 KB a matrix and program: all its loads are in flight at once
    options = {"EXPERTS": next_power_of_2(experts)} | pdl_options(x.device)
    gate_up_decode_kernel.launch(
        (cdiv(inter, rows[0]), slots),
        x, gate_up_proj, order, offsets, act_out, experts, hidden, inter,
        ACTIVATION=activation, BLOCK_N=rows[0], BLOCK_K=blocks[0], num_warps=max(2, blocks[0] // 2048), **options,
    )  # fmt: skip
    down_decode_kernel.launch(
        (cdiv(hidden, rows[1]), slots),
        act_out, down_proj, order, offsets, out, experts, hidden, inter,
        BLOCK_N=rows[1], BLOCK_K=blocks[1], num_warps=max(1, blocks[1] // 4096), **options,
    )  # fmt: skip


@custom_op("token_routed_mlp_forward")
@on_its_device
def token_routed_mlp_forward(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, order: Tensor, offsets: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`token_routed_mlp` and, if `keep`, what its backward needs: x sorted [T, H] and gate_up [T, 2I] (else empty)."""
    shape, (_, hidden, inter) = x.shape, down_proj.shape
    x = x.view(-1, hidden)
    tokens = x.shape[0]
    out, act = torch.empty_like(x), x.new_empty(tokens, inter)
    whole, gate_up = out.view(shape), x.new_empty((tokens, 2 * inter) if keep else 0)
    if tokens == 0:
        return whole, x.new_empty((tokens, hidden) if keep else 0), gate_up
    if tokens <= DECODE_TOKENS and not keep and max(hidden, inter) <= 16384:  # a weight row must fit in registers
        _decode(x, gate_up_proj, down_proj, order, offsets, act, out, activation)
        return whole, x.new_empty(0), gate_up
    tma = _use_tma(tokens, hidden, inter, len(down_proj), x, gate_up_proj, down_proj)
    x_sorted = _gather_rows(x, order) if keep or (tma and tokens >= COPY_TOKENS) else x
    _gate_up(x_sorted, gate_up_proj, order, offsets, act, gate_up, activation, x_sorted is x, tma)
    _routed_linear(act, down_proj, order, offsets, out, False, tma)
    return whole, x_sorted if keep else x.new_empty(0), gate_up


@token_routed_mlp_forward.register_fake
def _(x, gate_up_proj, down_proj, order, offsets, activation, keep):
    if not keep:
        return torch.empty_like(x), x.new_empty(0), x.new_empty(0)
    tokens = x.numel() // x.shape[-1]
    return torch.empty_like(x), x.new_empty(tokens, x.shape[-1]), x.new_empty(tokens, gate_up_proj.shape[1])


@custom_op("token_routed_mlp_backward")
@on_its_device
def token_routed_mlp_backward(
    grad: Tensor, x_sorted: Tensor, gate_up: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
    order: Tensor, offsets: Tensor, activation: str, need_x: bool, need_gate_up_proj: bool, need_down_proj: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, gate_up_proj and down_proj; an unneeded one is empty."""
    shape, (experts, hidden, inter) = grad.shape, down_proj.shape
    grad = grad.view(-1, hidden)
    tokens = grad.shape[0]
    grad_x = grad.new_empty((tokens, hidden) if need_x else 0)
    grad_gate_up_proj = torch.empty_like(gate_up_proj) if need_gate_up_proj else grad.new_empty(0)
    grad_down_proj = torch.empty_like(down_proj) if need_down_proj else grad.new_empty(0)
    if tokens == 0:
        return grad_x.view(shape) if need_x else grad_x, grad_gate_up_proj.zero_(), grad_down_proj.zero_()
    tma = _use_tma(tokens, hidden, inter, experts, x_sorted, gate_up_proj, down_proj)
    grad_sorted, act, grad_gate_up = _gather_rows(grad, order), grad.new_empty(tokens, inter), torch.empty_like(gate_up)
    config = _config("gate_up_bwd", tokens, experts, grad.dtype, tma)
    source, weight = grad_sorted, down_proj
    if tma:
        source = _matrix(grad_sorted, config["BLOCK_M"], config["BLOCK_K"])
        weight = _matrix(down_proj, config["BLOCK_K"], config["BLOCK_N"])
    gate_up_bwd_kernel.launch(
        _grid(tokens, experts, inter, config, grad.device, tma),
        source, weight, offsets, gate_up, act, grad_gate_up, experts, hidden, inter,
        EXPERTS=next_power_of_2(experts), ACTIVATION=activation, TMA=tma,
        EVEN_K=hidden % config["BLOCK_K"] == 0, **config, **pdl_options(grad.device),
    )  # fmt: skip
    if need_down_proj:
        _weight_grad(grad_sorted, act, offsets, grad_down_proj, tma)
    if need_x:
        _routed_linear(grad_gate_up, gate_up_proj, order, offsets, grad_x, True, tma)
    if need_gate_up_proj:
        _weight_grad(grad_gate_up, x_sorted, offsets, grad_gate_up_proj, tma)
    return grad_x.view(shape) if need_x else grad_x, grad_gate_up_proj, grad_down_proj


@token_routed_mlp_backward.register_fake
def _(grad, x_sorted, gate_up, gate_up_proj, down_proj, order, offsets, activation, *needs):
    like = (grad, gate_up_proj, down_proj)
    return tuple(torch.empty_like(t) if need else t.new_empty(0) for t, need in zip(like, needs))


def _save_for_backward(ctx, inputs, output):
    x, gate_up_proj, down_proj, order, offsets, ctx.activation, _ = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(*output[1:], gate_up_proj, down_proj, order, offsets)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _token_routed_mlp_grad(ctx, grad, grad_x_sorted, _gate_up):
    """`grad_x_sorted` comes only from a second derivative: the first one was taken with respect to x sorted."""
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
    x_sorted, _, gate_up_proj, down_proj, order, offsets = saved
    grads = [None] * 3
    if grad is not None and torch.is_grad_enabled():
        plan = order, offsets
        grads = _differentiable_token_routed_mlp_grad(grad, x_sorted, gate_up_proj, down_proj, *plan, ctx.activation)
    elif grad is not None:
        found = token_routed_mlp_backward(grad.contiguous(), *saved, ctx.activation, *needs)
        grads = [value if need else None for value, need in zip(found, needs)]
    if grad_x_sorted is not None and needs[0]:
        grad_x = in_token_order(grad_x_sorted, order).view(ctx.shape)
        grads[0] = grad_x if grads[0] is None else grads[0] + grad_x
    return *grads, None, None, None, None


def _differentiable_token_routed_mlp_grad(grad, x_sorted, gate_up_proj, down_proj, order, offsets, activation):
    mlp = lambda x, gate_up, down: sorted_mlp_reference(x, gate_up, down, offsets, activation)  # noqa: E731
    grads = differentiable_gradients(mlp, (x_sorted, gate_up_proj, down_proj), (grad.reshape(x_sorted.shape)[order],))
    if grads[0] is not None:
        grads[0] = in_token_order(grads[0], order).view(grad.shape)
    return grads


token_routed_mlp_forward.register_autograd(_token_routed_mlp_grad, setup_context=_save_for_backward)


def token_routed_mlp(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, order: Tensor, offsets: Tensor, activation: str = "silu"
) -> Tensor:
    """Token-routed gated MLP: y[t] = down[e] (act(gate[e] x[t]) * (up[e] x[t])), e the expert of token t.

    Args:
        x: [..., H], T tokens. gate_up_proj: [E, 2I, H], gate rows first. down_proj: [E, H, I]. All of one dtype.
        order, offsets: the routing plan of `routing_plan`.
        activation: one of `ACTIVATIONS`.

    Returns: [..., H] in token order, differentiable in x, gate_up_proj and down_proj.
    """
    experts, hidden, inter = down_proj.shape
    if x.shape[-1] != hidden or gate_up_proj.shape != (experts, 2 * inter, hidden):
        raise ValueError(
            "expected x [..., H], gate_up_proj [E, 2I, H], down_proj [E, H, I], got "
            f"{tuple(x.shape)}, {tuple(gate_up_proj.shape)}, {tuple(down_proj.shape)}"
        )
    dtypes = {x.dtype, gate_up_proj.dtype, down_proj.dtype}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(f"expected fp32, bf16 or fp16, the same for all three tensors, got {dtypes}")
    if order.shape[0] * hidden != x.numel() or offsets.shape[0] != experts + 1:
        plan = f"{order.shape[0]} tokens and {offsets.shape[0] - 1} experts"
        raise ValueError(f"plan of {plan} for {x.shape[:-1].numel()} tokens and {experts} experts")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    keep = torch.is_grad_enabled() and (x.requires_grad or gate_up_proj.requires_grad or down_proj.requires_grad)
    tensors = (tensor.contiguous() for tensor in (x, gate_up_proj, down_proj, order, offsets))
    return token_routed_mlp_forward(*tensors, activation, keep)[0]
