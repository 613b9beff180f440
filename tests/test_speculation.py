"""Speculative decoding gives greedy's tokens, by recorded steps where there can be any.

Without a GPU a stand-in records, which runs the step again at every replay, and PyTorch's functions go by the names of
the kernels. One test has the kernels themselves, in the interpreter.
"""

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from complexity_deep import accelerated_complexity_deep as accelerated
from complexity_deep import decode_graph_complexity_deep as graphs
from complexity_deep import routing_complexity_deep as routing
from complexity_deep import speculation_complexity_deep as speculation
from complexity_deep.compatibility_complexity_deep import CACHE_NAME
from complexity_deep.decode_graph_complexity_deep import HAVE_RUN
from complexity_deep.modeling_complexity_deep import ComplexityDeepExperts, ComplexityDeepModelOutputWithPast
from complexity_deep.speculation_complexity_deep import LENGTH_UNIT, STEP_LENGTHS, SpeculativeCache
from support import WIDTH, random_ids, triton_model

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NEW = 24


class Recordings:
    """How many recordings were made, the tokens of every replayed step, and of every pass with a cache."""

    def __init__(self):
        self.made, self.replayed, self.passes = 0, [], []

    def record(self, step, device):
        self.made += 1
        if CUDA:
            replay, outputs = graphs.record(step, device)
        else:
            outputs = ComplexityDeepModelOutputWithPast(last_hidden_state=torch.empty(0))

            def replay():
                found = step().last_hidden_state
                outputs.last_hidden_state.resize_(found.shape).copy_(found)

        def counted():
            replay()
            self.replayed.append(outputs.last_hidden_state.shape[1])

        return counted, outputs


@pytest.fixture
def recordings(monkeypatch) -> Recordings:
    made, step = Recordings(), speculation.speculative_step

    def watched(plain, model, ids, *args, **kwargs):
        made.passes.append(ids.shape[1])
        return step(plain, model, ids, *args, **kwargs)

    monkeypatch.setattr(graphs, "GRAPH_DEVICES", (DEVICE,))
    monkeypatch.setattr(speculation, "record", made.record)
    monkeypatch.setattr("complexity_deep.forward_graph_complexity_deep.speculative_step", watched)
    return made


@pytest.fixture
def plain_functions(monkeypatch):
    """PyTorch's functions by the names of the kernels, which the interpreter would need minutes for."""
    if not CUDA:
        monkeypatch.setitem(accelerated.ACCELERATED, "triton", {"model": accelerated.ACCELERATED["triton"]["model"]})
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "cggr", ComplexityDeepExperts.forward.__wrapped__)
        monkeypatch.setitem(routing.ROUTING_PLANS, "cggr", routing.ROUTING_PLANS["eager"])


def pair(layers: int = 3) -> tuple:
    """A model, and its first layer with its embedding and head to draft for it, so that the draft is right at times."""
    model, draft = triton_model(num_hidden_layers=layers), triton_model()
    draft.load_state_dict({name: x for name, x in model.state_dict().items() if name in draft.state_dict()})
    draft.generation_config.num_assistant_tokens = model.generation_config.num_assistant_tokens = 5
    draft.generation_config.assistant_confidence_threshold = 0.0
    model.generation_config.assistant_confidence_threshold = 0.0
    return model, draft


def generate(model, ids, **options):
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(ids, **options)


def ways(model, draft) -> dict[str, dict]:
    return {
        "assisted": {"assistant_model": draft},
        "assisted by itself": {"assistant_model": model},
        "prompt lookup": {"prompt_lookup_num_tokens": 5},
        "early exit": {"assistant_early_exit": 1},
    }


WAYS = tuple(ways(None, None))


@pytest.mark.parametrize("prompt", (1, 2, 9, 40))
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_greedys_and_steps_are_recorded(recordings, plain_functions, way, prompt):
    """Once each length has run, all but the prompts' passes are replayed, and few recordings serve them."""
    model, draft = pair()
    ids = random_ids(1, prompt, vocab_size=12).to(DEVICE)  # some of which repeat
    expected = generate(model, ids, cache_implementation="dynamic")
    options = ways(model, draft)[way]
    generate(model, ids, **options)  # compiles the kernels of each length
    recordings.passes[:], recordings.replayed[:] = [], []
    assert torch.equal(generate(model, ids, **options), expected)
    models = 1 if way == "prompt lookup" else 2
    assert len(recordings.passes) - len(recordings.replayed) <= models
    assert 8 in recordings.replayed and set(recordings.replayed) <= {1, 8, 32}
    assert 0 < recordings.made <= models * len(STEP_LENGTHS)


