"""docs/evidence/claims.md: what the preprints and the published card claim, and what the rows of runs.csv say of it."""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from complexity_deep.workflow.evidence.ablation_plan import MARGIN, read_yaml
from complexity_deep.workflow.evidence.balance import read_balance
from complexity_deep.workflow.evidence.claim_measures import (
    BALANCED,
    FAILS,
    HOLDS,
    IN_PART,
    NOT_TESTABLE,
    OPEN,
    SPEEDUP,
    CorpusBalance,
    LossDifference,
    Measure,
    NormGrowth,
    ShiftCost,
    Speedup,
    Study,
    UnstableRuns,
    VocabularyBalance,
    verdict,
)
from complexity_deep.workflow.markdown_table import table
from complexity_deep.workflow.provenance import REPOSITORY


def time_ratio(case: str, slow: str, fast: str) -> str:
    """How many times as long `slow` takes as `fast` in the newest rows of benchmarks/results.csv for a kernel case."""
    results = REPOSITORY / "benchmarks/results.csv"
    if not results.exists():  # an installed package has no measurements
        return "not measured here"
    with results.open(newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file) if row["case"] == case}  # the last of each
    if not {slow, fast} <= rows.keys() or rows[slow]["commit"] != rows[fast]["commit"]:
        return "not measured yet"
    ratio = float(rows[slow]["median_ms"]) / float(rows[fast]["median_ms"])
    ours = "ours" if fast == "this" else fast
    where = f"{case.removesuffix(', graph')}; {rows[fast]['device']}, commit {rows[fast]['commit']}"
    return f"the time of {slow} is {ratio:.1f} times that of {ours} ({where})"


@dataclass(frozen=True)
class Claim:
    """A claim with its source, what is measured of it, and what that is compared with.

    `measures` decide it, and `weaker` a weaker form that makes "holds in part" of "does not hold". One that cannot be
    tested has `why_not` instead. `command` makes the measurement, where that is no training run.
    """

    claim: str
    source: str
    quantity: str
    null: str
    measures: tuple[Measure, ...] = ()
    weaker: tuple[Measure, ...] = ()
    why_not: Callable[[Study], str] | None = None
    command: str = ""


PREPRINT = "[preprint](https://doi.org/10.5281/zenodo.18293026)"
TMLR = "[TMLR submission](https://openreview.net/forum?id=jZq6EVboC6)"
CARD = "[card of v0.13.0](https://huggingface.co/Pacific-Prime/small_words)"
CODE = "[published package](https://github.com/Complexity-ML/complexity-deep)"
LOSS = "held-out loss, nats"

