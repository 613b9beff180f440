"""Which runs a plan makes, and which of them runs.csv does not have."""

import hashlib
import json
import statistics
from pathlib import Path

import yaml

from complexity_deep.workflow.command import InputError, shipped

EQUAL_TOKENS = ("headline", "ablations")  # plans whose rows stand in one table
IDENTITY = ("variant", "seed", "size", "tokens", "learning_rate", "settings")  # of a run, whatever came of it
DONE = ("ok", "diverged")
FIELDS = ("base", "variants", "tokens", "learning_rates", "seeds")  # of a plan, and those that it may have:
OPTIONS = ("equal_seconds_to", "learning_rate_factors", "repeat_data")
BASE = ("size", "shape", "training", "variants")  # of the file of variants that a plan names
WHOLE_RATES = "whole_rates"  # the plan that tries rates in whole runs
WHOLE = (WHOLE_RATES, *EQUAL_TOKENS, "scaling")  # plans whose runs have its length
MARGIN = 0.02  # nats: two whole runs that differ in their seed alone are seldom further apart
SWEEP, SWEPT = "learning_rates", "swept"  # the plan that tries rates, and the rates of a plan that takes the best
FEWEST_RATES = 3  # tried, diverged ones too, before a sweep says which is best
SMOKE_SHARE = 4e-5  # of a plan's tokens
MUON = "muon"  # as the optimizer of a variant; one that names none takes AdamW


def read_yaml(path: Path) -> dict:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"'{path}' is not a readable YAML file ({error}).") from None


def read_plan(path: Path) -> dict:
    """The fields of a plan. Raises `InputError` for one that is missing, unknown or of another kind."""
    plan = read_yaml(path)
    if not isinstance(plan, dict):
        raise InputError(f"{path} is no plan, for it has no fields.")
    missing, unknown = [n for n in FIELDS if n not in plan], [n for n in plan if n not in FIELDS + OPTIONS]
    wrong = [f"lacks {', '.join(missing)}"] if missing else []
    wrong += [f"has {', '.join(map(str, unknown))}, which no plan has"] if unknown else []
    if wrong:
        raise InputError(
            f"{path} {' and '.join(wrong)}: its fields are {', '.join(FIELDS)}, and if needed {', '.join(OPTIONS)}."
        )
    if plan["learning_rates"] != SWEPT:
        check_numbers(path, "learning_rates", plan["learning_rates"])
    check_numbers(path, "tokens", [plan["tokens"]])
    check_numbers(path, "learning_rate_factors", plan.get("learning_rate_factors", [1]))
    for name, kind in (("variants", str), ("seeds", int)):
        if not isinstance(plan[name], list) or not all(type(value) is kind for value in plan[name]) or not plan[name]:
            raise InputError(f"{path} needs a list for {name}, of {'names' if kind is str else 'whole numbers'}.")
    if min(plan["seeds"]) < 0:
        raise InputError(f"{path} has the seed {min(plan['seeds'])}, but a seed is 0 or more.")
    return plan


def read_base(plan_path: Path, name) -> dict:
    """The file of variants that a plan names. Raises `InputError` for one that is none."""
    path = plan_path.parent / str(name)
    base = read_yaml(path)
    fields = base if isinstance(base, dict) else {}
    missing = [field for field in BASE if not isinstance(fields.get(field), str if field == "size" else dict)]
    if missing:
        raise InputError(f"'{path}', the base of {plan_path}, is no file of variants: it lacks {', '.join(missing)}.")
    for variant, described in base["variants"].items():
        if not isinstance(described, dict) or not {"family", "config"} <= described.keys():
            raise InputError(f"The variant '{variant}' of '{path}' needs a family and a config.")
    return base


def check_numbers(path: Path, name: str, values) -> None:
    try:
        is_right = isinstance(values, list) and values and all(0 < float(value) < float("inf") for value in values)
    except (TypeError, ValueError):
        is_right = False
    if not is_right:
        raise InputError(f"{path} has {name} that are no numbers above 0.")


