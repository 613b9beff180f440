"""Tables and figures of docs/evidence.md from the rows of runs.csv, which are of one size: 30m unless they say so."""

import math
import statistics
from collections import Counter
from pathlib import Path

from matplotlib import colormaps
from scipy import stats

from complexity_deep.workflow.charts import subplots, write_figure
from complexity_deep.workflow.evidence.ablation_plan import (
    DONE,
    EQUAL_TOKENS,
    FEWEST_RATES,
    MARGIN,
    MUON,
    SWEEP,
    best_of_sweep,
    identity,
    losses_of,
    most_rates,
    rate_by_now,
    sweep_of,
    whole_runs,
)
from complexity_deep.workflow.markdown_table import table

CONFIDENCE = 0.95
NOT_MEASURED = "Not measured yet."
EQUAL_SECONDS = ("equal_seconds",)
WITH_MUON = ("muon",)
TEXTS = {"held_out_edu": "educational text", "held_out_books": "books"}
# The goal: mean difference to the reference, and the bound that the upper end of its interval must not exceed.
GOALS = {"equal tokens": -0.15, "equal seconds": -0.10}
UPPER_BOUND = -0.05
CHOICE_SEEDS = (0, 1, 2)  # by which the best candidate is chosen, as planned; later ones measure it without that choice
SAME_LENGTH = 0.01  # of its tokens that a run of equal seconds may be off, for speeds are measured that well
BEYOND = 0.15  # nats
COLOURS = colormaps["tab10"].colors


def last_runs(rows: list[dict], plans: tuple[str, ...]) -> dict[tuple[str, int], dict]:
    """Runs of the plans that finished or diverged, by variant and seed: the last, where one was repeated.

    All have the rate and the tokens of the variant's last run. A rate that was found better, or a speed that was
    measured again, changes both from then on, and a mean over both would be of neither.
    """
    ended = [row for row in rows if row["plan"] in plans and row["status"] in DONE]
    made = {row["variant"]: (row["learning_rate"], row["tokens"]) for row in ended}
    return {
        (row["variant"], row["seed"]): row
        for row in ended
        if (row["learning_rate"], row["tokens"]) == made[row["variant"]]
    }


def group(rows: list[dict], plans: tuple[str, ...]) -> dict[str, list[dict]]:
    """Those of `last_runs` that finished, by variant."""
    grouped = {}
    for (variant, _), row in last_runs(rows, plans).items():
        if row["status"] == "ok":
            grouped.setdefault(variant, []).append(row)
    return grouped


def diverged_seeds(rows: list[dict], plans: tuple[str, ...]) -> dict[str, int]:
    """How many seeds of each variant `group` leaves out, for they diverged; `rows` are of one set of token files."""
    runs = sorted(last_runs(rows, plans).items())
    return dict(Counter(variant for (variant, _), row in runs if row["status"] == "diverged"))


def old_rates(rows: list[dict], data: str, plans: tuple[str, ...], base: dict) -> dict[str, tuple[float, float]]:
    """Variants whose runs on the token files have another rate than they would get by now: both rates.

    `rows` are of one size, and `base` is its file of variants.
    """
    rates = {}
    for variant, runs in group([row for row in rows if row["data"] == data], plans).items():
        had, now = runs[0]["learning_rate"], rate_by_now(variant, base, rows)
        if now not in (None, had):
            rates[variant] = had, now
    return rates


def at_other_rates(rows: list[dict], plans: tuple[str, ...]) -> list[str]:
    """Variants with finished runs at another rate than that of `last_runs`: the rate, and the means of both losses.

    `rows` are of one size and one set of token files.
    """
    rates = {variant: row["learning_rate"] for (variant, _), row in last_runs(rows, plans).items()}
    found: dict[tuple[str, float], dict[int, dict]] = {}
    for row in rows:
        if row["plan"] in plans and row["status"] == "ok" and row["learning_rate"] != rates[row["variant"]]:
            found.setdefault((row["variant"], row["learning_rate"]), {})[row["seed"]] = row
    lines = []
    for (variant, rate), last in sorted(found.items()):
        losses = " and ".join(f"{statistics.mean(column([*last.values()], text)):.4f}" for text in TEXTS)
        lines.append(f"`{variant}` at {rate:g} ({losses}, {len(last)} seed{'s' if len(last) > 1 else ''})")
    return lines


