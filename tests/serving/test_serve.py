"""scripts/serve.py over loopback: by OpenAI's client, and by bare HTTP where it would not send what is tested."""

import asyncio
import http.client
import json
import random
import signal
import socket
import time
from types import SimpleNamespace

import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from served import CONTEXT, Served, save_tiny

KEY = "a key of words"
MESSAGES = [{"role": "user", "content": "w9"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("serve") / "words")


@pytest.fixture(scope="module")
def offline(folder):
    """What `generate` makes of the same model."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def greedy(prompt: list[int], most_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        output = model.generate(ids, max_new_tokens=most_tokens, do_sample=False, attention_mask=torch.ones_like(ids))
        return output[0, len(prompt) :].tolist()

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    return SimpleNamespace(model=model, tokenizer=tokenizer, greedy=greedy, text=text)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    server = Served(folder, tmp_path_factory.mktemp("log") / "log")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def small_server(folder, tmp_path_factory):
    """Room for 4 requests at once and 1 that waits. It asks for a key."""
    place = tmp_path_factory.mktemp("small")
    (place / "key").write_text(f"{KEY}\n")
    options = ("--max-running", "4", "--max-waiting", "1", "--api-key-file", place / "key")
    server = Served(folder, place / "log", *map(str, options))
    yield server
    server.stop()


def client(server: Served, kind=OpenAI, key: str = "none"):
    return kind(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)


def prompt_ids(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(20, 100), k=length)


def words(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def post(server: Served, path: str, body: bytes, **headers: str) -> tuple[int, dict]:
    """Status and JSON of the answer to a body that no client would send."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def health(server: Served) -> dict:
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request("GET", "/health")
    content = json.loads(connection.getresponse().read())
    connection.close()
    return content


def becomes_idle(server: Served, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while health(server) != {"status": "ok", "running": 0, "waiting": 0}:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def is_sentence(refusal: dict) -> bool:
    """Whether a refusal has OpenAI's form, and its message is one line that begins and ends as a sentence does."""
    assert set(refusal) == {"error"} and set(refusal["error"]) == {"message", "type", "param", "code"}
    message = refusal["error"]["message"]
    return "\n" not in message and message[0].isupper() and message[-1] == "." and "Traceback" not in message


def test_64_streams_at_once_equal_generate(server, offline):
    """Half greedy, with prompts of 3 to 300 tokens; the others sample, two by two with the same seed and prompt."""

    async def stream(api: AsyncOpenAI, prompt: list[int], **options) -> tuple[str, object]:
        pieces, usage = [], None
        options |= {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 24}
        async for chunk in await api.completions.create(model="words", prompt=prompt, **options):
            pieces += [choice.text for choice in chunk.choices]
            usage = chunk.usage or usage
        return "".join(pieces), usage

    async def all_at_once():
        async with client(server, AsyncOpenAI) as api:
            greedy = [stream(api, prompt, temperature=0) for prompt in prompts]
            sampled = [stream(api, prompts[i // 2], temperature=1.5, top_p=0.95, seed=i // 2) for i in range(32)]
            mixed = [one for pair in zip(greedy, sampled) for one in pair]
            return await asyncio.gather(*mixed)

    prompts = [prompt_ids(i, 300 if i % 10 == 9 else 3 + i) for i in range(32)]
    answers = asyncio.run(all_at_once())
    for prompt, (text, usage) in zip(prompts, answers[::2]):
        expected = offline.greedy(prompt, 24)
        assert text == offline.text(expected)
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(expected))
        assert usage.total_tokens == len(prompt) + len(expected)
    sampled = [text for text, _ in answers[1::2]]
    assert sampled[::2] == sampled[1::2] and len(set(sampled)) == 16
    alone = client(server).completions.create(
        model="words", prompt=prompts[3], max_tokens=24, temperature=1.5, top_p=0.95, seed=3
    )
    assert alone.choices[0].text == sampled[6]


def test_chat_whole_and_streamed(server, offline):
    api = client(server)
    messages = [
        {"role": "system", "content": "w20"},
        {"role": "user", "content": [{"type": "text", "text": "w40 w41"}]},
    ]
    prompt = [4, 20, 5, 4, 40, 41, 5, 6]
    expected = offline.greedy(prompt, 20)
    options = {"model": "words", "messages": messages, "temperature": 0, "max_completion_tokens": 20}
    whole = api.chat.completions.create(**options, n=1, presence_penalty=0, user="somebody", logit_bias={}, tools=[])
    assert whole.choices[0].message.content == offline.text(expected)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.prompt_tokens == len(prompt) and whole.usage.completion_tokens == len(expected)
    chunks = list(api.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == offline.text(expected)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    stream_options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(api.chat.completions.create(**options, stream=True, stream_options=stream_options))
    written, told = "", []
    for chunk in chunks[1:-2]:
        written += chunk.choices[0].delta.content
        told.append(chunk.usage.completion_tokens)
        assert written == offline.text(expected[: told[-1]])
    assert told == sorted(set(told)) and told[-1] == len(expected) and chunks[-1].usage == whole.usage


def test_an_answer_can_be_sent_back_with_all_of_its_fields(server):
    """As OpenAI's client writes one out: what a message does not have is null."""
    api = client(server)
    message = api.chat.completions.create(model="words", messages=MESSAGES, max_tokens=3).choices[0].message
    assert {"refusal", "annotations", "audio", "function_call", "tool_calls"} <= message.model_dump().keys()
    for answer in message, message.model_dump():
        api.chat.completions.create(model="words", messages=[*MESSAGES, answer, *MESSAGES], max_tokens=3)


def test_an_answer_ends_at_the_first_stop_string(server, offline):
    """Also where the string is spread over tokens, or only begins; what was held back is not lost."""
    api, prompt = client(server), prompt_ids(5, 7)
    tokens = offline.greedy(prompt, 24)
    text = offline.text(tokens)
    first, second = text.split(" ")[7:9]
    for stop, end in (
        (f"{first} {second}", f"{first} {second}"),
        (["nothing", f" {second}", first], min(first, f" {second}", key=text.find)),
        (f"{text.split(' ')[-1]} and", None),
        (text[0], text[0]),
    ):
        options = {"model": "words", "prompt": prompt, "max_tokens": 24, "temperature": 0, "stop": stop}
        whole = api.completions.create(**options)
        expected = text if end is None else text[: text.index(end)]
        assert whole.choices[0].text == expected
        assert whole.choices[0].finish_reason == ("length" if end is None else "stop")
        assert whole.usage.completion_tokens <= 24 and (end is None or whole.usage.completion_tokens < 24)
        streamed = api.completions.create(**options, stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == expected


def test_experts_are_those_that_the_model_takes(server, offline):
    """They come only with a request that asks for them, and mu overrides the table for some tokens."""
    api, prompt = client(server), prompt_ids(8, 5)
    options = {"model": "words", "prompt": prompt, "max_tokens": 16, "temperature": 0}
    assert "experts" not in api.completions.create(**options).model_extra
    tokens = offline.greedy(prompt, 16)
    with torch.no_grad():
        output = offline.model(torch.tensor([prompt + tokens]), output_expert_ids=True)
    expected = torch.stack(output.expert_ids, -1)[0, len(prompt) :].tolist()
    whole = api.completions.create(**options, extra_body={"experts": True})
    assert [token["experts"] for token in whole.experts] == expected
    assert "".join(token["text"] for token in whole.experts) == whole.choices[0].text
    *_, last = api.completions.create(**options, stream=True, extra_body={"experts": True})
    assert last.choices[0].finish_reason and last.experts == whole.experts
    table = offline.model.model.routing_table(torch.tensor([tokens]))[0].tolist()
    assert any(row != [expert] * len(row) for row, expert in zip(expected, table))


def test_models_and_their_names(server):
    api = client(server)
    (model,) = api.models.list().data
    assert model.id == "words" and api.models.retrieve("words").max_model_len == CONTEXT
    for ask in (
        lambda: api.models.retrieve("gpt-4"),
        lambda: api.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "w9"}]),
    ):
        with pytest.raises(openai.NotFoundError, match="the one that is served is 'words'") as refused:
            ask()
        assert refused.value.code == "model_not_found"


WRONG_CHATS = [
    {"temperature": 1e9},
    {"temperature": -1},
    {"temperature": "warm"},
    {"temperature": True},
    {"top_p": 1.01},
    {"top_p": -0.5},
    {"top_k": -2},
    {"top_k": 10**30},
    {"top_k": 2.5},
    {"seed": 2**63},
    {"seed": "one"},
    {"max_tokens": 0},
    {"max_tokens": -5},
    {"max_tokens": 10**9},
    {"max_completion_tokens": CONTEXT},
    {"n": 2},
    {"n": 10**6},
    {"stop": ""},
    {"stop": [1]},
    {"stop": ["w9"] * 100},
    {"stream": "yes"},
    {"stream_options": []},
    {"presence_penalty": 1},
    {"logit_bias": {"5": 100}},
    {"logprobs": True},
    {"response_format": {"type": "json_object"}},
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"no_such_field": 1},
    {"model": 5},
    {"messages": []},
    {"messages": "w9"},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "robot", "content": "w9"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
    {"messages": [{"role": "assistant", "content": "w9"}]},
    {"messages": [{"role": "user", "content": "w9 " * CONTEXT}]},
]
WRONG_TEXTS = [
    {"prompt": ""},
    {"prompt": []},
    {"prompt": [257]},
    {"prompt": [-1]},
    {"prompt": [1.5]},
    {"prompt": [10**30]},
    {"prompt": ["w9", "w10"]},
    {"prompt": None},
    {"prompt": [9] * CONTEXT},
    {"prompt": [9] * (CONTEXT - 15)},
    {"prompt": "w9", "logprobs": 0},
    {"prompt": "w9", "echo": True},
    {"prompt": "w9", "best_of": 3},
    {},
]
WRONG_BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"words"',
    b"\xff\xfe",
    b"[" * 50_000,
    b'{"model": NaN}',
    b'{"a": "\\ud800"}',
]


def test_wrong_requests_get_a_sentence_and_harm_nobody(server, offline):
    """Each is refused with 400 while another request is being answered, whose text stays what it would be."""
    prompt = prompt_ids(2, 9)
    stream = client(server).completions.create(model="words", prompt=prompt, max_tokens=300, temperature=0, stream=True)
    pieces = [next(stream).choices[0].text]
    chats = [json.dumps({"model": "words", "messages": MESSAGES, **wrong}).encode() for wrong in WRONG_CHATS]
    texts = [json.dumps({"model": "words", **wrong}).encode() for wrong in WRONG_TEXTS]
    paths = {"/v1/chat/completions": chats + WRONG_BODIES, "/v1/completions": texts + WRONG_BODIES}
    for path, bodies in paths.items():
        for body in bodies:
            status, refusal = post(server, path, body)
            assert status == 400 and is_sentence(refusal), (body[:200], status, refusal)
    assert (
        post(server, "/v1/chat/completions", json.dumps({"model": "words"}).encode())[1]["error"]["param"] == "messages"
    )
    pieces += [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == offline.text(offline.greedy(prompt, 300))
    assert becomes_idle(server)


def test_huge_bodies_and_other_requests_that_are_not_read(server):
    status, refusal = post(server, "/v1/completions", b" " * 10_000_000)
    assert status == 413 and is_sentence(refusal) and "10,000,000" in refusal["error"]["message"]
    body = json.dumps({"model": "words", "prompt": "w9"}).encode()
    for headers, expected in ({"Content-Type": "text/plain"}, 415), ({"Host": "attacker.example"}, 403):
        status, refusal = post(server, "/v1/completions", body, **headers)
        assert status == expected and is_sentence(refusal)
    for path, expected in ("/v1/embeddings", 404), ("/v1/models", 405):
        status, refusal = post(server, path, body)
        assert status == expected and is_sentence(refusal)
    assert post(server, "/v1/completions", body)[0] == 200


def test_clients_that_leave_free_their_place(server, offline):
    """10 leave a stream in its middle and 10 a whole answer; the log counts them, and the next answer is right."""
    api, running = client(server), []
    for seed in range(10):
        stream = api.completions.create(
            model="words", prompt=prompt_ids(seed, 4), max_tokens=1800, stream=True, seed=seed
        )
        next(stream)
        running.append(stream)
    for stream in running:
        stream.close()
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"model": "words", "prompt": prompt_ids(1, 4), "max_tokens": 1800}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    for _ in range(10):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.02)
    assert becomes_idle(server)
    prompt = prompt_ids(3, 6)
    answer = api.completions.create(model="words", prompt=prompt, max_tokens=12, temperature=0)
    assert answer.choices[0].text == offline.text(offline.greedy(prompt, 12))
    deadline = time.monotonic() + 60
    while " 20 cancelled" not in server.log and time.monotonic() < deadline:
        time.sleep(0.1)
    assert " 20 cancelled" in server.log


