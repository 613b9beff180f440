"""Decode steps as one CUDA graph. Without a GPU a stand-in records, which runs the step again at every replay."""

import contextlib
import gc
import inspect
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from complexity_deep import accelerated_complexity_deep as accelerated
from complexity_deep import decode_graph_complexity_deep as graphs
from complexity_deep import routing_complexity_deep as routing
from complexity_deep.compatibility_complexity_deep import CACHE_NAME
from complexity_deep.decode_graph_complexity_deep import DecodeGraph
from complexity_deep.kernels.decode_attention import decode_attention_variant
from complexity_deep.modeling_complexity_deep import ComplexityDeepCausalLMOutputWithPast, ComplexityDeepExperts
from support import WIDTH, random_ids, tiny_model, triton_model

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


def prefilled(model, ids):
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    model(ids, cache=cache)
    return cache


def step_inputs(ids, cache, position, **more):
    seen = (torch.arange(LENGTH, device=DEVICE) <= position).expand(len(ids), 1, 1, LENGTH).contiguous()
    positions = torch.full((len(ids), 1), position, device=DEVICE)
    token = ids[:, position : position + 1]
    return {"input_ids": token, CACHE_NAME: cache, "attention_mask": seen, "position_ids": positions} | more


def never(**inputs):
    raise AssertionError("the step was not taken")


@torch.no_grad()
def test_steps_equal_the_full_forward(recordings):
    """A model's first step as it is, the second recorded, the rest replayed; another cache is recorded at once."""
    model, ids = triton_model(num_hidden_layers=2), random_ids(2, 7).to(DEVICE)
    full, graph = model(ids).logits, DecodeGraph(model, never)
    for steps in ([0, 1, 1], [2, 2, 2]):
        cache = prefilled(model, ids[:, :4])
        for position, count in zip(range(4, 7), steps, strict=True):
            outputs = graph(**step_inputs(ids, cache, position))
            assert outputs[CACHE_NAME] is cache and len(recordings) == count
            torch.testing.assert_close(outputs.logits[:, 0], full[:, position], rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == 7


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    (
        pytest.param(lambda model: model.half(), id="dtype"),
        pytest.param(lambda model: setattr(model.config, "hidden_act", "gelu"), id="config"),
        pytest.param(lambda model: model.train(), id="training"),
        pytest.param(lambda model: setattr(model.lm_head, "bias", torch.nn.Parameter(torch.ones(257))), id="weights"),
    ),
)
def test_a_step_that_takes_other_kernels_runs_as_it_is(recordings, change):
    """Triton cannot compile them while a graph is recorded."""
    model, ids = triton_model(), random_ids(1, 8).to(DEVICE)
    DecodeGraph(model, never)(**step_inputs(ids, prefilled(model, ids[:, :4]), 4))
    change(model)
    model.to(DEVICE)
    graph, cache = DecodeGraph(model, never), prefilled(model, ids[:, :4])
    graph(**step_inputs(ids, cache, 4))
    assert not recordings
    graph(**step_inputs(ids, cache, 5))
    assert len(recordings) == 1


@torch.no_grad()
def test_a_mask_of_another_kind_takes_other_kernels(recordings):
    """One mask for all rows is read with another stride than a mask for each row."""
    model, ids = triton_model(), random_ids(2, 8).to(DEVICE)

    def step(rows):
        inputs = step_inputs(ids, prefilled(model, ids[:, :4]), 4)
        DecodeGraph(model, never)(**inputs | {"attention_mask": inputs["attention_mask"][:rows]})
        return len(recordings)

    assert [step(2), step(1)] == [0, 0]  # each runs as it is
    assert [step(2), step(1)] == [1, 2]