def below_table(rows: list[dict], data: str, plans: tuple[str, ...], base: dict, where: str = "") -> list[str]:
    """Sentences on the seeds that diverged on the token files, on runs at other rates than those of the table, and on
    rates that were left since, and empty lines.

    The reference of `base` is among the latter, also where its runs are those of the table at equal tokens.
    """
    own = [row for row in rows if row["data"] == data]
    diverged = diverged_seeds(own, plans)
    lost = ", ".join(f"`{variant}` ({number})" for variant, number in diverged.items())
    lines = [f"Seeds that diverged{where} and are in no mean: {lost}.", ""] if lost else []
    reference = [row for row in rows if row["variant"] == base["reference"]]
    rates = old_rates(reference, data, EQUAL_TOKENS, base) | old_rates(rows, data, plans, base)
    old = ", ".join(f"`{variant}` ({had:g}, now {now:g})" for variant, (had, now) in rates.items())
    if others := at_other_rates(own, plans):
        lines += [f"Runs at other rates{where}, on both texts, are in no mean: {', '.join(others)}.", ""]
    if old:
        lines += [f"Another rate is found best by now{where}: {old}."]
        if base["reference"] in rates:
            lines += [f"Beside `{base['reference']}` at the rate that it left, others may look better than they are."]
        lines += [""]
    return lines


def old_lengths(runs: dict[str, list[dict]], reference: list[dict], speeds: dict[str, float]) -> list[str]:
    """A sentence on runs of equal seconds whose tokens follow from other speeds than the newest, and an empty line."""
    named = []
    for variant, rows in runs.items():
        if reference and {variant, reference[0]["variant"]} <= speeds.keys():
            had, whole = rows[0]["tokens"], reference[0]["tokens"]
            now = whole * speeds[variant] / speeds[reference[0]["variant"]]
            if abs(had / now - 1) > SAME_LENGTH:
                named.append(f"`{variant}` ({had / 1e6:.1f}M, now {now / 1e6:.1f}M)")
    return [f"The newest speeds give another number of tokens: {', '.join(named)}.", ""] if named else []


def interval(values: list[float]) -> tuple[float, float] | None:
    """Student's interval of the mean; none for a single value, and none where all are the same."""
    if len(set(values)) < 2:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return tuple(stats.t.interval(CONFIDENCE, len(values) - 1, statistics.mean(values), error))