@pytest.mark.parametrize(
    ("way", "graph"),
    (("assisted", False), ("assisted", True), ("prompt lookup", False), ("prompt lookup", True), ("early exit", True)),
)
def test_the_kernels_give_greedys_tokens(recordings, monkeypatch, way, graph):
    """In the interpreter where there is no GPU, so with few tokens."""
    if not graph:
        monkeypatch.setattr(graphs, "GRAPH_DEVICES", ())
    model, draft = pair(layers=2)
    model.generation_config.num_assistant_tokens = draft.generation_config.num_assistant_tokens = 3
    ids = torch.tensor([[7, 8, 9, 7, 8]], device=DEVICE)
    model.set_kernels_implementation("eager")
    model.set_experts_implementation("eager")
    expected = generate(model, ids, max_new_tokens=8)
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")
    for _ in range(1 + CUDA):
        found = generate(model, ids, max_new_tokens=8, **ways(model, draft)[way])
    assert torch.equal(found, expected)
    assert bool(recordings.passes) == graph


@pytest.mark.parametrize(
    "options",
    (
        pytest.param({"eos_token_id": list(range(3, 60))}, id="ends-early"),
        pytest.param({"min_new_tokens": NEW, "eos_token_id": list(range(100, 257))}, id="processors"),
        pytest.param({"repetition_penalty": 1.3}, id="penalty"),
        pytest.param({"position_ids": torch.arange(9)[None] + 3}, id="position-ids"),
        pytest.param({"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])}, id="left-padding"),
        pytest.param({"routing_ids": random_ids(1, 9, seed=5)}, id="routing-ids"),
    ),
)
@pytest.mark.parametrize("way", ("assisted", "prompt lookup", "early exit"))
def test_what_a_call_asks_for_holds(recordings, plain_functions, way, options):
    model, draft = pair()
    ids = random_ids(1, 9).to(DEVICE)
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    expected = generate(model, ids, cache_implementation="dynamic", **options)
    for _ in range(2):
        assert torch.equal(generate(model, ids, **options, **ways(model, draft)[way]), expected)
    with torch.inference_mode():
        assert torch.equal(generate(model, ids, **options, **ways(model, draft)[way]), expected)
    assert recordings.passes


def test_sampling_draws_the_tokens_of_a_growing_cache(recordings, plain_functions, monkeypatch):
    model, draft = pair()
    ids = random_ids(1, 9).to(DEVICE)

    def sample() -> torch.Tensor:
        torch.manual_seed(0)
        return generate(model, ids, assistant_model=draft, do_sample=True, temperature=0.7)

    sample()
    found = sample()
    assert recordings.replayed
    count = len(recordings.passes)
    monkeypatch.setattr(graphs, "GRAPH_DEVICES", ())
    assert torch.equal(found, sample()) and len(recordings.passes) == count


@pytest.mark.parametrize(
    "reason", ("returned", "dynamic", "hook", "window", "attention", "memory", "few tokens", "own cache", "turned off")
)
def test_a_call_that_asks_otherwise_keeps_the_librarys_cache(recordings, plain_functions, monkeypatch, reason):
    model, draft = pair()
    if reason == "window":
        model, draft = triton_model(num_hidden_layers=2, sliding_window=64), triton_model()
    ids, options = random_ids(1, 9).to(DEVICE), {}
    if reason == "hook":
        model.model.layers[0].register_forward_hook(lambda *_: None)
    if reason == "attention":
        model.set_attn_implementation("eager")
    if reason == "turned off":
        model.set_cuda_graphs(False)
    if reason == "memory":
        monkeypatch.setattr(graphs, "free_bytes", lambda device: 1000)
    expected = generate(model, ids, cache_implementation="dynamic")
    options = {
        "returned": {"return_dict_in_generate": True},
        "dynamic": {"cache_implementation": "dynamic"},
        "few tokens": {"max_new_tokens": 4},
        "own cache": {CACHE_NAME: DynamicCache(config=model.config)},
    }.get(reason, {})
    # With a draft, transformers 5.17 cannot have a named kind of cache.
    way = {"prompt_lookup_num_tokens": 5} if reason == "dynamic" else {"assistant_model": draft}
    found = generate(model, ids, **way, **options)
    found = found if isinstance(found, torch.Tensor) else found.sequences
    assert torch.equal(found, expected[:, : found.shape[1]]) and not recordings.passes


@pytest.mark.parametrize("reason", ("hook", "other architecture"))
def test_a_draft_that_cannot_be_recorded_drafts_as_it_is(recordings, plain_functions, reason):
    model, draft = pair()
    if reason == "hook":
        draft.model.layers[0].register_forward_hook(lambda *_: None)
    else:
        shape = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        draft = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).to(DEVICE).eval()
    ids = random_ids(1, 9).to(DEVICE)
    expected = generate(model, ids)
    for _ in range(2):
        assert torch.equal(generate(model, ids, assistant_model=draft), expected)
    assert recordings.replayed and draft.model not in HAVE_RUN


@torch.no_grad()
def test_a_pass_of_other_arguments_runs_as_it_is(recordings, plain_functions):
    model, ids = triton_model(), random_ids(1, 12).to(DEVICE)
    full = model(ids).logits
    cache = SpeculativeCache(model, 12)
    options = {CACHE_NAME: cache, "attention_mask": torch.ones_like(ids[:, :4])}
    first = model(ids[:, :4], **options).logits
    options["attention_mask"] = torch.ones_like(ids[:, :9])  # [B, S], which is not yet a mask of a step
    found = model(ids[:, 4:9], **options).logits
    torch.testing.assert_close(torch.cat((first, found), dim=1), full[:, :9], rtol=1e-4, atol=1e-4)
    cache.crop(-3)
    assert cache.get_seq_length() == 6
    options["attention_mask"] = torch.ones_like(ids)
    rest = model(ids[:, 6:], **options, output_hidden_states=True)
    torch.testing.assert_close(rest.logits, full[:, 6:], rtol=1e-4, atol=1e-4)
    assert len(rest.hidden_states) == 2 and not cache.steps and not recordings.made


def test_crop_of_a_cache_that_is_new_or_rewound_or_in_use():
    cache = SpeculativeCache(triton_model(num_hidden_layers=2).cpu(), 8, layers=1)
    assert len(cache.layers) == 1 and cache.longest == LENGTH_UNIT
    assert cache.layers[0].max_cache_len == LENGTH_UNIT + STEP_LENGTHS[-1]
    keys = torch.zeros(1, 2, 5, 16)
    for _ in range(2):
        cache.crop(-1)  # the library does so for a prompt of one token
        assert cache.get_seq_length() == 0
        cache.update(keys, keys, 0)
        cache.crop(torch.tensor(-2))
        cache.crop(0)
        assert cache.get_seq_length() == 3
        cache.rewind()


@torch.no_grad()
@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("tokens", (2, 5, 8))
def test_mask_of_few_tokens_is_the_librarys(tokens, padded):
    model, ids = triton_model(), random_ids(1, 6).to(DEVICE)
    cache = SpeculativeCache(model, 20)
    model(ids, **{CACHE_NAME: cache})
    mask = torch.ones(1, 6 + tokens, dtype=torch.long, device=DEVICE)
    mask[0, :2] = not padded
    positions = torch.arange(6, 6 + tokens, device=DEVICE)[None]
    inputs = {"inputs_embeds": torch.empty(1, tokens, 0, device=DEVICE), "attention_mask": mask if padded else None}
    inputs |= {CACHE_NAME: cache, "position_ids": positions}
    ours = model.create_masks_for_generate(config=model.config, **inputs)
    assert ours.dtype == torch.bool
    assert torch.equal(ours, graphs.create_masks_for_generate(config=model.config, **inputs))


@pytest.mark.parametrize("way", ("assisted", "early exit"))
def test_a_later_call_records_nothing(recordings, plain_functions, way):
    """Unless it needs more positions than before, or the model has changed, whose recordings would be wrong."""
    model, draft = pair()
    options = ways(model, draft)[way]
    made = []

    def call(prompt: int, new: int = NEW) -> None:
        recordings.made = 0
        ids = random_ids(1, prompt, seed=prompt, vocab_size=12).to(DEVICE)
        found = generate(model, ids, max_new_tokens=new, **options)
        made.append(recordings.made)
        assert torch.equal(found, generate(model, ids, max_new_tokens=new, cache_implementation="dynamic"))

    model.config.max_position_embeddings = 2 * LENGTH_UNIT
    for prompt in 3 * (1, 9, 40, 7):
        call(prompt)
    assert any(made[:8]) and not any(made[8:])
    call(LENGTH_UNIT)
    assert made[-1]
    model.model.layers[0].self_attn.o_proj.weight = torch.nn.Parameter(torch.eye(WIDTH, device=DEVICE))
    call(9)
    assert made[-1]
    with torch.inference_mode():
        call(9)
    for _ in range(3):
        call(9)
    assert made[-3] and not made[-1]


def test_a_precision_that_was_chosen_since_holds_for_a_later_call(recordings, plain_functions):
    model, ids = triton_model(), random_ids(1, 9).to(DEVICE)
    for _ in range(4):
        recordings.made = 0
        generate(model, ids, prompt_lookup_num_tokens=5)
    assert not recordings.made
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        generate(model, ids, prompt_lookup_num_tokens=5)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert recordings.made


def test_steps_that_cannot_be_recorded_run_as_they_are(recordings, plain_functions, monkeypatch):
    model, ids, tried = triton_model(), random_ids(1, 9, vocab_size=12).to(DEVICE), []
    expected = generate(model, ids, cache_implementation="dynamic")

    def refuse(*_):
        tried.append(1)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(speculation, "record", refuse)
    for _ in range(2):
        assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=5), expected)
    assert 1 <= len(tried) <= len(STEP_LENGTHS)  # each length once
    assert len(HAVE_RUN[model.model]) <= len(STEP_LENGTHS)


