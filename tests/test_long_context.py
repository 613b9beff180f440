"""Long contexts: scaled positions as the library scales them, decoding beyond the trained length and past a window."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from complexity_deep import ComplexityDeepForCausalLM
from complexity_deep.compatibility_complexity_deep import CACHE_NAME
from complexity_deep.modeling_complexity_deep import ComplexityDeepRotaryEmbedding
from support import random_ids, relative_rms, tiny_config, tiny_model, triton_model

TRAINED = 16  # positions
HALF = 8  # pairs of coordinates in a head of the tiny model
THETA = 50_000.0  # not the library's default, so that a forgotten one shows
ROPE = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "yarn with its options": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": TRAINED,
        "attention_factor": 1.3,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "short_factor": [1.0 + 0.1 * pair for pair in range(HALF)],
        "long_factor": [1.5 + pair for pair in range(HALF)],
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "proportional": {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5},
}
BY_LENGTH = ("dynamic", "longrope")  # their tables depend on the largest position
PAGE = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # since Transformers 5.18


def rope_options(name: str) -> dict:
    return {"rope_parameters": ROPE[name] | {"rope_theta": THETA}, "max_position_embeddings": TRAINED}


def llama_rotary(config) -> LlamaRotaryEmbedding:
    """The library's tables for the shape and RoPE parameters of `config`."""
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    shape = {name: getattr(config, name) for name in names}
    return LlamaRotaryEmbedding(LlamaConfig(**shape, rope_parameters=dict(config.rope_parameters)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", ROPE)
def test_tables_are_those_of_llama(name, dtype):
    """Bit by bit, while a sequence grows beyond the trained length, and when a short one follows."""
    config = tiny_config(**rope_options(name))
    ours, theirs = ComplexityDeepRotaryEmbedding(config), llama_rotary(config)
    assert ours.attention_scaling == theirs.attention_scaling
    x, tables = torch.zeros(1, dtype=dtype), []
    spans = ((0, 5), (5, TRAINED), (TRAINED - 1, TRAINED + 1), (0, 40), (40, 41), (3, 90), (0, TRAINED - 1), (0, 24))
    for start, end in spans:
        positions = torch.arange(start, end).expand(2, -1)
        found, expected = ours(x, position_ids=positions), theirs(x, positions)
        assert all(torch.equal(*pair) and pair[0].dtype == dtype for pair in zip(found, expected)), (start, end)
        tables.append(found[0])
    first = [table[0, 3] for table, (start, _) in zip(tables, spans) if start == 0]  # position 3 each time
    assert (name in BY_LENGTH) == any(not torch.equal(first[0], table) for table in first[1:])


def test_a_cast_keeps_dynamic_frequencies_growing():
    """`.to(dtype)` builds the frequencies anew, and the next long sequence has to scale them again."""
    config = tiny_config(**rope_options("dynamic"))
    rotary, x, positions = ComplexityDeepRotaryEmbedding(config), torch.zeros(1), torch.arange(40)[None]
    expected = rotary(x, position_ids=positions)
    rotary.to(torch.bfloat16)
    assert all(torch.equal(*pair) for pair in zip(rotary(x, position_ids=positions), expected))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    model = tiny_model(std=0.15, **rope_options("default"))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ROPE)
def test_a_scaling_given_at_load_keeps_the_base(trained, tmp_path, name):
    """As an argument of `from_pretrained`, through the Auto classes too, and again from what that model saves."""
    model = AutoModelForCausalLM.from_pretrained(trained, rope_parameters=dict(ROPE[name]))
    built = tiny_config(**rope_options(name))
    assert model.config.rope_parameters == built.rope_parameters
    ids, expected = random_ids(1, 3 * TRAINED), tiny_model(std=0.15, **rope_options(name))
    expected.load_state_dict(model.state_dict())
    assert torch.equal(model(ids).logits, expected(ids).logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("load", (ComplexityDeepForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained))
def test_a_published_checkpoint_is_scaled_at_load(published_folder, load):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    model = load(published_folder, rope_parameters=yarn, max_position_embeddings=128)
    assert model.config.rope_parameters == yarn | {"rope_theta": 10_000.0}
    assert model.config.max_position_embeddings == 128
    calls = recorded_tables(model)
    model(random_ids(1, 100, vocab_size=model.config.vocab_size))
    assert_tables_are_those_of_llama(model, calls)
    assert load(published_folder, rope_theta=500.0).config.rope_parameters["rope_theta"] == 500.0


def test_what_training_decided_is_kept(trained, tmp_path):
    """The length before a scaling too, when a model that is scaled already, and says it is longer, is scaled anew."""
    longer = {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings": 2 * TRAINED}
    AutoConfig.from_pretrained(trained, **longer).save_pretrained(tmp_path)
    given = {"rope_type": "yarn", "factor": 4.0}
    config = AutoConfig.from_pretrained(tmp_path, rope_parameters=given)
    assert config.max_position_embeddings == 2 * TRAINED and given == {"rope_type": "yarn", "factor": 4.0}
    assert config.rope_parameters == given | {"original_max_position_embeddings": TRAINED, "rope_theta": THETA}
    assert AutoConfig.from_pretrained(trained, rope_scaling={"type": "linear", "factor": 2.0}).rope_parameters == {
        "type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": THETA
    }  # fmt: skip
    assert AutoConfig.from_pretrained(tmp_path, rope_theta=1e6).rope_parameters == config.rope_parameters | {
        "factor": 2.0, "rope_theta": 1e6
    }  # fmt: skip


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    (
        ({"rope_type": "yarm", "factor": 4.0}, "rope_type must be one of default, linear.*but is 'yarm'"),
        ({"rope_type": "yarn"}, "Missing required keys .*'factor'"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        (
            {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 3, "long_factor": [2.0] * 8},
            "short_factor must hold 8 numbers, one for each frequency of a head, but holds 3",
        ),
    ),
)
def test_parameters_that_make_no_tables_are_refused(trained, parameters, sentence):
    with pytest.raises((ValueError, KeyError), match=sentence):
        AutoConfig.from_pretrained(trained, rope_parameters=parameters)


WAYS = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "chunked prefill": {"prefill_chunk_size": 3},
    "no cache": {"use_cache": False},
}


def recorded_tables(model) -> list[tuple]:
    """Grows by positions, cos and sin at every forward pass."""
    calls = []
    model.model.rotary_emb.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((kwargs["position_ids"].clone(), *out)), with_kwargs=True
    )
    return calls


def assert_tables_are_those_of_llama(model, calls: list[tuple]) -> None:
    """Llama's module, asked for the same positions in the same order, gives what the model took."""
    theirs = llama_rotary(model.config)
    for positions, *found in calls:
        assert all(torch.equal(*pair) for pair in zip(found, theirs(found[0], positions)))


@pytest.mark.parametrize("name", ROPE)
@pytest.mark.parametrize("prompt", (5, 2 * TRAINED))
def test_generation_beyond_the_trained_length(trained, name, prompt):
    """Every way takes Llama's tables at every step; all give the tokens of the growing cache."""
    model = AutoModelForCausalLM.from_pretrained(trained, rope_parameters=dict(ROPE[name]))
    ids, tokens = random_ids(2, prompt), {}
    for way, options in WAYS.items():
        model.model.rotary_emb = ComplexityDeepRotaryEmbedding(model.config)  # as if nothing had been long before
        calls = recorded_tables(model)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False, **options}
        tokens[way] = model.generate(ids, pad_token_id=1, **options)
        assert tokens[way].shape == (2, prompt + 20)
        assert max(int(positions.max()) for positions, *_ in calls) == prompt + 18 > TRAINED
        assert_tables_are_those_of_llama(model, calls)
    assert torch.equal(tokens["dynamic cache"], tokens["static cache"])
    if name not in BY_LENGTH:  # for these, keys in a cache keep the rotation of the step that wrote them
        assert torch.equal(tokens["dynamic cache"], tokens["chunked prefill"])
        assert torch.equal(tokens["dynamic cache"], tokens["no cache"])