def test_caches_that_the_kernels_are_compiled_for_alike():
    """Generations of other lengths need no step that compiles, unless their cache is the first to be split."""

    def variant(rows, length, offset=0):
        size = rows * length * 32
        keys = torch.empty(size + offset)[offset:].view(rows, 2, length, 16)
        return decode_attention_variant(keys, keys)

    assert variant(1, 257) == variant(1, 208) == variant(1, 1024) != variant(1, 64)
    assert variant(2, 256) != variant(1, 256) != variant(1, 256, offset=1)


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
    assert len(recordings) == 2


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    (
        pytest.param({CACHE_NAME: DynamicCache()}, id="dynamic-cache"),
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
    """Host work in the step (window, dynamic RoPE, the experts' PyTorch twin), and what others wrote or hooked."""
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
    assert not is_taken(triton_model().double())
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
    plain = type(model)
    own_forward = {"forward": lambda self, **inputs: plain.forward(self, **inputs)}
    for more, takes in (({"helper": 1}, True), (own_forward, False)):
        model.__class__ = type("Callers", (plain,), more)
        assert is_taken(model, cache) == takes
    model.__class__ = plain
    model.model.layers[0].self_attn.o_proj = type("Other", (torch.nn.Linear,), {})(WIDTH, WIDTH, bias=False).to(DEVICE)
    assert not is_taken(model, cache)


@torch.no_grad()
def test_generate_keeps_no_model_alive(recordings, monkeypatch):
    model, ids = triton_model(), random_ids(1, 5).to(DEVICE)
    DecodeGraph(model, never)(**step_inputs(ids, prefilled(model, ids[:, :4]), 4))
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert isinstance(model.get_compiled_call(None), DecodeGraph)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.fixture
def generate_records(recordings, monkeypatch):
    """One entry for each step of `generate`: the inputs that were copied.

    Without a GPU it takes the decode graph all the same, and PyTorch's functions go by the names of the kernels, which
    the interpreter would need minutes for.
    """
    copied = []

    class Watched(DecodeGraph):
        def __call__(self, **inputs):
            outputs = super().__call__(**inputs)
            copied.append([name for name, x in getattr(self, "inputs", {}).items() if inputs[name] is not x])
            return outputs

    if not CUDA:
        mixin = graphs.DecodeGraphMixin
        is_static = lambda _, kwargs, config: type(kwargs.get(CACHE_NAME)) is StaticCache  # noqa: E731
        monkeypatch.setattr(mixin, "_valid_auto_compile_criteria", is_static, raising=False)
        monkeypatch.setattr(mixin, "get_compiled_call", lambda self, _: graphs.DecodeGraph(self, never))
        monkeypatch.setattr(graphs, "GRAPH_DEVICES", ("cpu",))
        monkeypatch.setitem(accelerated.ACCELERATED, "triton", {})
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "cggr", ComplexityDeepExperts.forward.__wrapped__)
        monkeypatch.setitem(routing.ROUTING_PLANS, "cggr", routing.ROUTING_PLANS["eager"])
    monkeypatch.setattr(graphs, "DecodeGraph", Watched)
    return copied


STATIC = {"cache_implementation": "static"}
ROUTED_BY_OTHERS = {"routing_ids": random_ids(2, 7, seed=5)}
SHIFTED = {"position_ids": torch.arange(7).expand(2, -1) + torch.tensor([[2], [5]])}


@pytest.mark.parametrize(
    "options",
    (
        pytest.param({}, id="greedy"),
        pytest.param({"eos_token_id": list(range(3, 100)), "min_new_tokens": 0}, id="rows-end-one-by-one"),
        pytest.param({"num_beams": 2}, id="beams"),
        pytest.param({"num_return_sequences": 4, "do_sample": True}, id="four-samples"),
        pytest.param({"do_sample": True, "top_k": 5}, id="sampling"),
        pytest.param({"output_logits": True, "return_dict_in_generate": True}, id="logits"),
        pytest.param(ROUTED_BY_OTHERS, id="routing-ids"),
        pytest.param(SHIFTED, id="position-ids"),
    ),
)
def test_generate_with_a_static_cache(recordings, generate_records, options):
    """Equals generate with a dynamic cache, with left padding, again, and under inference mode."""
    model, ids = triton_model(), random_ids(2, 7).to(DEVICE)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 1, 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, **options}
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}

    def generate(**more):
        torch.manual_seed(0)
        outputs = model.generate(ids, **options, **more)
        return outputs.logits if "output_logits" in options else outputs

    expected = generate(cache_implementation="dynamic")
    torch.testing.assert_close(generate(), expected, rtol=1e-3, atol=1e-3)
    for _ in range(2):
        torch.testing.assert_close(generate(**STATIC), expected, rtol=1e-3, atol=1e-3)
    with torch.inference_mode():
        torch.testing.assert_close(generate(**STATIC), expected, rtol=1e-3, atol=1e-3)
    assert recordings or "num_beams" in options


