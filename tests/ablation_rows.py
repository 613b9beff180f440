"""Made-up rows of runs.csv."""

from complexity_deep.workflow.evidence.ablation_results import FIELDS


def finished(variant, seed, edu, plan="headline", **changes):
    row = {name: None for name in FIELDS}
    row |= {"variant": variant, "seed": seed, "size": "30m", "status": "ok", "plan": plan, "learning_rate": 1e-3}
    row |= {"held_out_edu": edu, "held_out_books": edu + 1, "parameters": 2e6, "active_parameters": 1e6, "tokens": 1e8}
    row |= {"data": "first", "commit": "new", "runs_per_gpu": 1}
    row |= {"curve": [[t, edu + 1 / t, edu + 1] for t in range(1, 9)], "device": "H100", "versions": "torch"}
    return row | {"spikes": 0, "max_grad_norm": 1.0} | changes