def test_a_call_within_another_has_caches_of_its_own(recordings, plain_functions):
    model, draft = pair()
    outer, inner = random_ids(1, 9, seed=1).to(DEVICE), random_ids(1, 9, seed=2).to(DEVICE)
    expected = [generate(model, ids, assistant_model=draft) for ids in (outer, inner)]
    found = []

    class Streamer:
        """Generates within the loop that it is told of."""

        def put(self, tokens):
            found.append(generate(model, inner, assistant_model=draft))

        def end(self):
            pass

    assert torch.equal(generate(model, outer, assistant_model=draft, streamer=Streamer()), expected[0])
    assert len(found) > 1 and all(torch.equal(x, expected[1]) for x in found)


def test_caches_are_freed_with_the_model_or_when_others_come(plain_functions, monkeypatch):
    """They hold recordings and much memory."""
    seen, make = [], SpeculativeCache.__init__

    def watched(self, *args, **kwargs):
        make(self, *args, **kwargs)
        seen.append(weakref.ref(self))

    outputs = ComplexityDeepModelOutputWithPast(last_hidden_state=torch.zeros(1, 8, WIDTH, device=DEVICE))
    monkeypatch.setattr(graphs, "GRAPH_DEVICES", (DEVICE,))
    # A CUDA graph does not hold the step that it was recorded from, as the stand-in of other tests does.
    monkeypatch.setattr(speculation, "record", lambda step, device: (lambda: None, outputs))
    monkeypatch.setattr(SpeculativeCache, "__init__", watched)
    model, draft = pair()

    def alive() -> list[bool]:
        return [cache() is not None for cache in seen]

    for _ in range(2):
        generate(model, random_ids(1, 9).to(DEVICE), assistant_model=draft)
    assert alive() == [True, True]
    draft.model.norm.weight = torch.nn.Parameter(draft.model.norm.weight.clone())
    gc.disable()
    try:
        generate(model, random_ids(1, 9).to(DEVICE), assistant_model=draft)
        assert alive() == [True, False, True]
    finally:
        gc.enable()
    del model, draft
    gc.collect()
    assert not any(alive())