@pytest.mark.parametrize("name", ("yarn", "dynamic", "longrope"))
def test_continuous_batching_beyond_the_trained_length(trained, name):
    model = AutoModelForCausalLM.from_pretrained(trained, rope_parameters=dict(ROPE[name]))
    calls, greedy = recorded_tables(model), GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=-1)
    prompt = random_ids(1, 5)
    config = ContinuousBatchingConfig(**{"num_blocks": 16, "max_batch_tokens": 32, PAGE: 8})
    (result,) = model.generate_batch([prompt[0].tolist()], greedy, config).values()
    assert max(int(positions.max()) for positions, *_ in calls) > TRAINED
    assert_tables_are_those_of_llama(model, calls)
    alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert result.generated_tokens == alone[0, 5:].tolist()


def test_kernels_take_the_attention_scaling():
    """yarn makes the tables longer than 1: forward, gradients and decode steps with both caches."""
    pytest.importorskip("triton")
    options = {**rope_options("yarn"), "num_hidden_layers": 2}
    model, ids = triton_model(**options), random_ids(1, TRAINED + 3)
    assert model.model.rotary_emb.attention_scaling > 1.1
    truth, unscaled = (copy.deepcopy(model).cpu() for _ in range(2))
    for plain in (truth, unscaled):
        plain.set_kernels_implementation("eager")
        plain.set_experts_implementation("eager")
    truth.double()
    truth(ids, labels=ids).loss.backward()
    with torch.no_grad():
        expected = truth(ids).logits
        unscaled.model.rotary_emb.attention_scaling = 1.0
        assert relative_rms(unscaled(ids).logits, expected) > 1e-3
    device = model.device
    model(ids.to(device), labels=ids.to(device)).loss.backward()
    for (name, parameter), reference in zip(model.named_parameters(), truth.parameters(), strict=True):
        assert relative_rms(parameter.grad.cpu(), reference.grad) < 1e-4, name
    caches = (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=2 * TRAINED))
    with torch.no_grad():
        for cache in caches:
            for start, end in ((0, TRAINED - 1), *((at, at + 1) for at in range(TRAINED - 1, TRAINED + 3))):
                logits = model(ids[:, start:end].to(device), **{CACHE_NAME: cache}).logits
                assert relative_rms(logits.cpu(), expected[:, start:end]) < 1e-5, start


