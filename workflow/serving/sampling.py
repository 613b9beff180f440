"""Sampling with options and a seed of its own for every request of a batch.

The library's processors for continuous batching take temperature, top_k and top_p of each request. It draws tokens from
one generator for the whole batch, so that a seed would change the answers of others. `SeededChoice` draws instead, from
the request's seed and the position of the token, and so gives the same answer beside whatever other requests.
"""

import hashlib

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopKLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

GREEDY = -1.0  # no share of the probability


def share(seed: int, position: int) -> float:
    """A number of [0, 1) that fp32 holds exactly, evenly distributed over seeds and positions."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=3).digest()
    return int.from_bytes(digest, "big") / 2**24


def choose(scores: Tensor, shares: Tensor) -> Tensor:
    """Scores [B, V] fp32, shares [B] fp32 -> tokens [B] int64.

    The token at which the cumulative probability passes the row's share, or the likeliest where the share is negative.
    """
    cumulative = scores.softmax(dim=-1).double().cumsum(dim=-1)  # [B, V]
    target = shares.double().clamp(min=0)[:, None] * cumulative[:, -1:]
    # Clamped for scores that are NaN, whose index would end the process on a GPU.
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=scores.shape[-1] - 1)
    return torch.where(shares < 0, scores.argmax(dim=-1), drawn)


class SeededChoice(ContinuousBatchingLogitsProcessor):
    """Leaves one token of each row: that of the request's `seed`, or the likeliest for a request without one."""

    supported_kwargs = {"seed": int}
    ignored_kwargs = ()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.copy_(torch.full_like(int32_tensor, GREEDY, dtype=torch.float32).view(torch.int32))

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        shares = []
        for state in (request.state for request in requests_with_new_token):
            seed = state.logit_processor_kwargs.get("seed")
            # The position counts from the start of the prompt, also for a request that is computed anew.
            shares.append(GREEDY if seed is None else share(seed, state.position_offset))
        return torch.tensor(shares, dtype=torch.float32).view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        chosen = choose(scores, tensor_arg[: scores.shape[0]].view(torch.float32))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)


class WhereAsked:
    """Put before a processor that sorts all scores: it passes over a step in which no request asks for it.

    Such sorts take twice as long as the rest of a step on a CPU. A CUDA graph would keep what its first step chose, so
    that under graphs `may_skip` is False.
    """

    def __init__(self, processor, may_skip: bool):
        super().__init__(processor)
        ((self.option, _),) = self.supported_kwargs.items()
        self.neutral, self.may_skip, self.is_asked = getattr(processor, self.option), may_skip, True

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        options = [request.state.logit_processor_kwargs for request in requests_with_new_token]
        self.is_asked = any(one.get(self.option, self.neutral) != self.neutral for one in options)
        return super().prepare_tensor_args(requests_with_new_token)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        return super().__call__(scores, tensor_arg) if self.is_asked or not self.may_skip else scores


class TopKWhereAsked(WhereAsked, ContinuousBatchingTopKLogitsWarper):
    pass


class TopPWhereAsked(WhereAsked, ContinuousBatchingTopPLogitsWarper):
    pass


def request_processors(vocab_size: int, may_skip: bool) -> ContinuousBatchingLogitsProcessorList:
    """Processors that leave the likeliest token of a request without options, and sample for one with a seed."""
    processors = [
        ContinuousBatchingTemperatureLogitsWarper(TemperatureLogitsWarper(1.0)),
        TopKWhereAsked(TopKLogitsWarper(vocab_size), may_skip),
        TopPWhereAsked(TopPLogitsWarper(1.0), may_skip),
        SeededChoice(),
    ]
    listed = ContinuousBatchingLogitsProcessorList(LogitsProcessorList(processors))
    listed.tensors_required = len(processors)  # the library counts only those that it has converted
    return listed