CLAIMS = (
    Claim(
        "Experts are perfectly balanced: in the vocabulary",
        f"{PREPRINT}, {TMLR}",
        "ids of the vocabulary per expert",
        "a table with equal numbers of ids has it by construction, random ones too",
        (VocabularyBalance(),),
        command="report",
    ),
    Claim(
        "Experts are perfectly balanced: each gets exactly 25 % of the tokens, whatever their frequencies",
        f"{PREPRINT}, {CARD}",
        "tokens of the fullest expert over the mean, on the training text; 1 is even",
        "random tables with equal numbers of ids",
        (CorpusBalance(),),
        command="report --data runs/evidence/data",
    ),
    Claim(
        "It has the capacity of a dense model at 1/n of the compute",
        TMLR,
        f"{LOSS}, minus that of dense of equal total size; in part: a gain over dense of equal active size",
        f"0; level up to {MARGIN:+}",
        (LossDifference("v0", "dense_total", MARGIN),),
        (LossDifference("v0", "dense_active"),),
    ),
    Claim(
        "Experts specialise although the table is arbitrary",
        TMLR,
        "norm growth of experts; what shifting tokens by one expert costs; loss against a random table",
        "experts that never trained (growth 1, cost 0), and a table shuffled before training",
        (NormGrowth("v0"), ShiftCost("v0", "v0_frozen_experts"), LossDifference("v0", "v0_random")),
    ),
    Claim(
        "Gradients make the experts orthogonal",
        TMLR,
        "cosine between the weights of two experts",
        "the same before training",
        why_not=lambda study: (
            f"Two fresh experts of the study's shape have a mean absolute cosine of {fresh_cosine(study.base):.4f} "
            "already, so that a small one after training says nothing of gradients."
        ),
        command="scripts/analyze.py runs/30m --text embedded",
    ),
    Claim(
        "Mu makes training converge 2 to 3 times as fast",
        CARD,
        "tokens to the final loss of the slower one: without guidance and its parameters / with them",
        f"1; the claim needs {SPEEDUP:g} or more, and above 1 is in part",
        (Speedup("v0", "v0_no_guidance"),),
    ),
    Claim(
        "The controller (INL dynamics) stabilises training",
        f"{TMLR}, {CARD}",
        "share of runs at 1.5, 2, 4 and 8 times the rate that diverge or spike: with dynamics minus without",
        "0",
        (UnstableRuns("v0", "v0_no_dynamics"),),
    ),
    Claim(
        "Routing that mu may override helps",
        f"{PREPRINT}, {CARD}",
        f"{LOSS}: with mu routing minus without; in part: if its router gets a gradient, as the published one does not",
        "0",
        (LossDifference("v0", "v0_no_mu_routing"),),
        (LossDifference("v0_router_gradient", "v0_no_mu_routing"),),
    ),
    Claim(
        "Routing by id is as good as a learned router: 4 experts",
        f"{PREPRINT}, {TMLR}",
        f"{LOSS}, minus that of a learned top-1 router of equal active size",
        f"0; level up to {MARGIN:+}",
        (LossDifference("v0", "learned_4", MARGIN),),
    ),
    Claim(
        "Routing by id is as good as a learned router: 64 experts and a shared one",
        "this repository",
        f"{LOSS}, minus that of a learned top-1 router of about equal total size",
        f"0; level up to {MARGIN:+}",
        (LossDifference("shared_64", "learned_16", MARGIN),),
    ),
    Claim(
        "The published CUDA path trains the experts",
        CODE,
        f"{LOSS}: experts without a gradient, as that path leaves them by its code, minus trained ones",
        f"0; level up to {MARGIN:+}",
        (LossDifference("v0_frozen_experts", "v0", MARGIN),),
    ),
    Claim(
        "CGGR is 5 to 6 times as fast as batched matrix products",
        PREPRINT,
        "time of the experts' forward",
        "1",
        why_not=lambda study: (
            "The published kernels are not part of this repository. Beside our own, in one run, "
            f"{time_ratio('MLP, 4 experts, 32 tokens, forward', 'batched_mm', 'cggr')}, and "
            f"{time_ratio('MLP, 4 experts, 16384 tokens, forward', 'grouped_mm', 'cggr')}."
        ),
        command="scripts/benchmark.py kernels",
    ),
    Claim(
        "Fused projections with mu are twice as fast as six products",
        CARD,
        "time of queries, keys and values",
        "1",
        why_not=lambda study: (
            "The published code is not part of this repository. Beside our own, in one run, "
            f"{time_ratio('mu qkv, 1 tokens, graph', 'six linears', 'this')}, and "
            f"{time_ratio('mu qkv, 32 tokens, graph', 'six linears', 'this')}."
        ),
        command="scripts/benchmark.py kernels",
    ),
    Claim(
        "At 1.5B: loss 3.78 after 33B tokens, MMLU 30 % and ARC-Challenge 23 % after fine-tuning",
        TMLR,
        "benchmark scores of the published weights",
        "guessing: 25 %",
        why_not=lambda study: (
            "The weights are not part of this repository, and no run here has 33B tokens. The command scores a folder "
            "with the published weights, with guessing and the standard error beside each score."
        ),
        command="scripts/evaluate.py path/to/published --tasks mmlu arc_challenge",
    ),
    Claim(
        "A dense 1.5B baseline and ablations at 100M to 500M were announced",
        TMLR,
        "loss on the same tokens at those sizes",
        "dense of equal total and equal active size",
        why_not=lambda study: (
            "A run at 1.5B is beyond this study; [scaling.md](scaling.md) says what it would take. The rows above are "
            "such controls and ablations at the 30m shape. A few at 150m are planned, and stand in the "
            "section on [scaling](../evidence.md#scaling) and below it as they are run. A later "
            "[card](https://huggingface.co/Pacific-i64/TR-MoE-190M) of the authors shows four runs of 500M tokens, "
            "one of each kind, of a model with a shared expert."
        ),
        command="run --plan recipes/evidence/headline.yaml recipes/evidence/ablations.yaml",
    ),
)


def fresh_cosine(base: dict) -> float:
    """Mean absolute cosine of two independent Gaussian vectors as long as the gate and up weights of an expert."""
    shape = base["shape"]
    length = 2 * shape["hidden_size"] * shape["intermediate_size"] // shape["num_experts"]
    return math.sqrt(2 / (math.pi * length))


def command_of(claim: Claim, recipes: Path) -> str:
    """The command that makes the measurement, or the rows of all variants that it compares."""
    measures = (*claim.measures, *claim.weaker)
    variants = list(dict.fromkeys(name for measure in measures for name in measure.variants))
    if not variants:
        script = "" if claim.command.startswith("scripts/") else "scripts/ablate.py "
        return f"python {script}{claim.command}"
    plans = []
    for plan in dict.fromkeys(plan for measure in measures for plan in measure.plans):
        if set(variants) & set(read_yaml(recipes / f"{plan}.yaml")["variants"]):
            plans.append(f"recipes/evidence/{plan}.yaml")
    return f"python scripts/ablate.py run --plan {' '.join(plans)} --only {' '.join(variants)}"


