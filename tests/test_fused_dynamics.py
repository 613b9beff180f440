"""Fused dynamics: the twin in fp64 is the truth, the twin in the same dtype sets what half precision may cost."""

import os

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton")

from complexity_deep.kernels.fused_dynamics import inl_dynamics_block  # noqa: E402
from complexity_deep.kernels.kernel_reference import (  # noqa: E402
    BETA_LIMIT,
    VELOCITY_LIMIT,
    inl_dynamics_block_reference,
)
from support import assert_near_truth, relative_rms  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
gpu = pytest.mark.gpu

# tokens (leading axes), H, C, has a highway, dtype; each row with its reason. Without a GPU, fp16 stands for half
# precision: Triton's interpreter (3.9.0) multiplies the bit patterns of bf16 operands of tl.dot as integers.
SHAPES = [
    pytest.param((1,), 64, 64, True, torch.float32, id="one-token"),
    pytest.param((1, 1), 48, 64, False, torch.float16, id="one-token-layer-0-half"),
    pytest.param((2, 37), 72, 64, True, torch.float32, id="off-the-tile-rows-and-columns"),
    pytest.param((150,), 100, 24, True, torch.float32, id="narrow-controller-several-tiles"),
    pytest.param((70,), 32, 100, False, torch.float32, id="controller-over-64-no-highway"),
    pytest.param((3, 30), 96, 64, True, torch.float16, id="half-off-tile"),
    pytest.param((65,), 64, 32, False, torch.bfloat16, id="bf16-no-highway", marks=gpu),
    pytest.param((2, 1000), 2048, 64, True, torch.bfloat16, id="real-width-bf16", marks=gpu),
    pytest.param((2, 1000), 2048, 64, False, torch.float32, id="real-width-fp32", marks=gpu),
    pytest.param((3000,), 768, 256, True, torch.float16, id="widest-controller-fp16", marks=gpu),
    pytest.param((3, 1365), 1000, 64, True, torch.bfloat16, id="columns-off-the-vector-width", marks=gpu),
]


pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def block_inputs(tokens, H, C, has_highway, generator):
    """Large logits and velocities: beta reaches its limit, and v too, for a fair share of the elements."""
    make = lambda *shape, scale=1.0: scale * torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {
        "h": make(*tokens, H, scale=4), "v": make(*tokens, H, scale=8),
        "highway": make(*tokens, H) if has_highway else None, "mu": make(H), "w_mu": make(H, H, scale=H**-0.5),
        "w_in": make(C, 2 * H, scale=0.2 * H**-0.5), "b_in": make(C),
        "w_out": make(3 * H, C, scale=2 * C**-0.5), "b_out": make(3 * H),
    }  # fmt: skip


def run(function, inputs, dtype, upstream):
    """Outputs and gradients of every input, by name."""
    inputs = {k: x if x is None else x.detach().to(dtype).requires_grad_() for k, x in inputs.items()}
    outputs = function(*inputs.values(), 0.1)
    torch.autograd.backward(outputs, [g.to(dtype) for g in upstream[: len(outputs)]])
    found = dict(zip(("h'", "v'", "guidance", "highway'", "mu_l"), outputs))
    return found | {f"d {k}": x.grad for k, x in inputs.items() if x is not None}


def before_the_limits(x):
    """Beta and the velocity as they are before they are limited, each [..., H]."""
    z = F.silu(F.linear(torch.cat((x["h"], x["v"]), -1), x["w_in"], x["b_in"]))
    mu = x["mu"] + F.linear(x["h"], x["w_mu"])
    alpha, beta, _ = F.linear(z, x["w_out"], x["b_out"]).chunk(3, -1)
    beta = F.softplus(beta)
    return beta, alpha.sigmoid() * x["v"] - beta.clamp(max=BETA_LIMIT) * (x["h"] - mu)


def near_a_limit(x, margin):
    """Where rounding decides the side of a clamp: the gradient jumps there, whoever computes it."""
    beta, velocity = before_the_limits(x)
    is_near = (velocity.abs() - VELOCITY_LIMIT).abs() < VELOCITY_LIMIT * margin
    return is_near | ((beta - BETA_LIMIT).abs() < BETA_LIMIT * margin)


def assert_close(function, reference, inputs, dtype, upstream):
    rounded = {k: x if x is None else x.to(dtype).double() for k, x in inputs.items()}
    upstream = [g.to(dtype).double() for g in upstream]
    for gradient in upstream[:2]:
        gradient[near_a_limit(rounded, 1e-5 if dtype == torch.float32 else 0.02)] = 0
    truth = run(reference, rounded, torch.float64, upstream)
    found = run(function, rounded, dtype, upstream)
    twin = run(reference, rounded, dtype, upstream)
    for name, expected in truth.items():
        assert_near_truth(found[name], expected, twin[name], name)
    return truth