def expand(
    plan_path: Path, rows: list[dict], data: dict, only: list[str] | None = None, repeat: bool = False
) -> list[dict]:
    """The runs of a plan, seed by seed; `rows` are those of runs.csv and `data` the contents of data.json.

    `only` names the variants that are asked for, None for all. With `repeat` they are those that runs.csv has on these
    token files, at the rates and lengths that they had, which sweeps and speeds may have left since.

    Raises `InputError` for a plan that cannot be read, and for one that needs runs which runs.csv does not have yet.
    """
    plan = read_plan(plan_path)
    base = read_base(plan_path, plan["base"])
    # Of any token files: a rate and a speed that were found on others of the same size and text hold for these too.
    known = [row for row in rows if row["size"] == base["size"] and row["status"] in DONE]
    unknown = [name for name in plan["variants"] if name not in base["variants"]]
    if unknown:
        raise InputError(f"{plan_path} names {', '.join(unknown)}, which {plan['base']} does not have.")
    runs = []
    for seed in plan["seeds"]:
        for name in plan["variants"]:
            if only and name not in only:
                continue  # before its rate and its speed are looked up
            variant = base["variants"][name]
            check_optimizer(name, variant)
            run = {
                "variant": name,
                "seed": seed,
                "size": base["size"],
                "data": data["id"],
                "config": {**base["shape"], **variant["config"]},
                "init": variant.get("init", "default"),
                "freeze_mlp": variant.get("freeze_mlp", False),
                "balance_loss": variant.get("balance_loss", 0.0),
                **base["training"],
                "plan": plan_path.stem,
            }
            if "optimizer" in variant:  # not in the settings of runs with AdamW
                run["optimizer"] = variant["optimizer"]
            if plan.get("repeat_data"):  # not in the settings of runs that take a single pass
                run["repeat_data"] = True
            made = rates_and_lengths_made(run, rows) if repeat else rates_and_lengths(plan, name, base, known)
            for rate, tokens in made:
                runs.append({**run, "learning_rate": rate, "tokens": tokens})
    return runs


def rates_and_lengths(plan: dict, name: str, base: dict, known: list[dict]) -> list[tuple[float, float]]:
    """The rates at which a plan trains a variant of `base`, each with the number of tokens."""
    rates, tokens = plan["learning_rates"], float(plan["tokens"])
    if rates == SWEPT:
        rates = [swept_rate(base["variants"][name]["family"], base, known)]
    if reference := plan.get("equal_seconds_to"):
        tokens *= speed(name, known, reference) / speed(reference, known, reference)
    factors = plan.get("learning_rate_factors", [1])
    return [(float(rate) * float(factor), tokens) for rate in rates for factor in factors]


def rates_and_lengths_made(run: dict, rows: list[dict]) -> list[tuple[float, float]]:
    """Those of the rows that there are of a run, on its token files, failed ones too."""
    names = ("plan", "variant", "seed", "size", "data")
    own = [row for row in rows if all(row[name] == run[name] for name in names)]
    return list(dict.fromkeys((row["learning_rate"], row["tokens"]) for row in own))


def runs_of(
    plans: list[str],
    rows: list[dict],
    data: dict,
    only: list[str] | None = None,
    seeds: list[int] | None = None,
    tokens: float | None = None,
    smoke: bool = False,
    repeat: bool = False,
) -> list[dict]:
    """The finished descriptions of the runs of several plans, those of some variants and seeds alone if they are named.

    Runs of another length, `tokens`, get a plan of their own, for they belong in no table of the plan's. With `repeat`
    they are those that runs.csv has, as they were. Raises `InputError` for names and seeds that the plans do not have,
    and where no run is left.
    """
    plans = [shipped(plan) for plan in plans]
    for option, names, field in (("--only", only, "variants"), ("--seeds", seeds, "seeds")):
        planned = {name for plan in plans for name in read_plan(Path(plan))[field]}
        if unknown := [str(name) for name in names or () if name not in planned]:
            raise InputError(f"{option} names {', '.join(unknown)}, which no plan of {', '.join(plans)} has.")
    runs = []
    for plan in plans:
        for run in expand(Path(plan), rows, data, only, repeat):
            if tokens:
                run |= {"tokens": tokens, "plan": f"{run['plan']} of {tokens:g} tokens"}
            runs.append(finish(run, smoke))
    runs = [run for run in runs if seeds is None or run["seed"] in seeds]
    if not runs:
        smoke = ", for those of --smoke do not count" if smoke else ""
        found = f"runs.csv has no such run on these token files{smoke}: leave --repeat out." if repeat else None
        raise InputError(found or "No plan has a run of both --only and --seeds.")
    return runs


