"""Repeated forward passes as a CUDA graph. Without a GPU a stand-in records, which runs the pass at every replay."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache

from complexity_deep import accelerated_complexity_deep as accelerated
from complexity_deep import forward_graph_complexity_deep as graphs
from complexity_deep import training_graph_complexity_deep as training_graphs
from complexity_deep.compatibility_complexity_deep import CACHE_NAME
from support import WIDTH, random_ids, triton_model

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture
def recordings(monkeypatch) -> list:
    """One entry for each recording."""
    made, record = [], graphs.record

    def stand_in(step, device):
        outputs = step()
        return lambda: copy_into(outputs, step()), outputs

    def copy_into(outputs, new):
        outputs.last_hidden_state.copy_(new.last_hidden_state)
        if outputs.get(CACHE_NAME) is not None:
            for layer, other in zip(outputs[CACHE_NAME].layers, new[CACHE_NAME].layers, strict=True):
                layer.keys.copy_(other.keys)
                layer.values.copy_(other.values)

    monkeypatch.setattr(graphs, "GRAPH_DEVICES", (DEVICE,))
    monkeypatch.setattr(graphs, "record", lambda *a: made.append(1) or (record if CUDA else stand_in)(*a))
    return made


def logits(model, ids, **more):
    return model(ids, **{"use_cache": False, **more}).logits


@torch.no_grad()
def test_a_repeated_shape_is_recorded_once_and_results_stay(recordings):
    model = triton_model()
    batches = [random_ids(2, 5, seed=seed).to(DEVICE) for seed in range(4)]
    counts, found = [], []
    for ids in batches:
        found.append(logits(model, ids))
        counts.append(len(recordings))
    assert counts == [0, 0, 1, 1]
    model.set_kernels_implementation("eager")
    for ids, result in zip(batches, found, strict=True):
        torch.testing.assert_close(result, logits(model, ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_call_with_all_that_a_tokenizer_gives_is_replayed(recordings, monkeypatch):
    """A mask that hides nothing, and the cache that a model makes by itself. The cache is the caller's own."""
    monkeypatch.setattr(graphs, "CALLS_BEFORE", 0)
    model = triton_model(num_hidden_layers=2)
    first, second = (random_ids(1, 6, seed=seed).to(DEVICE) for seed in range(2))
    outputs = [model(input_ids=ids[:, :5], attention_mask=torch.ones_like(ids[:, :5])) for ids in (first, second)]
    assert len(recordings) == 1
    model.set_kernels_implementation("eager")
    for ids, output in zip((first, second), outputs, strict=True):
        expected, cache = logits(model, ids), output[CACHE_NAME]
        torch.testing.assert_close(output.logits, expected[:, :5], rtol=1e-4, atol=1e-4)
        further = model(ids[:, 5:], **{CACHE_NAME: cache}).logits
        torch.testing.assert_close(further, expected[:, 5:], rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == 6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_compiler_is_at_work_before_a_recording_only(recordings, monkeypatch, mode):
    """Each kind of ids is compiled by itself: those of inference mode, and views. A recording has ids of its own."""
    torch._dynamo.reset()
    counter, record, counts = CompileCounterWithBackend("eager"), graphs.record, []
    monkeypatch.setattr(training_graphs, "GRAPH_DEVICES", (DEVICE,))

    def counted(*arguments):
        counts.append(counter.frame_count)
        result = record(*arguments)
        counts.append(counter.frame_count)
        return result

    monkeypatch.setattr(graphs, "record", counted)
    model = triton_model()
    compiled = torch.compile(model.model, backend=counter)
    for ids in (random_ids(2, 8).to(DEVICE)[:, 1:5], random_ids(2, 5).to(DEVICE)):
        with mode():
            for _ in range(3):
                compiled(ids)
    assert len(recordings) == 2 and counts[0] == counts[1] and counts[2] == counts[3]


@torch.no_grad()
def test_a_mask_that_hides_something_is_heeded(recordings, monkeypatch):
    monkeypatch.setattr(graphs, "CALLS_BEFORE", 0)
    model, ids = triton_model(), random_ids(2, 5).to(DEVICE)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], device=DEVICE)
    found = logits(model, ids, attention_mask=mask)
    model.set_kernels_implementation("eager")
    expected = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    assert not recordings


