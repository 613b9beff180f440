"""Which runs a plan makes, and which of them runs.csv does not have."""

import hashlib
import json
from pathlib import Path

import yaml

from complexity_deep.workflow.command import InputError

IDENTITY = ("variant", "seed", "size", "tokens", "learning_rate", "settings")  # of a run, whatever came of it
DONE = ("ok", "diverged")
MUON = "muon"  # as the optimizer of a variant; one that names none takes AdamW


class PlanError(InputError):
    """A plan that cannot be run; the message is one sentence for the person who gave it."""


def read_yaml(path: Path) -> dict:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise PlanError(f"'{path}' is not a readable YAML file ({error}).") from None


def expand(plan_path: Path, rows: list[dict], data: dict, only: list[str] | None = None) -> list[dict]:
    """The runs of a plan, seed by seed; `rows` are those of runs.csv and `data` the contents of data.json.

    `only` names the variants that are asked for, None for all.

    Raises `PlanError` for an unknown variant, and for a plan that needs runs which runs.csv does not have yet.
    """
    plan = read_yaml(plan_path)
    base = read_yaml(plan_path.parent / plan["base"])
    # Of any token files: a rate and a speed that were found on others of the same size and text hold for these too.
    known = [row for row in rows if row["size"] == base["size"] and row["status"] == "ok"]
    unknown = [name for name in plan["variants"] if name not in base["variants"]]
    if unknown:
        raise PlanError(f"{plan_path} names {', '.join(unknown)}, which {plan['base']} does not have.")
    runs = []
    for seed in plan["seeds"]:
        for name in plan["variants"]:
            if only and name not in only:
                continue  # before its rate and its speed are looked up
            variant = base["variants"][name]
            check_optimizer(name, variant)
            rates = plan["learning_rates"]
            if rates == "swept":
                rates = [swept_rate(variant["family"], base, known)]
            tokens = float(plan["tokens"])
            if reference := plan.get("equal_seconds_to"):
                tokens *= speed(name, known, reference) / speed(reference, known, reference)
            for rate in rates:
                for factor in plan.get("learning_rate_factors", [1]):
                    run = {
                        "variant": name,
                        "seed": seed,
                        "size": base["size"],
                        "tokens": tokens,
                        "learning_rate": float(rate) * factor,
                        "data": data["id"],
                        "config": {**base["shape"], **variant["config"]},
                        "init": variant.get("init", "default"),
                        "freeze_mlp": variant.get("freeze_mlp", False),
                        "balance_loss": variant.get("balance_loss", 0.0),
                        **base["training"],
                    }
                    if "optimizer" in variant:  # not in the settings of runs with AdamW
                        run["optimizer"] = variant["optimizer"]
                    if plan.get("repeat_data"):  # not in the settings of runs that take a single pass
                        run["repeat_data"] = True
                    runs.append({**run, "plan": plan_path.stem})
    return runs


def check_optimizer(name: str, variant: dict) -> None:
    """Raise `PlanError` for an unknown optimizer, and where the name of a variant, by which rows are told apart and
    put together, does not say it."""
    optimizer = variant.get("optimizer")
    if optimizer not in (None, MUON):
        raise PlanError(f"The variant '{name}' has the optimizer '{optimizer}', but only {MUON} can be named.")
    if (optimizer == MUON) != name.endswith(f"_{MUON}"):
        raise PlanError(f"'{name}' must have optimizer: {MUON} if its name ends with _{MUON}, and only then.")


def swept_rate(family: str, base: dict, rows: list[dict]) -> float:
    """The rate of a family's sweep with the lowest mean loss on the held-out educational text."""
    losses = {}
    for row in rows:
        if row["plan"] == "learning_rates" and base["variants"].get(row["variant"], {}).get("family") == family:
            losses.setdefault(row["learning_rate"], []).append(row["held_out_edu"])
    if not losses:
        raise PlanError(f"The family '{family}' has no swept learning rate yet: run learning_rates.yaml first.")
    return min(losses, key=lambda rate: sum(losses[rate]) / len(losses[rate]))


def speed(variant: str, rows: list[dict], reference: str) -> float:
    """Tokens a second of a variant that had its GPU to itself."""
    measured = newest_speeds(rows, reference)
    if variant not in measured:
        raise PlanError(
            f"The speed of '{variant}' is not measured by the commit that '{reference}' was last measured with: "
            "run speed.yaml first."
        )
    return measured[variant]


def newest_speeds(rows: list[dict], reference: str) -> dict[str, float]:
    """Tokens a second by variant, of the newest commit that `reference` was measured with: others do not compare."""
    rows = [row for row in rows if row["plan"] == "speed" and row["status"] == "ok"]
    commits = [row["commit"] for row in rows if row["variant"] == reference]
    return {row["variant"]: row["tokens_per_second"] for row in rows if row["commit"] in commits[-1:]}


def finish(run: dict, smoke: bool) -> dict:
    """The run as it will be trained: a whole number of steps, the toy size if asked for, and a hash of everything."""
    run = {**run, "config": dict(run["config"])}
    if smoke:
        config = run["config"]
        widths = [n for n in config if n.endswith("intermediate_size")]
        config.update({n: config[n] // 16 for n in [*widths, "hidden_size"]})
        config.update(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
        config.update({"head_dim": 16} if "head_dim" in config else {})
        config.update({"value_embedding_layers": [1]} if "value_embedding_layers" in config else {})
        run.update(size=f"{run['size']} smoke", row_length=64, rows_per_step=2, tokens=run["tokens"] * 4e-5)
    step = run["row_length"] * run["rows_per_step"]
    run["tokens"] = int(run["tokens"] // step * step)
    described = {name: value for name, value in run.items() if name != "plan"}
    run["settings"] = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:10]
    return run


def identity(run: dict) -> tuple:
    return tuple(str(run[name]) for name in IDENTITY)


def missing_of(runs: list[dict], rows: list[dict]) -> list[dict]:
    """The runs, each once, that no row of runs.csv has finished."""
    finished = {identity(row) for row in rows if row["status"] in DONE}
    return list({identity(run): run for run in runs if identity(run) not in finished}.values())
