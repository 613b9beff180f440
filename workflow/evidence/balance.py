"""How evenly routing tables load their experts: ids of the vocabulary, and tokens of the training text.

The token files are not in the repository. What is counted on them is kept in balance.json, with their id.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from complexity_deep.routing_complexity_deep import balanced_routing, modulo_routing, random_routing
from complexity_deep.workflow.command import whole_files
from complexity_deep.workflow.evidence.ablation_data import token_counts, token_rows
from complexity_deep.workflow.evidence.ablation_results import read_data
from complexity_deep.workflow.training.routing_balance import imbalance

FILE = "balance.json"
RANDOM_TABLES = 1000  # seeds, for what a random table gives by chance
CENTRAL = 0.95  # share of them that the range of chance holds


def most_over_mean(loads: Tensor) -> float:
    return (loads.max() / loads.double().mean()).item()


def describe(table: Tensor, num_experts: int, counts: Tensor, rows: Tensor, rows_per_batch: int) -> dict:
    """Ids and shares of the tokens by expert for a table [V], id counts [V] and the rows [N, S] that they come from."""
    ids = torch.bincount(table, minlength=num_experts)
    shares = torch.bincount(table, weights=counts.double(), minlength=num_experts) / counts.sum()
    total, batch_mean, worst = imbalance(table, num_experts, rows, rows_per_batch)
    return {
        "ids": [ids.min().item(), ids.max().item()],
        "shares": [round(shares.min().item(), 5), round(shares.max().item(), 5)],
        "most_over_mean": {
            "total": round(total, 4),
            "batch_mean": round(batch_mean, 4),
            "worst_batch": round(worst, 4),
        },
    }


def chance(num_experts: int, counts: Tensor) -> list[float]:
    """The central range of max over mean tokens per expert, over random tables with equal numbers of ids."""
    tables = (random_routing(len(counts), num_experts, seed) for seed in range(RANDOM_TABLES))
    found = [most_over_mean(torch.bincount(t, weights=counts.double(), minlength=num_experts)) for t in tables]
    ends = torch.tensor([(1 - CENTRAL) / 2, (1 + CENTRAL) / 2], dtype=torch.float64)
    return [round(end, 4) for end in torch.tensor(found, dtype=torch.float64).quantile(ends).tolist()]


def measure_balance(output: Path, data: str, base: dict) -> dict:
    """Count the tokens of each expert on the training text of `data`, and write balance.json into `output`.

    `base` is the study's file of variants; every number of experts that it names is measured. Returns what was written.
    Raises `InputError` where there are no token files.
    """
    facts, training = read_data(data), base["training"]
    rows = token_rows(data, "train", training["row_length"], "cpu")
    counts = token_counts(data, facts["vocab_size"])
    measured = {}
    for number in numbers_of_experts(base):
        tables = {
            "modulo": modulo_routing(len(counts), number),
            "balanced": balanced_routing(counts, number),
            "random": random_routing(len(counts), number),
        }
        described = {n: describe(t, number, counts, rows, training["rows_per_step"]) for n, t in tables.items()}
        measured[str(number)] = {**described, "chance": chance(number, counts)}
    written = {
        "data": facts["id"],
        "vocab_size": facts["vocab_size"],
        "tokens": counts.sum().item(),
        "largest_id_share": round((counts.max() / counts.sum()).item(), 5),
        "tokens_per_batch": training["row_length"] * training["rows_per_step"],
        "random_tables": RANDOM_TABLES,
        "experts": measured,
    }
    with whole_files(output) as folder:
        (folder / FILE).write_text(json.dumps(written, indent=1) + "\n")
    return written


def numbers_of_experts(base: dict) -> list[int]:
    """Those of the variants that route by token id, in order."""
    shapes = [{**base["shape"], **variant["config"]} for variant in base["variants"].values()]
    routed = [s for s in shapes if s["model_type"] == "complexity-deep" and s.get("use_token_routed_mlp", True)]
    return sorted({shape["num_experts"] for shape in routed})


def read_balance(output: Path) -> dict | None:
    """What balance.json says, or None where it was not measured."""
    path = output / FILE
    return json.loads(path.read_text()) if path.exists() else None