@torch.no_grad()
def test_what_changes_the_model_is_seen(recordings, monkeypatch):
    """Weights in place, replaced or of another dtype, a number of a module, a module, its class, a hook."""
    monkeypatch.setattr(graphs, "CALLS_BEFORE", 0)
    model, ids = triton_model(), random_ids(1, 3).to(DEVICE)
    before, layer = logits(model, ids), model.model.layers[0]
    assert len(recordings) == 1

    def is_followed() -> bool:
        found = [logits(model, ids), logits(model, ids)]  # one that sees the change, one that is recorded anew
        model.set_kernels_implementation("eager")
        truth = logits(model, ids)
        model.set_kernels_implementation("triton")
        is_equal = all(torch.allclose(x, truth, rtol=1e-4, atol=1e-4) for x in found)
        return is_equal and not torch.allclose(truth, before, rtol=1e-3)

    layer.self_attn.o_proj.weight.mul_(0.5)
    assert is_followed() and len(recordings) == 1
    layer.dynamics.dt = 0.7
    assert is_followed() and len(recordings) == 2
    layer.self_attn.o_proj.weight = nn.Parameter(torch.eye(WIDTH, device=DEVICE))
    assert is_followed() and len(recordings) == 3
    layer.input_layernorm = type(layer.input_layernorm)(WIDTH, 1e-2).to(DEVICE)
    assert is_followed() and len(recordings) == 4
    state = graphs.state_of(model.model)
    router = layer.mlp.mu_router
    weight = router.weight
    router.weight = weight.view(torch.int32)  # where it was, of another dtype
    assert graphs.state_of(model.model) != state
    router.weight = weight
    assert graphs.state_of(model.model) == state
    norm = layer.input_layernorm
    norm.__class__ = type("Other", (type(norm),), {})
    assert graphs.state_of(model.model) != state
    norm.__class__ = type(norm).__base__
    seen = []
    layer.mlp.register_forward_hook(lambda *_: seen.append(1))
    logits(model, ids)
    assert seen and len(recordings) == 4


@torch.no_grad()
def test_a_number_of_numpy_is_followed(recordings, monkeypatch):
    """A schedule may set the step size by one; its class is none of Python's own."""
    monkeypatch.setattr(graphs, "CALLS_BEFORE", 0)
    model, ids = triton_model(), random_ids(1, 3).to(DEVICE)
    if not CUDA:  # as a recording, which computes with the number that was recorded
        monkeypatch.setattr(graphs, "record", lambda step, device: (lambda: None, step()))
    for dt in np.linspace(0.1, 0.9, 3):
        model.model.layers[0].dynamics.dt = dt
        found = [logits(model, ids) for _ in range(2)]
        model.set_kernels_implementation("eager")
        torch.testing.assert_close(found, 2 * [logits(model, ids)], rtol=1e-4, atol=1e-4)
        model.set_kernels_implementation("triton")


@torch.no_grad()
def test_dropout_that_one_module_has_draws_once_in_each_call(recordings, monkeypatch):
    """As for several answers of one model. The call that records would draw twice."""
    monkeypatch.setattr(graphs, "CALLS_BEFORE", 0)
    model, ids, found = triton_model(), random_ids(1, 3).to(DEVICE), []
    attention = model.model.layers[0].self_attn.train()
    attention.attention_dropout = 0.5
    for _ in range(2):
        torch.manual_seed(0)
        found.append((logits(model, ids), torch.rand(1, device=DEVICE)))
    torch.testing.assert_close(*found)
    assert not recordings


@torch.no_grad()
def test_a_change_before_the_first_recording_puts_it_off_only(recordings):
    model, ids = triton_model(), random_ids(1, 3).to(DEVICE)
    logits(model, ids)
    model.model.layers[0].dynamics.dt = 0.7
    for _ in range(5):
        logits(model, ids)
    assert len(recordings) == 1


@pytest.mark.parametrize(("paid_back", "expected"), ((32, 2), (4, 10)))
@torch.no_grad()
def test_what_changes_often_is_recorded_later_and_later(recordings, monkeypatch, paid_back, expected):
    """Here every seven calls: it is recorded after two and after four calls, and would be after eight."""
    monkeypatch.setattr(graphs, "PAID_BACK", paid_back)
    model, ids = triton_model(), random_ids(1, 3).to(DEVICE)
    if not CUDA:  # the interpreter would take seconds for each call
        monkeypatch.setitem(accelerated.ACCELERATED, "triton", {"model": accelerated.ACCELERATED["triton"]["model"]})
    for change in range(10):
        model.model.layers[0].dynamics.dt = 0.1 + change
        for _ in range(7):
            logits(model, ids)
    assert len(recordings) == expected


