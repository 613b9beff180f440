"""Paged attention: the twin in fp64 is the truth, PyTorch's SDPA in the same dtype sets what rounding may cost."""

import os

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton")

from complexity_deep.kernels import paged_attention as kernels  # noqa: E402
from complexity_deep.kernels.paged_attention import paged_attention, paged_decode_attention  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
gpu = pytest.mark.gpu
pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# (positions in the cache, new tokens) of each sequence
DECODE = [(0, 1), (299, 1), (63, 1), (64, 1), (128, 1)]
MIXED = [(0, 1), (0, 70), (17, 1), (100, 65), (299, 1), (0, 3), (5, 40)]

# sequences, A, K, D, page, rows of padding, dtype; each row with its reason. bf16 in tl.dot is for the GPU only.
SHAPES = [
    pytest.param(DECODE, 4, 4, 32, 16, 0, torch.float32, id="decode-no-groups"),
    pytest.param(DECODE, 8, 4, 64, 256, 3, torch.float32, id="decode-padding"),
    pytest.param(DECODE[:2], 16, 2, 128, 32, 1, torch.float32, id="decode-eight-queries"),
    pytest.param(DECODE[1:2], 6, 2, 20, 4, 0, torch.float16, id="decode-odd-head-dim-odd-group-half"),
    pytest.param(MIXED, 4, 4, 32, 16, 0, torch.float32, id="mixed-no-groups"),
    pytest.param(MIXED, 8, 4, 64, 256, 9, torch.float32, id="mixed-padding"),
    pytest.param(MIXED[:4], 4, 1, 20, 4, 2, torch.float16, id="mixed-odd-head-dim-half"),
    pytest.param(MIXED[4:], 6, 2, 32, 32, 0, torch.float32, id="mixed-odd-group"),
    pytest.param([(0, 5)], 8, 1, 128, 16, 0, torch.float32, id="one-prompt-eight-queries"),
    pytest.param([(n, 1) for n in range(1, 600, 5)], 16, 8, 128, 256, 8, torch.bfloat16, id="real-decode", marks=gpu),
    pytest.param([(7000, 1), (90, 1)], 16, 8, 128, 256, 0, torch.bfloat16, id="real-long-decode", marks=gpu),
    pytest.param([(0, 511), (300, 1), (200, 900)], 16, 8, 128, 256, 62, torch.bfloat16, id="real-mixed", marks=gpu),
    pytest.param([(0, 257), (300, 1)], 16, 2, 64, 32, 0, torch.float32, id="real-mixed-fp32", marks=gpu),
]