@pytest.mark.parametrize(
    ("options", "is_recorded"),
    (
        pytest.param({}, True, id="nothing-asked"),
        pytest.param({"do_sample": True, "top_k": 5}, True, id="sampling"),
        pytest.param({"do_sample": True, "num_return_sequences": 3}, True, id="three-samples"),
        pytest.param({"max_new_tokens": 4, "min_new_tokens": 4}, False, id="few-tokens"),
        pytest.param({"num_beams": 2}, False, id="beams"),
        pytest.param({"return_dict_in_generate": True}, False, id="returned-cache"),
        pytest.param({"cache_implementation": "dynamic"}, False, id="dynamic"),
        pytest.param({"use_cache": False}, False, id="no-cache"),
        pytest.param({"prefill_chunk_size": 3}, False, id="chunked-prefill"),
        pytest.param({"prompt_lookup_num_tokens": 2}, False, id="prompt-lookup"),
        pytest.param({"assistant_early_exit": 1}, False, id="early-exit"),
        pytest.param({"disable_compile": True}, False, id="no-compilation"),
    ),
)
def test_generate_records_by_itself_where_no_cache_has_to_grow(recordings, generate_records, options, is_recorded):
    """The tokens are those of a dynamic cache, whatever is asked for."""
    model, ids = triton_model(num_hidden_layers=2), random_ids(1, 6).to(DEVICE)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **options}

    def generate(**more):
        torch.manual_seed(0)
        outputs = model.generate(ids, **(options | more))
        return outputs if isinstance(outputs, torch.Tensor) else outputs.sequences

    found = generate()
    assert bool(recordings) == is_recorded
    uses_no_cache = {"use_cache", "assistant_early_exit", "prompt_lookup_num_tokens"} & options.keys()
    assert torch.equal(found, generate(**({} if uses_no_cache else {"cache_implementation": "dynamic"})))


@pytest.mark.parametrize("reason", ("memory", "hook", "attention", "window"))
def test_generate_keeps_the_librarys_cache_where_a_recording_cannot_be(
    recordings, generate_records, monkeypatch, reason
):
    model, ids = triton_model(sliding_window=4 if reason == "window" else None), random_ids(1, 6).to(DEVICE)
    if reason == "memory":
        monkeypatch.setattr(graphs, "free_bytes", lambda device: 1000)
    if reason == "hook":
        model.model.layers[0].register_forward_hook(lambda *_: None)
    if reason == "attention":
        model.set_attn_implementation("eager")
    model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert not recordings


def test_a_step_that_cannot_be_recorded_runs_as_it_is(generate_records, monkeypatch):
    """Such as for want of memory: tokens are those of a dynamic cache, and no step tries again."""
    model, ids, tried = triton_model(), random_ids(1, 6).to(DEVICE), []
    expected = model.generate(ids, max_new_tokens=10, do_sample=False, cache_implementation="dynamic")

    def refuse(*_):
        tried.append(1)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(graphs, "record", refuse)
    assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False), expected)
    assert len(tried) == 1


def test_a_loop_of_the_caller_gets_a_cache_that_grows(recordings, generate_records):
    """It may crop what it has written, which the library's static cache cannot."""
    model, ids, given = triton_model(), random_ids(1, 6).to(DEVICE), []

    def loop(model, input_ids, **kwargs):
        given.append(kwargs[CACHE_NAME])
        return input_ids

    for options in ({}, {"prompt_lookup_num_tokens": 2}):
        model.generate(ids, max_new_tokens=12, do_sample=False, custom_generate=loop, **options)
    assert [type(cache) for cache in given] == [DynamicCache, DynamicCache]
    model.generate(ids, max_new_tokens=12, do_sample=False)
    assert recordings


def test_generate_with_gradients_gets_a_cache_that_grows(recordings, generate_records):
    """A static cache is written in place, and the backward pass would be refused."""
    model, ids = triton_model(), random_ids(1, 6).to(DEVICE)
    scores = []
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    processor = lambda ids, logits: scores.append(logits) or logits  # noqa: E731
    inspect.unwrap(type(model).generate)(model, ids, logits_processor=[processor], **options)
    scores[-1].sum().backward()
    assert model.model.norm.weight.grad is not None and not recordings


