"""Measures for the claims: each compares one quantity of the study with its null, and says what its interval decides.

A measure gives a line of text and an outcome for each held-out text. `verdict` makes one word of the outcomes by a
fixed rule, so that the table of claims fills itself as rows arrive.
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from scipy import stats

from complexity_deep.routing_complexity_deep import modulo_routing
from complexity_deep.workflow.evidence.ablation_plan import EQUAL_TOKENS, MARGIN
from complexity_deep.workflow.evidence.ablation_report import (
    CONFIDENCE,
    by_data,
    difference,
    diverged_seeds,
    interval,
    old_rates,
    signed,
)
from complexity_deep.workflow.evidence.balance import numbers_of_experts
from complexity_deep.workflow.provenance import REPOSITORY

HOLDS, IN_PART, FAILS = "holds", "holds in part", "does not hold"
OPEN, NOT_TESTABLE = "open", "not testable here"  # as verdicts; an outcome is OPEN where the interval decides nothing
UNMEASURED = "unmeasured"  # as an outcome: no rows, or one seed and so no interval
BALANCED = 1.01  # max over mean tokens of an expert up to which a load counts as even
SPEEDUP = 2.0  # the lower end of the claimed "2-3x"
TEXTS = {"held_out_edu": "edu", "held_out_books": "books"}
STABILITY = ("stability",)


class Study(NamedTuple):
    """What the measures read: rows of runs.csv, the file of variants, and balance.json or None."""

    rows: list[dict]
    base: dict
    balance: dict | None


class Measured(NamedTuple):
    """What was found: a line for the table, and what it says of the claim and of its weaker form."""

    text: str
    outcomes: list[str]
    weaker: list[str] = []


class Measure(Protocol):
    variants: tuple[str, ...]  # that it needs rows of, from `plans`
    plans: tuple[str, ...]

    def measure(self, study: Study) -> Measured: ...


def judge(bounds: tuple[float, float] | None, holds_up_to: float, fails_above: float) -> str:
    """The outcome for a quantity that the claim wants small, by its 95 % interval."""
    if bounds is None:
        return UNMEASURED
    if bounds[1] <= holds_up_to:
        return HOLDS
    return FAILS if bounds[0] > fails_above else OPEN


def verdict(outcomes: list[str], weaker: list[str]) -> str:
    """One word for a claim, from the outcomes of its own measures and of those of its weaker form."""
    if UNMEASURED in outcomes:
        return OPEN
    if all(outcome == HOLDS for outcome in outcomes):
        return HOLDS
    if HOLDS in outcomes or (weaker and all(outcome == HOLDS for outcome in weaker)):
        return IN_PART
    return FAILS if all(outcome == FAILS for outcome in outcomes) and UNMEASURED not in weaker else OPEN


def negated(bounds: tuple[float, float] | None) -> tuple[float, float] | None:
    return (-bounds[1], -bounds[0]) if bounds else None


def plural(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def basis(study: Study, data: str, variants: tuple[str, ...], numbers: list[int], is_exact: bool = False) -> str:
    """What a figure rests on: seeds of each variant, token files, seeds that diverged and rates that were left.

    One that is exact needs no interval.
    """
    seeds = plural(numbers[0], "seed") if len(set(numbers)) == 1 else " and ".join(map(str, numbers)) + " seeds"
    parts = [seeds if min(numbers) > 1 or is_exact else f"{seeds}, so no interval", f"files {data}"]
    parts += [f"{lost} and left out" for lost in diverged(study, data, variants)]
    rates = old_rates(study.rows, data, EQUAL_TOKENS, study.base)
    for variant in dict.fromkeys(variants):
        if variant in rates:
            had, now = rates[variant]
            parts.append(f"{variant} at the rate {had:g}, where {now:g} is found best by now")
    return f"({', '.join(parts)})"


def diverged(study: Study, data: str, variants: tuple[str, ...]) -> list[str]:
    """Which seeds diverged on the token files."""
    seeds = diverged_seeds([row for row in study.rows if row["data"] == data], EQUAL_TOKENS)
    return [f"{plural(seeds[name], 'seed')} of {name} diverged" for name in variants if name in seeds]


def no_measurement(study: Study, variants: tuple[str, ...]) -> str:
    """What stands for a figure of the variants where they have no finished runs on one set of token files."""
    lost = []
    for data, runs in by_data(study.rows, EQUAL_TOKENS).items():
        without = tuple(variant for variant in variants if variant not in runs)
        lost += [f"{what}, files {data}" for what in diverged(study, data, without)]
    return f"not measured ({'; '.join(lost)})" if lost else "not measured yet"


def most_seeds(study: Study, variants: tuple[str, ...], keep: Callable[[dict], bool]) -> tuple[str, list[list[dict]]]:
    """Rows of each variant from the one set of token files that has most seeds of all of them, the newest of equals.

    Rows that `keep` refuses do not count. Returns the id of the token files, and "" where no set has all variants.
    """
    best = "", [[] for _ in variants]
    for data, runs in by_data(study.rows, EQUAL_TOKENS).items():
        found = [list(filter(keep, runs.get(variant, []))) for variant in variants]
        if min(map(len, found)) and rank(found) >= rank(best[1]):
            best = data, found
    return best


def rank(groups: list[list]) -> tuple[int, int]:
    numbers = [len(group) for group in groups]
    return min(numbers), sum(numbers)


@dataclass(frozen=True)
class Comparison:
    """A measure that compares runs of the variant `ours` with those of `control`."""

    ours: str
    control: str

    @property
    def variants(self) -> tuple[str, ...]:
        return self.ours, self.control


def seeds_of_one_computation(ours: list[dict], control: list[dict]) -> int:
    """How many seeds both have, if all of these have the same losses at every point, which no two models have by
    chance; else 0."""
    curves = [{row["seed"]: row["curve"] for row in rows} for rows in (ours, control)]
    common = curves[0].keys() & curves[1].keys()
    return len(common) if all(curves[0][seed] == curves[1][seed] for seed in common) else 0


@dataclass(frozen=True)
class LossDifference(Comparison):
    """Held-out loss of `ours` minus that of `control`, which is to be at most `allowed`: 0 for a gain."""

    allowed: float = 0.0
    plans = EQUAL_TOKENS

    def measure(self, study: Study) -> Measured:
        data, (ours, control) = most_seeds(study, self.variants, lambda row: True)
        name = f"{self.ours} minus {self.control}"
        if not data:
            return Measured(f"{name}: {no_measurement(study, self.variants)}", [UNMEASURED])
        if common := seeds_of_one_computation(ours, control):
            outcome = HOLDS if self.allowed else FAILS  # as level, or as a gain
            found = basis(study, data, self.variants, [common], is_exact=True)
            return Measured(f"{name}: exactly 0 at every point of the curves {found}", [outcome])
        found = basis(study, data, self.variants, [len(ours), len(control)])
        shown, outcomes = [], []
        for text, title in TEXTS.items():
            mean, bounds = difference([row[text] for row in ours], [row[text] for row in control])
            shown.append(f"{title} {signed(mean, bounds)}")
            outcomes.append(judge(bounds, self.allowed, self.allowed - MARGIN))
        return Measured(f"{name}: {', '.join(shown)} {found}", outcomes)


@dataclass(frozen=True)
class NormGrowth:
    """Norm of the experts after training over that before it; the claim wants more than 1."""

    variant: str
    plans = EQUAL_TOKENS

    @property
    def variants(self) -> tuple[str, ...]:
        return (self.variant,)

    def measure(self, study: Study) -> Measured:
        data, (rows,) = most_seeds(study, self.variants, lambda row: row["expert_norm_ratio"] is not None)
        if not data:
            missing = no_measurement(study, self.variants)
            return Measured(f"norm growth of {self.variant}: {missing}", [UNMEASURED])
        values = [row["expert_norm_ratio"] for row in rows]
        bounds = interval(values)
        ends = f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else ""
        found = basis(study, data, self.variants, [len(rows)])
        return Measured(
            f"norm growth of {self.variant}: {statistics.mean(values):.2f}{ends} {found}",
            [judge(negated(bounds), -1, -1)],
        )


@dataclass(frozen=True)
class ShiftCost(Comparison):
    """What sending each token to the next expert adds to the loss of `ours`, beyond what it adds to that of `control`.

    The claim wants it above 0, and MARGIN nats to matter.
    """

    plans = EQUAL_TOKENS

    def measure(self, study: Study) -> Measured:
        def is_shifted(row: dict) -> bool:
            return row["shifted_edu"] is not None and row["held_out_edu"] is not None

        def costs(rows: list[dict]) -> list[float]:
            return [row["shifted_edu"] - row["held_out_edu"] for row in rows]

        data, (ours, control) = most_seeds(study, self.variants, is_shifted)
        name = f"cost of shifted experts, {self.ours} minus {self.control}"
        if data:
            mean, bounds = difference(costs(ours), costs(control))
            found = basis(study, data, self.variants, [len(ours), len(control)])
            return Measured(f"{name}: edu {signed(mean, bounds)} {found}", [judge(negated(bounds), 0, -MARGIN)])
        missing = no_measurement(study, self.variants)
        data, (ours,) = most_seeds(study, (self.ours,), is_shifted)
        if not data:
            return Measured(f"{name}: {missing}", [UNMEASURED])
        alone = f"{statistics.mean(costs(ours)):+.3f} {basis(study, data, (self.ours,), [len(ours)])}"
        return Measured(f"{name}: {missing}; {self.ours} alone: edu {alone}", [UNMEASURED])


def tokens_to_reach(level: float, curve: list[list[float]], text: int) -> float | None:
    """Tokens at which a held-out loss first falls to `level`, on straight lines between the points of the curve.

    `text` is the column of the curve. None for a level that lies above the first point or that is never reached.
    """
    for before, after in itertools.pairwise(curve):
        if before[text] >= level >= after[text]:
            fall = before[text] - after[text]
            part = (before[text] - level) / fall if fall else 0.0
            return before[0] + part * (after[0] - before[0])
    return None


@dataclass(frozen=True)
class Speedup(Comparison):
    """Tokens that `control` takes to reach a loss over those that `ours` takes, seed by seed.

    The loss is the final one of the slower of the two. The interval is Student's, on the logarithms of the ratios.
    The claim wants at least SPEEDUP, and its weaker form more than 1.
    """

    plans = EQUAL_TOKENS

    def measure(self, study: Study) -> Measured:
        data, (ours, control) = most_seeds(study, self.variants, lambda row: True)
        name = f"tokens of {self.control} / {self.ours}"
        if not data:
            return Measured(f"{name}: {no_measurement(study, self.variants)}", [UNMEASURED])
        by_seed = {row["seed"]: row for row in control}
        pairs = [(row, by_seed[row["seed"]]) for row in ours if row["seed"] in by_seed]
        shown, outcomes, weaker = [], [], []
        for column, title in enumerate(TEXTS.values(), start=1):
            logs = []
            for fast, slow in pairs:
                level = max(fast["curve"][-1][column], slow["curve"][-1][column])
                tokens = [tokens_to_reach(level, row["curve"], column) for row in (fast, slow)]
                if all(tokens):
                    logs.append(math.log(tokens[1] / tokens[0]))
            if not pairs:
                return Measured(f"{name}: not measured yet for one seed of both", [UNMEASURED])
            if len(logs) < len(pairs):  # a pair that cannot be compared must not drop out unseen
                found = basis(study, data, self.variants, [len(pairs)])
                below = "one begins its curve below the loss that the other ends at"
                return Measured(f"{name}: {below} {found}", [UNMEASURED])
            bounds = interval(logs)
            ends = f" [{math.exp(bounds[0]):.2f}, {math.exp(bounds[1]):.2f}]" if bounds else ""
            shown.append(f"{title} {math.exp(statistics.mean(logs)):.2f}{ends}")
            outcomes.append(judge(negated(bounds), -math.log(SPEEDUP), -math.log(SPEEDUP)))
            weaker.append(judge(negated(bounds), 0, 0))
        found = basis(study, data, self.variants, [len(pairs)])
        return Measured(f"{name}: {', '.join(shown)} {found}", outcomes, weaker)


@dataclass(frozen=True)
class UnstableRuns(Comparison):
    """Share of runs at multiples of the rate that diverged or spiked, `ours` minus `control`; Newcombe's interval.

    The runs are those of the rates and seeds that both have.
    """

    plans = STABILITY

    def measure(self, study: Study) -> Measured:
        best: tuple[str, list[tuple[dict, dict]]] = "", []
        rows = [row for row in study.rows if row["plan"] in STABILITY and row["status"] in ("ok", "diverged")]
        for data in dict.fromkeys(row["data"] for row in rows):
            last = {(r["variant"], r["learning_rate"], r["seed"]): r for r in rows if r["data"] == data}
            keys = [key[1:] for key in last if key[0] == self.ours and (self.control, *key[1:]) in last]
            pairs = [(last[(self.ours, *key)], last[(self.control, *key)]) for key in keys]
            if pairs and len(pairs) >= len(best[1]):
                best = data, pairs
        data, pairs = best
        name = f"unstable runs, {self.ours} minus {self.control}"
        if not data:
            return Measured(f"{name}: not measured yet", [UNMEASURED])
        numbers = [sum(map(is_unstable, side)) for side in zip(*pairs)]
        seeds = len({pair[0]["seed"] for pair in pairs})
        bounds = newcombe(*numbers, len(pairs)) if seeds > 1 else None
        rates = ", ".join(f"{rate:g}" for rate in sorted({pair[0]["learning_rate"] for pair in pairs}))
        mean = (numbers[0] - numbers[1]) / len(pairs)
        shares = f"{numbers[0]} and {numbers[1]} of {len(pairs)}, a difference of {signed(mean, bounds)}"
        few = "" if seeds > 1 else ", so no interval"
        text = f"{name}: {shares} (rates {rates}; {plural(seeds, 'seed')}{few}, files {data})"
        return Measured(text, [judge(bounds, 0, 0)])


def is_unstable(row: dict) -> bool:
    return row["status"] == "diverged" or bool(row["spikes"])


def newcombe(first: int, second: int, number: int) -> tuple[float, float]:
    """Newcombe's hybrid score interval of the difference of two shares, of `number` runs each."""
    shares = first / number, second / number
    wilson = [stats.binomtest(k, number).proportion_ci(CONFIDENCE, method="wilson") for k in (first, second)]
    mean = shares[0] - shares[1]
    low = math.hypot(shares[0] - wilson[0].low, wilson[1].high - shares[1])
    high = math.hypot(wilson[0].high - shares[0], shares[1] - wilson[1].low)
    return mean - low, mean + high


