"""Perplexity of a model that was already run, as a metric of the `evaluate` library.

    metric = evaluate.load("metrics/token_perplexity")
    metric.compute(nll=[61.2, 40.9], tokens=[20, 12])
    metric.compute(nll=[61.2, 40.9], tokens=[20, 12], total_bytes=150)

One entry is one document, or one row of packed documents.
"""

import datasets
import evaluate

from complexity_deep.workflow.evaluation.perplexity import perplexity_scores

DESCRIPTION = "Negative log-likelihood per token with its standard error, perplexity, and bits per byte."
INPUTS = """
Args:
    nll: summed negative log-likelihood of each document, in nats.
    tokens: number of tokens that each sum is over.
    total_bytes (optional): UTF-8 bytes of all documents together.
Returns:
    nll_per_token: nats per token, over all tokens.
    stderr: standard error of nll_per_token; None for a single document.
    perplexity: exp(nll_per_token).
    bits_per_byte: only with total_bytes.
"""


class TokenPerplexity(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"nll": datasets.Value("float64"), "tokens": datasets.Value("int64")}),
        )

    def _compute(self, nll: list[float], tokens: list[int], total_bytes: int | None = None) -> dict:
        return perplexity_scores(nll, tokens, total_bytes)