class Graph:
    def replay(self):
        pass


def cuda_that_captures_by(capture) -> SimpleNamespace:
    cuda = SimpleNamespace(CUDAGraph=Graph, graph=capture, graph_pool_handle=object, Stream=lambda _: object())
    cuda.current_stream = cuda.set_stream = lambda _: None
    return cuda


def test_each_recording_that_lives_has_a_stream_of_its_own(monkeypatch):
    """PyTorch has memory for each stream, and a few streams only: those of recordings that are gone are taken again."""
    streams = []

    def capture(*_, stream, **__):
        streams.append(stream)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch, "cuda", cuda_that_captures_by(capture))
    monkeypatch.setattr(graphs, "_IDLE_STREAMS", {})
    held = [graphs.record(lambda: None, DEVICE) for _ in range(2)]
    del held[0]
    held += [graphs.record(lambda: None, DEVICE) for _ in range(2)]
    assert streams[2] is streams[0] and len({*streams}) == 3


def test_a_capture_is_not_disturbed_by_one_that_waits(monkeypatch):
    """The one that ends must not let garbage be collected while the next one captures."""
    found, first, second = [], threading.Event(), threading.Event()

    @contextlib.contextmanager
    def capture(*_, **__):
        found.append(gc.isenabled())
        first.set()
        second.wait(5)
        yield
        found.append(gc.isenabled())

    monkeypatch.setattr(torch, "cuda", cuda_that_captures_by(capture))
    enabled = []
    disable = gc.disable
    monkeypatch.setattr(graphs.gc, "disable", lambda: enabled.append(gc.isenabled()) or disable())
    threads = [threading.Thread(target=graphs.record, args=(lambda: None, DEVICE)) for _ in range(2)]
    threads[0].start()
    first.wait(5)
    threads[1].start()
    threads[1].join(0.2)
    second.set()
    for thread in threads:
        thread.join()
    assert enabled == [True, True] and found == 4 * [False] and gc.isenabled()


@pytest.mark.parametrize("padded", (False, True))
def test_a_step_is_prepared_while_the_one_before_runs(generate_records, padded):
    """All but the token lies in the recording's memory when the library has seen that generation goes on."""
    model, ids = triton_model(), random_ids(2, 5).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, 0] = not padded
    for _ in range(2):
        model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, **STATIC)
    everything = ["input_ids", "position_ids", "attention_mask"]
    assert generate_records == [everything] * 2 + [["input_ids"]] * 3 + [everything] + [["input_ids"]] * 4


@torch.no_grad()
@pytest.mark.parametrize("change", ("attention_mask", "position_ids", CACHE_NAME, "keys"))
def test_what_changed_since_it_was_prepared_is_prepared_anew(recordings, generate_records, change):
    model, ids = triton_model(), random_ids(2, 8).to(DEVICE)
    caches = [prefilled(model, ids[:, :4]) for _ in range(2)]
    positions = torch.arange(5, device=DEVICE).expand(2, -1)
    kwargs = {CACHE_NAME: caches[0], "attention_mask": torch.ones_like(ids[:, :5]), "position_ids": positions}
    graph = DecodeGraph(model, never)

    def step(count):
        inputs = model.prepare_inputs_for_generation(ids[:, :count], next_sequence_length=1, **kwargs)
        return inputs, graph(**inputs)

    for count in (5, 6, 7):
        kwargs = model._update_model_kwargs_for_generation(step(count)[1], kwargs)
    given, prepared, _ = kwargs["prepared"]
    assert given.keys() == {CACHE_NAME, "attention_mask", "position_ids"}
    two = model.prepare_inputs_for_generation(ids, next_sequence_length=2, **kwargs)
    assert two["input_ids"].shape == (2, 2) and "prepared" not in two
    if change == CACHE_NAME:
        kwargs[change] = caches[1]
    elif change == "keys":
        caches[0].layers[0].keys = caches[0].layers[0].keys.clone()
    else:
        kwargs[change] = torch.zeros_like(kwargs[change])
    inputs, outputs = step(8)
    if change in ("attention_mask", "position_ids"):
        assert inputs[change] is not prepared[change] and not inputs[change].any()
        assert outputs.decode_graph is graph
    else:
        assert len(recordings) == 2  # of the step with other tensors


