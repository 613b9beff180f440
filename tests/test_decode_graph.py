"""Decode steps as one CUDA graph. Without a GPU a stand-in records, which runs the step again at every replay."""

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

from complexity_deep import decode_graph_complexity_deep as graphs
from complexity_deep.decode_graph_complexity_deep import DecodeGraph
from complexity_deep.modeling_complexity_deep import ComplexityDeepCausalLMOutputWithPast
from support import random_ids, tiny_model

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LENGTH = 8  # positions of the cache


@pytest.fixture
def recordings(monkeypatch) -> list:
    """One entry for each recording."""
    made, record = [], graphs.record

    def stand_in(step, device):
        outputs = ComplexityDeepCausalLMOutputWithPast()

        def replay():
            outputs.logits = step().logits

        return replay, outputs

    monkeypatch.setattr(graphs, "record", lambda *a: made.append(1) or (record if CUDA else stand_in)(*a))
    return made


def triton_model(**options):
    model = tiny_model(std=0.1, **{"num_hidden_layers": 1, **options}).to(DEVICE)
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")
    return model


def prefilled(model, ids):
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    model(ids, past_key_values=cache)
    return cache


def step_inputs(ids, cache, position, **more):
    seen = (torch.arange(LENGTH, device=DEVICE) <= position).expand(len(ids), 1, 1, LENGTH).contiguous()
    positions = torch.full((len(ids), 1), position, device=DEVICE)
    token = ids[:, position : position + 1]
    return {"input_ids": token, "past_key_values": cache, "attention_mask": seen, "position_ids": positions} | more


def never(**inputs):
    raise AssertionError("the step was not taken")


@torch.no_grad()
def test_steps_equal_the_full_forward(recordings):
    """The first step of a cache as it is, the second recorded, the rest replayed; another cache is recorded anew."""
    model, ids = triton_model(num_hidden_layers=2), random_ids(2, 7).to(DEVICE)
    full, graph = model(ids).logits, DecodeGraph(model, never)
    for count in (1, 2):
        cache = prefilled(model, ids[:, :4])
        for position in range(4, 7):
            outputs = graph(**step_inputs(ids, cache, position))
            assert outputs.past_key_values is cache
            torch.testing.assert_close(outputs.logits[:, 0], full[:, position], rtol=1e-4, atol=1e-4)
        assert len(recordings) == count and cache.get_seq_length() == 7


@torch.no_grad()
def test_other_weights_and_arguments_are_recorded_anew(recordings):
    model, ids = triton_model(), random_ids(1, 8).to(DEVICE)
    cache, graph = prefilled(model, ids[:, :4]), DecodeGraph(model, never)
    for position in (4, 5):
        graph(**step_inputs(ids, cache, position))
    assert len(recordings) == 1
    model.model.norm.weight.mul_(2)  # in place: the recording reads it
    doubled = graph(**step_inputs(ids, cache, 6)).logits.clone()
    torch.testing.assert_close(doubled[:, 0], model(ids[:, :7]).logits[:, 6], rtol=1e-4, atol=1e-4)
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight * 3)  # it would read the old one
    graph = DecodeGraph(model, never)  # as the next `generate` does
    tripled = graph(**step_inputs(ids, cache, 7)).logits
    torch.testing.assert_close(tripled[:, 0], model(ids).logits[:, 7], rtol=1e-4, atol=1e-4)
    assert len(recordings) == 1 and graph.replay is None  # the first step with these weights runs as it is


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    (
        pytest.param({"past_key_values": DynamicCache()}, id="dynamic-cache"),
        pytest.param({"attention_mask": torch.ones(1, 5)}, id="mask-not-made-yet"),
        pytest.param({"position_ids": None}, id="positions-not-given"),
        pytest.param({"input_ids": torch.tensor([[3, 4]])}, id="two-tokens"),
        pytest.param({"attention_mask": None}, id="no-mask"),
    ),
)
def test_whatever_else_goes_to_the_library(recordings, change):
    model, ids = triton_model(), random_ids(1, 8).to(DEVICE)
    graph = DecodeGraph(model, otherwise=lambda **inputs: "otherwise")
    inputs = step_inputs(ids, prefilled(model, ids[:, :4]), 4) | change
    inputs = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    assert graph(**inputs) == graph(**inputs) == graph(**inputs) == "otherwise"


@torch.no_grad()
def test_models_that_cannot_be_recorded_go_to_the_library(recordings):
    """Host work in the step (window, dynamic RoPE, the experts' PyTorch twin), hooks and modules of others."""
    ids = random_ids(1, 8).to(DEVICE)

    def is_taken(model, cache=None):
        cache = cache or prefilled(model, ids[:, :4])
        graph = DecodeGraph(model, otherwise=lambda **inputs: "otherwise")
        return graph(**step_inputs(ids, cache, 4)) != "otherwise"

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    for options in ({"sliding_window": 3}, {"rope_parameters": rope}):
        assert not is_taken(triton_model(**options))
    for options in ({"use_dynamics": False}, {"use_token_routed_mlp": False}):
        assert is_taken(triton_model(**options))
    # one cache, so that nothing but the model is another
    model = triton_model()
    cache = prefilled(model, ids[:, :4])
    assert is_taken(model, cache) and is_taken(model, cache)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert not is_taken(model, cache)
    model.set_experts_implementation("eager")
    assert not is_taken(model, cache)
    model.set_experts_implementation("cggr")
    hook = model.model.norm.register_forward_hook(lambda *_: None)
    assert not is_taken(model, cache)
    hook.remove()
    assert is_taken(model, cache)
    model.model.layers[0].self_attn.o_proj = type("Other", (torch.nn.Linear,), {})(64, 64, bias=False).to(DEVICE)
    assert not is_taken(model, cache)


def test_generate_keeps_no_model_alive(monkeypatch):
    model = triton_model()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert isinstance(model.get_compiled_call(None), DecodeGraph)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    (
        {},
        {"num_beams": 2},
        {"num_return_sequences": 4, "do_sample": True},
        {"do_sample": True, "top_k": 5},
        {"output_logits": True, "return_dict_in_generate": True},
    ),
    ids=str,
)
def test_generate_with_a_static_cache(recordings, options):
    """Equals generate with a dynamic cache, with left padding, again, and under inference mode."""
    model, ids = triton_model(), random_ids(2, 7).to(DEVICE)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 1, 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, **options}

    def generate(**more):
        torch.manual_seed(0)
        outputs = model.generate(ids, **options, **more)
        return outputs.logits if "output_logits" in options else outputs

    expected = generate()
    for _ in range(2):
        torch.testing.assert_close(generate(cache_implementation="static"), expected, rtol=1e-3, atol=1e-3)
    with torch.inference_mode():
        torch.testing.assert_close(generate(cache_implementation="static"), expected, rtol=1e-3, atol=1e-3)
    assert recordings or "num_beams" in options