class VocabularyBalance:
    """Ids per expert of the published shape and of the study's. They are even if they differ by at most one."""

    variants, plans = (), ()

    def measure(self, study: Study) -> Measured:
        published = json.loads((REPOSITORY / "configs/1.5b.json").read_text())
        size, experts = published["vocab_size"], published["num_experts"]
        counts = modulo_routing(size, experts).bincount(minlength=experts)
        parts = [f"modulo, 1.5B shape: {between(counts.min().item(), counts.max().item())} of {size:,} ids an expert"]
        for number in numbers_of_experts(study.base) if study.balance else ():
            described = study.balance["experts"].get(str(number))
            if described:
                shown = [f"{name} {between(*described[name]['ids'])}" for name in ("modulo", "random", "balanced")]
                parts.append(f"{number} experts, {study.balance['vocab_size']:,} ids: {', '.join(shown)}")
        return Measured("<br>".join(parts), [HOLDS if counts.max() - counts.min() <= 1 else FAILS])


def between(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


class CorpusBalance:
    """Max over mean tokens per expert on the training text, by the published rule and number of experts.

    The claim holds up to BALANCED. Its weaker form holds below the range of random tables, which is what chance gives.
    """

    variants, plans = (), ()

    def measure(self, study: Study) -> Measured:
        balance, published = study.balance, str(study.base["shape"]["num_experts"])
        if not balance:
            return Measured("not measured yet", [UNMEASURED])
        parts = []
        for number, found in balance["experts"].items():
            shown = [f"{name} {found[name]['most_over_mean']['total']:.3f}" for name in ("modulo", "balanced")]
            low, high = found["chance"]
            parts.append(f"{number} experts: {', '.join(shown)}, random tables {low:.3f} to {high:.3f}")
            if number == published:
                ends = [f"{100 * share:.1f}" for share in found["modulo"]["shares"]]
                worst = found["modulo"]["most_over_mean"]["worst_batch"]
                parts[-1] += (
                    f"; by modulo each gets {ends[0]} to {ends[1]} %, and in the worst batch of "
                    f"{balance['tokens_per_batch']:,} tokens the fullest has {worst:.3f} times the mean"
                )
        parts.append(f"the most frequent id has {100 * balance['largest_id_share']:.1f} % of all tokens")
        parts[-1] += f" (exact, {balance['tokens'] / 1e6:.0f}M tokens, files {balance['data']})"
        modulo = balance["experts"][published]["modulo"]["most_over_mean"]["total"]
        weaker = HOLDS if modulo < balance["experts"][published]["chance"][0] else FAILS
        return Measured("<br>".join(parts), [HOLDS if modulo <= BALANCED else FAILS], [weaker])
