"""Every way of generating gives the tokens of the plain uncached forward (greedy, fp32)."""

import pytest
import torch
from transformers import (
    AutoTokenizer,
    ContinuousBatchingConfig,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import GenerationConfig
from transformers.utils import is_optimum_quanto_available

from support import random_ids, tiny_model

NEW = 12


@pytest.fixture(scope="module")
def model():
    # Half the usual scale: greedy choices stay apart, so that equal tokens mean equal logits.
    model = tiny_model(std=0.15)
    model.generation_config.eos_token_id = None
    return model


def greedy(model, ids, steps=NEW, **kwargs):
    """The oracle: argmax of the full forward, without a cache."""
    routing_ids = kwargs.pop("routing_ids", None)
    for _ in range(steps):
        if routing_ids is not None:
            routing_ids = torch.cat((routing_ids, ids[:, routing_ids.shape[1] :]), dim=1)
        logits = model(ids, use_cache=False, routing_ids=routing_ids, **kwargs).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    return ids


def generate(model, ids, **kwargs):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **kwargs)


WAYS = {
    "dynamic cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "chunked prefill": {"prefill_chunk_size": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 1},
    "one beam returned of one": {"num_beams": 1, "num_return_sequences": 1},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_greedy_generation_equals_the_uncached_forward(model, options):
    ids = random_ids(1, 7)
    assert torch.equal(generate(model, ids, **options), greedy(model, ids))
    assert len(model.model.layers) == model.config.num_hidden_layers == 3  # early exit puts the depth back


@pytest.mark.skipif(not is_optimum_quanto_available(), reason="optimum-quanto is not installed")
def test_quantized_cache(model):
    ids = random_ids(1, 8)  # quanto takes groups of 64 numbers, and no remainder
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}}
    assert generate(model, ids, **options).shape == (1, 8 + NEW)


def test_sliding_window_generation():
    model = tiny_model(std=0.15, sliding_window=4)
    model.generation_config.eos_token_id = None
    ids = random_ids(1, 7)
    for options in ({}, WAYS["static cache"], WAYS["chunked prefill"]):
        assert torch.equal(generate(model, ids, **options), greedy(model, ids))


def test_static_cache_with_compile(model):
    ids = random_ids(1, 7)
    compiled = generate(model, ids, cache_implementation="static", compile_config=None, disable_compile=False)
    assert torch.equal(compiled, greedy(model, ids))
    # generate() compiles on accelerators only, so the compiled decode step is also tried by itself
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=32)
    step = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        logits = model(ids, cache=cache).logits
        for position in range(7, 11):
            token = logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, token), dim=1)
            logits = step(token, cache=cache, position_ids=torch.tensor([[position]])).logits
        torch.testing.assert_close(logits[:, -1], model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_beam_search_scores_are_those_of_the_uncached_forward(model):
    ids = random_ids(2, 6)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        num_beams=3,
        num_return_sequences=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    log_probabilities = model(out.sequences, use_cache=False).logits.log_softmax(-1)[:, 5:-1]
    chosen = log_probabilities.gather(-1, out.sequences[:, 6:, None]).squeeze(-1).sum(-1) / 5
    torch.testing.assert_close(out.sequences_scores, chosen, rtol=1e-4, atol=1e-4)


def test_sampling_is_reproducible_and_differs_between_seeds(model):
    ids = random_ids(1, 6)

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=True, temperature=2.0, top_k=0
        )

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))


def test_left_padded_batch_equals_each_prompt_alone(model):
    prompts = [random_ids(1, n, seed=n) for n in (4, 9)]
    batch, mask = torch.ones(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        batch[row, 9 - prompt.shape[1] :] = prompt
        mask[row, 9 - prompt.shape[1] :] = 1
    for options in ({}, WAYS["static cache"]):
        out = model.generate(batch, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)
        for row, prompt in enumerate(prompts):
            assert torch.equal(out[row : row + 1, 9:], greedy(model, prompt)[:, prompt.shape[1] :])


def test_assisted_decoding_with_a_smaller_draft_model(model):
    draft = tiny_model(std=0.15, seed=1, num_hidden_layers=1)
    draft.generation_config.eos_token_id = None
    ids = random_ids(1, 7)
    assert torch.equal(generate(model, ids, assistant_model=draft), greedy(model, ids))


def test_continuous_batching(model):
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (4, 9, 6)]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=1)
    cache = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=16)  # else it takes what memory there is
    results = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=cache)
    tokens = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
    assert len(tokens) == 3
    for prompt in prompts:
        assert tokens[tuple(prompt)] == greedy(model, torch.tensor([prompt]))[0, len(prompt) :].tolist()


@pytest.mark.parametrize("way", ("dynamic cache", "static cache", "chunked prefill"))
def test_generation_from_embeddings_equals_generation_from_ids(model, way):
    ids = random_ids(2, 7)
    embeds, mask, options = model.get_input_embeddings()(ids), torch.ones_like(ids), WAYS[way]
    kwargs = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False} | options
    expected = greedy(model, ids)[:, 7:]
    if way != "chunked prefill":  # the library chunks ids only
        assert torch.equal(model.generate(inputs_embeds=embeds, **kwargs), expected)
        assert torch.equal(model.generate(inputs_embeds=embeds, routing_ids=ids, **kwargs), expected)
    other = random_ids(2, 7, seed=9)
    routed = model.generate(ids, routing_ids=other, **kwargs)
    assert torch.equal(routed, greedy(model, ids, routing_ids=other))
    assert not torch.equal(routed[:, 7:], expected)


def test_streaming_prints_the_generated_text(model, tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{i}": i for i in range(257)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = random_ids(1, 7)
    expected = tokenizer.decode(greedy(model, ids)[0, 7:])
    generate(model, ids, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == expected
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    generate(model, ids, streamer=streamer)
    assert "".join(streamer).strip() == expected