WINDOW = 6


@pytest.mark.parametrize("way", ("dynamic cache", "static cache", "chunked prefill"))
@pytest.mark.parametrize("prompt", (3, 5 * WINDOW))
def test_a_window_decodes_with_constant_memory(way, prompt):
    """Tokens of the full forward under the window's mask, and a cache that never holds more than the window."""
    model = tiny_model(std=0.15, sliding_window=WINDOW, max_position_embeddings=TRAINED)
    model.generation_config.eos_token_id = None
    ids, sizes = random_ids(2, prompt), []

    def measure(module, args, kwargs, outputs):
        sizes.append(
            {tensor.shape[-2] for layer in outputs[CACHE_NAME].layers for tensor in (layer.keys, layer.values)}
        )

    handle = model.register_forward_hook(measure, with_kwargs=True)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4 * WINDOW, "do_sample": False}
    tokens = model.generate(ids, **options, **WAYS[way])
    handle.remove()
    assert len(sizes) >= 4 * WINDOW and max(map(max, sizes)) <= WINDOW, sizes
    assert sizes[-3 * WINDOW :] == [sizes[-1]] * 3 * WINDOW  # once past the window it stays what it is

    positions = torch.arange(tokens.shape[1])
    distance = positions[:, None] - positions
    seen = (distance >= 0) & (distance < WINDOW)
    full = tiny_model(std=0.15, max_position_embeddings=TRAINED)  # without a window of its own
    logits = full(tokens, attention_mask=seen.expand(2, 1, -1, -1), use_cache=False).logits
    assert torch.equal(logits[:, prompt - 1 : -1].argmax(-1), tokens[:, prompt:])
