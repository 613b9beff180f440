"""The scaling section of docs/evidence.md: the same variants at three sizes, against their active weights' compute.

Three sizes at equal tokens do not identify L = E + A C^-alpha: its three numbers go through any three losses that fall
and flatten, and nothing is left over to measure their error with. What is fitted is a line in log10 C.
"""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from scipy import stats

from complexity_deep.workflow.charts import subplots, write_figure
from complexity_deep.workflow.evidence.ablation_plan import read_yaml
from complexity_deep.workflow.evidence.ablation_report import (
    COLOURS,
    CONFIDENCE,
    EQUAL_TOKENS,
    NOT_MEASURED,
    TEXTS,
    as_difference,
    as_mean,
    below_table,
    by_data,
    column,
    difference,
    gaps,
    signed,
    sizes_of,
    speeds_alone,
    variant_table,
)
from complexity_deep.workflow.flops import FLOPS_PER_PARAMETER
from complexity_deep.workflow.markdown_table import table

SIZES = ("10m", "30m", "150m")
# At 30m the rows are those of the headline: scaling.yaml has the same variants and tokens at the other sizes.
SCALING, LARGE = (*EQUAL_TOKENS, "scaling"), ("large",)
UNIT, UNIT_NAME = 1e15, "1e15 FLOPs"  # of tables and figures
Points = dict[str, dict[str, list[dict]]]  # size -> variant -> a row for each seed

METHOD = f"""\
Compute is {FLOPS_PER_PARAMETER} FLOPs for each active parameter and training token, forward and backward: of the
attention, of one expert, of the shared one, of mu and dynamics, and of the head, which is the tied embedding.
Attention's products of queries with keys and values are left out, and so is looking up embeddings.
`shared_64_layers_values_plain` has fewer active parameters than the others of its size, for it has no mu and no
dynamics.

The fit is a straight line of the loss in log10 of compute, by least squares through all runs of a variant; its
interval is Student's with two degrees of freedom fewer than runs, and contains what the three sizes lie off a line.
The trend is the least-squares slope of the difference to dense through the three sizes. Its interval holds the spread
of seeds alone, pooled over both variants and all sizes. Nothing of it says that a line goes on beyond the largest
size. All sizes see the same tokens, so that a larger model sees fewer for each of its parameters."""


class Line(NamedTuple):
    """A least-squares line y = mean_y + slope (x - mean_x), with what its intervals need."""

    slope: float
    mean_x: float
    mean_y: float
    spread_x: float  # sum of the squared distances of x to its mean
    deviation: float  # of the residuals
    number: int

    @property
    def freedom(self) -> int:
        return self.number - 2

    @property
    def quantile(self) -> float:
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom))

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval of the slope."""
        half = self.quantile * self.deviation / math.sqrt(self.spread_x)
        return self.slope - half, self.slope + half

    def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The line at `x` [N], and half the width of the interval of its mean [N]."""
        error = self.deviation * np.sqrt(1 / self.number + (x - self.mean_x) ** 2 / self.spread_x)
        return self.mean_y + self.slope * (x - self.mean_x), self.quantile * error


def fit_line(x: list[float], y: list[float]) -> Line:
    """Raises `ValueError` for fewer than three points, which leave no error to estimate."""
    if len(x) < 3:
        raise ValueError(f"{len(x)} points leave no degree of freedom beside a line.")
    slope = stats.linregress(x, y).slope
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    residuals = [b - mean_y - slope * (a - mean_x) for a, b in zip(x, y)]
    spread = sum((a - mean_x) ** 2 for a in x)
    return Line(slope, mean_x, mean_y, spread, math.sqrt(sum(r * r for r in residuals) / (len(x) - 2)), len(x))


def pooled_variance(groups: list[list[float]]) -> tuple[float, int]:
    """Variance within the groups and its degrees of freedom; 0 and 0 where no group has two values."""
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups if len(group) > 1)
    return (squares / freedom, freedom) if freedom else (0.0, 0)


def trend(x: list[float], ours: list[list[float]], reference: list[list[float]]) -> tuple[float, tuple | None, int]:
    """Slope in `x` of the mean differences, its interval from the spread of seeds, and the degrees of freedom.

    `ours` and `reference` have the losses of each seed for each `x`; there is no interval where all have one seed.
    """
    centred = [value - statistics.mean(x) for value in x]
    weights = [value / sum(c * c for c in centred) for value in centred]
    means = [statistics.mean(a) - statistics.mean(b) for a, b in zip(ours, reference)]
    slope = sum(weight * mean for weight, mean in zip(weights, means))
    variance, freedom = pooled_variance([*ours, *reference])
    if not freedom:
        return slope, None, 0
    error = math.sqrt(variance * sum(w * w * (1 / len(a) + 1 / len(b)) for w, a, b in zip(weights, ours, reference)))
    return slope, tuple(map(float, stats.t.interval(CONFIDENCE, freedom, slope, error))), freedom


