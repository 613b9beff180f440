"""Fused INL dynamics in Triton: controller output, velocity and position update, and the mu highway in one pass.

Per token (T tokens, H hidden size, C controller width), with r the highway and m the guidance of the layer above:

    z       = SiLU(W_in [h, v] + b_in)                        [T, C]   inl_projection_kernel
    mu_l    = mu + W_mu h                                     [T, H]   one library GEMM
    a, b, g = sigmoid, min(softplus, 2), sigmoid of W_out z + b_out    three [T, H] logits, inside the kernel
    v'      = clamp(a v - b (h - mu_l), -10, 10)
    h'      = h + dt g v'
    r'      = r + mu_l                                        r counts as zero where it is None
    m       = mu_l + 0.1 r'

Saved for backward: h, v, mu_l, z and what SiLU makes z of. Recomputed: the logits and all that follows. The backward
writes the logits [T, 3H] to memory, where their gradients overwrite them for the GEMMs of z, W_out and b_out. Kept
inside the kernel, as in the forward, they would cost 475 us instead of 350 (T 16384, H 2048, H200, bf16). Nothing is
summed by atomics, so that the same input gives the same bits. Products take the model's dtype and accumulate in fp32;
all else is fp32. fp32 inputs use fp32 products (no TF32).
"""

import functools
import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the guard lets a checkpoint that ships this file load where there is no Triton
    raise

from .kernel_launch import cdiv, kernel, next_power_of_2, on_its_device
from .kernel_reference import BETA_LIMIT, HIGHWAY_SHARE, VELOCITY_LIMIT, inl_dynamics_block_reference
from .op_registration import custom_op, differentiable_gradients

FEW_TOKENS = 32  # up to here the projections are bound by reading their weights: one kernel reads them all
MAX_CONTROLLER = 256  # the dots take all of C at once
# The constants of the architecture in the form that Triton lets a kernel read.
MAX_VELOCITY, MAX_BETA, SHARE = tl.constexpr(VELOCITY_LIMIT), tl.constexpr(BETA_LIMIT), tl.constexpr(HIGHWAY_SHARE)
PTX = torch.version.cuda is not None and os.environ.get("TRITON_INTERPRET", "0") != "1"


@triton.jit
def _dot(x, y):
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def _load_rows(w_ptr, o_n, o_c, N, C):
    """Tile [BN, BC] of a row-major [N, C] matrix."""
    return tl.load(w_ptr + o_n[:, None] * C + o_c[None, :], mask=(o_n < N)[:, None] & (o_c < C)[None, :], other=0.0)


@triton.jit
def _sigmoid(x, PTX: tl.constexpr):
    """Four instructions instead of about twelve: the kernels below are close to bound by issuing them."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; "  # 2 ** (-x log2(e))
            "add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softplus(sigmoid, PTX: tl.constexpr):
    """softplus(x) = -log(sigmoid(-x)), given sigmoid(-x); an infinite result meets min(., 2) next."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; lg2.approx.ftz.f32 t, $1; mul.f32 $0, t, 0fBF317218; }",  # times -log(2)
            "=f,f", [sigmoid], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return -tl.log(sigmoid)


