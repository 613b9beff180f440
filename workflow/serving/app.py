"""The endpoints: each request is checked, admitted, and answered whole or as a stream of server-sent events."""

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import GenerationConfig

from complexity_deep.workflow.command import one_line
from complexity_deep.workflow.serving.answer_text import AnswerText, TokenTexts
from complexity_deep.workflow.serving.engine import Answer, Engine
from complexity_deep.workflow.serving.gate import Gate
from complexity_deep.workflow.serving.protocol import ChatRequest, Reply, TextRequest, parse
from complexity_deep.workflow.serving.refusal import Refusal

PAGE = Path(__file__).with_name("page.html")


class Service:
    """The model under its name, and what its endpoints share. `counts` holds how requests ended, for the log."""

    def __init__(self, name: str, engine: Engine, tokenizer, defaults: GenerationConfig):
        self.name, self.engine, self.tokenizer, self.defaults = name, engine, tokenizer, defaults
        self.counts: Counter[str] = Counter()
        self.created = int(time.time())
        # One thread, because a tokenizer is not for two at once; the loop, which all streams share, never waits for it.
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")
        self.observer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="observer")

    # A request

    async def admit(self, kind: type, http: Request) -> tuple[ChatRequest | TextRequest, Answer]:
        body, loop = await http.body(), asyncio.get_running_loop()
        request, prompt = await loop.run_in_executor(self.reader, self.read, kind, body)
        room = self.engine.context - len(prompt)
        most = room if request.most_tokens is None else request.most_tokens
        if room < 1 or most > room:
            raise Refusal(
                400,
                f"The model's context is {self.engine.context} tokens, but the prompt has {len(prompt)} and the answer "
                f"may have {max(most, 1)}: shorten the prompt or lower max_tokens.",
                "context_length_exceeded",
                "messages" if kind is ChatRequest else "prompt",
            )
        sampling = request.sampling(self.defaults, self.engine.vocabulary)
        return request, self.engine.submit(prompt, most, sampling, self.stop_tokens(request.stops))

    def read(self, kind: type, body: bytes) -> tuple[ChatRequest | TextRequest, list[int]]:
        """The request in `body` and the tokens of its prompt."""
        request = parse(kind, body)
        self.check_name(request.model)
        if request.experts and self.layers_and_experts is None:
            raise Refusal(400, "This model has no experts: leave the field 'experts' out.", "no_experts", "experts")
        prompt = self.chat_prompt(request) if isinstance(request, ChatRequest) else self.text_prompt(request)
        if not prompt:
            raise Refusal(400, "The prompt is empty: give some text to continue.", "empty_prompt", "prompt")
        return request, prompt

    def chat_prompt(self, request: ChatRequest) -> list[int]:
        if not self.tokenizer.chat_template:
            raise Refusal(
                400, "This model's tokenizer has no chat template: use /v1/completions.", "no_chat_template", "messages"
            )
        messages = [message.for_template() for message in request.messages]
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except (TemplateError, TypeError, ValueError) as error:
            sentence = f"The chat template does not take these messages: {one_line(error)[:200]}."
            raise Refusal(400, sentence, "invalid_messages", "messages") from None

    def text_prompt(self, request: TextRequest) -> list[int]:
        prompt = request.prompt
        if prompt and isinstance(prompt, list) and isinstance(prompt[0], str):
            if len(prompt) > 1:
                sentence = f"A request has one prompt, but this one has {len(prompt)}: send a request for each."
                raise Refusal(400, sentence, "invalid_value", "prompt")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        if any(not 0 <= token < self.engine.vocabulary for token in prompt):
            sentence = f"The prompt has token ids outside 0 to {self.engine.vocabulary - 1}."
            raise Refusal(400, sentence, "invalid_value", "prompt")
        return prompt

    def stop_tokens(self, stops: list[str]) -> list[int]:
        """The special tokens among stop strings, such as "<|im_end|>", which have no text in an answer."""
        added = self.tokenizer.added_tokens_decoder.items() if stops else ()
        return [token for token, how in added if how.special and how.content in stops]

    # Its answer

    def reason(self, answer: Answer, text: AnswerText) -> str:
        is_ended = text.is_stopped or (answer.tokens and answer.tokens[-1] in answer.end_tokens)
        return "stop" if is_ended else "length"

    async def text(self, answer: Answer, text: AnswerText) -> AsyncIterator[str]:
        """The pieces of an answer. One that is not read to its end is cancelled."""
        tokens = self.engine.tokens(answer)
        async with contextlib.aclosing(tokens):
            async for new in tokens:
                yield text.add(token for token in new if token not in answer.end_tokens)
                if text.is_stopped:
                    return
        yield text.end()

    def num_tokens(self, answer: Answer, text: AnswerText) -> int:
        return text.num_tokens if text.is_stopped else len(answer.tokens)

    async def experts(self, answer: Answer, text: AnswerText) -> list[dict]:
        """Text and experts of each token of the answer: its expert in every layer.

        They are those of a forward over prompt and answer, because mu may override what the table says of an id.
        """
        tokens = answer.prompt + answer.tokens[: self.num_tokens(answer, text)]
        loop = asyncio.get_running_loop()
        try:
            experts = await loop.run_in_executor(self.observer, self.engine.experts, tokens)
        except RuntimeError as error:  # no memory, as a rule
            sentence = "The experts of this answer could not be computed: ask without the field 'experts'."
            raise Refusal(503, sentence, "unavailable", "experts") from error
        texts, start = TokenTexts(self.tokenizer), len(answer.prompt)
        told = [{"text": texts.text_of(token), "experts": row} for token, row in zip(tokens[start:], experts[start:])]
        if told:
            told[-1]["text"] += texts.rest()
        return told

    async def extras(self, request: ChatRequest | TextRequest, answer: Answer, text: AnswerText) -> dict:
        return {"experts": await self.experts(answer, text)} if request.experts else {}

    async def whole(self, http: Request, request: ChatRequest | TextRequest, answer: Answer) -> Response:
        text = AnswerText(self.tokenizer, request.stops)

        async def answered() -> dict:
            pieces = [piece async for piece in self.text(answer, text)]
            more = await self.extras(request, answer, text)
            reply = Reply(request, answer.id, len(answer.prompt))
            return reply.whole("".join(pieces), self.reason(answer, text), self.num_tokens(answer, text), **more)

        work = asyncio.ensure_future(answered())
        left = asyncio.ensure_future(disconnection(http))
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=499)  # nobody reads it
            answer.outcome = "failed"
            body = work.result()
            answer.outcome = "answered"
            return JSONResponse(body)
        finally:
            work.cancel()
            left.cancel()
            self.over(answer)

    async def events(self, request: ChatRequest | TextRequest, answer: Answer) -> AsyncIterator[str]:
        text = AnswerText(self.tokenizer, request.stops)
        reply = Reply(request, answer.id, len(answer.prompt))
        try:
            if reply.is_chat:
                yield event(reply.chunk("", is_first=True))
            async with contextlib.aclosing(self.text(answer, text)) as pieces:
                async for piece in pieces:
                    if piece:
                        usage = {"usage": reply.usage(text.num_tokens)} if request.wants_usage_always else {}
                        yield event(reply.chunk(piece, **usage))
            more = await self.extras(request, answer, text)
            yield event(reply.chunk(None, self.reason(answer, text), **more))
            if request.wants_usage:
                yield event(reply.usage_chunk(self.num_tokens(answer, text)))
            answer.outcome = "answered"
            yield "data: [DONE]\n\n"
        except Refusal as refusal:  # the status has been sent, so the sentence follows as an event
            answer.outcome = "failed"
            yield event(refusal.body())

    def over(self, answer: Answer) -> None:
        """The request has ended, perhaps before its answer."""
        self.counts[answer.outcome] += 1
        self.engine.cancel(answer)

    # Endpoints

    async def complete(self, kind: type, http: Request) -> Response:
        request, answer = await self.admit(kind, http)
        if request.stream:
            return EventStream(self.events(request, answer), when_over=lambda: self.over(answer))
        return await self.whole(http, request, answer)

    async def chat_completions(self, http: Request) -> Response:
        return await self.complete(ChatRequest, http)

    async def completions(self, http: Request) -> Response:
        return await self.complete(TextRequest, http)

    @property
    def layers_and_experts(self) -> dict | None:
        config = self.engine.observer.config
        if not getattr(config, "is_routed", False):
            return None
        return {"layers": config.num_hidden_layers, "experts": config.num_experts}

    def check_name(self, name: str) -> None:
        if name != self.name:
            sentence = f"There is no such model here: the one that is served is '{self.name}'."
            raise Refusal(404, sentence, "model_not_found", "model")

    @property
    def description(self) -> dict:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "local",
            "max_model_len": self.engine.context,
            "has_chat_template": bool(self.tokenizer.chat_template),
            "routing": self.layers_and_experts,
        }

    async def models(self, http: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.description]})

    async def model(self, http: Request) -> Response:
        self.check_name(http.path_params["name"])
        return JSONResponse(self.description)

    async def health(self, http: Request) -> Response:
        engine = self.engine
        reason = engine.closed or engine.death()
        state = {"status": "unavailable" if reason else "ok", "running": engine.running, "waiting": engine.waiting}
        return JSONResponse(state, 503 if reason else 200)

    # What is refused

    def refused(self, status: int) -> None:
        self.counts["refused"] += 1
        self.counts[str(status)] += 1

    async def refusal(self, http: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # of the router: no such path, or no such method
            error = Refusal(error.status_code, f"{http.method} {http.url.path} is not served.", "not_found")
        assert isinstance(error, Refusal)
        if error.status < 500:
            self.refused(error.status)
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body(), error.status, headers)

    async def failure(self, http: Request, error: Exception) -> Response:
        self.counts["failed"] += 1
        return JSONResponse(Refusal(500, "The server has failed; its log says why.", "internal").body(), 500)


