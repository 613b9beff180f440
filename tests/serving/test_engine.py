"""The engine in this process: the ends of an answer, its sampling, and a model that fails."""

import asyncio
import json

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput, RequestState

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.serving import gate
from complexity_deep.workflow.serving.engine import Engine
from complexity_deep.workflow.serving.gate import Gate
from complexity_deep.workflow.serving.protocol import ChatRequest, TextRequest, parse
from complexity_deep.workflow.serving.refusal import Refusal
from complexity_deep.workflow.serving.sampling import GREEDY, choose, request_processors, share
from support import tiny_model

PROMPT = [20, 30, 40]


def model(**shape):
    return tiny_model(std=0.15, tie_word_embeddings=False, **shape)


def use(engine: Engine, act):
    """Run `act(engine)` while the engine is running."""

    async def run():
        await engine.start()
        try:
            return await act(engine)
        finally:
            engine.close("over")
            assert engine.stop(10)

    return asyncio.run(run())


async def answer(engine: Engine, prompt: list[int], most_tokens: int, **sampling) -> list[int]:
    return [token async for new in engine.tokens(engine.submit(prompt, most_tokens, sampling)) for token in new]


def test_an_answer_ends_with_an_end_token():
    free = model(eos_token_id=None).generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False)[0, 3:].tolist()
    end = free[-1]
    ending = model(eos_token_id=None)
    ending.generation_config.eos_token_id = [end, 256]
    tokens = use(Engine(ending, 4, 4, 1), lambda engine: answer(engine, PROMPT, 20))
    assert tokens == free[: free.index(end) + 1]


def test_an_answer_may_fill_the_context():
    small = model(eos_token_id=None, max_position_embeddings=40)
    expected = small.generate(torch.tensor([PROMPT]), max_new_tokens=37, do_sample=False)[0, 3:].tolist()
    assert use(Engine(small, 4, 4, 1), lambda engine: answer(engine, PROMPT, 37)) == expected


def test_a_full_cache_changes_no_answer(monkeypatch):
    """4 requests of 3 pages each, where the cache has 9: some are computed again, and all end as they would."""
    served = model(eos_token_id=None, max_position_embeddings=2048)
    prompts = torch.randint(20, 257, (3, 490), generator=torch.Generator().manual_seed(0))
    expected = served.generate(prompts, max_new_tokens=50, do_sample=False)[:, 490:].tolist()
    engine, seeded = Engine(served, 4, 4, 1), {"temperature": 1.0, "seed": 3}
    manager, emptied = engine.manager.batch_processor.offloading_manager, []
    offload = manager.offload_requests
    monkeypatch.setattr(manager, "offload_requests", lambda: emptied.append(offload()) or emptied[-1])

    async def act(engine):
        one = answer(engine, prompts[0].tolist(), 50, **seeded)
        together = await asyncio.gather(*(answer(engine, prompt, 50) for prompt in prompts.tolist()), one)
        return together, await answer(engine, prompts[0].tolist(), 50, **seeded)

    (*greedy, sampled), alone = use(engine, act)
    assert greedy == expected and sampled == alone and any(emptied)


def test_a_model_that_fails_is_told_and_admits_no_more():
    broken = model()
    engine = Engine(broken, 4, 4, 1)
    steps = iter(range(5))
    forward = broken.forward

    def failing(*arguments, **options):
        if next(steps, None) is None:
            raise RuntimeError("out of\nmemory")
        return forward(*arguments, **options)

    broken.forward = failing

    async def act(engine):
        with pytest.raises(Refusal, match="The model failed while it answered") as told:
            await answer(engine, PROMPT, 20)
        assert told.value.status == 503
        for _ in range(100):
            if engine.death():
                break
            await asyncio.sleep(0.05)
        assert engine.death() == "out of memory" and not engine.answers
        with pytest.raises(Refusal, match="has stopped working"):
            engine.submit(PROMPT, 5, {})

    use(engine, act)


def test_a_cache_that_no_memory_holds_is_a_sentence():
    with pytest.raises(InputError, match=r"A cache of [\d,]+ tokens for this model cannot be had"):
        Engine(model(), 4, 4, 10**13)


def test_outputs_of_cancelled_requests_are_kept_nowhere():
    async def act(engine):
        for _ in range(5):
            left = engine.submit(PROMPT, 100, {})
            await anext(engine.tokens(left))
            engine.cancel(left)
            engine.manager.output_router.deliver(GenerationOutput(left.id))  # of the step that was under way
        await answer(engine, PROMPT, 10)
        assert engine.manager.output_router.output_queue.empty() and not engine.manager.output_router.result_handlers
        assert not engine.manager.batch_processor.scheduler.active_requests

    use(Engine(model(eos_token_id=None), 4, 4, 1), act)


def test_tokens_are_drawn_with_their_probabilities():
    scores = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 2
    shares = torch.tensor([share(7, position) for position in range(50_000)])
    assert len(set(shares.tolist())) > 49_000 and shares.min() >= 0 and shares.max() < 1
    drawn = choose(scores.expand(len(shares), -1), shares).bincount(minlength=40) / len(shares)
    expected = scores[0].softmax(-1)
    assert (drawn - expected).abs().max() < 5 * (expected * (1 - expected) / len(shares)).sqrt().max()


def test_the_choice_at_the_borders():
    scores = torch.tensor([[-torch.inf, 1.0, 1.0, -torch.inf]])
    for given, token in ((0.0, 1), (0.49, 1), (0.51, 2), (1.0, 3), (GREEDY, 1)):
        assert choose(scores, torch.tensor([given])).item() == token, given
    broken = choose(torch.full((2, 4), torch.nan), torch.tensor([0.5, GREEDY]))
    assert ((broken >= 0) & (broken < 4)).all()