def compute(row: dict) -> float:
    """FLOPs of the run in products with active weights, those of attention's scores left out."""
    return FLOPS_PER_PARAMETER * row["active_parameters"] * row["tokens"]


def log_compute(rows: list[dict]) -> float:
    return math.log10(statistics.mean(map(compute, rows)))


def measured_points(rows: list[dict], variants: list[str]) -> tuple[str, Points]:
    """Finished runs at equal tokens, of the one set of token files that has most of them at all sizes.

    Returns the id of the token files as well, "" where there is no run.
    """
    found: dict[str, Points] = {}
    for size in SIZES:
        for data, runs in by_data([row for row in rows if row["size"] == size], SCALING).items():
            found.setdefault(data, {})[size] = {name: runs[name] for name in variants if name in runs}

    def complete(data: str) -> tuple[int, int]:
        groups = [group for runs in found[data].values() for group in runs.values()]
        return len(groups), sum(map(len, groups))

    best = max(found, key=complete, default="")
    return best, found.get(best, {})


def size_table(points: Points, variants: list[str], reference: str) -> list[str]:
    """One line for each size and variant that it has, with the difference to the reference of the same size."""
    header = ["size", "variant", "parameters, M (total / active)", f"compute, {UNIT_NAME}", "seeds"]
    header += ["held-out edu", "held-out books", "edu, difference", "books, difference"]
    lines = []
    for size, runs in points.items():
        for variant in (name for name in variants if name in runs):
            rows, dense = runs[variant], runs.get(reference, [])
            is_alone = variant == reference or not dense
            cells = [size, variant, sizes_of(rows[0])]
            cells += [f"{compute(rows[0]) / UNIT:.1f}", str(len(rows))]
            cells += [as_mean(column(rows, text)) for text in TEXTS]
            for text in TEXTS:
                cells.append("" if is_alone else as_difference(column(rows, text), column(dense, text)))
            lines.append(cells)
    return table(header, lines, text_columns=2)


def fit_of(points: Points, variant: str, text: str) -> Line:
    rows = [row for size in SIZES for row in points[size][variant]]
    return fit_line([math.log10(compute(row)) for row in rows], column(rows, text))


def fit_table(points: Points, variants: list[str], reference: str) -> list[str]:
    """Slope of each variant's line, and the trend of its difference, in nats for ten times the compute."""
    header = ["variant", "text", "slope of the line", "degrees of freedom"]
    header += ["trend of the difference", "degrees of freedom"]
    x = [log_compute(points[size][reference]) for size in SIZES]
    lines = []
    for variant in variants:
        for text, title in TEXTS.items():
            line = fit_of(points, variant, text)
            cells = [variant, title, signed(line.slope, line.bounds), str(line.freedom), "", ""]
            if variant != reference:
                ours, dense = ([column(points[size][name], text) for size in SIZES] for name in (variant, reference))
                slope, bounds, freedom = trend(x, ours, dense)
                cells[-2:] = [signed(slope, bounds), str(freedom)]
            lines.append(cells)
    return table(header, lines, text_columns=2)


def draw_scaling(path: Path, points: Points, variants: list[str], reference: str) -> None:
    """Educational loss against compute with a line and its band, and the difference to the reference at each size."""
    text = "held_out_edu"
    figure, (losses, differences) = subplots(1, 2, figsize=(12, 4.8))
    others = [variant for variant in variants if variant != reference]
    for index, variant in enumerate([*others, reference]):
        colour = COLOURS[index]
        rows = [row for size in SIZES for row in points[size][variant]]
        losses.plot([compute(row) / UNIT for row in rows], column(rows, text), "o", color=colour, markersize=4)
        line = fit_of(points, variant, text)
        x = np.linspace(*(math.log10(end(map(compute, rows))) for end in (min, max)), 50)
        middle, half = line.band(x)
        losses.plot(10**x / UNIT, middle, color=colour, label=f"{variant} ({len(rows)} runs)")
        losses.fill_between(10**x / UNIT, middle - half, middle + half, color=colour, alpha=0.12, linewidth=0)
        if variant == reference:
            continue
        for place, size in enumerate(SIZES):
            mean, bounds = difference(column(points[size][variant], text), column(points[size][reference], text))
            error = [[mean - bounds[0]], [bounds[1] - mean]] if bounds else None
            where = place + 0.12 * (index - (len(others) - 1) / 2)  # side by side
            label = variant if place == 0 else None
            differences.errorbar(where, mean, yerr=error, fmt="o", color=colour, capsize=3, label=label)
    lowest, highest = losses.get_ylim()
    measured = [row[text] for runs in points.values() for rows in runs.values() for row in rows]
    # A band of few runs may be wider than all that was measured.
    margin = 0.25 * (max(measured) - min(measured))
    losses.set_ylim(max(lowest, min(measured) - margin), min(highest, max(measured) + margin))
    losses.set(xscale="log", xlabel=f"training compute of active parameters, {UNIT_NAME}")
    losses.set(ylabel="held-out loss, nats per token")
    losses.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    losses.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    losses.xaxis.set_minor_formatter(NullFormatter())
    losses.set_title("Held-out educational text: each run, lines and 95 % bands")
    differences.axhline(0, color="black", linewidth=0.8)
    differences.set_xticks(range(len(SIZES)), SIZES)
    differences.set(
        xlabel="size (bars: 95 %, no bar: one seed on either side)", ylabel=f"held-out loss minus that of {reference}"
    )
    differences.set_title("Difference at each size (below 0 is better)")
    for axes in (losses, differences):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    write_figure(figure, path)


