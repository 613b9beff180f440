"""Requests in, tokens out: the library's continuous batching under the rules of a server.

The library's own server (transformers.cli.serving) finds no model that is not a class of the library, takes the
sampling of all requests from the first, leaves out stop strings, and does not check what would end its worker. Each of
these would need a patch of its handlers. This one uses the part below them, `ContinuousBatchingManager`, as it is.
"""

import asyncio
import copy
import gc
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.generation import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput

from complexity_deep.workflow.command import InputError, one_line
from complexity_deep.workflow.serving.refusal import Refusal
from complexity_deep.workflow.serving.sampling import request_processors

PAGE = 256  # tokens of a block of the cache, the library's default and the least that FlashAttention takes
BATCH_TOKENS = 1024  # of one step: longer prompts take several, between which the other requests go on


@dataclass
class Answer:
    """A request that has been admitted. `tokens` are those generated so far."""

    id: str
    prompt: list[int]
    most_tokens: int
    end_tokens: set[int]  # the answer ends with the first of these
    tokens: list[int] = field(default_factory=list)
    error: str | None = None
    is_finished: bool = False
    outcome: str = "cancelled"  # until somebody has it
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class AnswersOnly(OutputRouter):
    """Hands outputs to the requests that wait for them, and drops those of requests that were cancelled meanwhile."""

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        with self._lock:
            awaited = [output for output in outputs if output.request_id in self.result_handlers]
        super().deliver_batch(awaited)