def prepare(tokens, H, C, has_highway, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = block_inputs(tokens, H, C, has_highway, generator)
    upstream = [torch.randn(*tokens, H, generator=generator, dtype=torch.float64).to(DEVICE) for _ in range(5)]
    return {k: x if x is None else x.to(DEVICE) for k, x in inputs.items()}, upstream


@pytest.mark.parametrize("tokens, H, C, has_highway, dtype", SHAPES)
def test_matches_fp64(tokens, H, C, has_highway, dtype):
    inputs, upstream = prepare(tokens, H, C, has_highway)
    truth = assert_close(inl_dynamics_block, inl_dynamics_block_reference, inputs, dtype, upstream)
    if truth["v'"].numel() > 1000:  # both limits are exercised
        beta, velocity = before_the_limits(inputs)
        for share in ((beta > BETA_LIMIT).double().mean(), (velocity.abs() > VELOCITY_LIMIT).double().mean()):
            assert 0.02 < share < 0.6


def test_gradient_on_the_limits():
    """Exactly on |v| = 10 the gradient passes, beyond it is zero: alpha = 1 and beta = 0 by saturated logits."""
    v = torch.tensor([[10.0, -10.0, 10.01, 9.99]], device=DEVICE, requires_grad=True)
    zeros = lambda *shape: torch.zeros(*shape, device=DEVICE)  # noqa: E731
    b_out = torch.tensor([100.0] * 4 + [-200.0] * 4 + [0.0] * 4, device=DEVICE)
    weights = zeros(4), zeros(4, 4), zeros(16, 8), zeros(16), zeros(12, 16), b_out
    velocity = inl_dynamics_block(zeros(1, 4), v, None, *weights, 0.1)[1]
    velocity.backward(torch.ones_like(velocity))
    assert v.grad.tolist() == [[1.0, 1.0, 0.0, 1.0]]


@pytest.mark.parametrize("used", [(0,), (1,), (2, 3), (0, 1, 4)], ids=str)
def test_unused_outputs(used):
    """Outputs that nothing uses (the last layer's velocity and mu) bring no gradient, not garbage."""
    inputs, upstream = prepare((20,), 48, 16, True)

    def pick(function):
        def wrapped(*args):
            return tuple(out for i, out in enumerate(function(*args)) if i in used)

        return wrapped

    leaves = []
    for function in (inl_dynamics_block, inl_dynamics_block_reference):
        dtype = torch.float32 if function is inl_dynamics_block else torch.float64
        copies = {k: x.detach().to(dtype).requires_grad_() for k, x in inputs.items()}
        outputs = pick(function)(*copies.values(), 0.1)
        grads = [g.to(dtype) for g in upstream[: len(outputs)]]
        leaves.append(
            torch.autograd.grad(outputs, list(copies.values()), grads, allow_unused=True, materialize_grads=True)
        )
    for name, found, expected in zip(inputs, *leaves):
        assert relative_rms(found, expected) <= 1e-5, name


def test_nan_passes():
    inputs, _ = prepare((5,), 32, 16, False)
    inputs = {k: x if x is None else x.float() for k, x in inputs.items()}
    inputs["h"][2, 3] = float("nan")
    for output in inl_dynamics_block(*inputs.values(), 0.1):
        assert output[2].isnan().any() and not output[[0, 1, 3, 4]].isnan().any()


def test_wrong_inputs_are_refused():
    inputs, _ = prepare((5,), 32, 16, False)
    with pytest.raises(ValueError, match="float64"):
        inl_dynamics_block(*inputs.values(), 0.1)
    inputs = {k: x if x is None else x.float() for k, x in inputs.items()}
    with pytest.raises(ValueError, match="bfloat16"):
        inl_dynamics_block(*(inputs | {"v": inputs["v"].bfloat16()}).values(), 0.1)
    wide, _ = prepare((2,), 8, 257, False)
    with pytest.raises(ValueError, match="up to 256, got 257"):
        inl_dynamics_block(*(x if x is None else x.float() for x in wide.values()), 0.1)


def test_deterministic():
    inputs, upstream = prepare((300,), 128, 64, True)
    first = run(inl_dynamics_block, inputs, torch.bfloat16, upstream)
    second = run(inl_dynamics_block, inputs, torch.bfloat16, upstream)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpoint_and_autocast():
    inputs, upstream = prepare((9,), 32, 16, True)
    plain = run(inl_dynamics_block, inputs, torch.float32, upstream)
    again = run(
        lambda *args: torch.utils.checkpoint.checkpoint(inl_dynamics_block, *args, use_reentrant=False),
        inputs, torch.float32, upstream,
    )  # fmt: skip
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        outputs = inl_dynamics_block(*(x.float() for x in inputs.values()), 0.1)
    assert all(x.dtype == torch.bfloat16 for x in outputs)


def test_custom_op_contract():
    """Schema, fake tensors and autograd registration agree with what the ops do."""
    inputs, _ = prepare((6,), 32, 16, True)
    arguments = [x.float().requires_grad_() for x in inputs.values()]
    op = torch.ops.complexity_deep.inl_dynamics_block.default
    torch.library.opcheck(
        op, (*arguments, 0.1), test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


@gpu
def test_compiles_without_a_break():
    inputs, upstream = prepare((2, 100), 256, 64, True)
    compiled = torch.compile(inl_dynamics_block, fullgraph=True)
    eager = run(inl_dynamics_block, inputs, torch.bfloat16, upstream)
    found = run(compiled, inputs, torch.bfloat16, upstream)
    assert all(torch.equal(eager[name], found[name]) for name in eager)


@gpu
@pytest.mark.parametrize("tokens", [1, 300])
def test_cuda_graph(tokens):
    inputs, _ = prepare((tokens,), 256, 64, True)
    inputs = {k: x.bfloat16() for k, x in inputs.items()}
    with torch.no_grad():
        expected = inl_dynamics_block(*inputs.values(), 0.1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = inl_dynamics_block(*inputs.values(), 0.1)
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected))
