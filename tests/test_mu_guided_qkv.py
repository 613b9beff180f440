"""Mu-guided QKV, QK norm, RoPE: the twin in fp64 is the truth, in the same dtype it sets what rounding may cost."""

import os

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton")

from complexity_deep.kernels.kernel_reference import qk_norm_rope_reference  # noqa: E402
from complexity_deep.kernels.mu_guided_qkv import mu_guided_qkv, mu_guided_qkv_kernel, qk_norm_rope  # noqa: E402
from support import assert_near_truth  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
EPS = 1e-6
gpu = pytest.mark.gpu

# B, S, A, K, D, q weight, k weight, batch of cos, dtype; each row with its reason. bf16 in tl.dot is for the GPU only:
# Triton's interpreter (3.9.0) multiplies the operands' bit patterns as integers.
ROPE_SHAPES = [
    pytest.param(1, 1, 2, 1, 16, True, True, 1, torch.float32, id="one-token"),
    pytest.param(2, 7, 6, 3, 20, True, True, 2, torch.float32, id="odd-heads-odd-half-positions-per-row"),
    pytest.param(1, 9, 20, 5, 8, True, True, 1, torch.float32, id="more-heads-than-a-tile"),
    pytest.param(2, 5, 4, 4, 12, False, False, 1, torch.float32, id="no-norm"),
    pytest.param(2, 5, 4, 2, 12, True, False, 2, torch.float16, id="norm-on-queries-only-half"),
    pytest.param(1, 33, 4, 2, 16, True, True, 1, torch.bfloat16, id="bf16"),
    pytest.param(2, 1300, 16, 8, 128, True, True, 1, torch.bfloat16, id="real-heads", marks=gpu),
    pytest.param(2, 1300, 7, 1, 80, True, True, 2, torch.float16, id="programs-walk-off-tile", marks=gpu),
    pytest.param(1, 3000, 16, 8, 128, True, True, 1, torch.float32, id="real-heads-fp32", marks=gpu),
]
# tokens (leading axes), H, Q, KV, with mu, dtype
QKV_SHAPES = [
    pytest.param((1,), 48, 32, 16, True, torch.float32, id="one-token"),
    pytest.param((3, 7), 100, 24, 8, True, torch.float32, id="few-tokens-off-the-tile"),
    pytest.param((1, 1), 64, 48, 24, False, torch.float32, id="one-token-layer-0"),
    pytest.param((5,), 300, 20, 20, True, torch.float16, id="several-inner-steps-half"),
    pytest.param((40,), 36, 24, 12, True, torch.float32, id="many-tokens"),
    pytest.param((40,), 36, 24, 12, False, torch.float32, id="many-tokens-layer-0"),
    pytest.param((32,), 2048, 2048, 1024, True, torch.bfloat16, id="real-few", marks=gpu),
    pytest.param((1,), 2048, 2048, 1024, True, torch.bfloat16, id="real-one-token", marks=gpu),
    pytest.param((4, 512), 2048, 2048, 1024, True, torch.bfloat16, id="real-many", marks=gpu),
    pytest.param((2100,), 192, 256, 128, True, torch.float16, id="our-gemm-off-tile", marks=gpu),
    pytest.param((2100,), 200, 256, 128, True, torch.bfloat16, id="inner-axis-that-our-gemm-refuses", marks=gpu),
]


pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def make(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE) for shape in shapes]


def run(function, inputs, dtype, upstream):
    """Outputs, then the gradient of every input."""
    inputs = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs)
    torch.autograd.backward(outputs, [g.to(dtype) for g in upstream])
    return [*outputs, *(x.grad for x in inputs if x is not None and x.grad is not None)]


def assert_close(function, reference, inputs, dtype, upstream):
    rounded = [None if x is None else x.to(dtype).double() for x in inputs]
    upstream = [g.to(dtype).double() for g in upstream]
    truth = run(reference, rounded, torch.float64, upstream)
    found = run(function, rounded, dtype, upstream)
    twin = run(reference, rounded, dtype, upstream)
    for index, (value, expected, eager) in enumerate(zip(found, truth, twin, strict=True)):
        assert_near_truth(value, expected, eager, index)


def rope_case(B, S, A, K, D, q_weight, k_weight, batch, dtype):
    """A fused projection output, the weights, the tables (no gradient) and upstream gradients in attention's layout."""
    qkv, w_q, w_k, angle = make(0, (B, S, (A + 2 * K) * D), (D,), (D,), (batch, S, D))
    upstream = [g.transpose(1, 2) for g in make(1, (B, A, S, D), (B, K, S, D))]  # strided, as SDPA returns them
    cos, sin = (table.to(dtype) for table in (angle.cos(), angle.sin()))

    def through(op):
        def apply(qkv, w_q, w_k):
            query, key, _ = qkv.split((A * D, K * D, K * D), dim=-1)
            tables = cos.to(qkv.dtype), sin.to(qkv.dtype)
            return op(query.view(B, S, A, D), key.view(B, S, K, D), w_q, w_k, *tables, EPS)

        return apply

    inputs = [qkv, w_q + 1 if q_weight else None, w_k + 1 if k_weight else None]
    return through, inputs, upstream


@pytest.mark.parametrize("B, S, A, K, D, q_weight, k_weight, batch, dtype", ROPE_SHAPES)
def test_qk_norm_rope_matches_fp64(B, S, A, K, D, q_weight, k_weight, batch, dtype):
    through, inputs, upstream = rope_case(B, S, A, K, D, q_weight, k_weight, batch, dtype)
    assert_close(through(qk_norm_rope), through(qk_norm_rope_reference), inputs, dtype, upstream)