class EventStream(StreamingResponse):
    """Calls `when_over` at the end, also where the client has gone before the first event was asked for."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], when_over: Callable[[], None]):
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.when_over = when_over

    async def __call__(self, *arguments) -> None:
        try:
            await super().__call__(*arguments)
        finally:
            self.when_over()


def event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def disconnection(http: Request) -> None:
    """Wait until the client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def page_response() -> Response:
    """The page, allowed to run its own script and style and to talk to this server, and nothing else."""
    html = PAGE.read_text(encoding="utf-8")

    def hash_of(tag: str) -> str:
        content = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {hash_of('script')}; style-src {hash_of('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(html, headers={**headers, "Cache-Control": "no-store"})


def build_app(
    service: Service, key: bytes | None, hosts: set[str] | None, has_page: bool, lifespan: Callable
) -> Starlette:
    routes = [
        Route("/health", service.health),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.model),
        Route("/v1/chat/completions", service.chat_completions, methods=["POST"]),
        Route("/v1/completions", service.completions, methods=["POST"]),
    ]
    if has_page:
        page = page_response()

        async def show_page(http: Request) -> Response:
            return page

        routes.append(Route("/", show_page))
    return Starlette(
        routes=routes,
        middleware=[Middleware(Gate, refused=service.refused, key=key, hosts=hosts)],
        exception_handlers={Refusal: service.refusal, HTTPException: service.refusal, Exception: service.failure},
        lifespan=lifespan,
    )
