"""docs/evidence/scaling.md: seeds, tokens, GPU hours and money that a comparison at 1.5b would take, on paper."""

import csv
import math
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from scipy import stats
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from complexity_deep.workflow.evidence.ablation_plan import newest_speeds, read_yaml
from complexity_deep.workflow.evidence.ablation_report import (
    CONFIDENCE,
    NOT_MEASURED,
    TEXTS,
    best_of,
    by_data,
    column,
    difference,
    most_candidates,
    old_rates,
)
from complexity_deep.workflow.evidence.scaling import LARGE, SCALING, SIZES, pooled_variance
from complexity_deep.workflow.flops import active_parameters, flops_per_token, total_parameters
from complexity_deep.workflow.markdown_table import table
from complexity_deep.workflow.provenance import REPOSITORY

PRICE_PER_GPU_HOUR = 2.5  # US dollars for an H100: an assumption, the only one of the page about money
POWER = 0.80
TOKENS_PER_PARAMETER = 20  # about what Hoffmann et al. (2022) found best for dense models
SWEEP = 4 * 0.25  # of a run: the rates of learning_rates.yaml, each at a quarter of the length
BYTES_PER_PARAMETER = 16  # fp32 weight, gradient and the two moments of AdamW
GPU_GIB = 80  # of an H100
TEXT = "held_out_edu"  # which the study chooses by
CASE, ROW_LENGTH = "1.5b 8x2048 step", 2048
OURS, DENSE = "complexity-deep, sdpa, compiled", "llama, sdpa, compiled"
MOST_SEEDS = 1000
COMPARED = ("headline", "scaling")  # plans of candidates and controls


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def power_of(seeds: int, distance: float, deviation: float) -> float:
    """Chance that a two-sided t test of two groups of `seeds` runs finds a true `distance` between their means.

    Finding it with the wrong sign does not count.
    """
    freedom = 2 * seeds - 2
    threshold = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    shift = distance / (deviation * math.sqrt(2 / seeds))
    return float(stats.nct.sf(threshold, freedom, shift))


def seeds_needed(distance: float, deviation: float) -> int | None:
    """Seeds of each variant that tell a difference from 0; None for more than `MOST_SEEDS`."""
    return next((n for n in range(2, MOST_SEEDS + 1) if power_of(n, distance, deviation) >= POWER), None)


class Spread(NamedTuple):
    """Standard deviation of runs that differ in their seed alone, its degrees of freedom, and an upper bound of it."""

    deviation: float
    freedom: int

    @property
    def upper(self) -> float:
        """The one-sided bound at `CONFIDENCE`."""
        return self.deviation * math.sqrt(self.freedom / float(stats.chi2.ppf(1 - CONFIDENCE, self.freedom)))

    def half_width(self, seeds: int) -> float:
        """Half the interval of a difference between two variants of `seeds` runs each, if all spread alike."""
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom)) * self.deviation * math.sqrt(2 / seeds)


def spread_of_seeds(rows: list[dict], text: str) -> Spread | None:
    """Pooled over the candidates and controls in `rows`, which are of one size, and their token files.

    None without repeats. An ablation may train unsteadily, which says nothing of the runs that are to be compared.
    """
    groups = [
        column(found, text)
        for plans in (COMPARED, LARGE)
        for runs in by_data(rows, plans).values()
        for found in runs.values()
    ]
    variance, freedom = pooled_variance(groups)
    return Spread(math.sqrt(variance), freedom) if freedom else None


def newest_steps(path: Path) -> dict[str, dict]:
    """The last row of each variant of `CASE` on an H100."""
    if not path.exists():  # an installed package has no measurements
        return {}
    with path.open(newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file) if row["case"] == CASE and "H100" in row["device"]}


def empty_model(shape: dict) -> PreTrainedModel:
    """A model of the shape without memory for its weights."""
    shape = dict(shape)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape))