@torch.no_grad()
def test_a_loop_that_goes_back_to_an_older_step_reads_that_steps_inputs(recordings, generate_records):
    """What was prepared for it lay in memory that newer steps have filled since."""
    model, ids = triton_model(), random_ids(2, 8).to(DEVICE)
    kwargs = {CACHE_NAME: prefilled(model, ids[:, :4]), "attention_mask": torch.ones_like(ids[:, :5])}
    kwargs["position_ids"] = torch.arange(5, device=DEVICE).expand(2, -1)
    graph, steps = DecodeGraph(model, never), {}
    for count in (5, 6, 7, 8):
        steps[count] = dict(kwargs)
        inputs = model.prepare_inputs_for_generation(ids[:, :count], next_sequence_length=1, **kwargs)
        kwargs = model._update_model_kwargs_for_generation(graph(**inputs), kwargs)
    assert "prepared" in steps[7]
    inputs = model.prepare_inputs_for_generation(ids[:, :7], next_sequence_length=1, **steps[7])
    assert inputs["position_ids"].tolist() == [[6], [6]]


@torch.no_grad()
@pytest.mark.parametrize("padded", (False, True))
def test_mask_of_one_new_token_is_the_librarys(padded):
    model, ids = tiny_model(num_hidden_layers=1), random_ids(2, 5)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    inputs = {"inputs_embeds": torch.empty(2, 1, 0), "attention_mask": mask if padded else None}
    inputs |= {CACHE_NAME: prefilled(model.to(DEVICE), ids.to(DEVICE)), "position_ids": torch.tensor([[5], [5]])}
    inputs = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    ours = model.create_masks_for_generate(config=model.config, **inputs)
    theirs = graphs.create_masks_for_generate(config=model.config, **inputs)
    assert ours.shape[1:] == theirs.shape[1:] == (1, 1, LENGTH) and ours.dtype == theirs.dtype == torch.bool
    assert torch.equal(ours.expand_as(theirs), theirs)


def test_the_one_token_mask_of_ids_on_another_device_than_the_cache():
    """transformers 5.23 passes no mask for unpadded prompts, and moves ids from the host only after the mask."""
    model = tiny_model()
    cache = StaticCache(config=model.config, max_cache_len=8)
    cache.get_seq_length = lambda: torch.zeros(1, dtype=torch.long)  # a CPU scalar would go with any device
    cache.get_mask_sizes = lambda *_: (8, 0)
    embeds = torch.empty(1, 1, model.config.hidden_size, device="meta")  # stands for the other device
    mask = model.create_masks_for_generate(model.config, embeds, None, **{CACHE_NAME: cache})
    assert mask.device.type == "meta" and mask.shape == (1, 1, 1, 8)


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_device_as_it_was():
    """Random numbers can be drawn, and memory goes back to the driver."""
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    with pytest.raises(RuntimeError):
        graphs.record(lambda: torch.ones(2**28, device=device).sum().item(), device)
    torch.rand(1, device=device)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(device) - before < 2**28


@pytest.mark.parametrize("kernels", ("eager", "triton"))
@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("room", (4, 8))
def test_a_static_cache_without_room_for_the_text_is_refused(kernels, padded, room):
    """Full before the prompt ends, or while tokens are generated: the kernels would go on with NaN."""
    model, ids = triton_model(), random_ids(1, 6).to(DEVICE)
    model.set_kernels_implementation(kernels)
    options = {CACHE_NAME: StaticCache(config=model.config, max_cache_len=room), "do_sample": False}
    if padded:
        options["attention_mask"] = torch.tensor([[0, 1, 1, 1, 1, 1]], device=DEVICE)
    with pytest.raises(ValueError, match=f"The cache has room for {room} tokens, but the text has"):
        model.generate(ids, max_new_tokens=6, eos_token_id=None, **options)
    cache = StaticCache(config=model.config, max_cache_len=9)
    whole = model.generate(ids, max_new_tokens=4, eos_token_id=None, do_sample=False)
    found = model.generate(ids, max_new_tokens=4, eos_token_id=None, **(options | {CACHE_NAME: cache}))
    assert padded or torch.equal(found, whole)  # the last token needs no room