def scaling_section(output: Path, rows: list[dict], recipes: Path) -> list[str]:
    """The lines of the section; writes scaling.png into `output` where there are runs at every size.

    Those at some sizes have their table alone.
    """
    plan, base = read_yaml(recipes / "150m" / "scaling.yaml"), read_yaml(recipes / "30m.yaml")
    reference = base["reference"]
    data, points = measured_points(rows, plan["variants"])
    whole = [name for name in plan["variants"] if all(name in points.get(size, {}) for size in SIZES)]
    below = []
    for size in points:
        of_size = [row for row in rows if row["size"] == size and row["variant"] in plan["variants"]]
        below += below_table(of_size, data, SCALING, read_yaml(recipes / f"{size}.yaml"), f" at {size}")
    lines = ["## Scaling", ""]
    if reference not in whole or len(whole) < 2:
        if any(runs for size, runs in points.items() if size != base["size"]):
            lines += [f"Runs of equal tokens, token files {data}. No line is fitted before every size has them.", ""]
            lines += [*size_table(points, plan["variants"], reference), "", *below]
        else:
            lines += [NOT_MEASURED]
    else:
        lines += [f"Runs of equal tokens at three sizes, token files {data}.", "", METHOD, ""]
        lines += [*size_table(points, whole, reference), "", *below]
        lines += ["In nats for ten times the compute:", ""]
        lines += [*fit_table(points, whole, reference), ""]
        draw_scaling(output / "scaling.png", points, whole, reference)
        lines += [f"![held-out loss against compute, token files {data}]({output.name}/scaling.png)"]
        others = [name for name in plan["variants"] if name not in whole]
        if others:
            lines += ["", f"Not measured at every size: {', '.join(f'`{name}`' for name in others)}."]
    lines += ["", f"[scaling.md]({output.name}/scaling.md) says what it would take to tell at 1.5b.", ""]
    for size in SIZES:
        own = [row for row in rows if row["size"] == size]
        for data, runs in by_data(own, LARGE).items():
            lines += [f"## {size} on more tokens, token files {data}", ""]
            lines += ["More than one pass over the token files, each of which takes every row once, in an order of its"]
            lines += ["own. Rates are those that shorter runs found best: none was chosen at this length."]
            lines += ["", *variant_table(runs, runs.get(reference, []), speeds_alone(runs)), ""]
            lines += while_training(runs, reference)
            lines += below_table(own, data, LARGE, read_yaml(recipes / f"{size}.yaml"))
    return lines


def while_training(runs: dict[str, list[dict]], reference: str) -> list[str]:
    """Sentences for each variant on when its difference to the reference was lowest, and an empty line."""
    lines = []
    for variant, rows in runs.items():
        if variant == reference or reference not in runs:
            continue
        edu, books = (gaps(rows, runs[reference], text) for text in TEXTS)
        if not edu:
            continue
        # While the rate still rises, losses differ by more than they ever do again.
        later = range(len(edu) // 4, len(edu))
        best = min(later, key=lambda index: edu[index][1])
        lines.append(
            f"After the first quarter, `{variant}` minus `{reference}` is lowest at {edu[best][0] / 1e6:.0f}M tokens: "
            f"{edu[best][1]:+.3f} on educational text and {books[best][1]:+.3f} on books. It ends at {edu[-1][1]:+.3f} "
            f"and {books[-1][1]:+.3f}."
        )
    return [*lines, ""] if lines else []
