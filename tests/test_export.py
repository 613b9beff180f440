"""What looks at a model without running it: FakeTensor, the meta device, `torch.export` and `torch.compile`."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export

from complexity_deep import ComplexityDeepForCausalLM
from support import random_ids, tiny_config, tiny_model

OPTIONS = ({}, {"use_mu_routing": False, "sliding_window": 4})


def train_and_decode(model, ids):
    """A training step and a cached step; returns the shapes of their logits."""
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    prefix = model(ids, use_cache=True)
    return [tuple(x.logits.shape) for x in (outputs, model(ids[:, :1], past_key_values=prefix.past_key_values))]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fake_tensors(options):
    with FakeTensorMode():
        model = ComplexityDeepForCausalLM(tiny_config(num_hidden_layers=1, **options))
        ids = torch.randint(3, 257, (2, 6))
        assert train_and_decode(model, ids) == [(2, 6, 257), (2, 1, 257)]
        assert model(ids, attention_mask=torch.ones_like(ids)).logits.shape == (2, 6, 257)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_meta_device(options):
    with torch.device("meta"):
        model = ComplexityDeepForCausalLM(tiny_config(num_hidden_layers=1, **options))
        ids = torch.randint(3, 257, (2, 6))
    assert train_and_decode(model, ids) == [(2, 6, 257), (2, 1, 257)]


@pytest.mark.parametrize("options, strict", zip(OPTIONS, (False, True)), ids=str)
def test_exported_with_dynamic_shapes(options, strict):
    """Another batch, another length and a left-padded row: logits and loss are the model's."""
    model, ids = tiny_model(num_hidden_layers=1, **options), random_ids(3, 6)
    shape = {0: Dim("batch", max=64), 1: Dim("length", min=2, max=128)}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}
    shapes = {"input_ids": shape, "attention_mask": shape, "labels": shape, "use_cache": None}
    program = export(model, (), inputs, dynamic_shapes=shapes, strict=strict).module()
    other = random_ids(5, 9, seed=2)
    mask = torch.ones_like(other)
    mask[0, :3] = 0
    inputs = {"input_ids": other, "attention_mask": mask, "labels": other, "use_cache": False}
    found, expected = program(**inputs), model(**inputs)
    kept = mask.bool()
    torch.testing.assert_close(found.logits[kept], expected.logits[kept])
    torch.testing.assert_close(found.loss, expected.loss)


def test_compiled_for_all_lengths():
    """The first shape and all others."""
    model = tiny_model(num_hidden_layers=1)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for rows, length in ((2, 5), (3, 9), (4, 17), (5, 33)):
        ids = random_ids(rows, length)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert counter.frame_count <= 2