class Batch:
    """Sequences whose pages are scattered over a cache in fp64, and the arguments that name them."""

    def __init__(self, sequences, A, K, D, page, padding, seed=0):
        generator = torch.Generator().manual_seed(seed)
        make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)  # noqa: E731
        N = sum(new for _, new in sequences) + padding
        self.sequences, self.page = sequences, page
        # As the model gives them: parts of one tensor, heads of a token side by side.
        self.query, self.key, self.value = make(N, A + 2 * K, D).split((A, K, K), dim=1)
        pages = [-(-(past + new) // page) for past, new in sequences]
        order = torch.randperm(sum(pages) + 1, generator=generator).tolist()
        self.trash = order.pop()  # the page that padding is written to
        self.key_cache, self.value_cache = make((sum(pages) + 1) * page, K, D), make((sum(pages) + 1) * page, K, D)
        self.block_table = torch.full((len(sequences) + padding, max(pages) + 1), -1, dtype=torch.int32)
        self.slots = []
        for row, ((past, new), count) in enumerate(zip(sequences, pages, strict=True)):
            own = torch.tensor([order.pop() for _ in range(count)])
            self.block_table[row, :count] = own
            self.slots.append((own[:, None] * page + torch.arange(page)).flatten()[: past + new])
        lengths = torch.tensor([[new, past + new] for past, new in sequences] + [[0, 0]] * padding)
        self.cu_q, self.cu_k = (F.pad(x, (1, 0)).int().to(DEVICE) for x in lengths.T.cumsum(1))
        written = [slots[past:] for slots, (past, _) in zip(self.slots, sequences, strict=True)]
        trash = torch.full((padding,), self.trash * page)
        self.write_index = torch.cat([*written, trash]).to(DEVICE)
        self.index = torch.cat([*self.slots, torch.zeros(5, dtype=torch.int64)]).to(DEVICE)
        self.block_table = self.block_table.to(DEVICE)
        self.slots = [slots.to(DEVICE) for slots in self.slots]

    def to(self, dtype):
        for name in ("query", "key", "value", "key_cache", "value_cache"):
            setattr(self, name, getattr(self, name).to(dtype))
        return self

    def reference(self, dtype):
        """Attention of each sequence by itself in `dtype`; zeros for padding. Writes new keys and values first."""
        key_cache, value_cache = self.key_cache.to(dtype), self.value_cache.to(dtype)
        out, first = torch.zeros_like(self.query, dtype=dtype), 0
        for slots, (past, new) in zip(self.slots, self.sequences, strict=True):
            rows = slice(first, first + new)
            key_cache[slots[past:]], value_cache[slots[past:]] = self.key[rows].to(dtype), self.value[rows].to(dtype)
            groups = self.query.shape[1] // self.key.shape[1]
            key, value = (x[slots].repeat_interleave(groups, 1).transpose(0, 1) for x in (key_cache, value_cache))
            seen = torch.ones(new, past + new, dtype=torch.bool, device=DEVICE).tril(past)
            query = self.query[rows].to(dtype).transpose(0, 1)
            out[rows] = F.scaled_dot_product_attention(query, key, value, seen).transpose(0, 1)
            first += new
        return out, key_cache, value_cache

    def caches(self, key_cache, value_cache):
        """What both hold outside the page of padding."""
        kept = torch.ones(len(key_cache), dtype=torch.bool, device=DEVICE)
        kept[self.trash * self.page : (self.trash + 1) * self.page] = False
        return torch.stack((key_cache[kept], value_cache[kept]))

    def attend(self):
        scale = self.query.shape[2] ** -0.5
        caches = self.key_cache, self.value_cache
        if all(new == 1 for _, new in self.sequences):
            places = self.block_table, self.page, self.cu_k
            return paged_decode_attention(self.query, self.key, self.value, *caches, *places, scale)
        places = self.index, self.write_index, self.cu_q, self.cu_k
        return paged_attention(self.query, self.key, self.value, *caches, *places, scale)


def error(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("sequences, A, K, D, page, padding, dtype", SHAPES)
def test_matches_fp64_and_writes_the_cache(monkeypatch, sequences, A, K, D, page, padding, dtype, parts):
    if parts == 1 and any(new > 1 for _, new in sequences):
        pytest.skip("only decoding splits the positions")
    monkeypatch.setattr(kernels, "MAX_PARTS", parts)
    batch = Batch(sequences, A, K, D, page, padding).to(dtype)
    truth, *_ = batch.reference(torch.float64)
    rounded, *expected = batch.reference(dtype)
    found = batch.attend()
    limit = 1e-5 if dtype == torch.float32 else 2 * error(rounded, truth)
    assert found.dtype == dtype and found.shape == truth.shape
    assert error(found, truth) <= limit
    assert (found[len(found) - padding :] == 0).all()
    assert torch.equal(batch.caches(batch.key_cache, batch.value_cache), batch.caches(*expected))


def test_single_tokens_give_the_same_in_both_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_PARTS", 3)
    batch, twin = (Batch(DECODE, 8, 4, 32, 16, 0).to(torch.float32) for _ in range(2))
    places = twin.index, twin.write_index, twin.cu_q, twin.cu_k
    mixed = paged_attention(twin.query, twin.key, twin.value, twin.key_cache, twin.value_cache, *places, 32**-0.5)
    torch.testing.assert_close(batch.attend(), mixed, rtol=1e-5, atol=1e-6)
    assert torch.equal(batch.key_cache, twin.key_cache) and torch.equal(batch.value_cache, twin.value_cache)


def test_only_the_slots_of_a_sequence_count(monkeypatch):
    """Other slots of a cache, such as unused ones, may hold NaN."""
    monkeypatch.setattr(kernels, "MAX_PARTS", 3)
    for sequences in (DECODE, MIXED):
        clean = Batch(sequences, 4, 2, 16, 16, 2).to(torch.float32)
        batch = Batch(sequences, 4, 2, 16, 16, 2).to(torch.float32)
        unused = torch.ones(len(batch.key_cache), dtype=torch.bool, device=DEVICE)
        for slots, (past, _) in zip(batch.slots, sequences, strict=True):
            unused[slots[:past]] = False
        batch.key_cache[unused], batch.value_cache[unused] = torch.nan, torch.nan
        assert torch.equal(batch.attend(), clean.attend())


def test_wrong_inputs_are_refused():
    batch = Batch(DECODE, 4, 2, 16, 16, 0).to(torch.float32)
    batch.key_cache = batch.key_cache.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="contiguous"):
        batch.attend()
    batch = Batch(MIXED, 3, 2, 16, 16, 0).to(torch.float32)
    with pytest.raises(ValueError, match="multiple of K"):
        batch.attend()