def scaled_shape(shape: dict, base: dict, config: dict) -> dict:
    """`shape` with the changes of a variant of `base`: widths in proportion to intermediate_size, and value embeddings
    in every second layer."""
    changes = dict(config)
    for name in changes:
        if name.endswith("intermediate_size"):
            changes[name] = changes[name] * shape["intermediate_size"] // base["shape"]["intermediate_size"]
    if "value_embedding_layers" in changes:
        changes["value_embedding_layers"] = list(range(1, shape["num_hidden_layers"], 2))
    return {**shape, **changes}


class Arm(NamedTuple):
    """One of the compared models: what it is called, where its speed comes from, and that in tokens a second."""

    name: str
    source: str
    tokens_per_second: float

    def gpu_hours(self, tokens: float) -> float:
        return tokens / self.tokens_per_second / 3600


def arms_of(steps: dict[str, dict], ours: PreTrainedModel, speeds: dict[str, float], candidate: str) -> list[Arm]:
    """The candidate, where its speed is known, the published shape and the two dense controls."""
    speed = float(steps[OURS]["tokens_per_s"])
    arms = [Arm("1.5b.json", "measured", speed)]
    if {"v0", candidate} <= speeds.keys():
        ratio = speeds[candidate] / speeds["v0"]
        arms.insert(0, Arm(candidate, f"1.5b.json, times {ratio:.3f}, which it runs at of `v0` at 30m", speed * ratio))
    rate = float(steps[DENSE]["tflops"])
    dense = rate * 1e12 / flops_per_token(ours, ROW_LENGTH)
    arms += [Arm("dense, equal active size", f"from {rate:.0f} TFLOP/s of Llama and the FLOPs of 1.5b.json", dense)]
    return [*arms, Arm("dense, equal total width", "Llama, measured", float(steps[DENSE]["tokens_per_s"]))]


class Best(NamedTuple):
    """The candidate with the lowest mean loss at a size, and its difference to the reference in nats."""

    variant: str
    reference: str
    difference: float
    data: str  # id of the token files
    tokens_per_parameter: float  # training tokens for each active parameter
    seeds: tuple[int, int]  # of the candidate and of the reference
    left: tuple[float, float] | None  # the rate of the reference's runs and a better one, where one was found since


def best_candidate(rows: list[dict], base: dict, text: str) -> Best | None:
    """At equal tokens, of the token files with most candidates; None where none has runs of both."""
    name = base["reference"]
    found = by_data(rows, SCALING)
    data, choices = most_candidates(found, name, base["candidates"])
    if not choices:
        return None
    best = best_of(found[data], choices, text)
    distance, _ = difference(column(found[data][best], text), column(found[data][name], text))
    run = found[data][best][0]
    left = old_rates(rows, data, SCALING, base).get(name)
    seeds = len(found[data][best]), len(found[data][name])
    return Best(best, name, distance, data, run["tokens"] / run["active_parameters"], seeds, left)


def tell_table(distance: float, spread: Spread, hours: float, sweep_hours: float) -> list[str]:
    """Seeds, GPU hours and money for the distance and parts of it, with the spread as it is and at its upper bound.

    `hours` are those of one run of every compared model, `sweep_hours` those of their learning rates.
    """
    header = ["true difference, nats", "seeds each", "GPU hours", "US dollars"]
    header += [f"{name}, at the upper bound" for name in header[1:]]
    lines = []
    for part in (1, 1 / 2, 1 / 4, 1 / 8):
        cells = [f"{distance * part:.3f}"]
        for deviation in (spread.deviation, spread.upper):
            seeds = seeds_needed(distance * part, deviation)
            needed = None if seeds is None else seeds * hours + sweep_hours
            cells += [f"over {MOST_SEEDS}"] if seeds is None else [str(seeds)]
            cells += ["", ""] if needed is None else [f"{needed:,.0f}", f"{needed * PRICE_PER_GPU_HOUR:,.0f}"]
        lines.append(cells)
    return table(header, lines)


def paragraph(*sentences: str, mark: str = "") -> list[str]:
    """Lines of running text, or with a mark those of a list's item."""
    return textwrap.wrap(mark + " ".join(sentences), 120, subsequent_indent=" " * len(mark), break_on_hyphens=False)


