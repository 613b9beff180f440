"""Continuous batching on the paged kernels: the tokens of `generate`, and what stays as the caller asks."""

import gc
import os
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation import ContinuousMixin
from transformers.generation.continuous_batching.utils import WorkloadHints

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton")

from complexity_deep import accelerated_complexity_deep as accelerated  # noqa: E402
from complexity_deep import continuous_batching_complexity_deep as batching  # noqa: E402
from complexity_deep.compatibility_complexity_deep import PAGED_ATTENTION  # noqa: E402
from complexity_deep.kernels import paged_attention as kernels  # noqa: E402
from support import random_ids, tiny_model  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
PAGE = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # since Transformers 5.18
NEW = 3
GREEDY = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=1)
PROMPTS = [random_ids(1, n, seed=n)[0].tolist() for n in (4, 19, 1)]


def triton_model(**options):
    model = tiny_model(std=0.15, **{"num_hidden_layers": 1, **options}).to(DEVICE)
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr" if accelerated.ACCELERATED["triton"] else "eager")
    return model


def small_cache(**options) -> ContinuousBatchingConfig:
    """Pages of 8 tokens, and steps of at most 16, so that the long prompt comes in two parts beside other tokens."""
    return ContinuousBatchingConfig(**{"num_blocks": 16, "max_batch_tokens": 16, PAGE: 8} | options)


def batched(model, config, prompts=PROMPTS):
    results = model.generate_batch(inputs=prompts, generation_config=GREEDY, continuous_batching_config=config)
    tokens = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
    return [tokens[tuple(prompt)] for prompt in prompts]


def alone(model, prompts=PROMPTS):
    rows = (torch.tensor([prompt], device=DEVICE) for prompt in prompts)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    return [model.generate(ids, **options)[0, ids.shape[1] :].tolist() for ids in rows]


