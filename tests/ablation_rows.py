"""Made-up rows of runs.csv."""

import yaml

from complexity_deep.workflow.evidence.ablation_results import FIELDS
from support import REPOSITORY

PLANS = REPOSITORY / "recipes" / "evidence"
DATA = {"id": "4e12", "eos_token_id": 0}  # an id that could be taken for a number


def finished(variant, seed, edu, plan="headline", **changes):
    row = {name: None for name in FIELDS}
    row |= {"variant": variant, "seed": seed, "size": "30m", "status": "ok", "plan": plan, "learning_rate": 1e-3}
    row |= {"held_out_edu": edu, "held_out_books": edu + 1, "parameters": 2e6, "active_parameters": 1e6, "tokens": 1e8}
    row |= {"data": "first", "commit": "new", "runs_per_gpu": 1}
    row |= {"curve": [[t, edu + 1 / t, edu + 1] for t in range(1, 9)], "device": "H100", "versions": "torch"}
    return row | {"spikes": 0, "max_grad_norm": 1.0} | changes


def swept(variant, rate, loss, plan="learning_rates", speed=1000, status="ok", size="30m"):
    return {
        "variant": variant,
        "size": size,
        "data": DATA["id"],
        "status": status,
        "plan": plan,
        "learning_rate": rate,
        "held_out_edu": loss,
        "tokens": 1e8,
        "tokens_per_second": speed,
        "seed": 0,
        "commit": "new",
        "device": "H100",
        "runs_per_gpu": 1,
    }


def all_swept(base="30m.yaml", best=2e-3):
    """A finished sweep of every family, in which `best` is best."""
    base = yaml.safe_load((PLANS / base).read_text())
    rates = (1e-3, 2e-3, 4e-3)
    return [swept(n, rate, 3.0 + abs(rate - best), size=base["size"]) for n in base["variants"] for rate in rates]