def qkv_reference(x, m, *weights):
    q, k, v, mu_q, mu_k, mu_v = weights
    weight = torch.cat((q, k, v))
    if m is None:
        return (F.linear(x, weight),)
    return (F.linear(torch.cat((x, m), -1), torch.cat((weight, torch.cat((mu_q, mu_k, mu_v))), 1)),)


def qkv(x, m, *weights):
    return (mu_guided_qkv(x, m, weights),)


def qkv_case(tokens, H, Q, KV, mu):
    x, m, q, k, v, *mu_weights = make(2, (*tokens, H), (*tokens, H), (Q, H), (KV, H), (KV, H), (Q, H), (KV, H), (KV, H))
    return [x, m if mu else None, q, k, v, *mu_weights], make(3, (*tokens, Q + 2 * KV))


@pytest.mark.parametrize("tokens, H, Q, KV, mu, dtype", QKV_SHAPES)
def test_mu_guided_qkv_matches_fp64(tokens, H, Q, KV, mu, dtype):
    inputs, upstream = qkv_case(tokens, H, Q, KV, mu)
    assert_close(qkv, qkv_reference, inputs, dtype, upstream)


@gpu
def test_order_in_memory_is_no_matter_of_compilation():
    """x and m lie where the allocator put them; a recorded graph must not meet a kernel that is not compiled."""
    inputs, _ = qkv_case((2048,), 192, 256, 128, True)
    both = torch.empty(2, 2048, 192, dtype=torch.bfloat16, device=DEVICE)
    x, m, *weights = (tensor.bfloat16() for tensor in inputs)
    outputs, kernels = [], []
    for at in (0, 1):
        both[at], both[1 - at] = x, m
        outputs.append(mu_guided_qkv(both[at], both[1 - at], weights))
        kernels.append(len(mu_guided_qkv_kernel.compiled))
    assert torch.equal(*outputs) and kernels[0] == kernels[1] > 0


def test_frozen_weights():
    """With frozen projections the gradient still reaches x and m."""
    inputs, (upstream,) = qkv_case((6,), 32, 16, 8, True)
    x, m, *weights = (x.float() for x in inputs)
    grads = []
    for frozen in (True, False):
        leaves = [x.clone().requires_grad_(), m.clone().requires_grad_()]
        mu_guided_qkv(*leaves, [w.clone().requires_grad_(not frozen) for w in weights]).backward(upstream.float())
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_wrong_inputs_are_refused():
    inputs, _ = qkv_case((6,), 32, 16, 8, True)
    with pytest.raises(ValueError, match="one dtype"):
        mu_guided_qkv(inputs[0].float(), inputs[1].float(), inputs[2:])
    with pytest.raises(ValueError, match="even D"):
        qk_norm_rope(
            torch.zeros(1, 1, 2, 7),
            torch.zeros(1, 1, 2, 7),
            None,
            None,
            torch.zeros(1, 1, 7),
            torch.zeros(1, 1, 7),
            EPS,
        )


def test_deterministic():
    through, inputs, upstream = rope_case(2, 40, 4, 2, 16, True, True, 1, torch.float32)
    first, second = (run(through(qk_norm_rope), inputs, torch.float32, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_custom_op_contract():
    """Schema, fake tensors and autograd registration agree with what the ops do."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs, _ = qkv_case((6,), 32, 16, 8, True)
    arguments = [x.float().requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.complexity_deep.mu_guided_qkv.default, arguments, test_utils=checks)
    q, k, w, cos, sin = (x.float() for x in make(4, (1, 3, 2, 8), (1, 3, 1, 8), (8,), (1, 3, 8), (1, 3, 8)))
    arguments = q.requires_grad_(), k.requires_grad_(), w.requires_grad_(), None, cos, sin, EPS
    torch.library.opcheck(torch.ops.complexity_deep.qk_norm_rope.default, arguments, test_utils=checks)
    # under autocast the weights of the norms stay fp32: a fake gradient of another dtype would be read as garbage
    half = [x.detach().half() for x in (q, k)]
    tables = [x.half() for x in (cos, sin)]
    arguments = *half, *half, w.detach(), w.detach(), *tables, EPS
    backward = torch.ops.complexity_deep.qk_norm_rope_backward.default
    torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


def both(x, m, q_weight, k_weight, cos, sin, *weights):
    """Projection and rotation of two query heads and one key head of 64, as the attention calls them."""
    query, key, value = mu_guided_qkv(x, m, weights).split((128, 64, 64), dim=-1)
    heads = lambda states: states.unflatten(-1, (-1, 64))  # noqa: E731
    return *qk_norm_rope(heads(query), heads(key), q_weight, k_weight, cos, sin, EPS), value


def both_inputs(tokens):
    x, m, w_q, w_k, angle, *weights = make(
        5, (1, tokens, 256), (1, tokens, 256), (64,), (64,), (1, tokens, 64), *[(n, 256) for n in (128, 64, 64) * 2]
    )
    return [t.bfloat16() for t in (x, m, w_q, w_k, angle.cos(), angle.sin(), *weights)]


@gpu
@pytest.mark.parametrize("tokens", [4, 300])
def test_compiles_without_a_break(tokens):
    inputs = both_inputs(tokens)
    upstream = make(6, (1, tokens, 2, 64), (1, tokens, 1, 64), (1, tokens, 64))
    eager = run(both, inputs, torch.bfloat16, upstream)
    found = run(torch.compile(both, fullgraph=True), inputs, torch.bfloat16, upstream)
    assert all(torch.equal(a, b) for a, b in zip(eager, found))


@gpu
@pytest.mark.parametrize("tokens", [1, 300])
def test_cuda_graph(tokens):
    inputs = both_inputs(tokens)
    with torch.no_grad():
        expected = both(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = both(*inputs)
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected))
