"""The process around the endpoints: where it listens, its key, and its end when the model fails."""

import asyncio
import contextlib
import http.client
import json
import logging
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from starlette.testclient import TestClient
from transformers import AddedToken, GenerationConfig

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.tokenizer_training import train_bpe
from complexity_deep.workflow.serving import server
from complexity_deep.workflow.serving.answer_text import AnswerText
from complexity_deep.workflow.serving.app import Service, build_app
from complexity_deep.workflow.serving.engine import Answer, Engine
from complexity_deep.workflow.serving.server import listen, load_line, read_key, serve
from support import tiny_model, tiny_tokenizer


def broken_service(steps: int) -> Service:
    """A model that fails after so many steps."""
    broken, left = tiny_model(eos_token_id=None), iter(range(steps))
    forward = broken.forward

    def fail(*arguments, **options):
        if next(left, None) is None:
            raise RuntimeError("no memory")
        return forward(*arguments, **options)

    engine = Engine(broken, 4, 4, 1)
    broken.forward = fail
    return Service("broken", engine, tiny_tokenizer(), broken.generation_config)


def test_a_server_whose_model_fails_ends(caplog):
    """The request is told, and the process ends with a sentence. Without a key on every address it warns before."""
    caplog.set_level(logging.INFO, "complexity_deep.serve")
    listener = listen("0.0.0.0", 0)
    port = listener.getsockname()[1]

    def ask() -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps({"model": "broken", "prompt": [20]})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json", "Host": "any.name"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    service = broken_service(steps=5)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        with pytest.raises(InputError, match="The model has stopped working"):
            serve(service, listener, key=None, has_page=False, name="0.0.0.0")
    status, refusal = asked.result()
    assert status == 503 and refusal["error"]["message"] == "The model failed while it answered this request."
    assert re.search(r"Everybody who reaches http://0\.0\.0\.0:\d+ can use the model", caplog.text)
    assert "The model has stopped working, and the server ends: no memory" in caplog.text


def test_options_of_the_model_that_are_not_followed_are_named(caplog, monkeypatch):
    """Greedy answers are not those of `generate` then."""
    monkeypatch.setattr(server.Server, "run", lambda self, sockets: None)
    engine = Engine(tiny_model(), 4, 4, 1)
    asked = {"repetition_penalty": 1.2, "stop_strings": ["w9"]}
    nothing = {"repetition_penalty": 1.0, "min_p": 0.0, "num_beams": 1, "no_repeat_ngram_size": 0}
    for options in asked, nothing, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}:
        caplog.clear()
        service = Service("words", engine, tiny_tokenizer(), GenerationConfig(**options))
        with listen("127.0.0.1", 0) as listener:
            serve(service, listener, key=None, has_page=False, name="127.0.0.1")
        expected = "options that are not followed: repetition_penalty, stop_strings."
        assert (expected in caplog.text) == (options is asked) == ("not followed" in caplog.text)


def test_answers_that_depend_on_others_are_told(caplog, monkeypatch):
    monkeypatch.setattr(server.Server, "run", lambda self, sockets: None)
    sizes = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0, "original_max_position_embeddings": 64}
    for rope in {"rope_type": "longrope", **sizes}, {"rope_type": "dynamic", "factor": 4.0}:
        caplog.clear()
        engine = Engine(tiny_model(rope_parameters={"rope_theta": 10000.0, **rope}), 4, 4, 1)
        with listen("127.0.0.1", 0) as listener:
            service = Service("words", engine, tiny_tokenizer(), GenerationConfig())
            serve(service, listener, key=None, has_page=False, name="127.0.0.1")
        assert ("answers depend on others" in caplog.text) == (rope["rope_type"] == "longrope")


@pytest.mark.parametrize("name", ["127.0.0.2", "localhost", "Machine"])
def test_requests_to_the_address_that_was_named_are_answered(name, monkeypatch):
    """Any address of this machine, such as 127.0.1.1, under which Debian lists its name. Case is no difference."""
    statuses = []
    monkeypatch.setattr(server.Server, "run", lambda self, sockets: statuses.append(status(self.config.app)))
    hosts = [name, f"{name.upper()}:8000", "localhost:80", "attacker.example", ""]

    def status(app) -> list[int]:
        return [TestClient(app).get("/health", headers={"Host": host}).status_code for host in hosts]

    service = Service("words", Engine(tiny_model(), 4, 4, 1), tiny_tokenizer(), GenerationConfig())
    with listen("127.0.0.1" if name == "Machine" else name, 0) as listener:
        serve(service, listener, key=None, has_page=False, name=name)
    assert statuses == [[503, 503, 503, 403, 403]]  # the engine was not started


def test_a_model_that_does_not_work_is_not_served(caplog):
    caplog.set_level(logging.INFO, "complexity_deep.serve")
    with pytest.raises(InputError, match="The model has stopped working"):
        serve(broken_service(steps=1), listen("127.0.0.1", 0), key=None, has_page=False, name="127.0.0.1")
    assert "the server ends: no memory" in caplog.text and "Serving" not in caplog.text