def check_optimizer(name: str, variant: dict) -> None:
    """Raise `InputError` for an unknown optimizer, and where the name of a variant, by which rows are told apart and
    put together, does not say it."""
    optimizer = variant.get("optimizer")
    if optimizer not in (None, MUON):
        raise InputError(f"The variant '{name}' has the optimizer '{optimizer}', but only {MUON} can be named.")
    if (optimizer == MUON) != name.endswith(f"_{MUON}"):
        raise InputError(f"'{name}' must have optimizer: {MUON} if its name ends with _{MUON}, and only then.")


def sweep_of(rows: list[dict], variants: list[str]) -> dict[float, list[dict]]:
    """Rows of the sweep of some variants by rate, one for each seed, from one set of token files.

    It is the set with most rates, the newest of equals: losses on two do not compare. A run that was repeated counts
    once, as it came out last.
    """
    found: dict[str, dict[float, dict]] = {}
    for row in rows:
        if row["plan"] == SWEEP and row["variant"] in variants and row["status"] in DONE:
            rates = found.setdefault(row["data"], {})
            rates.setdefault(row["learning_rate"], {})[row["variant"], row["seed"]] = row
    best = max(reversed(found.values()), key=len, default={})
    return {rate: list(last.values()) for rate, last in sorted(best.items())}


def losses_of(sweep: dict[float, list[dict]]) -> dict[float, float]:
    """The mean loss on the held-out educational text at each rate of `sweep_of` at which no run diverged."""
    return {
        rate: statistics.mean(row["held_out_edu"] for row in tried)
        for rate, tried in sweep.items()
        if all(row["status"] == "ok" for row in tried)
    }


def best_of_sweep(rows: list[dict], variants: list[str]) -> float | None:
    """The rate with the lowest of `losses_of`; None where fewer than `FEWEST_RATES` were tried, or all diverged."""
    sweep = sweep_of(rows, variants)
    losses = losses_of(sweep)
    return min(losses, key=losses.get) if losses and len(sweep) >= FEWEST_RATES else None


def whole_runs(rows: list[dict]) -> dict[tuple[str, str, int, float], dict[float, dict]]:
    """Whole runs by variant, token files, seed and tokens, then by rate: the last of each, if one is of `WHOLE_RATES`.

    `rows` are of one size.
    """
    found: dict[tuple[str, str, int, float], dict[float, dict]] = {}
    for row in rows:
        if row["plan"] in WHOLE and row["status"] in DONE:
            key = row["variant"], row["data"], row["seed"], row["tokens"]
            found.setdefault(key, {})[row["learning_rate"]] = row
    return {key: runs for key, runs in found.items() if any(row["plan"] == WHOLE_RATES for row in runs.values())}


def most_rates(rows: list[dict], variants: list[str]) -> dict[float, dict]:
    """Those of `whole_runs` of some variants that have most rates, the newest of equals, by rate."""
    found = [runs for (variant, *_), runs in whole_runs(rows).items() if variant in variants]
    return max(reversed(found), key=len, default={})


def swept_rate(family: str, base: dict, rows: list[dict]) -> float:
    """The best rate of a family, by the mean loss on the held-out educational text; none diverged at it.

    It is that of the sweep, unless whole runs at it and at others were made, and another ends more than `MARGIN` lower
    or it diverged: what is best for a quarter of the length need not be for all of it. Without a sweep, whole runs
    alone say it.
    """
    variants = [name for name, variant in base["variants"].items() if variant["family"] == family]
    best, whole = best_of_sweep(rows, variants), most_rates(rows, variants)
    ended = {rate: row["held_out_edu"] for rate, row in sorted(whole.items()) if row["status"] == "ok"}
    lowest = min(ended, key=ended.get, default=None)
    if lowest and (best in whole or (best is None and len(whole) >= FEWEST_RATES)):
        return best if best in ended and ended[lowest] >= ended[best] - MARGIN else lowest
    if best:
        return best
    sweep = sweep_of(rows, variants)
    raise InputError(
        f"The family '{family}' has no swept learning rate yet, for {len(sweep)} rates were tried on one set of "
        f"token files and {len(losses_of(sweep))} of them ended: run {SWEEP}.yaml or {WHOLE_RATES}.yaml first. "
        "Those of --smoke do not count."
    )