@pytest.fixture(autouse=True)
def few_parts(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_PARTS", 2)  # the interpreter runs programs one after the other


@pytest.fixture
def only_paged(monkeypatch):
    """The other kernels, which take seconds a step in the interpreter, give way to PyTorch."""
    if not CUDA:
        monkeypatch.setitem(accelerated.ACCELERATED, "triton", {})


@pytest.fixture
def calls(monkeypatch) -> list:
    """Names of the kernels called."""
    names = []
    for name in ("paged_attention", "paged_decode_attention"):
        plain = getattr(batching, name)
        monkeypatch.setattr(batching, name, lambda *a, plain=plain, name=name: names.append(name) or plain(*a))
    return names


def test_tokens_are_those_of_generate(only_paged, calls, monkeypatch):
    masks, plain = [], batching.paged_attention_forward
    monkeypatch.setitem(
        batching.ALL_ATTENTION_FUNCTIONS,
        PAGED_ATTENTION,
        lambda *a, **k: masks.append(a[4]) or plain(*a, **k),
    )
    model = triton_model()
    assert batched(model, small_cache()) == alone(model)
    assert set(calls) == {"paged_attention", "paged_decode_attention"}
    assert masks and all(mask is None for mask in masks)
    assert model.config._attn_implementation == "sdpa"


def test_beside_the_other_kernels(calls):
    model = triton_model()
    tokens = batched(model, small_cache(), PROMPTS[:1])
    model.set_kernels_implementation("eager")
    model.set_experts_implementation("eager")
    assert tokens == alone(model, PROMPTS[:1])
    assert set(calls) == {"paged_attention", "paged_decode_attention"}


def test_sequences_longer_than_the_trained_length(only_paged, calls):
    """Also longer than the block tables that a manager makes for a model of 8 positions when no call names a length."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    model = triton_model(max_position_embeddings=8, rope_parameters=rope)
    expected = alone(model)
    assert batched(model, small_cache()) == expected
    assert set(calls) == {"paged_attention", "paged_decode_attention"}
    with model.continuous_batching_context_manager(GREEDY, continuous_batching_config=small_cache()) as manager:
        assert manager.continuous_batching_config.max_blocks_per_request == 1
        manager.add_request(PROMPTS[1], request_id="long")
        while (result := manager.get_result(timeout=1)) is None:
            assert manager.is_running()
        assert result.generated_tokens == expected[1]


def test_block_tables_hold_the_longest_sequence(only_paged):
    model = triton_model(max_position_embeddings=20)
    for hints, pages in ((None, 3), (WorkloadHints(max_prompt_length=30, max_generated_length=3), 5)):
        manager = model.init_continuous_batching(GREEDY, small_cache(), hints)
        assert manager.continuous_batching_config.max_blocks_per_request == pages
        model.set_attn_implementation("sdpa")


def test_a_call_takes_memory_for_its_requests(only_paged, monkeypatch):
    """And all that is free, as the library does, where they may fill it or where they are not known."""
    model = triton_model(max_position_embeddings=700)
    many, one = WorkloadHints(300, 300, num_requests=10), WorkloadHints(4, 3, num_requests=1)
    for hints, pages in ((many, 48), (one, 4), (None, None), (WorkloadHints(300, 0, num_requests=10), None)):
        config = model.init_continuous_batching(GREEDY, workload_hints=hints).continuous_batching_config
        assert config.num_blocks == pages and (pages is None) == (config.max_batch_tokens is None)
        model.set_attn_implementation("sdpa")
    given = ContinuousBatchingConfig(max_batch_tokens=16)
    assert model.init_continuous_batching(GREEDY, given, many).continuous_batching_config.num_blocks is None
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(batching, "_free_bytes", lambda device: 1e6)
    assert model.init_continuous_batching(GREEDY, None, many).continuous_batching_config.num_blocks is None


@pytest.mark.skipif(CUDA, reason="the library counts the memory of a GPU where there is one")
@pytest.mark.parametrize("attention", ("sdpa", "eager"))
def test_a_call_on_a_cpu_takes_memory_for_its_requests(attention, monkeypatch):
    """The library takes 60 % of all that the machine has, for which processes were killed that shared it."""
    model = tiny_model(max_position_embeddings=700, attn_implementation=attention)
    many = WorkloadHints(300, 300, num_requests=10)
    for hints, pages in (many, 48), (None, None):
        assert model.init_continuous_batching(GREEDY, None, hints).continuous_batching_config.num_blocks == pages
        model.set_attn_implementation(attention)
    assert batched(model, None) == [
        model.generate(torch.tensor([prompt]), generation_config=GREEDY)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    monkeypatch.setattr(batching.psutil, "virtual_memory", lambda: SimpleNamespace(available=1e6, total=2e10))
    assert model.init_continuous_batching(GREEDY, None, many).continuous_batching_config.num_blocks is None


def test_memory_that_cuda_graphs_hold_is_not_free(monkeypatch):
    """PyTorch counts it as not allocated. The library finds 8 GB free, and raises where it should take 18."""
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70e9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8e9, 80e9))
    sizes = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 24}
    config = tiny_model().config.__class__(max_position_embeddings=2048, vocab_size=1000, **sizes)
    model = SimpleNamespace(config=config, device=torch.device("cuda", 0), dtype=torch.bfloat16)
    hints = WorkloadHints(500, 500, num_requests=128)
    assert batching.ContinuousBatchingMixin._cache_for(model, hints, 256, 0.9, None) is None


def test_the_last_requests_of_a_call_need_not_wait_for_the_first_to_end(only_paged, calls, monkeypatch):
    """Where prompts fill nearly all pages of their requests. The steps: two for prompts, a third for their rest."""
    monkeypatch.setattr(batching, "STEP_TOKENS", 768)
    model = triton_model(max_position_embeddings=256)
    prompts = [random_ids(1, 128, seed=n)[0].tolist() for n in range(12)]
    options = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=1)
    config = ContinuousBatchingConfig(**{PAGE: 4}, use_cuda_graph=False, use_async_batching=False)  # a call a step
    model.generate_batch(prompts, options, config)
    assert len(calls) == 6


@pytest.mark.parametrize("trained", (64, 16))
def test_a_manager_that_was_kept_takes_longer_requests(only_paged, trained):
    """Also longer than the trained length."""
    model = triton_model(max_position_embeddings=trained)
    for prompts in (PROMPTS[2:], [random_ids(1, 60)[0].tolist()]):
        config = ContinuousBatchingConfig(max_memory_percent=0.01, **{PAGE: 8})
        results = model.generate_batch(prompts, GREEDY, config, persistent_manager=True)
        assert [result.generated_tokens for result in results.values()] == alone(model, prompts)


@pytest.mark.parametrize("is_frozen", (False, True))
def test_collections_pass_over_older_objects_until_a_call_ends(only_paged, is_frozen):
    model, few = triton_model(), batching.FROZEN_AT_START
    if is_frozen:
        gc.freeze()
    try:
        with model.continuous_batching_context_manager(GREEDY, continuous_batching_config=small_cache()):
            assert gc.get_freeze_count() > few
        assert (gc.get_freeze_count() > few) is is_frozen
    finally:
        gc.unfreeze()


def test_garbage_of_a_loop_of_calls_is_collected(only_paged):
    """Such as tensors of one round that are still held while the next call runs."""
    model, made = triton_model(), []
    for _ in range(4):
        garbage = Exception()
        garbage.itself, garbage.tensor = garbage, torch.empty(1)
        made.append(weakref.ref(garbage.tensor))
        with model.continuous_batching_context_manager(GREEDY, continuous_batching_config=small_cache()):
            pass
    assert sum(x() is not None for x in made) == 1


def test_without_block_tables_all_steps_go_by_slots(only_paged, calls):
    model = triton_model()
    assert batched(model, small_cache(max_blocks_per_request=0)) == alone(model)
    assert set(calls) == {"paged_attention"}


@pytest.mark.parametrize("change", ("eager kernels", "eager attention", "sliding window"))
def test_other_models_take_the_path_of_the_library(calls, change):
    model = triton_model(**({"sliding_window": 8, "use_sliding_window": True} if change == "sliding window" else {}))
    if change == "eager kernels":
        model.set_kernels_implementation("eager")
    elif change == "eager attention":
        model.set_attn_implementation("eager")
    name = model.config._attn_implementation
    manager = model.init_continuous_batching(GREEDY, small_cache())
    assert model.config._attn_implementation in (name, f"paged|{name}")
    assert not calls and not manager.continuous_batching_config.max_blocks_per_request


@pytest.mark.parametrize("kind", ("linear", "dynamic"))
def test_tokens_that_depend_on_other_requests_are_told(kind, monkeypatch):
    """A row alone has another table than beside a longer one."""
    told: list[str] = []
    monkeypatch.setattr(batching.logger, "warning_once", told.append)
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    tiny_model(rope_parameters=rope).init_continuous_batching(GREEDY, small_cache())
    assert [kind in sentence for sentence in told] == [True] * (kind == "dynamic")


def test_the_model_can_be_called_while_a_manager_holds_it(only_paged):
    model, ids = triton_model(), random_ids(2, 9).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected, tokens = model(ids, attention_mask=mask).logits, alone(model)
    with model.continuous_batching_context_manager(GREEDY, continuous_batching_config=small_cache()) as manager:
        assert model.config._attn_implementation == PAGED_ATTENTION
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)
        assert alone(model) == tokens
        manager.add_request(PROMPTS[0], request_id="first")
        while (result := manager.get_result(timeout=1)) is None:
            assert manager.is_running()
        assert result.generated_tokens == tokens[0]
    assert model.config._attn_implementation == "sdpa"


def test_a_manager_that_cannot_be_made_leaves_the_model_as_it_was(monkeypatch):
    def fail(*arguments):
        raise ValueError("no manager")

    monkeypatch.setattr(ContinuousMixin, "init_continuous_batching", fail)
    model = triton_model()
    with pytest.raises(ValueError, match="no manager"):
        model.init_continuous_batching(GREEDY)
    assert model.config._attn_implementation == "sdpa"


def test_a_kept_manager_serves_the_next_call(only_paged, calls):
    model, tokens = triton_model(), alone(triton_model())
    for _ in range(2):
        calls.clear()
        results = model.generate_batch(PROMPTS[:1], GREEDY, small_cache(), persistent_manager=True)
        assert [result.generated_tokens for result in results.values()] == tokens[:1]
        assert calls and model.config._attn_implementation == "sdpa"


@pytest.mark.gpu
def test_steps_of_single_tokens_are_replayed(monkeypatch):
    """Lengths grow under a recorded step, sequences end, and rows of padding take their place."""
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    model = triton_model(num_hidden_layers=2, max_position_embeddings=512)
    manager = model.init_continuous_batching(GREEDY)
    config = manager.continuous_batching_config
    assert config.use_async_batching and config.use_cuda_graph == (False, True)
    model.set_attn_implementation("sdpa")
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (4, 19, 1, 250, 90)]
    new = (40, 9, 23, 40, 31)
    tokens = {}
    with model.continuous_batching_context_manager(GREEDY) as manager:
        for prompt, count in zip(prompts, new, strict=True):
            manager.add_request(prompt, max_new_tokens=count, eos_token_id=-1)
        while len(tokens) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is not None:
                tokens[tuple(result.prompt_ids)] = result.generated_tokens
            assert manager.is_running()
    assert len(replays) > 20
    for prompt, count in zip(prompts, new, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=1)
        assert tokens[tuple(prompt)] == out[0, len(prompt) :].tolist()
