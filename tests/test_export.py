"""What looks at a model without running it: FakeTensor, the meta device, `torch.export` and `torch.compile`."""

import os
import subprocess
import sys

import pytest
import torch
from packaging import version
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from transformers import GenerationConfig
from transformers.integrations.executorch import convert_and_export_with_cache

from complexity_deep import ComplexityDeepForCausalLM
from complexity_deep.compatibility_complexity_deep import CACHE_NAME
from support import random_ids, tiny_config, tiny_model, triton_model

OPTIONS = ({}, {"use_mu_routing": False, "sliding_window": 4})
OPTIONS_OF_KERNELS = ({}, {"use_mu_routing": False})


def train_and_decode(model, ids):
    """A training step and a cached step; returns the shapes of their logits."""
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    prefix = model(ids, use_cache=True)
    step = model(ids[:, :1], **{CACHE_NAME: prefix[CACHE_NAME]})
    return [tuple(x.logits.shape) for x in (outputs, step)]


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


# torch 2.11 does not export a Llama either without `strict`.
OLD_TORCH = pytest.mark.skipif(version.parse(torch.__version__) < version.parse("2.12"), reason="torch 2.11")


@pytest.mark.parametrize(
    "options, strict", [pytest.param(OPTIONS[0], False, marks=OLD_TORCH), (OPTIONS[1], True)], ids=str
)
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


class LogitsOnly(torch.nn.Module):
    """A program that returns the model's output object needs the class of it where it is loaded."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def test_exported_for_processes_without_this_code(tmp_path):
    """docs/inference.md says how."""
    model, ids = tiny_model(num_hidden_layers=1, experts_implementation="batched_mm"), random_ids(2, 6)
    torch.export.save(export(LogitsOnly(model), (ids,), strict=True), tmp_path / "model.pt2")
    torch.save((ids, model(ids).logits), tmp_path / "expected.pt")
    script = """
import torch
ids, expected = torch.load("expected.pt")
torch.testing.assert_close(torch.export.load("model.pt2").module()(ids), expected)
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env={"PATH": os.environ["PATH"]}, check=True)


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


@pytest.mark.parametrize("options", OPTIONS_OF_KERNELS, ids=str)
@pytest.mark.parametrize("trains", [False, True])
def test_kernels_compiled_for_all_lengths(trains, options):
    """One program for the first shape and one for all others, also of more rows than the decode kernels take."""
    pytest.importorskip("triton")
    model = triton_model(**options).train(trains)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model.model, fullgraph=True, backend=counter)
    for rows, length in ((2, 5), (3, 6), (4, 7), (5, 9), (2, 33)):
        with torch.set_grad_enabled(trains):
            compiled(random_ids(rows, length).to(model.device), use_cache=False)
    assert counter.frame_count == 2


def test_kernels_exported_with_dynamic_shapes():
    pytest.importorskip("triton")
    model = triton_model()
    ids, other = random_ids(3, 6).to(model.device), random_ids(5, 9).to(model.device)
    shapes = {"input_ids": {0: Dim("batch", max=64), 1: Dim("length", min=2, max=128)}, "use_cache": None}
    with torch.no_grad():
        program = export(model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=shapes).module()
        found, expected = (x(input_ids=other, use_cache=False).logits for x in (program, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_exported_with_a_static_cache():
    """The library's own export of a decode step, one token at a time."""
    model, ids = tiny_model(num_hidden_layers=1), random_ids(1, 4)
    options = {"batch_size": 1, "max_cache_len": 8, "device": "cpu"}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=options)
    example = {"example_input_ids": ids[:, :1], "example_cache_position": torch.tensor([0])}
    step = convert_and_export_with_cache(model, **example).module()
    found = [step(input_ids=ids[:, i : i + 1], cache_position=torch.tensor([i]))[:, -1] for i in range(4)]
    torch.testing.assert_close(torch.stack(found, dim=1), model(ids).logits)