def rate_by_now(variant: str, base: dict, rows: list[dict]) -> float | None:
    """The rate that a variant of `base` would be trained at; None where its family has no sweep yet."""
    try:
        return swept_rate(base["variants"][variant]["family"], base, rows)
    except (InputError, KeyError):  # the latter is a variant that was taken out of `base`
        return None


def speed(variant: str, rows: list[dict], reference: str) -> float:
    """Tokens a second of a variant that had its GPU to itself."""
    measured = newest_speeds(rows, reference)
    if variant not in measured:
        raise InputError(
            f"The speed of '{variant}' is not measured by the commit and on the GPU that '{reference}' was last "
            "measured with: run speed.yaml first, with --runs-per-gpu 1."
        )
    return measured[variant]


def newest_speeds(rows: list[dict], reference: str) -> dict[str, float]:
    """Tokens a second by variant, of runs that had their GPU to themselves.

    They are those of the commit and the kind of GPU that `reference` was last measured with: others do not compare.
    """
    alone = [r for r in rows if r["plan"] == "speed" and r["status"] == "ok" and r["runs_per_gpu"] == 1]
    last = [(row["commit"], row["device"]) for row in alone if row["variant"] == reference][-1:]
    return {row["variant"]: row["tokens_per_second"] for row in alone if (row["commit"], row["device"]) in last}


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
        run.update(size=f"{run['size']} smoke", row_length=64, rows_per_step=2, tokens=run["tokens"] * SMOKE_SHARE)
    step = run["row_length"] * run["rows_per_step"]
    run["tokens"] = int(run["tokens"] // step * step)
    described = {name: value for name, value in run.items() if name != "plan"}
    run["settings"] = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:10]
    return run


def name_of(run: dict) -> str:
    """What its log and its saved model are called."""
    return f"{run['plan']}-{run['variant']}-{run['seed']}-{run['settings']}"


def identity(run: dict) -> tuple:
    return tuple(str(run[name]) for name in IDENTITY)


def check_length(run: dict, data: dict) -> None:
    """Raise `InputError` for a finished description of a run whose tokens are too few to train on, or not there."""
    step = run["row_length"] * run["rows_per_step"]
    rows = data["files"]["train"]["tokens"] // run["row_length"]
    if run["tokens"] < 2 * step:
        share = f", for --smoke takes 1/{round(1 / SMOKE_SHARE):,} of the plan's"
        smoke = share if run["size"].endswith(" smoke") else ""
        raise InputError(
            f"'{run['variant']}' needs 2 steps of {step:,} tokens or more, and gets {run['tokens']:,}{smoke}."
        )
    if run["tokens"] // run["row_length"] > rows and not run.get("repeat_data"):
        raise InputError(
            f"'{run['variant']}' takes {run['tokens']:,} tokens, but the token files have {rows:,} rows of "
            f"{run['row_length']:,}: prepare more, or set repeat_data in the plan."
        )


def missing_of(runs: list[dict], rows: list[dict]) -> list[dict]:
    """The runs, each once, that no row of runs.csv has finished for the table that the plan fills.

    A run of the sweep is no run of the stability plan, though they may be alike: each table reads rows of its own. That
    of rates at the whole length reads the rows of every plan that has it.
    """

    def key(run: dict, plan: str) -> tuple:
        return *identity(run), EQUAL_TOKENS[0] if plan in EQUAL_TOKENS else plan

    finished = {key(row, row["plan"]) for row in rows if row["status"] in DONE}

    def is_finished(run: dict) -> bool:
        plans = WHOLE if run["plan"] == WHOLE_RATES else (run["plan"],)
        return any(key(run, plan) in finished for plan in plans)

    return list({key(run, run["plan"]): run for run in runs if not is_finished(run)}.values())
