"""Perplexity for Trainer, counted per token over the whole evaluation set, without keeping its logits.

Trainer(..., compute_metrics=perplexity_metrics, preprocess_logits_for_metrics=token_nll)
"""

import functools
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import EvalPrediction

REPOSITORY = Path(__file__).resolve().parents[1]
# A script's folder comes first on the path, and the evaluate.py in it would hide the library `evaluate`: last, then.
sys.path.sort(key=lambda entry: Path(entry).resolve() == REPOSITORY / "scripts")

import evaluate  # noqa: E402

IGNORED = -100  # the label of tokens that are not counted


@functools.cache
def load_metric() -> evaluate.Metric:
    return evaluate.load(str(REPOSITORY / "metrics" / "token_perplexity"), keep_in_memory=True)


def token_nll(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (B, T) of each label, from logits (B, T, V); 0 where nothing is counted.

    A model of chunked_loss.py gives its token losses (B, T - 1) in place of logits.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
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
    scores = load_metric().compute(nll=nll[tokens > 0], tokens=tokens[tokens > 0])
    return {name: value for name, value in scores.items() if value is not None}
