"""The decoder layer of a few new tokens: its twins in fp64 are the truth, the twins in the same dtype the limit."""

import os
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton")

from kernel_twins import (  # noqa: E402
    decode_attend_reference,
    decode_layer_tail_reference,
    decode_plain_tail_reference,
    decode_qkv_reference,
)

from complexity_deep.kernels import decode_layer, kernel_launch  # noqa: E402
from complexity_deep.kernels.decode_layer import (  # noqa: E402
    decode_attend,
    decode_layer_tail,
    decode_plain_tail,
    decode_qkv,
)
from support import assert_near_truth  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
gpu = pytest.mark.gpu
pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# T, H, A * D, K * D, C, E, I, has mu (and residual), router, activation, dtype; each row with its reason. Without a
# GPU, fp16 stands for half precision: the interpreter truncates where bf16 is rounded.
SHAPES = [
    pytest.param(1, 64, 64, 32, 64, 4, 44, True, True, "silu", torch.float32, id="one-token"),
    pytest.param(2, 48, 40, 8, 24, 3, 20, True, True, "gelu", torch.float32, id="nothing-a-power-of-two"),
    pytest.param(1, 36, 36, 36, 16, 2, 8, False, False, "relu", torch.float32, id="layer-0-plain-routing"),
    pytest.param(2, 64, 64, 32, 64, 5, 16, True, True, "swish", torch.float16, id="half"),
    pytest.param(2, 64, 64, 32, 64, 1, 16, True, False, "silu", torch.bfloat16, id="one-expert-bf16", marks=gpu),
    pytest.param(1, 2048, 2048, 1024, 64, 4, 1408, True, True, "silu", torch.bfloat16, id="real", marks=gpu),
    pytest.param(2, 2048, 2048, 1024, 64, 4, 1408, True, True, "silu", torch.float16, id="real-two-rows", marks=gpu),
    pytest.param(2, 768, 768, 256, 64, 4, 768, False, True, "silu", torch.bfloat16, id="150m-layer-0", marks=gpu),
    pytest.param(1, 1024, 1024, 512, 64, 32, 300, True, True, "silu", torch.float32, id="most-experts", marks=gpu),
]