def difference(values: list[float], reference: list[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean difference and Welch's interval of it; none where either has a single value, or neither has a spread."""
    mean = statistics.mean(values) - statistics.mean(reference)
    if min(len(values), len(reference)) < 2 or len(set(values)) == len(set(reference)) == 1:
        return mean, None
    bounds = stats.ttest_ind(values, reference, equal_var=False).confidence_interval(CONFIDENCE)
    return mean, (float(bounds.low), float(bounds.high))


def column(rows: list[dict], name: str) -> list[float]:
    return [row[name] for row in rows]


def signed(mean: float, bounds: tuple[float, float] | None) -> str:
    """A difference with its sign, and its interval where there is one."""
    return f"{mean:+.3f}" + (f" [{bounds[0]:+.3f}, {bounds[1]:+.3f}]" if bounds else "")


def as_difference(values: list[float], reference: list[float]) -> str:
    return signed(*difference(values, reference))


def as_mean(values: list[float]) -> str:
    mean, bounds = statistics.mean(values), interval(values)
    if bounds is None:
        return f"{mean:.4f}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.4f} ± {error:.4f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def variant_table(runs: dict[str, list[dict]], reference: list[dict], speeds: dict[str, float]) -> list[str]:
    """One line for each variant, best first."""
    header = [
        "variant",
        "parameters, M (total / active)",
        "rate",
        "seeds",
        "tokens, M",
        "held-out edu",
        "held-out books",
    ]
    header += ["edu, difference", "books, difference", "shifted experts", "norm", "tokens/s alone"]
    lines = []
    for variant, rows in sorted(runs.items(), key=lambda item: statistics.mean(column(item[1], "held_out_edu"))):
        first = rows[0]
        cells = [variant, sizes_of(first)]
        cells += [f"{first['learning_rate']:g}", str(len(rows)), f"{first['tokens'] / 1e6:.1f}"]
        cells += [as_mean(column(rows, name)) for name in TEXTS]
        is_reference = variant == reference[0]["variant"] if reference else True
        for name in TEXTS:
            cells.append("" if is_reference else as_difference(column(rows, name), column(reference, name)))
        for name, digits in (("shifted_edu", 3), ("expert_norm_ratio", 2)):
            known = [row[name] for row in rows if row[name] is not None]
            cells.append(f"{statistics.mean(known):.{digits}f}" if known else "")
        cells.append(f"{speeds[variant]:,.0f}" if variant in speeds else "")
        lines.append(cells)
    return table(header, lines)


def verdict(rows: list[dict], base: dict, equal_tokens: dict, equal_seconds: dict) -> list[str]:
    """The first paragraph: whether the goal is reached by the best candidate, and its figures.

    `equal_tokens` and `equal_seconds`: id of token files -> variant -> runs. Losses compare within one id only, so that
    each difference is that of the id with most seeds, the newest of equals. `rows` are those of one size, and `base` is
    its file of variants.
    """
    reference, candidates = base["reference"], base["candidates"]
    data, present = most_candidates(equal_tokens, reference, candidates)
    if not present:
        return [f"**The goal is not decided yet**: no candidate has a finished run beside one of `{reference}`."]
    best = best_of(equal_tokens[data], present, "held_out_edu")
    parts, later, fails, is_known = [], [], False, True
    for what, runs in (("equal tokens", equal_tokens), ("equal seconds", equal_seconds)):
        pairs = [
            (runs[data][best], equal_tokens[data][reference])
            for data in runs
            if best in runs[data] and reference in equal_tokens.get(data, {})
        ]
        if not pairs:
            parts.append(f"at {what} there are no finished runs")
            is_known = False
            continue
        found, others = max(reversed(pairs), key=lambda pair: min(map(len, pair)))
        for name, text in TEXTS.items():
            ours, theirs = column(found, name), column(others, name)
            mean, bounds = difference(ours, theirs)
            is_known &= bounds is not None
            fails |= bounds is not None and not (mean <= GOALS[what] and bounds[1] <= UPPER_BOUND)
            parts.append(f"{with_bounds(ours, theirs)} at {what} on {text}")
        later.append(at_later_seeds(found, others, what))
    compared = choice_rows(equal_tokens[data], present)
    if not any(later) and len(compared) > 1:
        later = [
            f"It is the best of {len(compared)} that were compared, which makes its difference look larger than it is;",
            "no seed by which it was not chosen was run yet.",
        ]
    word = "not reached" if fails else "reached" if is_known else "not decided yet"
    goal = f"{GOALS['equal tokens']} nats at equal tokens and {GOALS['equal seconds']} at equal seconds"
    return [
        f"**The goal is {word}.** It was a difference in held-out loss to a dense model of equal active size of at",
        f"most {goal}, with the upper 95 % bound at most {UPPER_BOUND}, on both texts. The best candidate is `{best}`:",
        "; ".join(parts) + ".",
        *filter(None, later),
        *fewer_seeds(equal_tokens[data], present, "equal tokens"),
        *best_at_equal_seconds(equal_tokens, equal_seconds, reference, candidates, best),
        *better_reference(rows, base, data),
        *tried((*equal_tokens.values(), *equal_seconds.values()), candidates),
    ]


def tried(tables: tuple[dict[str, list[dict]], ...], candidates: list[str]) -> list[str]:
    """Sentences on the candidates that have finished runs, and on those that have none."""
    have = [name for name in candidates if any(name in runs for runs in tables)]
    parts = (("Tried were", have), ("Without a finished run are", [name for name in candidates if name not in have]))
    return [f"{what} {', '.join(f'`{name}`' for name in names)}." for what, names in parts if names]


def at_later_seeds(found: list[dict], others: list[dict], what: str) -> str:
    """A sentence on the difference of the seeds by which nothing was chosen; empty where either has none."""
    ours, theirs = ([row for row in rows if row["seed"] not in CHOICE_SEEDS] for rows in (found, others))
    if not ours or not theirs:
        return ""
    shown = on_each_text(ours, theirs)
    seeds = " and ".join(str(seed) for seed in sorted({row["seed"] for row in ours}))
    return f"With the seeds {seeds} alone, by which it was not chosen, it is {shown} at {what}."


def most_candidates(runs: dict, reference: str, candidates: list[str]) -> tuple[str, list[str]]:
    """The id of token files that has the reference and most candidates, the newest of equals, and the names of these.

    They are empty where none has any.
    """
    present = {data: [name for name in candidates if name in own] for data, own in runs.items() if reference in own}
    data = max(reversed(present), key=lambda data: len(present[data]), default="")
    return data, present.get(data, [])


def choice_rows(runs: dict[str, list[dict]], names: list[str]) -> dict[str, list[dict]]:
    """Rows that the names are compared by.

    One seed may be a lucky one, so that names with one are left out, but only where half of the names have more: the
    first to get another seed would be the best of one.
    """
    found = {name: [row for row in runs[name] if row["seed"] in CHOICE_SEEDS] for name in names}
    enough = min(2, statistics.median_high(map(len, found.values())))
    return {name: rows or runs[name] for name, rows in found.items() if len(rows) >= enough}


def best_of(runs: dict[str, list[dict]], names: list[str], text: str) -> str:
    compared = choice_rows(runs, names)
    return min(compared, key=lambda name: statistics.mean(column(compared[name], text)))


def fewer_seeds(runs: dict[str, list[dict]], names: list[str], what: str) -> list[str]:
    """A sentence on the names that cannot be the best yet."""
    fewer = [f"`{name}`" for name in names if name not in choice_rows(runs, names)]
    return [f"With fewer seeds at {what}, and so not compared yet: {', '.join(fewer)}."] if fewer else []


def best_at_equal_seconds(
    equal_tokens: dict, equal_seconds: dict, reference: str, candidates: list[str], best: str
) -> list[str]:
    """Sentences on the candidates at equal seconds, of the token files with most runs.

    They name the best, where it is not `best`, and those with fewer seeds.
    """
    present = {
        data: [name for name in candidates if name in runs]
        for data, runs in equal_seconds.items()
        if reference in equal_tokens.get(data, {})
    }
    data = max(
        reversed(present), key=lambda data: sum(len(equal_seconds[data][name]) for name in present[data]), default=""
    )
    if not present.get(data):
        return []
    quickest = best_of(equal_seconds[data], present[data], "held_out_edu")
    fewer = fewer_seeds(equal_seconds[data], present[data], "equal seconds")
    if quickest == best:
        return fewer
    found, others = equal_seconds[data][quickest], equal_tokens[data][reference]
    return [f"At equal seconds the best is `{quickest}`: {on_each_text(found, others)}.", *fewer]


def on_each_text(rows: list[dict], reference: list[dict]) -> str:
    parts = (f"{with_bounds(column(rows, name), column(reference, name))} on {text}" for name, text in TEXTS.items())
    return "; ".join(parts)


def sizes_of(row: dict) -> str:
    """Its parameters in millions, total / active."""
    return f"{row['parameters'] / 1e6:.1f} / {row['active_parameters'] / 1e6:.1f}"


def with_bounds(values: list[float], reference: list[float]) -> str:
    """Mean difference and its interval, or how many seeds either side has where that is too few for one."""
    mean, bounds = difference(values, reference)
    if bounds:
        return f"{mean:+.3f} (95 %: {bounds[0]:+.3f} to {bounds[1]:+.3f})"
    numbers = len(values), len(reference)
    return f"{mean:+.3f} ({'one seed' if set(numbers) == {1} else f'{numbers[0]} and {numbers[1]} seeds'}, no interval)"


def draw_curves(path: Path, runs: dict[str, list[dict]]) -> None:
    """Held-out educational loss against tokens, the mean of the seeds, from a quarter of the run on.

    The legend has the variants in the order in which their lines end.
    """
    figure, axes = subplots(figsize=(8, 5))
    ordered = sorted(runs.items(), key=lambda item: statistics.mean(column(item[1], "held_out_edu")), reverse=True)
    for index, (variant, rows) in enumerate(ordered):
        curves = [row["curve"] for row in rows]
        points = [statistics.mean(losses) for losses in zip(*([point[1] for point in curve] for curve in curves))]
        tokens = [point[0] / 1e6 for point in curves[0]]
        start = len(points) // 4
        style = {"color": COLOURS[index % 10], "linestyle": "--" if index >= 10 else "-"}
        axes.plot(tokens[start:], points[start:], label=f"{variant} ({len(rows)})", **style)
    axes.set(xlabel="training tokens, millions", ylabel="held-out loss, nats per token")
    axes.set_title(
        "Held-out educational text at equal tokens, mean over seeds (their number)\nlegend in the order of last losses"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    write_figure(figure, path)


def gaps(rows: list[dict], reference: list[dict], text: str) -> list[tuple[int, float]]:
    """Tokens, and the mean loss minus that of the reference, at each point of the curves that both have."""

    def losses(found: list[dict]) -> dict[int, float]:
        points: dict[int, list[float]] = {}
        for row in found:
            for point in row["curve"]:
                points.setdefault(point[0], []).append(point[1 + list(TEXTS).index(text)])
        return {tokens: statistics.mean(values) for tokens, values in points.items() if len(values) == len(found)}

    ours, theirs = losses(rows), losses(reference)
    return [(tokens, loss - theirs[tokens]) for tokens, loss in ours.items() if tokens in theirs]


def draw_gaps(path: Path, panels: dict[str, dict[str, list[dict]]], reference: str, order: tuple[str, ...]) -> None:
    """Differences to the reference while training goes on; `panels`: title -> variant -> runs.

    A variant has the colour of its place in `order` in every panel.
    """
    figure, every = subplots(1, len(panels), figsize=(6.5 * len(panels), 5), squeeze=False)
    for axes, (title, runs) in zip(every[0], panels.items()):
        for variant in (variant for variant in runs if variant != reference):
            colour = COLOURS[order.index(variant) % 10]
            for style, text in zip("-:", TEXTS):
                points = gaps(runs[variant], runs[reference], text)
                label = f"{variant} ({len(runs[variant])})" if style == "-" else None
                axes.plot([at / 1e6 for at, _ in points], [gap for _, gap in points], style, color=colour, label=label)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=f"{title}\nsolid: educational text, dotted: books", xlabel="training tokens, millions")
        axes.set_ylabel(f"held-out loss minus that of {reference} ({len(runs[reference])}), nats per token")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, title="seeds in brackets", title_fontsize=8)
    write_figure(figure, path)


def draw_differences(path: Path, runs: dict[str, list[dict]], reference: list[dict]) -> None:
    """Difference of every variant to the reference on both texts, with its interval.

    The axis reaches `BEYOND` nats past the differences, so that one interval which is much wider than all others does
    not make these too small to read.
    """
    name = reference[0]["variant"]
    mean_of = {variant: statistics.mean(column(rows, "held_out_edu")) for variant, rows in runs.items()}
    variants = sorted((variant for variant in runs if variant != name), key=mean_of.get, reverse=True)
    figure, axes = subplots(figsize=(8, 1.2 + 0.35 * len(variants)))
    for offset, (text, title) in enumerate(TEXTS.items()):
        for height, variant in enumerate(variants):
            mean, bounds = difference(column(runs[variant], text), column(reference, text))
            error = [[mean - bounds[0]], [bounds[1] - mean]] if bounds else None
            label = title if height == 0 else None
            y = height + 0.15 * (1 - 2 * offset)
            axes.errorbar(mean, y, xerr=error, fmt="os"[offset], color=COLOURS[offset], capsize=3, label=label)
    means = [difference(column(runs[v], text), column(reference, text))[0] for v in variants for text in TEXTS]
    axes.set_xlim(min(0, *means) - BEYOND, max(0, *means) + BEYOND)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks([*range(len(variants))], [f"{v} ({len(runs[v])})" for v in variants])
    axes.set(
        title=f"Held-out loss minus that of {name} ({len(reference)})\nat equal tokens (number of seeds)",
        xlabel="nats per token: left of 0 is better\n(bars: 95 %, cut off at the frame; no bar: one seed)",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    write_figure(figure, path)


def cells_of_rates(rates: list[float], tried: dict, ended: dict[float, tuple[float, ...]]) -> list[str]:
    """For each rate the losses of what ended at it; nothing where it was not tried."""
    shown = {rate: " / ".join(f"{loss:.4f}" for loss in losses) for rate, losses in ended.items()}
    return [shown.get(rate, "diverged" if rate in tried else "") for rate in rates]


def sweep_section(rows: list[dict], size: str) -> list[str]:
    """Lines on the held-out educational loss of each swept variant and rate; none without a sweep.

    `rows` are of one size. One that diverged says so. Sentences name the variants whose best rate has no worse one on
    both sides, and those for which another set of token files finds another rate best.
    """
    sweeps = {row["variant"]: sweep_of(rows, [row["variant"]]) for row in rows if row["plan"] == SWEEP}
    sweeps = {variant: sweep for variant, sweep in sweeps.items() if sweep}
    if not sweeps:
        return []
    rates = sorted(set().union(*sweeps.values()))
    lines, at_edge = [], []
    for variant, sweep in sweeps.items():
        ended = losses_of(sweep)
        shown = cells_of_rates(rates, sweep, {rate: (loss,) for rate, loss in ended.items()})
        lines.append([variant, next(iter(sweep.values()))[0]["data"], *shown])
        if ended and (len(sweep) < FEWEST_RATES or min(ended, key=ended.get) in (min(sweep), max(sweep))):
            at_edge.append(f"`{variant}`")
    notes = [f"The best rate may lie beyond those that were tried for {', '.join(at_edge)}."] if at_edge else []
    disagreeing = ", ".join(f"`{variant}`" for variant in sweeps if len(best_rates(rows, variant)) > 1)
    if disagreeing:
        notes += [
            f"Two sets of token files find different rates best, of those that both have, for {disagreeing}:",
            "so short a sweep with so few seeds does not tell neighbouring rates apart for certain.",
        ]
    rows_of_table = table(["variant", "token files", *(f"{rate:g}" for rate in rates)], lines, text_columns=2)
    lengths = sorted({tried[0]["tokens"] for sweep in sweeps.values() for tried in sweep.values()})
    tokens = " and ".join(f"{length / 1e6:.0f}M" for length in lengths)
    most = max(len(tried) for sweep in sweeps.values() for tried in sweep.values())
    seeds = "one seed each" if most == 1 else f"the mean of up to {most} seeds"
    above = f"Held-out loss on educational text after {tokens} tokens, {seeds}."
    return [f"## Learning rates at {size}", "", above, "", *rows_of_table, "", *notes, *([""] if notes else [])]


def best_rates(rows: list[dict], variant: str) -> set[float]:
    """The best rates of a variant by each set of token files, of those that all sets have; `rows` are of one size.

    None where they have fewer than two in common.
    """
    own = [row for row in rows if row["plan"] == SWEEP and row["variant"] == variant]
    found = []
    for data in dict.fromkeys(row["data"] for row in own):
        found.append(losses_of(sweep_of([row for row in own if row["data"] == data], [variant])))
    common = set.intersection(*map(set, found)) if found else set()
    if len(common) < 2:
        return set()
    return {min(common, key=losses.get) for losses in found}


def whole_rates_section(rows: list[dict], size: str) -> list[str]:
    """Lines on whole runs at several rates, beside those of the headline or of scaling; none without any.

    `rows` are of one size.
    """
    tried = whole_runs(rows)
    if not tried:
        return []
    rates = sorted(set().union(*tried.values()))
    lines, better, at_edge = [], [], []
    for (variant, data, seed, _), runs in sorted(tried.items()):
        ended = {rate: row["held_out_edu"] for rate, row in runs.items() if row["status"] == "ok"}
        both = {rate: tuple(runs[rate][text] for text in TEXTS) for rate in ended}
        lines.append([variant, data, str(seed), *cells_of_rates(rates, runs, both)])
        if not ended:
            continue
        lowest = min(ended, key=ended.get)
        if lowest in (min(runs), max(runs)):
            at_edge.append(f"`{variant}`")
        swept = ended.get(best_of_sweep(rows, [variant]))
        if swept is not None and ended[lowest] < swept - MARGIN:
            better.append(f"`{variant}` ({ended[lowest] - swept:+.3f} at {lowest:g})")
    notes = []
    if better:
        notes += [f"More than {MARGIN} nats below that of the sweep's best rate: {', '.join(better)}."]
    if at_edge:
        names = ", ".join(dict.fromkeys(at_edge))
        notes += [f"The best rate may lie beyond those that were tried for {names}."]
    header = ["variant", "token files", "seed", *(f"{rate:g}" for rate in rates)]
    return [
        f"## Learning rates at {size}, whole runs",
        "",
        "Held-out loss of whole runs, on educational text / books. A rate that ends more than "
        f"{MARGIN} nats below that of the sweep on educational text takes its place; without a sweep, the lowest of "
        f"{FEWEST_RATES} or more is taken. Families of variants without a line here have what the sweep alone says.",
        "",
        *table(header, lines, text_columns=2),
        "",
        *notes,
        *([""] if notes else []),
    ]


def better_reference(rows: list[dict], base: dict, data: str) -> list[str]:
    """A sentence for the first paragraph where the reference is found better at another rate than that of its runs."""
    name = base["reference"]
    had, now = old_rates(rows, data, EQUAL_TOKENS, base).get(name, (None, None))
    whole = most_rates(rows, [name])
    if any(rate not in whole or whole[rate]["status"] != "ok" for rate in (had, now)):
        return []
    lower = " and ".join(f"{whole[had][text] - whole[now][text]:.3f} on {title}" for text, title in TEXTS.items())
    return [
        f"`{name}` ends lower at a rate of {now:g} than at the {had:g} of its runs here, by {lower}",
        "(one seed). Beside it, every variant looks better by about that than it is, at equal seconds too, until its",
        "runs are made again.",
    ]


def stability_table(rows: list[dict]) -> list[str]:
    """One line for each variant and rate on one set of token files, each seed as it came out last."""
    header = ["variant", "token files", "rate", "seeds", "diverged", "spikes a run", "largest gradient norm"]
    last = {
        (row["variant"], row["data"], row["learning_rate"], row["seed"]): row
        for row in rows
        if row["plan"] == "stability" and row["status"] != "failed"
    }
    grouped, lines = {}, []
    for (*key, _), row in last.items():
        grouped.setdefault(tuple(key), []).append(row)
    if not grouped:
        return [NOT_MEASURED]
    for (variant, data, rate), found in sorted(grouped.items()):
        ended = [row["held_out_edu"] for row in found if row["status"] == "ok"]
        norms = column(found, "max_grad_norm")
        cells = [variant, data, f"{rate:g}", str(len(found)), str(len(found) - len(ended))]
        cells += [f"{statistics.mean(column(found, 'spikes')):.1f}"]
        cells += [f"{max(norms):.1f}" if all(map(math.isfinite, norms)) else "not finite"]
        lines.append([*cells, as_mean(ended) if ended else ""])
    shown = table([*header, "held-out edu, of those that ended"], lines, text_columns=2)
    if all(row["status"] == "diverged" for row in last.values()):
        shown += ["", "All of them diverged, so that they do not tell the variants apart."]
    return shown


def repeats_section(rows: list[dict]) -> list[str]:
    """Lines on runs of the same settings and seed, which only the commit and the GPU tell apart; none without any."""
    runs: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["status"] in DONE:
            runs.setdefault((*identity(row), row["data"]), []).append(row)
    repeated = sorted((key, found) for key, found in runs.items() if len(found) > 1)
    if not repeated:
        return []
    lines, agreeing = [], 0
    for _, found in repeated:
        first, ended = found[0], [row for row in found if row["status"] == "ok"]
        ranges = [max(column(ended, text)) - min(column(ended, text)) for text in TEXTS] if len(ended) > 1 else []
        agreeing += len(ended) in (0, len(found)) and all(apart <= MARGIN for apart in ranges)
        cells = [first["variant"], ", ".join(dict.fromkeys(column(found, "plan"))), first["data"]]
        cells += [", ".join(column(found, "commit")), first["size"], str(first["seed"]), f"{first['tokens'] / 1e6:.1f}"]
        cells += [", ".join(f"{r[text]:.4f}" if r in ended else "diverged" for r in found) for text in TEXTS]
        lines.append([*cells, *([f"{apart:.4f}" for apart in ranges] or ["", ""])])
    header = ["variant", "plans", "token files", "commits", "size", "seed", "tokens, M"]
    header += ["held-out edu", "held-out books", "edu, range", "books, range"]
    return [
        "## Runs that were made again",
        "",
        *table(header, lines, text_columns=4),
        "",
        f"{agreeing} of {len(repeated)} agree within {MARGIN} nats on both texts. Two runs of 100M tokens that differ",
        "in their seed alone are seldom further apart; how far shorter ones are was not measured. Each table has the",
        "last of them.",
        "",
    ]


def speeds_alone(runs: dict[str, list[dict]]) -> dict[str, float]:
    """Tokens a second of each variant, by those of its runs that had their GPU to themselves."""
    alone = {
        name: [row["tokens_per_second"] for row in rows if row["runs_per_gpu"] == 1 and row["tokens_per_second"]]
        for name, rows in runs.items()
    }
    return {name: statistics.mean(speeds) for name, speeds in alone.items() if speeds}


def muon_section(rows: list[dict], base: dict) -> list[str]:
    """Lines on the runs with Muon: beside each other, then each beside the same variant with AdamW; none without runs.

    The former differences are to the reference of `base`, the file of variants, with Muon.
    """
    lines, reference = [], base["reference"]
    with_adamw = by_data(rows, EQUAL_TOKENS)
    for data, runs in by_data(rows, WITH_MUON).items():
        speeds = speeds_alone(runs)
        lines += [f"## With Muon, token files {data}", ""]
        lines += ["Matrices are trained by Muon, embeddings and vectors by AdamW. Differences are to dense with Muon;"]
        lines += [f"one between the optimizers that is below {MARGIN} counts as none, as planned."]
        lines += ["", *variant_table(runs, runs.get(f"{reference}_{MUON}", []), speeds), ""]
        lines += below_table(rows, data, WITH_MUON, base)
        pairs = {name: with_adamw.get(data, {}).get(name.removesuffix(f"_{MUON}"), []) for name in runs}
        cells = [
            [name, f"{len(runs[name])} and {len(others)}"]
            + [as_difference(column(runs[name], text), column(others, text)) for text in TEXTS]
            for name, others in pairs.items()
            if others
        ]
        if cells:
            lines += ["Minus the same variant with AdamW, at equal tokens:", ""]
            lines += [*table(["variant", "seeds", "edu, difference", "books, difference"], cells), ""]
    return lines


def by_data(rows: list[dict], plans: tuple[str, ...]) -> dict[str, dict[str, list[dict]]]:
    """`group` of each id of token files that has runs of the plans, which is empty where all of them diverged."""
    ids = dict.fromkeys(row["data"] for row in rows if row["plan"] in plans and row["status"] in DONE)
    return {data: group([row for row in rows if row["data"] == data], plans) for data in ids}
