"""Requests and responses of OpenAI's API, as far as they are served. Every value is checked here.

A field that is not served is taken only where it asks for nothing, as `n: 1` does. Fields beyond OpenAI's: `top_k`,
`stream_options.continuous_usage_stats`, and `experts`, which asks for the expert that each token of the answer took in
each layer.
"""

import math
import secrets
import time
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import GenerationConfig

from complexity_deep.workflow.serving.refusal import Refusal

INT64 = 2**63
COLDEST = 1e-4  # temperatures below it choose the likeliest token, and would divide scores into infinity
TEXT_TOKENS = 16  # of a text completion that names no number, in OpenAI's API

Stop = Annotated[str, Field(min_length=1, max_length=256)]
Nothing = Literal[False, 0] | Annotated[list[Any], Field(max_length=0)] | None
NoMapping = Annotated[dict[str, Any], Field(max_length=0)] | None
NOT_SERVED = Field(None, description="not served")

# What a generation_config.json may ask for and is not served, with the values that ask for nothing.
NEUTRAL = {
    **dict.fromkeys(("repetition_penalty", "typical_p", "guidance_scale", "num_beams"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens", "min_p", "epsilon_cutoff"), 0),
    **dict.fromkeys(("eta_cutoff", "penalty_alpha"), 0),
    **dict.fromkeys(("top_h", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty")),
    **dict.fromkeys(("stop_strings", "watermarking_config", "dola_layers")),
}


def options_left_out(config: GenerationConfig) -> list[str]:
    """The options of a model's generation config that change what `generate` writes, and that are not served."""
    asked = {name: getattr(config, name, None) for name in NEUTRAL}
    return [name for name, value in asked.items() if value is not None and value != NEUTRAL[name]]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # of vLLM: every chunk of text tells the usage so far
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(Strict):
    type: Literal["text"]


class GenerationRequest(Strict):
    """What both endpoints take."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=INT64)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    experts: bool = False
    user: str | None = None  # taken and not used, as are the next
    metadata: dict[str, Any] | None = None
    n: Literal[1] | None = NOT_SERVED
    presence_penalty: Literal[0] | None = NOT_SERVED
    frequency_penalty: Literal[0] | None = NOT_SERVED
    logit_bias: NoMapping = NOT_SERVED

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_usage_always(self) -> bool:
        return self.wants_usage and self.stream_options.continuous_usage_stats

    def sampling(self, defaults: GenerationConfig, vocabulary: int) -> dict:
        """Options for `Engine.submit`. What the request leaves out is the model's, else OpenAI's (temperature 1)."""

        def chosen(name: str, otherwise):
            value = getattr(self, name)
            value = getattr(defaults, name, None) if value is None else value
            return otherwise if value is None else value

        temperature = float(chosen("temperature", 1.0))
        if temperature < COLDEST:
            return {}
        top_k = int(chosen("top_k", 0))
        return {
            "temperature": temperature,
            "top_k": vocabulary if top_k < 1 else min(top_k, vocabulary),
            "top_p": float(chosen("top_p", 1.0)),
            "seed": secrets.randbits(63) if self.seed is None else self.seed,
        }


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    # Clients send answers back with all fields that an answer may have.
    refusal: None = NOT_SERVED
    annotations: Nothing = NOT_SERVED
    audio: None = NOT_SERVED
    function_call: None = NOT_SERVED
    tool_calls: Nothing = NOT_SERVED

    def for_template(self) -> dict:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content} | ({"name": self.name} if self.name else {})


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Nothing = NOT_SERVED
    top_logprobs: Nothing = NOT_SERVED
    tools: Nothing = NOT_SERVED
    tool_choice: Literal["none", "auto"] | None = NOT_SERVED
    parallel_tool_calls: bool | None = NOT_SERVED
    response_format: ResponseFormat | None = NOT_SERVED
    store: Literal[False] | None = NOT_SERVED

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TextRequest(GenerationRequest):
    prompt: str | Annotated[list[int], Field(fail_fast=True)] | Annotated[list[str], Field(min_length=1)]
    logprobs: None = NOT_SERVED
    best_of: Literal[1] | None = NOT_SERVED
    echo: Nothing = NOT_SERVED
    suffix: Literal[""] | None = NOT_SERVED

    @property
    def most_tokens(self) -> int | None:
        return TEXT_TOKENS if self.max_tokens is None else self.max_tokens


NAMES_NOT_SERVED = {
    name
    for kind in (ChatRequest, TextRequest, Message)
    for name, field in kind.model_fields.items()
    if field.description == NOT_SERVED.description
}
Parsed = TypeVar("Parsed", ChatRequest, TextRequest)


def parse(kind: type[Parsed], body: bytes) -> Parsed:
    """The request in `body`. Raises `Refusal` with a sentence about the first value that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> Refusal:
    found = error.errors(include_url=False, include_context=False)
    if not found[0]["loc"]:
        return Refusal(400, f"The body is not a JSON object that can be read: {found[0]['msg']}.", "invalid_json")
    # Of a field that takes several types, each has its errors. Those deepest within it are of the type that was meant.
    of_field = [one for one in found if one["loc"][0] == found[0]["loc"][0]]
    first = max(of_field, key=lambda one: len(_steps(one)))
    steps = _steps(first)
    for number, step in enumerate(steps, 1):
        if step in NAMES_NOT_SERVED:
            path = ".".join(steps[:number])
            sentence = f"What the field '{path}' asks for is not served here: leave it out."
            return Refusal(400, sentence, "not_served", path)
    path = ".".join(steps)[:80]
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"The field '{path}' is not known here: leave it out.", "unknown_field", path)
    if first["type"] == "missing":
        return Refusal(400, f"The field '{path}' is missing.", "missing_field", path)
    reasons = dict.fromkeys(one["msg"][:1].lower() + one["msg"][1:] for one in of_field if _steps(one) == steps)
    return Refusal(400, f"The value of '{path}' cannot be used: {', or '.join(reasons)}.", "invalid_value", path)


def _steps(error: dict) -> list[str]:
    """The path to the value of an error, without the steps that name a type of several, such as "list[int]"."""
    first, *rest = error["loc"]
    # The last step of these two is a field, whatever its name.
    last = [rest.pop()] if rest and error["type"] in ("extra_forbidden", "missing") else []
    fields = [step for step in rest if isinstance(step, int) or (step.isidentifier() and step != "str")]
    return [str(step) for step in (first, *fields, *last)]


class Reply:
    """Writes the objects of one answer, whole or in chunks of a stream, in the forms of chat and of text."""

    def __init__(self, request: ChatRequest | TextRequest, id: str, prompt_tokens: int):
        self.is_chat = isinstance(request, ChatRequest)
        self.model, self.id, self.prompt_tokens = request.model, id, prompt_tokens
        self.created = math.floor(time.time())

    def _object(self, choices: list[dict], is_chunk: bool, **more) -> dict:
        kind = ("chat.completion.chunk" if is_chunk else "chat.completion") if self.is_chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}

    def usage(self, num_tokens: int) -> dict:
        total = self.prompt_tokens + num_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": num_tokens, "total_tokens": total}

    def whole(self, text: str, reason: str, num_tokens: int, **more) -> dict:
        content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return self._object([choice], is_chunk=False, usage=self.usage(num_tokens), **more)

    def chunk(self, text: str | None, reason: str | None = None, is_first: bool = False, **more) -> dict:
        """A part of the answer; the first of a chat names the role, and the last has a `reason` and no text."""
        delta = ({"role": "assistant"} if is_first else {}) | ({} if text is None else {"content": text})
        content = {"delta": delta} if self.is_chat else {"text": text or ""}
        return self._object([{"index": 0, **content, "logprobs": None, "finish_reason": reason}], is_chunk=True, **more)

    def usage_chunk(self, num_tokens: int) -> dict:
        return self._object([], is_chunk=True, usage=self.usage(num_tokens))