def spread_lines(spreads: dict[str, dict[str, Spread]]) -> list[str]:
    header = ["size", "degrees of freedom", *(f"{title}, nats" for title in TEXTS.values())]
    described = []
    for size, found in spreads.items():
        cells = [f"{found[text].deviation:.4f} (at most {found[text].upper:.4f})" for text in TEXTS]
        described.append([size, str(found[TEXT].freedom), *cells])
    before = paragraph(
        "Standard deviation of the held-out loss between runs that differ in their seed alone, pooled over the",
        "candidates and controls with several seeds in [runs.csv](runs.csv), and its one-sided",
        f"{percent(CONFIDENCE)} bound.",
    )
    size, found = list(spreads.items())[-1]
    widths = " and ".join(f"{found[text].half_width(2):.3f} on {title}" for text, title in TEXTS.items())
    after = paragraph(
        f"If all variants spread alike, the {percent(CONFIDENCE)} interval of a difference between two of them with",
        f"two seeds each reaches {widths} to each side at {size}. Welch's intervals in the study do not assume that,",
        "and with two seeds they are often several times as wide; verdicts are by Welch's, as the plan says.",
    )
    return ["## Spread of seeds", "", *before, "", *table(header, described), "", *after, ""]


def speed_lines(arms: list[Arm], steps: dict[str, dict], active: int) -> list[str]:
    tokens = TOKENS_PER_PARAMETER * active
    described = []
    for arm in arms:
        hours = arm.gpu_hours(tokens)
        cells = [arm.name, arm.source, f"{arm.tokens_per_second:,.0f}", f"{hours:,.0f}", f"{hours / 8 / 24:.1f}"]
        described.append([*cells, f"{hours * PRICE_PER_GPU_HOUR:,.0f}"])
    header = ["model", "speed from", "tokens/s", "GPU hours a run", "days on 8 GPUs", "US dollars a run"]
    commits = " and ".join(dict.fromkeys(f"`{steps[name]['commit']}`" for name in (OURS, DENSE)))
    before = paragraph(
        f"`configs/1.5b.json` has {active / 1e6:,.0f}M active parameters, its tied embedding included, so that",
        f"{TOKENS_PER_PARAMETER} tokens for each are {tokens / 1e9:.1f}B tokens; every model gets as many. Speeds are",
        f"those of one {steps[OURS]['device']} in training steps of 8 rows of {ROW_LENGTH:,} tokens, AdamW",
        f"included and with bf16 weights, the newest of [results.csv](../../benchmarks/results.csv) (commit {commits},",
        f"{steps[OURS]['date'][:10]}).",
    )
    after = paragraph(
        f"A GPU hour is taken to cost {PRICE_PER_GPU_HOUR:.2f} US dollars, which is an assumption and not a",
        "measurement. Days are without any loss from spreading a run over 8 GPUs.",
    )
    rows = table(header, described, text_columns=2)
    return ["## Speed and length of a run", "", *before, "", *rows, "", *after, ""]


def seeds_lines(best: Best, size: str, spread: Spread, compared: list[Arm], hours: float) -> list[str]:
    text = paragraph(
        f"At {size}, `{best.variant}` is {best.difference:+.3f} nats from `{best.reference}` on {TEXTS[TEXT]}",
        f"({best.seeds[0]} and {best.seeds[1]} seeds, token files {best.data}). The table takes that, and parts of it,",
        "as the true difference at 1.5b. It says how many",
        f"seeds of each model let a two-sided t test tell it from 0 at {percent(CONFIDENCE)} with a chance of",
        f"{percent(POWER)}, if seeds spread as they did at {size}, and if they spread as widely as the upper bound of",
        f"that says. Two seeds are the fewest that have a spread. GPU hours are those of all seeds of {len(compared)}",
        f"models ({'; '.join(arm.name for arm in compared)}), and of a sweep of the learning rate for each, which",
        f"takes as many tokens as {SWEEP:g} run.",
    )
    rows = tell_table(abs(best.difference), spread, hours, SWEEP * hours)
    return ["## Seeds", "", *text, "", *rows, ""]


