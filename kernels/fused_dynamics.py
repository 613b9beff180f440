"""Fused INL dynamics in Triton: controller output, velocity and position update, and the mu highway in one pass.

Per token (T tokens, H hidden size, C controller width):

    z       = SiLU(W_in [h, v] + b_in)                        [T, C]   inl_projection_kernel
    mu_l    = mu + W_mu h                                     [T, H]   one library GEMM
    a, b, g = sigmoid, min(softplus, 2), sigmoid of W_out z + b_out    three [T, H] logits, inside the kernel
    v'      = clamp(a v - b (h - mu_l), -10, 10)
    h'      = h + dt g v'
    R'      = R + mu_l                                        mu highway (R = 0 when it is None)
    m       = mu_l + 0.1 R'

`inl_dynamics` is the part from the logits down and equals `inl_dynamics_reference`; `inl_dynamics_block` is all of it.

Saved for backward: h, v, z, mu_l (and the block's pre-activation of z). Recomputed: the logits and all that follows.
The backward's logits [T, 3H] do pass through memory for a moment, where their gradients overwrite them for the GEMMs
of z, W_out and b_out: kept inside like the forward's they cost 475 us, this way 350 (T 16384, H 2048, H200, bf16).
Nothing is summed by atomics: the same input gives the same bits. Products take the model's dtype and accumulate in
fp32, all else is fp32; fp32 inputs use fp32 products (no TF32).
"""

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the guard lets a checkpoint that ships this file load where there is no Triton
    raise

from .kernel_launch import cdiv, next_power_of_2, on_its_device
from .kernel_reference import inl_dynamics_block_reference, inl_dynamics_reference
from .op_registration import custom_op, differentiable_gradients