def test_where_nobody_can_listen_is_a_sentence():
    taken = r"--port \d+ cannot be listened on \(Address already in use\)"
    with listen("127.0.0.1", 0) as first, pytest.raises(InputError, match=taken):
        listen("127.0.0.1", first.getsockname()[1])
    for host, port in ("no.such.host.invalid", 0), ("127.0.0.1", 70_000):
        with pytest.raises(InputError, match=f"--host {host} --port {port} cannot be listened on"):
            listen(host, port)


def test_keys(tmp_path):
    assert read_key(None) is None
    (tmp_path / "key").write_text("  secret é \nsecond line\n")
    assert read_key(str(tmp_path / "key")) == "secret é".encode()
    for content in (b"", b"\n", b"   \nkey\n"):
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(InputError, match="first line"):
            read_key(str(tmp_path / "key"))
    with pytest.raises(InputError, match="has no key"):
        read_key(str(tmp_path / "nothing"))


def test_the_line_of_a_second():
    counts = Counter({"answered": 1200, "refused": 3, "400": 2, "429": 1})
    line = "4 running, 1 waiting, 1,500 tokens/s; so far 1,200 answered, 3 refused (400: 2, 429: 1)"
    assert load_line(4, 1, 1500, counts) == line
    assert load_line(1, 0, 0, Counter()) == "1 running, 0 waiting, 0 tokens/s; so far none answered"


def running(service: Service):
    """The endpoints, with an engine that runs while a client is open."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        await service.engine.start()
        yield
        service.engine.close("over")
        assert service.engine.stop(10)

    return build_app(service, key=None, hosts=None, has_page=False, lifespan=lifespan)


def test_a_special_token_among_stop_strings_ends_an_answer():
    """It has no text, so that the string is not in that of the answer."""
    model, tokenizer = tiny_model(std=0.15, eos_token_id=None, tie_word_embeddings=False), tiny_tokenizer()
    ids = torch.tensor([[20]])
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[
        0, 1:
    ].tolist()
    place = next(place for place in range(2, 12) if tokens[place] not in tokens[:place])
    special = f"w{tokens[place]}"
    tokenizer.add_tokens([AddedToken(special, special=True)], special_tokens=True)
    options = {"model": "words", "prompt": [20], "max_tokens": 12, "temperature": 0}
    with TestClient(running(Service("words", Engine(model, 4, 4, 1), tokenizer, GenerationConfig()))) as client:
        for stop, kept, reason, counted in ("w", 0, "stop", 1), (["x", special], place, "stop", place + 1):
            answer = client.post("/v1/completions", json={**options, "stop": stop}).json()
            (choice,) = answer["choices"]
            assert choice["text"] == tokenizer.decode(tokens[:kept]) and choice["finish_reason"] == reason
            assert answer["usage"]["completion_tokens"] == counted


def test_texts_of_experts_together_are_the_answer():
    """Also where the answer was cut within a character."""
    tokenizer = train_bpe(iter(["some text"]), vocab_size=300, model_max_length=64)
    service = Service("bytes", Engine(tiny_model(vocab_size=300), 4, 4, 1), tokenizer, GenerationConfig())
    tokens = tokenizer("a日")["input_ids"][:-1]
    told = asyncio.run(service.experts(Answer("id", [20], 9, set(), tokens), AnswerText(tokenizer)))
    assert "".join(token["text"] for token in told) == tokenizer.decode(tokens) == "a\ufffd"


def test_experts_that_cannot_be_computed_are_told_and_end_nothing(monkeypatch):
    """Whole with a status, and in a stream with an event after the text."""
    service = Service("words", Engine(tiny_model(), 4, 4, 1), tiny_tokenizer(), GenerationConfig(do_sample=False))

    def fail(tokens):
        raise RuntimeError("no memory")

    monkeypatch.setattr(service.engine, "experts", fail)

    app = running(service)
    options = {"model": "words", "prompt": [20], "max_tokens": 3, "temperature": 0, "experts": True}
    with TestClient(app) as client:
        whole = client.post("/v1/completions", json=options)
        assert whole.status_code == 503 and "'experts'" in whole.json()["error"]["message"]
        *pieces, last, rest = client.post("/v1/completions", json={**options, "stream": True}).text.split("\n\n")
        told = json.loads(last.removeprefix("data: "))["error"]["message"]
        assert "'experts'" in told and not rest
        plain = client.post("/v1/completions", json={**options, "experts": False})
        assert plain.status_code == 200
        # A piece holds all tokens that came since the last one, so that their number depends on the machine.
        texts = [json.loads(piece.removeprefix("data: "))["choices"][0]["text"] for piece in pieces]
        assert "".join(texts) == plain.json()["choices"][0]["text"] != ""