@torch.no_grad()
@pytest.mark.parametrize(
    ("setting", "value"),
    (
        ("fp32_precision", "tf32"),  # which PyTorch's own query of the precision does not take
        ("allow_bf16_reduced_precision_reduction", False),
        ("allow_fp16_reduced_precision_reduction", False),
        ("allow_fp16_accumulation", True),
    ),
)
def test_a_setting_of_matrix_products_has_its_own_recording(recordings, monkeypatch, setting, value):
    monkeypatch.setattr(graphs, "CALLS_BEFORE", 0)
    model, ids = triton_model(), random_ids(1, 3).to(DEVICE)
    logits(model, ids)
    before = getattr(torch.backends.cuda.matmul, setting)
    try:
        setattr(torch.backends.cuda.matmul, setting, value)
        logits(model, ids)
    finally:
        setattr(torch.backends.cuda.matmul, setting, before)
    assert len(recordings) == 2


@torch.no_grad()
def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch):
    def refuse(step, device):
        refused.append(1)
        raise torch.OutOfMemoryError("no memory")

    refused, model, ids = [], triton_model(), random_ids(1, 3).to(DEVICE)
    monkeypatch.setattr(graphs, "GRAPH_DEVICES", (DEVICE,))
    monkeypatch.setattr(graphs, "CALLS_BEFORE", 0)
    monkeypatch.setattr(graphs, "record", refuse)
    first, second = logits(model, ids), logits(model, ids)
    assert torch.equal(first, second) and len(refused) == 1


@torch.no_grad()
def test_a_model_that_nobody_holds_is_freed_with_its_graphs(monkeypatch):
    """The recordings depend on the model, and must not keep it. (The stand-in of other tests holds it.)"""
    outputs = SimpleNamespace(last_hidden_state=torch.zeros(1, 3, WIDTH, device=DEVICE))
    monkeypatch.setattr(graphs, "GRAPH_DEVICES", (DEVICE,))
    monkeypatch.setattr(graphs, "CALLS_BEFORE", 0)
    monkeypatch.setattr(graphs, "record", lambda step, device: (lambda: None, outputs))
    gc.collect()  # models of other tests, which would leave in between
    model, held = triton_model(), len(graphs._GRAPHS)
    base = weakref.ref(model.model)
    model.model(random_ids(1, 3).to(DEVICE), use_cache=False)
    assert len(graphs._GRAPHS) == held + 1
    del model
    gc.collect()
    assert base() is None and len(graphs._GRAPHS) <= held


def test_calls_that_ask_for_more_run_as_they_are(recordings, monkeypatch):
    monkeypatch.setattr(graphs, "CALLS_BEFORE", 0)
    model, ids = triton_model(), random_ids(1, 3).to(DEVICE)
    mask, positions = torch.ones(1, 1, 3, 3, device=DEVICE).bool().tril(), torch.arange(3, device=DEVICE)[None]
    cache = {CACHE_NAME: DynamicCache(config=model.config)}
    with torch.no_grad():
        for more in (cache, {"attention_mask": mask}, {"position_ids": positions}, {"routing_ids": ids}):
            logits(model, ids, **more)
        model(ids, use_cache=False, output_hidden_states=True)
        logits(model, ids, is_causal=False)  # every token sees all others
        with pytest.raises(AttributeError):
            logits(model, ids, attention_mask=np.ones((1, 3)))
    model = triton_model()
    logits(model, ids).sum().backward()
    with torch.no_grad():
        logits(model.train(), ids)
    assert not recordings


@torch.no_grad()
def test_few_graphs_are_kept(recordings, monkeypatch):
    monkeypatch.setattr(graphs, "CALLS_BEFORE", 0)
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    model = triton_model()
    for length in (2, 3, 4, 2):
        logits(model, random_ids(1, length).to(DEVICE))
    assert len(recordings) == 4 and len(graphs._GRAPHS[model.model].recorded) == 2
