"""Decode attention: the twin in fp64 is the truth, PyTorch's SDPA in the same dtype sets what rounding may cost."""

import os

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton")

from kernel_twins import decode_attention_reference  # noqa: E402

from complexity_deep.kernels import decode_attention as kernels  # noqa: E402
from complexity_deep.kernels.decode_attention import decode_attention  # noqa: E402
from support import assert_near_truth  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
gpu = pytest.mark.gpu
pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# B, A, K, L, D, mask, dtype; each row with its reason. bf16 in tl.dot is for the GPU only (see test_mu_guided_qkv.py).
SHAPES = [
    pytest.param(1, 4, 2, 1, 16, "none", torch.float32, id="one-position"),
    pytest.param(2, 6, 2, 70, 20, "rows", torch.float32, id="odd-head-group-odd-head-dim-two-parts"),
    pytest.param(2, 4, 4, 300, 8, "rows", torch.float16, id="no-groups-half"),
    pytest.param(3, 2, 1, 200, 16, "shared", torch.float32, id="one-kv-head-mask-for-all-rows"),
    pytest.param(1, 40, 2, 65, 16, "none", torch.float32, id="more-queries-than-a-tile"),
    pytest.param(1, 16, 8, 640, 128, "rows", torch.bfloat16, id="real-one-row", marks=gpu),
    pytest.param(32, 16, 8, 2048, 128, "rows", torch.bfloat16, id="real-batch", marks=gpu),
    pytest.param(2, 16, 8, 9000, 128, "none", torch.float16, id="real-long", marks=gpu),
    pytest.param(4, 6, 3, 513, 64, "rows", torch.float32, id="real-fp32", marks=gpu),
]


def case(B, A, K, L, D, mask, seed=0):
    """Inputs in fp64: keys and values as views into a cache that is longer, a mask with padding on both sides."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    query = make(B, 1, A, D).transpose(1, 2)
    key, value = (make(B, K, L + 5, D)[:, :, :L] for _ in range(2))
    seen = None
    if mask != "none":
        rows = torch.arange(B if mask == "rows" else 1).view(-1, 1, 1, 1)
        position = torch.arange(L).view(1, 1, 1, L)
        seen = (position >= 3 * rows) & (position < L - 7 * (rows + 1))
    return [x if x is None else x.to(DEVICE) for x in (query, key, value, seen)]


@pytest.mark.parametrize("parts", ["one", "many"])
@pytest.mark.parametrize("B, A, K, L, D, mask, dtype", SHAPES)
def test_matches_fp64(monkeypatch, B, A, K, L, D, mask, dtype, parts):
    if parts == "one":
        monkeypatch.setattr(kernels, "MAX_PARTS", 1)
    query, key, value, seen = case(B, A, K, L, D, mask)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    truth = decode_attention_reference(query.double(), key.double(), value.double(), seen, D**-0.5)
    found = decode_attention(query, key, value, seen, D**-0.5)
    torch_mask = None if seen is None else seen.expand(B, A, 1, L)
    repeated = (x.repeat_interleave(A // K, dim=1) for x in (key, value))
    twin = F.scaled_dot_product_attention(query, *repeated, torch_mask).transpose(1, 2)
    assert found.shape == (B, 1, A, D)
    assert_near_truth(found, truth, twin)


def test_hidden_positions_do_not_count():
    """Not even NaN in them, which is what an unused cache may hold; a row that sees nothing gives zeros."""
    query, key, value, _ = (None if x is None else x.float() for x in case(2, 4, 2, 130, 16, "none"))
    seen = torch.zeros(2, 1, 1, 130, dtype=torch.bool, device=DEVICE)
    seen[0, ..., 2:67] = True
    clean = decode_attention(query, key, value, seen, 0.25)
    hidden = ~seen.transpose(2, 3)
    found = decode_attention(
        query, key.masked_fill(hidden, torch.nan), value.masked_fill(hidden, torch.nan), seen, 0.25
    )
    assert torch.equal(found, clean) and found[0].abs().min() > 0 and (found[1] == 0).all()


def test_wrong_inputs_are_refused():
    query, key, value, seen = case(2, 4, 2, 9, 16, "rows")
    with pytest.raises(ValueError, match="bool"):
        decode_attention(query, key, value, seen.float(), 1.0)
    with pytest.raises(ValueError, match="bool"):
        decode_attention(query, key, value, seen[..., :-1], 1.0)
    with pytest.raises(ValueError, match="multiple of K"):
        decode_attention(query[:, :3], key, value, seen, 1.0)


def test_custom_op_contract():
    query, key, value, seen = case(2, 4, 2, 70, 16, "rows")
    arguments = query.float(), key.float(), value.float(), seen, 0.25
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.complexity_deep.decode_attention.default, arguments, test_utils=checks)