FEW_TOKENS = 32  # up to here the projections are bound by reading their weights: one kernel reads them all
MAX_CONTROLLER = 256  # the dots take all of C at once
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
def _clamp(x):
    """Clamp to [-10, 10] that lets NaN through, as torch.clamp does."""
    x = tl.maximum(x, -10.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, 10.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load_tile(ptr, at, mask, WANTED: tl.constexpr):
    """A [BT, BH] tile in its own dtype, or one zero in place of a gradient that is not there."""
    if WANTED:
        return tl.load(ptr + at, mask=mask, other=0.0)
    else:
        return tl.zeros([1, 1], tl.float32)


@triton.jit
def inl_dynamics_fwd_kernel(
    h_ptr, v_ptr, r_ptr, z_ptr, mu_ptr, w_ptr, b_ptr,
    h_out_ptr, v_out_ptr, m_out_ptr, r_out_ptr,
    T, H, C, dt,
    HAS_RESIDUAL: tl.constexpr, HIGHWAY: tl.constexpr, PTX: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    o_h = tl.program_id(0) * BH + tl.arange(0, BH)  # column blocks vary fastest: neighbours read the same rows
    o_t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    o_c = tl.arange(0, BC)
    m_h = o_h < H
    at = o_t[:, None] * H + o_h[None, :]  # [BT, BH]
    mask = (o_t < T)[:, None] & m_h[None, :]
    # every load before the first dot: no load moves up past its barriers
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
    if HIGHWAY:
        r = mu
        if HAS_RESIDUAL:
            r += tl.load(r_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(r_out_ptr + at, r.to(r_out_ptr.dtype.element_ty), mask=mask)
        tl.store(m_out_ptr + at, (mu + 0.1 * r).to(m_out_ptr.dtype.element_ty), mask=mask)
    alpha = _sigmoid(_dot(z, tl.trans(w_alpha)) + b_alpha, PTX)
    beta = _softplus(_sigmoid(-b_beta - _dot(z, tl.trans(w_beta)), PTX), PTX)
    gate = _sigmoid(_dot(z, tl.trans(w_gate)) + b_gate, PTX)
    v = _clamp(alpha * v - tl.minimum(beta, 2.0) * (h - mu))
    tl.store(v_out_ptr + at, v.to(v_out_ptr.dtype.element_ty), mask=mask)
    tl.store(h_out_ptr + at, (h + dt * gate * v).to(h_out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def inl_dynamics_bwd_kernel(
    dh_out_ptr, dv_out_ptr, dm_out_ptr, dr_out_ptr, dmu_out_ptr,
    h_ptr, v_ptr, mu_ptr, logits_ptr,
    dh_ptr, dv_ptr, dr_ptr, dmu_ptr, dmu_sums_ptr,
    T, H, dt, dmu_stride,
    HAS_DH: tl.constexpr, HAS_DV: tl.constexpr, HAS_DM: tl.constexpr, HAS_DR: tl.constexpr, HAS_DMU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, PTX: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Elementwise; the logits [T, 3H] are overwritten by their gradients."""
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
    h = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
    mu = tl.load(mu_ptr + at, mask=mask, other=0.0).to(tl.float32)
    d_hidden = _load_tile(dh_out_ptr, at, mask, HAS_DH).to(tl.float32)
    d_velocity = _load_tile(dv_out_ptr, at, mask, HAS_DV).to(tl.float32)
    d_m = _load_tile(dm_out_ptr, at, mask, HAS_DM).to(tl.float32)
    d_residual = _load_tile(dr_out_ptr, at, mask, HAS_DR).to(tl.float32) + 0.1 * d_m
    d_mu = d_residual + d_m + _load_tile(dmu_out_ptr, at, mask, HAS_DMU).to(tl.float32)
    if HAS_RESIDUAL:
        tl.store(dr_ptr + at, tl.broadcast_to(d_residual, [BT, BH]).to(dtype), mask=mask)

    alpha, gate = _sigmoid(alpha, PTX), _sigmoid(gate, PTX)
    minus_beta = _sigmoid(-beta, PTX)
    softplus = _softplus(minus_beta, PTX)
    beta = tl.minimum(softplus, 2.0)
    error = h - mu
    free = alpha * v - beta * error  # the velocity before its clamp
    d_gate = dt * gate * d_hidden
    d_velocity = tl.where(tl.abs(free) <= 10.0, d_velocity + d_gate, 0.0)  # on the limit the gradient passes
    d_gate *= _clamp(free) * (1.0 - gate)
    d_error = beta * d_velocity
    d_alpha = alpha * d_velocity
    tl.store(dh_ptr + at, (d_hidden - d_error).to(dtype), mask=mask)
    tl.store(dv_ptr + at, d_alpha.to(dtype), mask=mask)
    d_mu += d_error
    tl.store(dmu_ptr + o_t[:, None] * dmu_stride + o_h[None, :], d_mu.to(dtype), mask=mask)
    d_alpha *= v * (1.0 - alpha)
    d_beta = tl.where(softplus <= 2.0, (minus_beta - 1.0) * d_velocity * error, 0.0)
    tl.store(logits_ptr, d_alpha.to(dtype), mask=mask)
    tl.store(logits_ptr + H, d_beta.to(dtype), mask=mask)
    tl.store(logits_ptr + 2 * H, d_gate.to(dtype), mask=mask)
    if dmu_sums_ptr is not None:  # rows outside are zero; sums [token blocks, H]
        tl.store(dmu_sums_ptr + tl.program_id(1).to(tl.int64) * H + o_h, tl.sum(d_mu, 0), mask=m_h)


@triton.jit
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


def _launch_dynamics(h, v, r, z, mu, w, b, dt: float, highway: bool):
    """`inl_dynamics_fwd_kernel` over [T, H] inputs; without `highway` the last two results are empty."""
    T, H = h.shape
    h_out, v_out = torch.empty_like(h), torch.empty_like(h)
    m_out, r_out = (torch.empty_like(h), torch.empty_like(h)) if highway else (h.new_empty(0), h.new_empty(0))
    # few tokens: the time is reading W_out, spread it over the chip; many: 188 us by sweep on an H200 (193 to 330 else)
    BT, BH, warps = (16, 8, 1) if T <= FEW_TOKENS else (64, 32, 4)
    if h.dtype == torch.float32:
        BT = min(BT, 32)
    inl_dynamics_fwd_kernel[cdiv(H, BH), cdiv(T, BT)](
        h, v, r, z, mu, w, b, h_out, v_out, m_out, r_out, T, H, z.shape[1], dt,
        HAS_RESIDUAL=r is not None, HIGHWAY=highway, PTX=PTX,
        BT=BT, BH=BH, BC=max(16, next_power_of_2(z.shape[1])), num_warps=warps,
    )  # fmt: skip
    return h_out, v_out, m_out, r_out


def _launch_dynamics_backward(grads, h, v, z, mu, w, b, dt: float, has_residual: bool, dmu: Tensor, sums: bool):
    """Backward of `_launch_dynamics`; `grads` of (h', v', m, R', mu_l) may be None; writes dmu into `dmu` [T, H].

    Returns dh, dv, dR (empty without a residual), dz, dW_out, db_out and, if wanted, the column sums of dmu.
    """
    (T, H), C = h.shape, z.shape[1]
    grads = [None if grad is None else grad.reshape(T, H).contiguous() for grad in grads]
    dh, dv = torch.empty_like(h), torch.empty_like(h)
    dr = torch.empty_like(h) if has_residual else h.new_empty(0)
    logits = torch.addmm(b, z, w.T)  # [T, 3H]
    BT, BH = 32, 64  # 285 us by sweep on an H200 (285 to 390 else)
    blocks = cdiv(T, BT)
    dmu_sums = torch.empty(blocks, H, dtype=torch.float32, device=h.device) if sums else None
    inl_dynamics_bwd_kernel[cdiv(H, BH), blocks](
        *grads, h, v, mu, logits, dh, dv, dr, dmu, dmu_sums, T, H, dt, dmu.stride(0),
        *[grad is not None for grad in grads], has_residual, PTX, BT, BH, num_warps=8,
    )  # fmt: skip
    # columns of ones beside z make the bias' gradient a column of the weight's; eight keep the rows aligned
    dw = logits.T @ torch.nn.functional.pad(z, (0, 8), value=1.0)  # [3H, C + 8]
    dmu_vec = dmu_sums.sum(0).to(h.dtype) if sums else None
    return dh, dv, dr, logits @ w, dw[:, :C].contiguous(), dw[:, C].contiguous(), dmu_vec


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
    inl_projection_kernel[grid](
        h, v, w_in, b_in, w_mu, mu_vec, z_pre, z, mu, T, H, C, mu_blocks,
        PTX=PTX, BT=BT, BN=BN, BK=BK, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return z_pre, z, mu


@custom_op("inl_dynamics")
@on_its_device
def _inl_dynamics(
    h: Tensor, v: Tensor, r: Tensor | None, z: Tensor, mu: Tensor, w: Tensor, b: Tensor, dt: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _launch_dynamics(h, v, r, z, mu, w, b, dt, True)


@_inl_dynamics.register_fake
def _(h, v, r, z, mu, w, b, dt):
    return tuple(torch.empty_like(h) for _ in range(4))


@custom_op("inl_dynamics_backward")
@on_its_device
def _inl_dynamics_backward(
    dh: Tensor | None, dv: Tensor | None, dm: Tensor | None, dr: Tensor | None,
    h: Tensor, v: Tensor, z: Tensor, mu: Tensor, w: Tensor, b: Tensor, dt: float, has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dmu = torch.empty_like(h)
    grads = dh, dv, dm, dr, None
    dh, dv, dr, dz, dw, db, _ = _launch_dynamics_backward(grads, h, v, z, mu, w, b, dt, has_residual, dmu, False)
    return dh, dv, dr, dz, dmu, dw, db


@_inl_dynamics_backward.register_fake
def _(dh, dv, dm, dr, h, v, z, mu, w, b, dt, has_residual):
    dr = torch.empty_like(h) if has_residual else h.new_empty(0)
    return *(torch.empty_like(h) for _ in range(2)), dr, *(torch.empty_like(x) for x in (z, mu, w, b))


def _with_residual(ctx, h, v, *others):
    """Arguments of the plain twins. R itself is not kept: everything is linear in it, so zeros give the gradients."""
    r = torch.zeros_like(h, requires_grad=True) if ctx.has_residual else None
    return h, v, r, *others


def _save_dynamics(ctx, inputs, output):
    h, v, r, z, mu, w, b, ctx.dt = inputs
    ctx.has_residual = r is not None
    ctx.save_for_backward(h, v, z, mu, w, b)
    ctx.set_materialize_grads(False)  # outputs that nothing uses (the last layer's) stay None


def _dynamics_grad(ctx, *grads):
    saved = ctx.saved_tensors
    if torch.is_grad_enabled():
        plain = lambda *tensors: inl_dynamics_reference(*tensors, ctx.dt)  # noqa: E731
        return *differentiable_gradients(plain, _with_residual(ctx, *saved), grads), None
    dh, dv, dr, dz, dmu, dw, db = _inl_dynamics_backward(*grads, *saved, ctx.dt, ctx.has_residual)
    return dh, dv, dr if ctx.has_residual else None, dz, dmu, dw, db, None


_inl_dynamics.register_autograd(_dynamics_grad, setup_context=_save_dynamics)


@custom_op("inl_dynamics_block")
@on_its_device
def _inl_dynamics_block(
    h: Tensor, v: Tensor, r: Tensor | None, mu_vec: Tensor, w_mu: Tensor,
    w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, dt: float, highway: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    z_pre, z, mu = _launch_projection(h, v, w_in, b_in, w_mu, mu_vec)
    return *_launch_dynamics(h, v, r, z, mu, w_out, b_out, dt, highway), mu, z_pre, z


@_inl_dynamics_block.register_fake
def _(h, v, r, mu_vec, w_mu, w_in, b_in, w_out, b_out, dt, highway):
    m, r = (torch.empty_like(h), torch.empty_like(h)) if highway else (h.new_empty(0), h.new_empty(0))
    z_pre, z = (h.new_empty(h.shape[0], w_in.shape[0]) for _ in range(2))
    return torch.empty_like(h), torch.empty_like(h), m, r, torch.empty_like(h), z_pre, z


@custom_op("inl_dynamics_block_backward")
@on_its_device
def _inl_dynamics_block_backward(
    dh: Tensor | None, dv: Tensor | None, dm: Tensor | None, dr: Tensor | None, dmu: Tensor | None,
    h: Tensor, v: Tensor, mu: Tensor, z_pre: Tensor, z: Tensor,
    w_mu: Tensor, w_in: Tensor, w_out: Tensor, b_out: Tensor, dt: float, has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (T, H), C = h.shape, z.shape[1]
    # dmu and dz side by side: both reach h through one GEMM with K = H + C, instead of two passes over dh
    side = h.new_empty(T, H + C)
    d_mu, d_z = side[:, :H], side[:, H:]
    grads = dh, dv, dm, dr, dmu
    dh, dv, dr, dz, dw_out, db_out, dmu_vec = _launch_dynamics_backward(
        grads, h, v, z, mu, w_out, b_out, dt, has_residual, d_mu, True
    )
    torch.ops.aten.silu_backward.grad_input(dz, z_pre, grad_input=d_z)
    dh.addmm_(side, torch.cat((w_mu, w_in[:, :H])))
    dv.addmm_(d_z, w_in[:, H:])
    dw_in = torch.empty_like(w_in)
    torch.mm(d_z.T, h, out=dw_in[:, :H])
    torch.mm(d_z.T, v, out=dw_in[:, H:])
    return dh, dv, dr, dmu_vec, d_mu.T @ h, dw_in, d_z.sum(0), dw_out, db_out


@_inl_dynamics_block_backward.register_fake
def _(dh, dv, dm, dr, dmu, h, v, mu, z_pre, z, w_mu, w_in, w_out, b_out, dt, has_residual):
    dr = torch.empty_like(h) if has_residual else h.new_empty(0)
    vectors = h.new_empty(h.shape[1]), h.new_empty(z.shape[1])
    dh, dv, dw_mu, dw_in, dw_out, db_out = (torch.empty_like(x) for x in (h, v, w_mu, w_in, w_out, b_out))
    return dh, dv, dr, vectors[0], dw_mu, dw_in, vectors[1], dw_out, db_out


def _save_block(ctx, inputs, output):
    h, v, r, mu_vec, w_mu, w_in, b_in, w_out, b_out, ctx.dt, _ = inputs
    ctx.has_residual = r is not None
    ctx.save_for_backward(h, v, *output[4:], w_mu, w_in, w_out, b_out, mu_vec, b_in)
    ctx.set_materialize_grads(False)


def _block_grad(ctx, dh, dv, dm, dr, dmu, *_):
    *saved, mu_vec, b_in = ctx.saved_tensors
    if torch.is_grad_enabled():
        h, v, _, _, _, w_mu, w_in, w_out, b_out = saved
        inputs = _with_residual(ctx, h, v, mu_vec, w_mu, w_in, b_in, w_out, b_out)
        plain = lambda *tensors: inl_dynamics_block_reference(*tensors, ctx.dt)  # noqa: E731
        return *differentiable_gradients(plain, inputs, (dh, dv, dm, dr, dmu)), None, None
    dh, dv, dr, *weights = _inl_dynamics_block_backward(dh, dv, dm, dr, dmu, *saved, ctx.dt, ctx.has_residual)
    return dh, dv, dr if ctx.has_residual else None, *weights, None, None


_inl_dynamics_block.register_autograd(_block_grad, setup_context=_save_block)


def _prepare(hidden_states: Tensor, rows: tuple, weights: tuple, width: int) -> list:
    """Check, bring to one dtype under autocast, and flatten the leading axes of `rows`."""
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    tensors = [hidden_states, *rows, *weights]
    if torch.is_autocast_enabled(device):
        tensors = [None if x is None else x.to(dtype) for x in tensors]
    found = [x.dtype for x in tensors if x is not None]
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or any(x != dtype for x in found):
        raise ValueError(f"inl_dynamics needs all tensors in one of float32, bfloat16, float16, got {found}")
    if not 0 < width <= MAX_CONTROLLER:
        raise ValueError(f"inl_dynamics supports controller widths up to {MAX_CONTROLLER}, got {width}")
    split = 1 + len(rows)
    flat = [None if x is None else x.reshape(-1, x.shape[-1]).contiguous() for x in tensors[:split]]
    return flat + [x.contiguous() for x in tensors[split:]]


def inl_dynamics(
    hidden_states: Tensor,
    velocity: Tensor,
    mu_residual: Tensor | None,
    controller_hidden: Tensor,
    mu: Tensor,
    controller_out_weight: Tensor,
    controller_out_bias: Tensor,
    dt: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equals `inl_dynamics_reference`: (h', v', m, R'), each [..., H], from the controller's z [..., C]."""
    shape = hidden_states.shape
    rows, weights = (velocity, mu_residual, controller_hidden, mu), (controller_out_weight, controller_out_bias)
    tensors = _prepare(hidden_states, rows, weights, controller_hidden.shape[-1])
    return tuple(x.view(shape) for x in _inl_dynamics(*tensors, dt))


def inl_dynamics_block(
    hidden_states: Tensor,
    velocity: Tensor,
    mu_residual: Tensor | None,
    mu: Tensor,
    mu_proj_weight: Tensor,
    controller_in_weight: Tensor,
    controller_in_bias: Tensor,
    controller_out_weight: Tensor,
    controller_out_bias: Tensor,
    dt: float,
    highway: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """The whole dynamics module: controller, mu projection, update and highway.

    Args:
        hidden_states, velocity, mu_residual: h, v, R (or None), each [..., H].
        mu: [H]. mu_proj_weight: [H, H]. controller_in_weight: [C, 2H], columns for h first. controller_in_bias: [C].
        controller_out_weight: [3H, C]. controller_out_bias: [3H]. dt: step size.
        highway: whether m and R' are wanted; without it they are None.

    Returns: (h', v', m, R', mu_l), each [..., H].
    """
    shape = hidden_states.shape
    weights = mu, mu_proj_weight, controller_in_weight, controller_in_bias, controller_out_weight, controller_out_bias
    tensors = _prepare(hidden_states, (velocity, mu_residual), weights, controller_in_weight.shape[0])
    h, v, m, r, mu_l, _, _ = _inl_dynamics_block(*tensors, dt, highway)
    if not highway:
        return h.view(shape), v.view(shape), None, None, mu_l.view(shape)
    return tuple(x.view(shape) for x in (h, v, m, r, mu_l))