def test_a_reader_that_reads_nothing_holds_up_nobody(server, offline):
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"model": "words", "prompt": "w9", "max_tokens": 1500, "stream": True, "seed": 4}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with slow:
        slow.connect((host, int(port)))
        slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        prompt = prompt_ids(4, 6)
        answer = client(server).completions.create(model="words", prompt=prompt, max_tokens=60, temperature=0)
        assert answer.choices[0].text == offline.text(offline.greedy(prompt, 60))
    assert becomes_idle(server)


def test_the_log_is_for_an_operator(server):
    """At most a line a second, without words of a request or of an answer, and nothing went wrong so far."""
    lines = server.log.splitlines()
    seconds = [line.split(" INFO ")[0] for line in lines if "tokens/s" in line]
    assert len(seconds) == len(set(seconds)) > 0
    assert all(" INFO " in line for line in lines), lines
    assert "answered" in lines[-1] and "400: " in lines[-1]


# The small server


def test_a_key_is_asked_for(small_server):
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        client(small_server, key="another").models.list()
    assert client(small_server, key=KEY).models.list().data[0].id == "words"
    assert health(small_server)["status"] == "ok"


def test_too_many_requests_are_refused_and_sigterm_tells_the_others(small_server):
    """The sixth gets 429. SIGTERM ends the process within seconds, and each of the five is told in a sentence."""

    async def five_and_one():
        async with client(small_server, AsyncOpenAI, KEY) as api:
            options = {"model": "words", "prompt": "w9", "max_tokens": 2000}
            streams = [await api.completions.create(**options, seed=seed, stream=True) for seed in range(4)]
            for stream in streams:
                await anext(stream)
            whole = asyncio.ensure_future(api.completions.create(**options))
            while health(small_server)["waiting"] != 1:
                assert health(small_server)["running"] == 4
                await asyncio.sleep(0.01)
            with pytest.raises(openai.RateLimitError, match="4 requests running and 1 waiting") as full:
                await api.completions.create(**options)
            small_server.process.terminate()
            started = time.monotonic()
            told = []
            for stream in streams:
                with pytest.raises(openai.APIError, match="The server is shutting down") as error:
                    [_ async for _ in stream]
                told.append(error.value)
            with pytest.raises(openai.InternalServerError, match="The server is shutting down") as error:
                await whole
            assert error.value.status_code == 503
            await asyncio.to_thread(small_server.process.join, 60)
            return full.value, time.monotonic() - started

    full, seconds = asyncio.run(five_and_one())
    assert is_sentence({"error": full.body}) and full.response.headers["retry-after"] == "1"
    assert small_server.process.exitcode == -signal.SIGTERM and seconds < 20  # 1 on an idle machine
    assert "Shutting down. Unfinished requests, which are told: 5." in small_server.log
    assert small_server.log.splitlines()[-1].endswith("Ended.")
