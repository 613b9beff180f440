"""Repeated forward passes as a CUDA graph. Without a GPU a stand-in records, which runs the pass again when replayed."""

import pytest
import torch
from torch import nn

from complexity_deep import forward_graph_complexity_deep as graphs
from support import random_ids, tiny_model

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture
def recordings(monkeypatch) -> list:
    """One entry for each recording."""
    made, record = [], graphs.record

    def stand_in(step, device):
        outputs = step()
        return lambda: outputs.last_hidden_state.copy_(step().last_hidden_state), outputs

    monkeypatch.setattr(graphs, "GRAPH_DEVICES", (DEVICE,))
    monkeypatch.setattr(graphs, "record", lambda *a: made.append(1) or (record if CUDA else stand_in)(*a))
    return made


def triton_model(**options):
    model = tiny_model(std=0.1, **{"num_hidden_layers": 2, **options}).to(DEVICE)
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")
    return model


def logits(model, ids, **more):
    return model(ids, **{"use_cache": False, **more}).logits


@torch.no_grad()
def test_a_repeated_shape_is_recorded_once_and_results_stay(recordings):
    model = triton_model()
    batches = [random_ids(2, 5, seed=seed).to(DEVICE) for seed in range(5)]
    expected = [logits(model, ids[:1].expand(2, -1).contiguous()) for ids in batches[:1]]
    found = [logits(model, ids) for ids in batches]
    assert len(recordings) == 1 and len(expected) == 1
    model.set_kernels_implementation("eager")
    for ids, result in zip(batches, found, strict=True):
        torch.testing.assert_close(result, logits(model, ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_changes_the_model_is_seen(recordings):
    """Weights in place or replaced, a number of a module, a module, a hook, a setting."""
    model, ids = triton_model(), random_ids(1, 5).to(DEVICE)
    before = [logits(model, ids) for _ in range(4)][-1]
    assert len(recordings) == 1
    layer = model.model.layers[0]

    def change_follows(change) -> bool:
        change()
        found = [logits(model, ids) for _ in range(4)]
        model.set_kernels_implementation("eager")
        truth = logits(model, ids)
        model.set_kernels_implementation("triton")
        return all(torch.allclose(x, truth, rtol=1e-4, atol=1e-4) for x in found) and not torch.equal(truth, before)

    assert change_follows(lambda: layer.self_attn.o_proj.weight.mul_(0.5)) and len(recordings) == 1
    assert change_follows(lambda: setattr(layer.dynamics, "dt", 0.7)) and len(recordings) == 2
    assert change_follows(lambda: setattr(layer.self_attn.o_proj, "weight", nn.Parameter(torch.eye(64, device=DEVICE))))
    norm = type(layer.input_layernorm)(64, 1e-2).to(DEVICE)
    assert change_follows(lambda: setattr(layer, "input_layernorm", norm)) and len(recordings) == 4
    seen = []
    layer.mlp.register_forward_hook(lambda *_: seen.append(1))
    logits(model, ids)
    assert seen and len(recordings) == 4


def test_calls_that_ask_for_more_run_as_they_are(recordings):
    model, ids = triton_model(), random_ids(1, 5).to(DEVICE)
    mask, positions = torch.ones_like(ids), torch.arange(5, device=DEVICE)[None]
    for more in ({"use_cache": True}, {"attention_mask": mask}, {"position_ids": positions}, {"routing_ids": ids}):
        with torch.no_grad():
            for _ in range(4):
                logits(model, ids, **more)
    for _ in range(4):
        logits(model, ids).sum().backward()
    with torch.no_grad():
        for length in range(2, 9):
            logits(model, random_ids(1, length).to(DEVICE))
        for _ in range(4):
            model(ids, use_cache=False, output_hidden_states=True)
    assert not recordings


@torch.no_grad()
def test_few_graphs_are_kept(recordings):
    model = triton_model()
    for length in range(2, 2 + graphs.MAX_GRAPHS + 1):
        for _ in range(4):
            logits(model, random_ids(1, length).to(DEVICE))
    assert len(recordings) == graphs.MAX_GRAPHS + 1
    assert len(graphs._GRAPHS[model.model].recorded) == graphs.MAX_GRAPHS