def inputs(T, H, Q, KV, C, E, I, has_mu, has_router, activation):  # noqa: E741
    """Arguments of both functions in fp64: logits large enough for both clamps, mu overrides some experts."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape, scale=1.0: scale * torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    linear = lambda out, width, scale=1.0: make(out, width, scale=scale * width**-0.5)  # noqa: E731
    qkv = [make(T, H), 1 + make(H, scale=0.1), 1e-6, make(T, H) if has_mu else None]
    qkv += [linear(Q, H), linear(KV, H), linear(KV, H)]
    qkv += [linear(Q, H), linear(KV, H), linear(KV, H)] if has_mu else [None] * 3
    tail = [make(T, Q), make(T, H), make(T, H, scale=8), make(T, H) if has_mu else None]
    tail += [torch.randint(0, E, (T,), generator=generator), linear(H, Q, 4), make(H), linear(H, H)]
    tail += [linear(C, 2 * H, 0.3), make(C), linear(3 * H, C, 2), make(3 * H), 0.1, 1 + make(H, scale=0.1), 1e-5]
    tail += [linear(E, H, 8) if has_router else None, 10.0, linear_experts(make, E, 2 * I, H)]
    tail += [linear_experts(make, E, H, I), activation]
    return qkv, tail


def with_more(qkv, tail, K, S):
    """Arguments with value embeddings of K heads and a shared expert of width S, and those of a layer without mu."""
    generator = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    (T, H), KV = qkv[0].shape, qkv[5].shape[0]
    values = [torch.randint(0, 30, (T,), generator=generator), make(K, H) * H**-0.5, make(30, KV)]
    shared = [make(S, H) * H**-0.5, make(S, H) * H**-0.5, make(H, S) * S**-0.5]
    plain = [tail[index] for index in (0, 1, 4, 5, 13, 14, 17, 18, 19)]
    return qkv + values, tail + shared, plain + shared, plain


def linear_experts(make, experts, out, width):
    return make(experts, out, width, scale=width**-0.5)


def cast(arguments, dtype, rounded):
    """Floating tensors rounded to `rounded` and given in `dtype`, on the device."""
    move = lambda x: x.to(rounded).to(dtype) if x.is_floating_point() else x  # noqa: E731
    return [move(x).to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.mark.parametrize("T, H, Q, KV, C, E, I, has_mu, has_router, activation, dtype", SHAPES)
def test_matches_fp64(T, H, Q, KV, C, E, I, has_mu, has_router, activation, dtype):  # noqa: E741
    torch.backends.cuda.matmul.allow_tf32 = False
    qkv, tail = inputs(T, H, Q, KV, C, E, I, has_mu, has_router, activation)
    valued, shared, plain_shared, plain = with_more(qkv, tail, KV // 128 or 2, I + 4)
    for function, reference, arguments in (
        (decode_qkv, decode_qkv_reference, qkv),
        (decode_qkv, decode_qkv_reference, valued),
        (decode_layer_tail, decode_layer_tail_reference, tail),
        (decode_layer_tail, decode_layer_tail_reference, shared),
        (decode_plain_tail, decode_plain_tail_reference, plain_shared),
        (decode_plain_tail, decode_plain_tail_reference, plain),
    ):
        truth = reference(*cast(arguments, torch.float64, dtype))
        found = function(*cast(arguments, dtype, dtype))
        twin = reference(*cast(arguments, dtype, dtype))
        found, twin, truth = ((x,) if isinstance(x, torch.Tensor) else x for x in (found, twin, truth))
        for index, expected in enumerate(truth):
            assert_near_truth(found[index], expected, twin[index], (function, index))


# T, A, K, D, L, positions in use, QK norm, dtype; each row with its reason
ATTEND_SHAPES = [
    pytest.param(1, 4, 2, 16, 8, 0, True, torch.float32, id="empty-cache"),
    pytest.param(2, 6, 3, 20, 70, 66, False, torch.float32, id="no-norm-odd-sizes-two-parts"),
    pytest.param(2, 4, 4, 8, 9, 8, True, torch.float16, id="last-position-half"),
    pytest.param(1, 16, 8, 128, 640, 300, True, torch.bfloat16, id="real", marks=gpu),
    pytest.param(4, 12, 4, 64, 1000, 999, True, torch.bfloat16, id="real-rows", marks=gpu),
]


def attend_inputs(T, A, K, D, L, used, norm):
    """Arguments in fp64; the unused end of the cache holds NaN, the rows see what is in use but their padding."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    norms = [1 + make(D) / 10, 1 + make(D) / 10, 1e-6] if norm else [None, None, 0.0]
    angle, cache = make(T, 1, D), [make(T, K, L, D), make(T, K, L, D)]
    for part in cache:
        part[:, :, used + 1 :] = float("nan")
    seen = torch.arange(L).expand(T, 1, 1, L) <= used
    seen = seen & (torch.arange(L) >= torch.arange(T).view(T, 1, 1, 1).clamp(max=used))
    return [make(T, (A + 2 * K) * D), *norms, angle.cos(), angle.sin(), *cache, torch.tensor(used), seen, D**-0.5]


@pytest.mark.parametrize("T, A, K, D, L, used, norm, dtype", ATTEND_SHAPES)
def test_attend_matches_fp64(T, A, K, D, L, used, norm, dtype):
    """Output and what is in the cache afterwards."""
    found, twin, truth = (
        cast(attend_inputs(T, A, K, D, L, used, norm), kind, dtype) for kind in (dtype, dtype, torch.float64)
    )
    for arguments, function in (
        (found, decode_attend),
        (twin, decode_attend_reference),
        (truth, decode_attend_reference),
    ):
        arguments[6:9] = [x.clone() for x in arguments[6:9]]
        # the twin multiplies what no row sees by zero, so it must not be NaN there
        if function is decode_attend_reference:
            arguments[6:8] = [x.nan_to_num(0.0) for x in arguments[6:8]]
        arguments.append(function(*arguments))
    assert found[8] == used + 1
    for index in (6, 7, -1):
        kept = found[index] if index == -1 else found[index].nan_to_num(0.0)
        assert_near_truth(kept, truth[index], twin[index], index)


def test_a_full_cache_gives_nan_and_is_not_written():
    arguments = cast(attend_inputs(1, 4, 2, 16, 8, 7, True), torch.float32, torch.float32)
    arguments[8] += 1
    before = [x.clone() for x in arguments[6:8]]
    assert decode_attend(*arguments).isnan().all()
    assert all(torch.equal(old, new) for old, new in zip(before, arguments[6:8]))