def limit_lines(best: Best, size: str, freedom: int, parameters: int) -> list[str]:
    gib = parameters * BYTES_PER_PARAMETER / 2**30
    left = []
    if best.left:
        had, now = best.left
        left = [f"And `{best.reference}` had a rate of {had:g} there, where {now:g} is found best by now."]
    fits = "which fit" if gib < GPU_GIB else "which do not fit"
    items = [
        (f"The spread of seeds at 1.5b. It is that of {size} here, on {freedom} degrees of freedom.",),
        (
            f"The difference at 1.5b. The runs at {size} saw {best.tokens_per_parameter:.1f} tokens for each active",
            f"parameter, not {TOKENS_PER_PARAMETER}, and models that are trained for longer may differ by less or by",
            "more. It is also that of the best of several candidates, which choosing it makes too large.",
            *left,
        ),
        (
            f"The speed of `{best.variant}` at 1.5b, which was not measured. It would have {parameters / 1e9:.1f}B",
            f"parameters; their weights, gradients and AdamW moments in fp32 are {gib:,.0f} GiB, {fits} one GPU of",
            f"{GPU_GIB} GiB. What spreading them over several costs, and AdamW over that many, is not in its row.",
        ),
        ("The cost of fp32 weights under bf16 autocast, as a training run has them, over these steps in bf16.",),
        ("The text. So many tokens are not prepared here, and the estimate assumes that none is repeated.",),
    ]
    return ["## What this does not know", "", *(line for item in items for line in paragraph(*item, mark="- "))]


def estimate_lines(rows: list[dict], recipes: Path, results: Path, config: Path) -> list[str]:
    """The page without its title; "Not measured yet." where what it is computed from is missing."""
    of_size = {size: [row for row in rows if row["size"] == size] for size in SIZES}
    spreads = {size: {text: spread_of_seeds(own, text) for text in TEXTS} for size, own in of_size.items()}
    spreads = {size: found for size, found in spreads.items() if found[TEXT]}
    steps = newest_steps(results)
    if not spreads or not {OURS, DENSE} <= steps.keys() or not config.exists():
        return [NOT_MEASURED]
    found = {size: best_candidate(of_size[size], read_yaml(recipes / f"{size}.yaml"), TEXT) for size in spreads}
    measured = [size for size, best in found.items() if best]
    if not measured:
        return [NOT_MEASURED]
    repeated = [size for size in measured if min(found[size].seeds) > 1]
    size = (repeated or measured)[-1]  # the largest
    best = found[size]
    small, shape = read_yaml(recipes / "30m.yaml"), read_yaml(config)  # JSON is YAML
    ours, candidate = (
        empty_model(scaled_shape(shape, small, changes)) for changes in ({}, small["variants"][best.variant]["config"])
    )
    active, spread = active_parameters(ours), spreads[size][TEXT]
    arms = arms_of(steps, ours, newest_speeds(of_size["30m"], small["reference"]), best.variant)
    compared = arms if len(arms) == 3 else [arms[0], *arms[2:]]  # the candidate in the place of the published shape
    hours = sum(arm.gpu_hours(TOKENS_PER_PARAMETER * active) for arm in compared)
    lines = [*spread_lines(spreads), *speed_lines(arms, steps, active)]
    lines += seeds_lines(best, size, spread, compared, hours)
    return [*lines, *limit_lines(best, size, spread.freedom, total_parameters(candidate))]


def write_estimate(output: Path, rows: list[dict], recipes: str) -> str:
    """Write scaling.md into `output`; returns what it is made of."""
    page = ["# What it would take to tell at 1.5b", ""]
    page += [
        "An estimate on paper: nothing of that size was trained for it. Written by `python scripts/ablate.py report`;"
    ]
    page += ["the runs that there are, all of them far smaller, are in the [study](../evidence.md).", ""]
    results, config = REPOSITORY / "benchmarks/results.csv", REPOSITORY / "configs/1.5b.json"
    (output / "scaling.md").write_text("\n".join([*page, *estimate_lines(rows, Path(recipes), results, config)]) + "\n")
    return f"from {len(rows)} runs"
