"""CGGR against its PyTorch twin: on the GPU where there is one, else in Triton's interpreter (set by conftest)."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernel file is imported
pytest.importorskip("triton")

from complexity_deep.kernels.kernel_reference import routing_plan_reference, token_routed_mlp_reference
from complexity_deep.kernels.routing_plan import routing_plan
from complexity_deep.kernels.token_routed_gemm import ACTIVATIONS, token_routed_mlp
from support import assert_near_truth, relative_rms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.gpu
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# (tokens, hidden, intermediate, experts, dtype, routing), then why the row is there. bf16 rows need a GPU: the
# interpreter of Triton 3.6 and 3.9 takes bf16 operands of a dot for integers.
CASES = [
    pytest.param(1, 32, 16, 4, FP32, "uniform", id="one token: decode path and three empty experts"),
    pytest.param(2, 48, 20, 4, FP16, "uniform", id="decode path: sizes off the powers of two"),
    pytest.param(7, 40, 24, 2, FP32, "uniform", id="fewer tokens than a tile"),
    pytest.param(70, 64, 64, 3, FP32, "skip_one", id="an empty expert: zero weight gradients"),
    pytest.param(65, 33, 17, 2, FP32, "one_expert", id="all tokens to one expert; odd sizes; tail of one row"),
    pytest.param(37, 31, 19, 5, FP32, "uniform", id="primes everywhere"),
    pytest.param(25, 16, 16, 256, FP32, "uniform", id="256 experts, most of them empty"),
    pytest.param(12, 16, 16, 1024, FP32, "uniform", id="1,024 experts"),
    pytest.param(50, 64, 32, 3, BF16, "uniform", id="bf16", marks=gpu),
    pytest.param(50, 64, 32, 3, FP16, "uniform", id="fp16"),
    pytest.param(1000, 96, 72, 4, BF16, "uniform", id="hidden and width off the TMA tiles", marks=gpu),
    pytest.param(700, 128, 192, 4, BF16, "skip_one", id="TMA path: an empty expert, tails everywhere", marks=gpu),
    pytest.param(2500, 256, 320, 7, BF16, "uniform", id="TMA path: large tiles, columns off the tile", marks=gpu),
    pytest.param(9000, 128, 128, 64, FP16, "uniform", id="TMA path: 64 experts", marks=gpu),
    pytest.param(100, 2048, 1408, 4, BF16, "uniform", id="the 1.5B model, a few tokens", marks=gpu),
    pytest.param(4096, 2048, 1408, 4, BF16, "uniform", id="the 1.5B model, a training batch", marks=gpu),
    pytest.param(600, 512, 352, 4, FP32, "uniform", id="fp32 on the GPU is fp32", marks=gpu),
]


def make_inputs(tokens, hidden, inter, experts, dtype, routing, seed=0):
    """Expert ids, then x, both weights and the upstream gradient in fp64 rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts, (tokens,), generator=generator)
    if routing == "skip_one":
        ids[ids == 1] = 0
    if routing == "one_expert":
        ids.fill_(experts - 1)
    shapes = [(tokens, hidden), (experts, 2 * inter, hidden), (experts, hidden, inter), (tokens, hidden)]
    scales = [1.0, hidden**-0.5, inter**-0.5, 1.0]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) * k for s, k in zip(shapes, scales)]
    return ids.to(DEVICE), [tensor.to(DEVICE, dtype) for tensor in tensors]


def forward_and_gradients(mlp, x, gate_up_proj, down_proj, upstream, order, offsets, activation="silu"):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, gate_up_proj, down_proj)]
    y = mlp(*leaves, order, offsets, activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.mark.parametrize("tokens, hidden, inter, experts, dtype, routing", CASES)
def test_forward_and_gradients_match_fp64(tokens, hidden, inter, experts, dtype, routing):
    ids, inputs = make_inputs(tokens, hidden, inter, experts, dtype, routing)
    plan = routing_plan_reference(ids, experts)
    truth = forward_and_gradients(token_routed_mlp_reference, *(tensor.double() for tensor in inputs), *plan)
    twin = forward_and_gradients(token_routed_mlp_reference, *inputs, *plan)
    ours = forward_and_gradients(token_routed_mlp, *inputs, *plan)
    with torch.no_grad():  # what is kept for backward decides the kernels of forward
        inference = token_routed_mlp(*inputs[:3], *plan)
    names = ("y", "dx", "dgate_up_proj", "ddown_proj", "y without gradient")
    for name, value, eager, true in zip(names, [*ours, inference], [*twin, twin[0]], [*truth, truth[0]], strict=True):
        assert_near_truth(value, true, eager, name)
    hit = torch.bincount(ids, minlength=experts) > 0
    for gradient in ours[2:]:
        assert not gradient[~hit].any(), "an expert without tokens has a gradient of exact zeros"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [2, 40])