def test_mu_overrides_the_expert_and_ties_go_to_the_lowest():
    """A router that scores two experts alike, far above the others, whatever the token's own expert."""
    _, tail = inputs(2, 32, 32, 16, 16, 4, 8, True, True, "silu")
    tail[6] = torch.full((32,), 3.0, dtype=torch.float64)  # mu, so large that its sum is positive for any token
    tail[7] = tail[7] * 0.01
    tail[15] = torch.tensor([0.0, 5.0, 5.0, -1.0], dtype=torch.float64)[:, None].expand(4, 32).contiguous()
    arguments = cast(tail, torch.float32, torch.float32)
    for own in (0, 3):
        arguments[4] = torch.full((2,), own, device=DEVICE)
        found = decode_layer_tail(*arguments)[0]
        arguments[15], router, arguments[4] = None, arguments[15], torch.full((2,), 1, device=DEVICE)
        torch.testing.assert_close(found, decode_layer_tail_reference(*arguments)[0], rtol=1e-5, atol=1e-5)
        arguments[15] = router


def test_nan_is_not_hidden():
    """By none of the clamps, and not in another row."""
    _, tail = inputs(2, 32, 32, 16, 16, 4, 8, True, True, "silu")
    arguments = cast(tail, torch.float32, torch.float32)
    arguments[0][1, 0] = float("nan")
    for found in decode_layer_tail(*arguments):
        assert found[1].isnan().all() and found[0].isfinite().all()


def test_nan_in_the_bias_of_beta_is_not_hidden():
    _, tail = inputs(1, 32, 32, 16, 16, 4, 8, True, True, "silu")
    arguments = cast(tail, torch.float32, torch.float32)
    arguments[11][32 + 5] = float("nan")
    found = decode_layer_tail(*arguments)[1]
    assert found.isnan().sum() == 1 and found[0, 5].isnan()


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32), ids=str)
def test_ids_may_begin_anywhere(monkeypatch, dtype):
    """With a table for each layer, a layer's ids lie among those of all: the launch is still the short one."""
    looked_up, found = [], SimpleNamespace(run=lambda *_: None, function=None, packed_metadata=None)
    kernels = [x for x in vars(decode_layer).values() if isinstance(x, kernel_launch.Kernel)]
    for kernel in kernels:
        jit = defaultdict(lambda kernel=kernel: lambda *_, **__: looked_up.append(kernel.__name__) or found)
        for name, value in (("is_interpreted", False), ("jit", jit), ("compiled", {})):
            monkeypatch.setattr(kernel, name, value)
    monkeypatch.setattr(kernel_launch, "_current_device", lambda: 0)
    monkeypatch.setattr(kernel_launch, "_current_stream", lambda device: 0)
    qkv, tail = inputs(2, 32, 32, 16, 16, 4, 8, True, True, "silu")
    valued, shared, plain, _ = (cast(part, torch.float32, torch.float32) for part in with_more(qkv, tail, 4, 12))
    ids = torch.zeros(3, 3, dtype=dtype, device=DEVICE)[:, :2]
    for layer in (0, 1, 2):
        valued[10], shared[4], plain[2] = ids[layer], ids[layer], ids[layer]
        decode_qkv(*valued)
        decode_layer_tail(*shared)
        decode_plain_tail(*plain)
    counts = Counter(looked_up)
    assert counts["decode_value_kernel"] == 1 and max(counts.values()) == 2  # of both tails, whose arguments differ


def test_custom_op_contract():
    qkv, tail = inputs(2, 32, 32, 16, 16, 4, 8, True, True, "silu")
    checks = ("test_schema", "test_faketensor")
    valued, shared, plain_shared, _ = with_more(qkv, tail, 4, 12)
    for operator, arguments in (
        ("decode_qkv", qkv),
        ("decode_qkv", valued),
        ("decode_layer_tail", tail),
        ("decode_layer_tail", shared),
        ("decode_plain_tail", plain_shared),
        ("decode_attend", attend_inputs(2, 4, 2, 16, 8, 3, True)),
    ):
        arguments = cast(arguments, torch.float32, torch.float32)
        torch.library.opcheck(getattr(torch.ops.complexity_deep, operator).default, arguments, test_utils=checks)
