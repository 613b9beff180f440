"""Perplexity for Trainer, counted per token over the whole evaluation set, without keeping its logits.

Trainer(..., compute_metrics=perplexity_metrics, preprocess_logits_for_metrics=token_nll)

It is that of the plain cross-entropy, whatever loss the model trains on: smoothed labels, a z-loss or a router's loss
are not in it.
"""

import math

import numpy as np
import torch
from transformers import EvalPrediction

IGNORED = -100  # the label of tokens that are not counted


def perplexity_scores(nll, tokens, total_bytes: int | None = None) -> dict[str, float | None]:
    """Scores of documents, or of rows of packed documents, from each one's sum over its tokens.

    Args:
        nll: [N] summed negative log-likelihood, in nats.
        tokens: [N] number of tokens that each sum is over.
        total_bytes: UTF-8 bytes of all documents together.
    Returns:
        `nll_per_token` in nats with its standard error `stderr` (None for a single document), `perplexity` =
        exp(nll_per_token), and with `total_bytes` also `bits_per_byte`.
    """
    nll, tokens = np.asarray(nll, dtype=np.float64), np.asarray(tokens, dtype=np.int64)
    mean = float(nll.sum() / tokens.sum())
    # Documents are independent of each other, but their tokens are not: the error of a ratio of sums over documents.
    documents, residuals = len(nll), nll - mean * tokens
    stderr = None
    if documents > 1:
        stderr = math.sqrt(documents / (documents - 1) * float(residuals @ residuals)) / int(tokens.sum())
    scores = {"nll_per_token": mean, "stderr": stderr, "perplexity": float(np.exp(mean))}
    if total_bytes is not None:
        scores["bits_per_byte"] = float(nll.sum()) / math.log(2) / total_bytes
    return scores


def token_nll(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (B, T) of each label, from logits (B, T, V); 0 where nothing is counted.

    A model with the chunked loss gives its token losses (B, T - 1) in place of logits.
    """
    if isinstance(logits, tuple):  # a router's loss may come first
        logits = next(output for output in logits if isinstance(output, torch.Tensor) and output.ndim > 1)
    if logits.ndim == 2:
        return torch.nn.functional.pad(logits, (1, 0))
    rows = [  # one at a time, so that only one is copied to fp32
        torch.nn.functional.cross_entropy(row[:-1].float(), ids[1:], ignore_index=IGNORED, reduction="none")
        for row, ids in zip(logits, labels)
    ]
    return torch.nn.functional.pad(torch.stack(rows), (1, 0))  # (B, T); nothing predicts the first token


def perplexity_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Scores of what `token_nll` kept: predictions (N, T), label_ids (N, T)."""
    counted = prediction.label_ids != IGNORED
    counted[:, 0] = False
    tokens = counted.sum(axis=1)
    nll = np.where(counted, prediction.predictions, 0).sum(axis=1, dtype=np.float64)
    return without_none(perplexity_scores(nll[tokens > 0], tokens[tokens > 0]))


def summed_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Scores of sums by document: predictions (N, D) in nats, label_ids (N, D) tokens, not above 0 for padding."""
    counted = prediction.label_ids > 0
    return without_none(perplexity_scores(prediction.predictions[counted], prediction.label_ids[counted]))


def without_none(scores: dict) -> dict[str, float]:
    return {name: value for name, value in scores.items() if value is not None}


def held_out(entry: dict) -> dict[str, float]:
    """`loss` in nats per token and `perplexity` of an evaluation in Trainer's log, each with its `..stderr` if known.

    An older log has nothing but the training loss on held-out text.
    """
    loss, stderr = entry.get("eval_nll_per_token", entry["eval_loss"]), entry.get("eval_stderr")
    scores = {"loss": loss, "loss_stderr": stderr, "perplexity": math.exp(loss)}
    scores["perplexity_stderr"] = stderr and math.exp(loss) * stderr
    return without_none(scores)


def with_error(scores: dict, name: str, digits: int) -> str:
    """A score, and its standard error after ± where it is known."""
    error = scores.get(f"{name}_stderr")
    return f"{scores[name]:,.{digits}f}" + (f" ± {error:,.{digits}f}" if error is not None else "")


def shown_perplexity(entry: dict) -> str:
    """The perplexity of an evaluation in Trainer's log, as a person reads it."""
    return with_error(held_out(entry), "perplexity", 2)