def test_activations(activation, tokens):
    ids, inputs = make_inputs(tokens, 24, 20, 3, FP32, "uniform")
    plan = routing_plan_reference(ids, 3)
    truth = forward_and_gradients(token_routed_mlp_reference, *(t.double() for t in inputs), *plan, activation)
    for value, true in zip(forward_and_gradients(token_routed_mlp, *inputs, *plan, activation), truth, strict=True):
        assert relative_rms(value, true) <= 1e-5


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_asked_for(needed):
    ids, (*inputs, upstream) = make_inputs(20, 24, 20, 3, FP32, "uniform")
    plan = routing_plan_reference(ids, 3)
    results = []
    for mlp in (token_routed_mlp, token_routed_mlp_reference):
        leaves = [tensor.clone().requires_grad_(index in needed) for index, tensor in enumerate(inputs)]
        mlp(*leaves, *plan).backward(upstream)
        assert [leaf.grad is not None for leaf in leaves] == [index in needed for index in range(3)]
        results.append([leaves[index].grad for index in needed])
    for ours, twin in zip(*results, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "tokens, experts",
    [(1, 1), (1, 256), (64, 4), (65, 63), (513, 4), (700, 256), (700, 1024), pytest.param(65537, 200, marks=gpu)],
)
def test_routing_plan(tokens, experts):
    ids = make_inputs(tokens, 1, 1, experts, FP32, "uniform")[0]
    order, offsets = routing_plan(ids, experts)
    assert order.dtype == offsets.dtype == torch.int32
    for ours, twin in zip((order, offsets), routing_plan_reference(ids, experts), strict=True):
        assert torch.equal(ours, twin)
    assert torch.equal(order.sort().values.long(), torch.arange(tokens, device=DEVICE))
    assert torch.equal(offsets.diff().long(), torch.bincount(ids, minlength=experts))


def test_repeats_bit_for_bit():
    ids, inputs = make_inputs(150, 48, 40, 4, FP16, "uniform")
    plan = routing_plan(ids, 4)
    first, second = (forward_and_gradients(token_routed_mlp, *inputs, *plan) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_tokens():
    _, (x, gate_up_proj, down_proj, upstream) = make_inputs(0, 16, 8, 3, FP32, "uniform")
    plan = torch.zeros(0, dtype=torch.int32, device=DEVICE), torch.zeros(4, dtype=torch.int32, device=DEVICE)
    y, *gradients = forward_and_gradients(token_routed_mlp, x, gate_up_proj, down_proj, upstream, *plan)
    assert y.shape == (0, 16) and not any(gradient.any() for gradient in gradients)


def test_wrong_shapes_are_named():
    ids, (x, gate_up_proj, down_proj, _) = make_inputs(4, 16, 8, 3, FP32, "uniform")
    order, offsets = routing_plan_reference(ids, 3)
    with pytest.raises(ValueError, match=r"\(3, 8, 16\)"):
        token_routed_mlp(x, gate_up_proj, down_proj.transpose(1, 2), order, offsets)
    with pytest.raises(ValueError, match="activation"):
        token_routed_mlp(x, gate_up_proj, down_proj, order, offsets, "tanh")


@gpu
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_compiled_without_a_break(tokens):
    ids, inputs = make_inputs(tokens, 128, 64, 4, BF16, "uniform")

    def mlp(x, gate_up_proj, down_proj, ids, offsets, activation):
        return token_routed_mlp(x, gate_up_proj, down_proj, *routing_plan(ids, 4), activation)

    eager = forward_and_gradients(mlp, *inputs, ids, None)
    compiled = forward_and_gradients(torch.compile(mlp, fullgraph=True), *inputs, ids, None)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@gpu
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_captured_in_a_graph(tokens):
    ids, inputs = make_inputs(tokens, 128, 64, 4, BF16, "uniform")
    new_ids, new_inputs = make_inputs(tokens, 128, 64, 4, BF16, "uniform", seed=1)
    forward_and_gradients(token_routed_mlp, *inputs, *routing_plan(ids, 4))  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_gradients(token_routed_mlp, *inputs, *routing_plan(ids, 4))
    for old, new in zip([ids, *inputs], [new_ids, *new_inputs], strict=True):
        old.copy_(new)
    graph.replay()
    expected = forward_and_gradients(token_routed_mlp, *new_inputs, *routing_plan(new_ids, 4))
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_operators_agree_with_their_fakes():
    ids, (x, gate_up_proj, down_proj, _) = make_inputs(9, 16, 8, 3, FP32, "uniform")
    torch.library.opcheck(routing_plan.op, (ids, 3))
    order, offsets = routing_plan(ids, 3)
    leaves = [tensor.requires_grad_() for tensor in (x, gate_up_proj, down_proj)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.complexity_deep.token_routed_mlp_forward.default
    torch.library.opcheck(operator, (*leaves, order, offsets, "silu", True), test_utils=checks)