def test_sorts_of_all_scores_are_for_steps_that_ask_for_them():
    """Skipping them changes no score; under CUDA graphs, which would keep the choice, nothing is skipped."""
    scores = torch.randn(2, 257, generator=torch.Generator().manual_seed(0))
    plain, asking = {"temperature": 1.0, "top_k": 257, "top_p": 1.0, "seed": 1}, {"top_k": 5, "top_p": 0.5, "seed": 2}
    for options, is_asked in (({}, plain), False), ((plain, asking), True):
        kept = []
        for may_skip in (True, False):
            listed = request_processors(257, may_skip)
            states = [RequestState("id", [20], position_offset=1, logit_processor_kwargs=one) for one in options]
            batch = [FutureRequestState(state, True, {}, 1) for state in states]
            arguments = listed.prepare_tensor_args(batch, torch.zeros(listed.tensors_required, 2, dtype=torch.int32))
            with torch.profiler.profile() as profile:
                kept.append(listed(None, scores, arguments))
            counted = sum(event.count for event in profile.key_averages() if event.key == "aten::sort")
            assert (counted > 0) == (is_asked or not may_skip)
        assert torch.equal(*kept)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"temperature": 0}, {}),
        ({"temperature": 1e-30}, {}),
        ({"seed": 1}, {"temperature": 0.7, "top_k": 50, "top_p": 1.0, "seed": 1}),
        (
            {"seed": 1, "temperature": 2, "top_k": 0, "top_p": 0},
            {"temperature": 2.0, "top_k": 257, "top_p": 0.0, "seed": 1},
        ),
        ({"seed": -1, "top_k": 10**18}, {"temperature": 0.7, "top_k": 257, "top_p": 1.0, "seed": -1}),
    ],
)
def test_sampling_of_a_request(body, expected):
    """What it leaves out comes from the model's generation_config.json."""
    request = parse(TextRequest, json.dumps({"model": "m", "prompt": "w", **body}).encode())
    assert request.sampling(GenerationConfig(temperature=0.7, top_k=50), 257) == expected


def test_a_chat_without_a_seed_is_drawn_anew():
    request = parse(ChatRequest, b'{"model": "m", "messages": [{"role": "developer", "content": "w"}]}')
    first, second = (request.sampling(GenerationConfig(), 257) for _ in range(2))
    assert first["temperature"] == 1.0 and first["seed"] != second["seed"]
    assert request.messages[0].for_template() == {"role": "system", "content": "w"}


def part(**content) -> dict:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "w"}, content]}]}


@pytest.mark.parametrize(
    ("wrong", "field", "sentence"),
    [
        ({"n": 2}, "n", "What the field 'n' asks for is not served here: leave it out."),
        ({"tools": [{"type": "function"}]}, "tools", "is not served here"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "is not served here"),
        (
            {"messages": [{"role": "assistant", "content": "w", "tool_calls": [{"id": "1"}]}]},
            "messages.0.tool_calls",
            "is not served here",
        ),
        (part(type="image_url", image_url={"url": "w"}), "messages.0.content.1.type", ": input should be 'text'."),
        (part(type="text"), "messages.0.content.1.text", "The field 'messages.0.content.1.text' is missing."),
        ({"messages": [{"role": "tool", "content": "w", "tool_call_id": "1"}]}, "messages.0.role", "'assistant'."),
        ({"stop": ["w", 1]}, "stop.1", "The value of 'stop.1' cannot be used: input should be a valid string."),
        ({"stop": 1}, "stop", ": input should be a valid string, or input should be a valid array."),
        ({"list[str]": 1}, "list[str]", "The field 'list[str]' is not known here: leave it out."),
    ],
)
def test_a_refusal_says_where_and_what(wrong, field, sentence):
    """Of a value that may have several types, it speaks of the one that was meant."""
    body = {"model": "m", "messages": [{"role": "user", "content": "w"}], **wrong}
    with pytest.raises(Refusal) as refused:
        parse(ChatRequest, json.dumps(body).encode())
    assert refused.value.field == field and sentence in refused.value.sentence


@pytest.mark.parametrize("given", ["Bearer {}", "bearer {}", "BEARER  {}", "Bearer {}x", "Basic {}", ""])
def test_a_key_comes_in_any_case_of_its_scheme(given):
    refused, reached = [], []

    async def app(scope, receive, send):
        reached.append(scope)

    async def taken(message):
        pass

    headers = [(b"authorization", given.format("Key").encode())]
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": headers}
    asyncio.run(Gate(app, refused.append, b"Key", None)(scope, taken, taken))
    assert bool(reached) == (given.lower().split() == ["bearer", "{}"]) and len(refused) == 1 - len(reached)


def test_a_body_that_does_not_come_and_a_client_that_takes_nothing_are_given_up(monkeypatch):
    monkeypatch.setattr(gate, "SECONDS_OF_BODY", 0.05)
    monkeypatch.setattr(gate, "SECONDS_OF_SEND", 0.05)
    refused, sent = [], []

    async def app(scope, receive, send):
        for _ in range(3):
            await send({"type": "http.response.body", "body": b"", "more_body": True})

    async def never(*_):
        await asyncio.sleep(60)

    async def taken(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"localhost:1")]}
    stuck = Gate(app, refused.append, None, {"localhost"})
    asyncio.run(asyncio.wait_for(stuck(scope, never, taken), 5))
    assert refused == [408] and sent[0]["status"] == 408
    asyncio.run(asyncio.wait_for(stuck({**scope, "method": "GET"}, never, never), 5))