class Engine:
    """A model that answers many requests at once. All methods but the constructor belong to the thread of the loop.

    Up to `most_running` requests are computed together and `most_waiting` more wait. The cache holds `cache_tokens`
    tokens, prompts and answers; where it is full, the library computes the youngest requests again later.
    """

    def __init__(self, model: PreTrainedModel, most_running: int, most_waiting: int, cache_tokens: int):
        self.context = model.config.max_position_embeddings
        self.vocabulary = model.config.vocab_size
        self.most_running, self.most_waiting = most_running, most_waiting
        pages = -(-max(cache_tokens, self.context + PAGE) // PAGE)
        self.cache_tokens = pages * PAGE
        self.answers: dict[str, Answer] = {}
        self.closed: str | None = None
        self.tokens_generated = 0
        # A second model on the same weights. Looking into it changes neither attention nor hooks of the first.
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.observer = copy.deepcopy(model, shared).eval()
        end = model.generation_config.eos_token_id
        self.end_tokens = {end} if isinstance(end, int) else set(end or ())
        try:
            self.manager: ContinuousBatchingManager = model.init_continuous_batching(
                generation_config=GenerationConfig(do_sample=False, eos_token_id=sorted(self.end_tokens) or -1),
                continuous_batching_config=ContinuousBatchingConfig(
                    num_blocks=pages, max_batch_tokens=BATCH_TOKENS, max_requests_per_batch=most_running
                ),
            )
            has_graphs = any(self.manager.continuous_batching_config.use_cuda_graph)
            self.manager.logit_processor = request_processors(self.vocabulary, may_skip=not has_graphs)
            self.manager.output_router = AnswersOnly()
            self.manager.warmup()  # allocates the cache
        except (ValueError, MemoryError, RuntimeError) as error:
            raise InputError(
                f"A cache of {self.cache_tokens:,} tokens for this model cannot be had ({one_line(error)}): give "
                "--cache-tokens a smaller number, or --device another device."
            ) from error

    async def start(self) -> None:
        """Begin to answer, after one request of its own: it compiles kernels, and shows whether the model works."""
        self.manager.start()
        async for _ in self.tokens(self.submit([0], min(2, self.context - 1), {})):
            pass

    def death(self) -> str | None:
        """Why the thread that generates has ended without being asked to, or None where it runs."""
        if self.manager.is_running() or self.closed:
            return None
        return one_line(self.manager.background_thread_status.fatal_error or "no error was recorded")

    @property
    def running(self) -> int:
        return min(len(self.answers), self.most_running)

    @property
    def waiting(self) -> int:
        return len(self.answers) - self.running

    def submit(self, prompt: list[int], most_tokens: int, sampling: dict, end_tokens: Iterable[int] = ()) -> Answer:
        """Admit a request. `sampling` may have temperature, top_k, top_p and seed; without seed it is greedy.

        The answer ends with the first of `end_tokens` and the model's own.

        Raises `Refusal` where the server is full, closed or dead. The caller has checked all values.
        """
        if self.closed or self.death():
            raise Refusal(503, self.closed or "The server's model has stopped working.", "unavailable")
        if len(self.answers) >= self.most_running + self.most_waiting:
            sentence = f"There are {self.running} requests running and {self.waiting} waiting already: try again later."
            raise Refusal(429, sentence, "too_many_requests")
        answer = Answer(f"cmpl-{uuid.uuid4().hex}", prompt, most_tokens, self.end_tokens | set(end_tokens))
        self.answers[answer.id] = answer
        self.manager.register_result_handler(answer.id, lambda output: self._take(answer, output))
        self.manager.add_request(
            prompt,
            request_id=answer.id,
            max_new_tokens=most_tokens,
            streaming=True,
            eos_token_id=sorted(answer.end_tokens),
            **sampling,
        )
        return answer

    def _take(self, answer: Answer, output: GenerationOutput) -> None:
        new = output.generated_tokens[len(answer.tokens) :]
        self.tokens_generated += len(new)
        answer.tokens += new
        if output.is_finished():
            self._finish(answer, output.error and "The model failed while it answered this request.")
        answer.changed.set()

    def _finish(self, answer: Answer, error: str | None = None) -> None:
        if not answer.is_finished:
            answer.is_finished, answer.error = True, error
            answer.changed.set()
        self.answers.pop(answer.id, None)

    async def tokens(self, answer: Answer) -> AsyncIterator[list[int]]:
        """The answer's tokens as they come. An iteration that is left early cancels the request."""
        told = 0
        try:
            while True:
                await answer.changed.wait()
                answer.changed.clear()
                is_finished, new = answer.is_finished, answer.tokens[told:]
                told += len(new)
                if new:
                    yield new
                if is_finished and told == len(answer.tokens):
                    break
            if answer.error:
                raise Refusal(503, answer.error, "unavailable")
        finally:
            self.cancel(answer)

    def cancel(self, answer: Answer) -> None:
        """End a request that nobody waits for. One that has ended is left as it is."""
        if not answer.is_finished:
            self.manager.output_router.result_handlers.pop(answer.id, None)
            self.manager.cancel_request(answer.id)
            self._finish(answer)

    @torch.inference_mode()
    def experts(self, tokens: list[int]) -> list[list[int]]:
        """The expert that each of `tokens` takes, in each layer: [S][L]. Blocks for the time of a forward pass."""
        ids = torch.tensor([tokens], device=self.observer.device)
        output = self.observer.base_model(ids, output_expert_ids=True, use_cache=False)
        return torch.stack(output.expert_ids, dim=-1)[0].tolist()  # [B, S] of each layer -> [S, L]

    def close(self, reason: str) -> int:
        """End all requests and admit no more. Returns how many were told `reason`."""
        self.closed = reason
        told = list(self.answers.values())
        for answer in told:
            self.manager.output_router.result_handlers.pop(answer.id, None)
            self._finish(answer, reason)
        return len(told)

    def stop(self, seconds: float) -> bool:
        """End the thread that generates, and say whether it ended within `seconds`."""
        # The library then looks for garbage among all that the process has loaded, which can take longer than the end.
        gc.freeze()
        try:
            self.manager.stop(block=True, timeout=seconds, hard_stop=True)
        finally:
            gc.unfreeze()
        return not self.manager.is_running()
