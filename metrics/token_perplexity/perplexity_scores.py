"""What the metric beside this file computes, for those who do not need the `evaluate` library for it."""

import math

import numpy as np


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
    # Tokens of one document are not independent, documents are: this is the error of a ratio of sums over documents.
    documents, residuals = len(nll), nll - mean * tokens
    stderr = None
    if documents > 1:
        stderr = math.sqrt(documents / (documents - 1) * float(residuals @ residuals)) / int(tokens.sum())
    scores = {"nll_per_token": mean, "stderr": stderr, "perplexity": float(np.exp(mean))}
    if total_bytes is not None:
        scores["bits_per_byte"] = float(nll.sum()) / math.log(2) / total_bytes
    return scores