def assess(claim: Claim, study: Study) -> tuple[str, str]:
    """What was measured of a claim, for a cell of the table, and the verdict."""
    if claim.why_not:
        return claim.why_not(study), NOT_TESTABLE
    own = [measure.measure(study) for measure in claim.measures]
    others = [measure.measure(study) for measure in claim.weaker]
    outcomes = [outcome for found in own for outcome in found.outcomes]
    weaker = [outcome for found in own for outcome in found.weaker]
    weaker += [outcome for found in others for outcome in found.outcomes]
    return "<br>".join(found.text for found in (*own, *others)), verdict(outcomes, weaker)


RULES = f"""\
Measurements are means over seeds with 95 % intervals in brackets: Welch's for differences of losses, Student's for one
variant (on logarithms for the ratio of tokens), Newcombe's for shares of runs. Both sides of a difference come from one
set of token files, whose id stands beside it. `edu` and `books` are the two held-out texts, and less loss is better.
The names are variants of [30m.yaml](../../recipes/evidence/30m.yaml). `v0` is the published architecture with 4
experts, and with the residual-scaled init that all variants and controls share.

A verdict follows from the intervals alone:

- A gain **holds** on a text if the interval lies below 0. Otherwise it does not hold if the interval lies above
  -{MARGIN}. Two whole runs that differ in their seed alone are seldom further apart.
- "As good as" **holds** on a text if the interval lies below +{MARGIN}. Otherwise it does not hold if the interval lies
  above 0.
- Runs of the same seed with the same losses at every point are one computation. Their difference is 0, whatever the
  number of seeds: no gain, and level.
- The cost of shifted experts is a gain of the other sign.
- A ratio or a share holds if its whole interval is on the side of the claim, and does not hold if it is wholly on the
  other.
- Counts are exact. Ids are even if experts differ by at most one. Tokens are even if the fullest expert has at most
  {100 * (BALANCED - 1):.0f} % more than the mean, and in part if 97.5 % of random tables load them less evenly.
- A claim **holds** if all of its quantities hold on both texts. It **holds in part** if some do, or if a weaker form
  that the row names does on both texts. It **does not hold** if each of its quantities does not hold on either text,
  and no weaker form is still without an interval.
- Everything else is **open**: no rows, one seed and so no interval, or an interval too wide to decide.

Each interval is at 95 %, without a correction for the number of claims. An interval from two or three seeds is wide.

The curves that tokens are read off are those of whole runs with a cosine schedule. The faster run is compared before
its rate has fallen, which draws the ratio of tokens towards 1."""


def write_claims(output: Path, rows: list[dict], recipes: str) -> str:
    """Write claims.md into `output`, which may have balance.json; returns the numbers of verdicts."""
    base = read_yaml(Path(recipes, "30m.yaml"))
    rows = [row for row in rows if row["size"] == base["size"]]
    study = Study(rows, base, read_balance(output))
    lines, verdicts, commands = [], [], {}
    for number, claim in enumerate(CLAIMS, start=1):
        measured, word = assess(claim, study)
        verdicts.append(word)
        commands.setdefault(command_of(claim, Path(recipes)), []).append(str(number))
        shown = word if word == OPEN else f"**{word}**"
        lines.append([f"{number}", f"{claim.claim} ({claim.source})", claim.quantity, claim.null, measured, shown])
    found = ", ".join(
        f"{word} ({verdicts.count(word)})" for word in (HOLDS, IN_PART, FAILS, OPEN, NOT_TESTABLE) if word in verdicts
    )
    header = ["", "claim (source)", "quantity", "null", "measured here", "verdict"]
    page = ["# The claims, and what was measured", "", f"**{len(CLAIMS)} claims: {found}.**", ""]
    page += ["What the preprints and the published card say of Complexity-Deep, beside what the runs of the 30m"]
    page += ["[study](../evidence.md) say. Written by `python scripts/ablate.py report` from [runs.csv](runs.csv) and"]
    page += ["[balance.json](balance.json). Nothing here says what holds at a larger scale.", ""]
    page += [*table(header, lines, text_columns=len(header)), "", "## How to read it", "", RULES, "", "## Commands", ""]
    page += ["`run` leaves out what runs.csv has, and `report` fills the table in. Numbers are those of the rows.", ""]
    page += ["```bash"]
    for command, numbers in commands.items():
        page += [f"# {', '.join(numbers)}", command]
    page += ["```"]
    (output / "claims.md").write_text("\n".join(page) + "\n")
    return found