@triton.jit
def clamp_velocity(x):
    """The velocity within its limits. NaN passes through, as in torch.clamp."""
    x = tl.maximum(x, -MAX_VELOCITY, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, MAX_VELOCITY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load_tile(ptr, at, mask, WANTED: tl.constexpr):
    """A [BT, BH] tile in its own dtype, or one zero in place of a gradient that is not there."""
    if WANTED:
        return tl.load(ptr + at, mask=mask, other=0.0)
    else:
        return tl.zeros([1, 1], tl.float32)


@kernel("T")
def inl_dynamics_fwd_kernel(
    h_ptr, v_ptr, highway_ptr, z_ptr, mu_ptr, w_ptr, b_ptr,
    h_out_ptr, v_out_ptr, guidance_out_ptr, highway_out_ptr,
    T, H, C, dt, HAS_HIGHWAY: tl.constexpr, PTX: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    o_h = tl.program_id(0) * BH + tl.arange(0, BH)  # column blocks vary fastest: neighbours read the same rows
    o_t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    o_c = tl.arange(0, BC)
    m_h = o_h < H
    at = o_t[:, None] * H + o_h[None, :]  # [BT, BH]
    mask = (o_t < T)[:, None] & m_h[None, :]
    # All loads come before the first dot, because the compiler moves none up past the barriers of a dot.
    z = _load_rows(z_ptr, o_t, o_c, T, C)  # [BT, BC]
    w_alpha = _load_rows(w_ptr, o_h, o_c, H, C)  # [BH, BC]
    w_beta = _load_rows(w_ptr + H * C, o_h, o_c, H, C)
    w_gate = _load_rows(w_ptr + 2 * H * C, o_h, o_c, H, C)
    b_alpha = tl.load(b_ptr + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    b_beta = tl.load(b_ptr + H + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    b_gate = tl.load(b_ptr + 2 * H + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    h = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
    mu = tl.load(mu_ptr + at, mask=mask, other=0.0).to(tl.float32)
    highway = mu
    if HAS_HIGHWAY:
        highway += tl.load(highway_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(highway_out_ptr + at, highway.to(highway_out_ptr.dtype.element_ty), mask=mask)
    tl.store(guidance_out_ptr + at, (mu + SHARE * highway).to(guidance_out_ptr.dtype.element_ty), mask=mask)
    alpha = _sigmoid(_dot(z, tl.trans(w_alpha)) + b_alpha, PTX)
    beta = _softplus(_sigmoid(-b_beta - _dot(z, tl.trans(w_beta)), PTX), PTX)
    gate = _sigmoid(_dot(z, tl.trans(w_gate)) + b_gate, PTX)
    v = clamp_velocity(alpha * v - tl.minimum(beta, MAX_BETA) * (h - mu))
    tl.store(v_out_ptr + at, v.to(v_out_ptr.dtype.element_ty), mask=mask)
    tl.store(h_out_ptr + at, (h + dt * gate * v).to(h_out_ptr.dtype.element_ty), mask=mask)


@kernel("T")
def inl_dynamics_bwd_kernel(
    dh_out_ptr, dv_out_ptr, dguidance_out_ptr, dhighway_out_ptr, dmu_out_ptr,
    h_ptr, v_ptr, mu_ptr, logits_ptr, b_ptr,
    dh_ptr, dv_ptr, dhighway_ptr, dmu_ptr, sums_ptr,
    T, H, dt, dmu_stride,
    HAS_DH: tl.constexpr, HAS_DV: tl.constexpr, HAS_DGUIDANCE: tl.constexpr, HAS_DHIGHWAY: tl.constexpr,
    HAS_DMU: tl.constexpr, HAS_HIGHWAY: tl.constexpr, PTX: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Elementwise; the logits [T, 3H], still without their bias, are overwritten by their gradients.

    sums [token blocks, 4H]: the gradients of mu_l and of the logits, summed over the tokens of a block.
    """
    o_h = tl.program_id(0) * BH + tl.arange(0, BH)
    o_t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    m_h = o_h < H
    at = o_t[:, None] * H + o_h[None, :]  # [BT, BH]
    mask = (o_t < T)[:, None] & m_h[None, :]
    dtype = h_ptr.dtype.element_ty
    logits_ptr += o_t[:, None] * (3 * H) + o_h[None, :]
    alpha = tl.load(logits_ptr, mask=mask, other=0.0).to(tl.float32)
    beta = tl.load(logits_ptr + H, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(logits_ptr + 2 * H, mask=mask, other=0.0).to(tl.float32)
    alpha += tl.load(b_ptr + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    beta += tl.load(b_ptr + H + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(b_ptr + 2 * H + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    h = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
    mu = tl.load(mu_ptr + at, mask=mask, other=0.0).to(tl.float32)
    d_hidden = _load_tile(dh_out_ptr, at, mask, HAS_DH).to(tl.float32)
    d_velocity = _load_tile(dv_out_ptr, at, mask, HAS_DV).to(tl.float32)
    d_guidance = _load_tile(dguidance_out_ptr, at, mask, HAS_DGUIDANCE).to(tl.float32)
    d_highway = _load_tile(dhighway_out_ptr, at, mask, HAS_DHIGHWAY).to(tl.float32) + SHARE * d_guidance
    d_mu = d_highway + d_guidance + _load_tile(dmu_out_ptr, at, mask, HAS_DMU).to(tl.float32)
    if HAS_HIGHWAY:
        tl.store(dhighway_ptr + at, tl.broadcast_to(d_highway, [BT, BH]).to(dtype), mask=mask)

    alpha, gate = _sigmoid(alpha, PTX), _sigmoid(gate, PTX)
    minus_beta = _sigmoid(-beta, PTX)
    softplus = _softplus(minus_beta, PTX)
    beta = tl.minimum(softplus, MAX_BETA)
    error = h - mu
    free = alpha * v - beta * error  # the velocity before its clamp
    d_gate = dt * gate * d_hidden
    d_velocity = tl.where(tl.abs(free) <= MAX_VELOCITY, d_velocity + d_gate, 0.0)  # on the limit the gradient passes
    d_gate *= clamp_velocity(free) * (1.0 - gate)
    d_error = beta * d_velocity
    d_alpha = alpha * d_velocity
    tl.store(dh_ptr + at, (d_hidden - d_error).to(dtype), mask=mask)
    tl.store(dv_ptr + at, d_alpha.to(dtype), mask=mask)
    d_mu += d_error
    tl.store(dmu_ptr + o_t[:, None] * dmu_stride + o_h[None, :], d_mu.to(dtype), mask=mask)
    d_alpha *= v * (1.0 - alpha)
    d_beta = tl.where(softplus <= MAX_BETA, (minus_beta - 1.0) * d_velocity * error, 0.0)
    tl.store(logits_ptr, d_alpha.to(dtype), mask=mask)
    tl.store(logits_ptr + H, d_beta.to(dtype), mask=mask)
    tl.store(logits_ptr + 2 * H, d_gate.to(dtype), mask=mask)
    sums_ptr += tl.program_id(1).to(tl.int64) * 4 * H + o_h  # rows outside have a bias, but no gradient
    tl.store(sums_ptr, tl.sum(tl.where(mask, d_mu, 0.0), 0), mask=m_h)
    tl.store(sums_ptr + H, tl.sum(tl.where(mask, d_alpha, 0.0), 0), mask=m_h)
    tl.store(sums_ptr + 2 * H, tl.sum(tl.where(mask, d_beta, 0.0), 0), mask=m_h)
    tl.store(sums_ptr + 3 * H, tl.sum(tl.where(mask, d_gate, 0.0), 0), mask=m_h)


@kernel("T")
def inl_projection_kernel(
    h_ptr, v_ptr, w_in_ptr, b_in_ptr, w_mu_ptr, mu_ptr, z_pre_ptr, z_ptr, mu_out_ptr,
    T, H, C, mu_blocks, PTX: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """z = SiLU(W_in [h, v] + b_in) without forming [h, v]; the first `mu_blocks` programs of a row do mu + W_mu h."""
    pid_n = tl.program_id(0)
    o_t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    m_t = o_t < T
    row = o_t[:, None] * H + o_k[None, :]  # [BT, BK]
    acc = tl.zeros([BT, BN], tl.float32)
    if pid_n < mu_blocks:
        o_n = pid_n * BN + tl.arange(0, BN)
        m_n = o_n < H
        column = o_n[:, None] * H + o_k[None, :]  # [BN, BK]
        for k in range(0, H, BK):
            m_k = o_k < H - k
            x = tl.load(h_ptr + row + k, mask=m_t[:, None] & m_k[None, :], other=0.0)
            w = tl.load(w_mu_ptr + column + k, mask=m_n[:, None] & m_k[None, :], other=0.0)
            acc += _dot(x, tl.trans(w))
        acc += tl.load(mu_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        tl.store(
            mu_out_ptr + o_t[:, None] * H + o_n[None, :],
            acc.to(mu_out_ptr.dtype.element_ty), mask=m_t[:, None] & m_n[None, :],
        )  # fmt: skip
    else:
        o_n = (pid_n - mu_blocks) * BN + tl.arange(0, BN)
        m_n = o_n < C
        column = o_n[:, None] * (2 * H) + o_k[None, :]  # [BN, BK]
        for k in range(0, H, BK):
            m_k = o_k < H - k
            x = tl.load(h_ptr + row + k, mask=m_t[:, None] & m_k[None, :], other=0.0)
            w = tl.load(w_in_ptr + column + k, mask=m_n[:, None] & m_k[None, :], other=0.0)
            acc += _dot(x, tl.trans(w))
        for k in range(0, H, BK):
            m_k = o_k < H - k
            x = tl.load(v_ptr + row + k, mask=m_t[:, None] & m_k[None, :], other=0.0)
            w = tl.load(w_in_ptr + H + column + k, mask=m_n[:, None] & m_k[None, :], other=0.0)
            acc += _dot(x, tl.trans(w))
        acc += tl.load(b_in_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        at = o_t[:, None] * C + o_n[None, :]
        mask = m_t[:, None] & m_n[None, :]
        tl.store(z_pre_ptr + at, acc.to(z_ptr.dtype.element_ty), mask=mask)
        tl.store(z_ptr + at, (acc * _sigmoid(acc, PTX)).to(z_ptr.dtype.element_ty), mask=mask)


def _launch_dynamics(h, v, highway, z, mu, w, b, dt: float):
    """`inl_dynamics_fwd_kernel` over [T, H] inputs: h', v', the guidance of the layer above, the highway."""
    T, H = h.shape
    h_out, v_out, guidance_out, highway_out = (torch.empty_like(h) for _ in range(4))
    # Few tokens: the time is reading W_out, so it is spread over the chip. Many tokens: 188 us by sweep on an H200, and
    # 193 to 330 us with other tiles.
    BT, BH, warps = (16, 8, 1) if T <= FEW_TOKENS else (64, 32, 4)
    if h.dtype == torch.float32:
        BT = min(BT, 32)
    inl_dynamics_fwd_kernel.launch(
        (cdiv(H, BH), cdiv(T, BT)),
        h, v, highway, z, mu, w, b, h_out, v_out, guidance_out, highway_out, T, H, z.shape[1], dt,
        HAS_HIGHWAY=highway is not None, PTX=PTX,
        BT=BT, BH=BH, BC=max(16, next_power_of_2(z.shape[1])), num_warps=warps,
    )  # fmt: skip
    return h_out, v_out, guidance_out, highway_out


def _launch_dynamics_backward(grads, h, v, z, mu, w, b, dt: float, has_highway: bool, dmu: Tensor):
    """Backward of `_launch_dynamics`; `grads` of (h', v', guidance, highway', mu_l) may be None.

    Writes the gradient of mu_l into `dmu` [T, H]. Returns those of h, v, the highway (empty where there was none), z,
    W_out, and [4H], those of mu and b_out.
    """
    T, H = h.shape
    grads = [None if grad is None else grad.reshape(T, H).contiguous() for grad in grads]
    dh, dv = torch.empty_like(h), torch.empty_like(h)
    dhighway = torch.empty_like(h) if has_highway else h.new_empty(0)
    logits = z @ w.T  # [T, 3H]; adding the bias here would have the host search for a GEMM that does, every time
    BT, BH = 32, 64  # 285 us by sweep on an H200, 285 to 390 us with other tiles
    blocks = cdiv(T, BT)
    sums = torch.empty(blocks, 4 * H, dtype=torch.float32, device=h.device)
    given = [grad is not None for grad in grads]
    inl_dynamics_bwd_kernel.launch(
        (cdiv(H, BH), blocks),
        *grads, h, v, mu, logits, b, dh, dv, dhighway, dmu, sums, T, H, dt, dmu.stride(0),
        HAS_DH=given[0], HAS_DV=given[1], HAS_DGUIDANCE=given[2], HAS_DHIGHWAY=given[3], HAS_DMU=given[4],
        HAS_HIGHWAY=has_highway, PTX=PTX, BT=BT, BH=BH, num_warps=8,
    )  # fmt: skip
    return dh, dv, dhighway, logits @ w, logits.T @ z, sums.sum(0).to(h.dtype)


def _launch_projection(h, v, w_in, b_in, w_mu, mu_vec):
    """(z_pre, z, mu_l) of [T, H] inputs."""
    (T, H), C = h.shape, w_in.shape[0]
    z_pre, z = h.new_empty(T, C), h.new_empty(T, C)
    few = T <= FEW_TOKENS
    mu = torch.empty_like(h) if few else torch.addmm(mu_vec, h, w_mu.T)
    BT, BN, BK, warps, stages = (16, 16, 256, 2, 5) if few else (64, 64, 64, 4, 4)
    if h.dtype == torch.float32:
        BN, BK, stages = min(BN, 32), 64, 2
    mu_blocks = cdiv(H, BN) if few else 0
    grid = (mu_blocks + cdiv(C, BN), cdiv(T, BT))
    inl_projection_kernel.launch(
        grid,
        h, v, w_in, b_in, w_mu, mu_vec, z_pre, z, mu, T, H, C, mu_blocks,
        PTX=PTX, BT=BT, BN=BN, BK=BK, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return z_pre, z, mu


@custom_op("inl_dynamics_block")
@on_its_device
def _inl_dynamics_block(
    h: Tensor, v: Tensor, highway: Tensor | None, mu_vec: Tensor, w_mu: Tensor,
    w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, dt: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """All but weights are [..., H]; the last two outputs, which backward needs, are [T, C]."""
    shape = h.shape
    h, v, highway = (None if x is None else x.reshape(-1, shape[-1]) for x in (h, v, highway))
    z_pre, z, mu = _launch_projection(h, v, w_in, b_in, w_mu, mu_vec)
    outputs = *_launch_dynamics(h, v, highway, z, mu, w_out, b_out, dt), mu
    return *(x.view(shape) for x in outputs), z_pre, z


@_inl_dynamics_block.register_fake
def _(h, v, highway, mu_vec, w_mu, w_in, b_in, w_out, b_out, dt):
    z_pre, z = (h.new_empty(h.numel() // h.shape[-1], w_in.shape[0]) for _ in range(2))
    return *(torch.empty_like(h) for _ in range(5)), z_pre, z


@custom_op("inl_dynamics_block_backward")
@on_its_device
def _inl_dynamics_block_backward(
    dh: Tensor | None, dv: Tensor | None, dguidance: Tensor | None, dhighway: Tensor | None, dmu: Tensor | None,
    h: Tensor, v: Tensor, mu: Tensor, z_pre: Tensor, z: Tensor,
    w_mu: Tensor, w_in: Tensor, w_out: Tensor, b_out: Tensor, dt: float, has_highway: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape, (T, C) = h.shape, z.shape
    H = shape[-1]
    h, v, mu = (x.view(T, H) for x in (h, v, mu))
    # The gradients of mu_l and z side by side reach h through one GEMM with K = H + C, instead of two passes over dh.
    side = h.new_empty(T, H + C)
    d_mu, d_z = side[:, :H], side[:, H:]
    grads = dh, dv, dguidance, dhighway, dmu
    dh, dv, dhighway, dz, dw_out, sums = _launch_dynamics_backward(
        grads, h, v, z, mu, w_out, b_out, dt, has_highway, d_mu
    )
    torch.ops.aten.silu_backward.grad_input(dz, z_pre, grad_input=d_z)
    dh.addmm_(side, torch.cat((w_mu, w_in[:, :H])))
    dv.addmm_(d_z, w_in[:, H:])
    dw_in = torch.empty_like(w_in)
    torch.mm(d_z.T, h, out=dw_in[:, :H])
    torch.mm(d_z.T, v, out=dw_in[:, H:])
    dmu_vec, db_out = sums[:H].clone(), sums[H:].clone()  # outputs of an operator must not share memory
    dh, dv, dhighway = (x.view(shape) if x.numel() else x for x in (dh, dv, dhighway))
    return dh, dv, dhighway, dmu_vec, d_mu.T @ h, dw_in, d_z.sum(0), dw_out, db_out


@_inl_dynamics_block_backward.register_fake
def _(dh, dv, dguidance, dhighway, dmu, h, v, mu, z_pre, z, w_mu, w_in, w_out, b_out, dt, has_highway):
    dhighway = torch.empty_like(h) if has_highway else h.new_empty(0)
    vectors = h.new_empty(h.shape[-1]), h.new_empty(z.shape[1])
    dh, dv, dw_mu, dw_in, dw_out, db_out = (torch.empty_like(x) for x in (h, v, w_mu, w_in, w_out, b_out))
    return dh, dv, dhighway, vectors[0], dw_mu, dw_in, vectors[1], dw_out, db_out


def _save_block(ctx, inputs, output):
    h, v, highway, mu_vec, w_mu, w_in, b_in, w_out, b_out, ctx.dt = inputs
    ctx.has_highway = highway is not None
    ctx.save_for_backward(h, v, *output[4:], w_mu, w_in, w_out, b_out, mu_vec, b_in)
    ctx.set_materialize_grads(False)  # outputs that nothing uses (the last layer's) stay None


def _block_grad(ctx, dh, dv, dguidance, dhighway, dmu, *_):
    *saved, mu_vec, b_in = ctx.saved_tensors
    grads = dh, dv, dguidance, dhighway, dmu
    if torch.is_grad_enabled():
        h, v, _, _, _, w_mu, w_in, w_out, b_out = saved
        # The highway is not saved. Everything is linear in it, so that zeros in its place give the same gradients.
        highway = torch.zeros_like(h, requires_grad=True) if ctx.has_highway else None
        plain = functools.partial(inl_dynamics_block_reference, dt=ctx.dt)
        inputs = h, v, highway, mu_vec, w_mu, w_in, b_in, w_out, b_out
        return *differentiable_gradients(plain, inputs, grads), None
    dh, dv, dhighway, *weights = _inl_dynamics_block_backward(*grads, *saved, ctx.dt, ctx.has_highway)
    return dh, dv, dhighway if ctx.has_highway else None, *weights, None


_inl_dynamics_block.register_autograd(_block_grad, setup_context=_save_block)


def inl_dynamics_block(
    hidden_states: Tensor,
    velocity: Tensor,
    highway: Tensor | None,
    mu: Tensor,
    mu_proj_weight: Tensor,
    controller_in_weight: Tensor,
    controller_in_bias: Tensor,
    controller_out_weight: Tensor,
    controller_out_bias: Tensor,
    dt: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The whole dynamics module: controller, mu projection, update and highway. Equals `inl_dynamics_block_reference`.

    Args:
        hidden_states, velocity: [..., H]. highway: [..., H], or None for zero. Under autocast all are brought to its
            dtype, else all tensors must be of one: float32, bfloat16 or float16.
        mu: [H]. mu_proj_weight: [H, H]. controller_in_weight: [C, 2H], columns for h first. controller_in_bias: [C].
        controller_out_weight: [3H, C]. controller_out_bias: [3H]. dt: step size.

    Returns: (h', v', guidance for the layer above, highway', mu of this layer), each [..., H]. Raises `ValueError` for
    other dtypes and for a controller that is too wide.
    """
    device = hidden_states.device.type
    tensors = [hidden_states, velocity, highway, mu, mu_proj_weight, controller_in_weight, controller_in_bias]
    tensors += [controller_out_weight, controller_out_bias]
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = [None if x is None else x.to(dtype) for x in tensors]
    found = {x.dtype for x in tensors if x is not None}
    if len(found) > 1 or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"inl_dynamics_block needs all tensors in one of float32, bfloat16, float16, got {sorted(map(str, found))}"
        )
    if not 0 < controller_in_weight.shape[0] <= MAX_CONTROLLER:
        raise ValueError(
            f"inl_dynamics_block takes controller widths up to {MAX_CONTROLLER}, got {controller_in_weight.shape[0]}"
        )
    return _inl_dynamics_block(*(None if x is None else x.contiguous() for x in tensors), dt)[:5]
