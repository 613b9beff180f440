"""The pictures of benchmarks/results.csv, each of which answers one question.

A picture takes the newest measurement that has all it shows, and names its device, versions and commit. One whose rows
were never measured is left out.
"""

import csv
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from complexity_deep.workflow.charts import subplots, write_figure

OURS, LIBRARY, DENSE = "#d9480f", "#1c7ed6", "#868e96"
NAMES = {"complexity-deep": "Complexity-Deep", "qwen3-moe": "Qwen3-MoE", "llama": "Llama"}
PASSES = ("forward", "forward+backward")
RUN = ("device", "torch", "triton", "commit", "date")


class NotMeasuredError(LookupError):
    """results.csv has no measurement with every row that a picture needs."""


def measurements(results: list[dict]) -> list[dict[tuple[str, str], dict]]:
    """The rows, by (case, variant), split where another run begins: what was not measured together is not compared."""
    calls: list[dict] = []
    for row in results:
        key, run = (row["case"], row["variant"]), [row[name] for name in RUN]
        if not calls or key in calls[-1] or run != [next(iter(calls[-1].values()))[name] for name in RUN]:
            calls.append({})
        calls[-1][key] = row
    return calls


def newest(results: list[dict], needed: list[tuple[str, str]]) -> dict[tuple[str, str], dict]:
    """The rows of the newest measurement that has all `needed` (case, variant) pairs."""
    for rows in reversed(measurements(results)):
        if all(key in rows for key in needed):
            return rows
    raise NotMeasuredError(f"nothing measured all of {needed}")


def new_figure(title: str, rows: list[dict], height: float, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure of page width: its question above, where the numbers of `rows` come from below."""
    figure, grid = subplots(1, columns, figsize=(8, height), squeeze=False)
    axes = list(grid[0])
    figure.suptitle(title, fontsize=13, fontweight="bold")
    runs = dict.fromkeys(
        "{device}, torch {torch}, triton {triton}, commit {commit}, {date:.10}".format(**row) for row in rows
    )
    figure.supxlabel("\n".join(runs), fontsize=9, color="#666666")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def bars(
    axis: Axes, labels: list[str], values: list[float], colours: list[str], text: str = "{:.0f} %", end: float = 120
) -> None:
    """Horizontal bars from 0 to `end`, the first on top, each with its value written by the format `text` behind it."""
    positions = range(len(values))
    axis.barh(positions, values, color=colours)
    for position, value in zip(positions, values):
        axis.text(value, position, " " + text.format(value), va="center")
    axis.set_yticks(positions, labels)
    axis.set_xlim(0, end)
    axis.invert_yaxis()


def near_dense(results: list[dict]) -> Figure:
    sizes = (1, 32, 512, 4096, 16384, 65536)
    lines = {
        "cggr": ("cggr (ours)", OURS, "o-"),
        "cggr + plan": ("cggr, sorting of the tokens included", OURS, ":"),
        "grouped_mm, compiled": ("grouped_mm (the library's, compiled)", LIBRARY, "o-"),
    }

    def case(tokens: int, which: str) -> str:
        return f"MLP, 4 experts, {tokens} tokens, {which}"

    found = newest(results, [(case(n, p), v) for n in sizes for p in PASSES for v in (*lines, "dense, compiled")])
    title = "How near is the routed MLP to a dense MLP of the same active size?"
    figure, axes = new_figure(title, [found[case(1, "forward"), "cggr"]], 4.0, 2)
    for axis, which in zip(axes, PASSES):
        dense = [float(found[case(n, which), "dense, compiled"]["median_ms"]) for n in sizes]
        for variant, (label, colour, style) in lines.items():
            offset = 7 if colour == OURS else -16  # the labels of the lower line stand below it
            ratios = [100 * d / float(found[case(n, which), variant]["median_ms"]) for n, d in zip(sizes, dense)]
            axis.plot(range(len(sizes)), ratios, style, color=colour, label=label)
            for position, ratio in enumerate(ratios if style != ":" else ()):
                axis.annotate(f"{ratio:.0f}", (position, ratio), (0, offset), textcoords="offset points", ha="center")
        axis.axhline(100, color=DENSE, linewidth=1, linestyle="--")
        axis.set_xticks(range(len(sizes)), [f"{n:,}" for n in sizes], fontsize=9)
        axis.set_ylim(0, 200)
        axis.set_xlabel("tokens (width 2048, 4 experts of 1408, bf16)")
        axis.set_title(which, fontsize=11)
    axes[0].set_ylabel("speed, % of the compiled dense MLP")
    axes[1].legend(loc="upper right", frameon=False)
    return figure


def near_limit(results: list[dict]) -> Figure:
    step = [("1.5b 8x2048 step", f"{name}, sdpa, compiled") for name in NAMES]
    mlp = [(f"MLP, 4 experts, 16384 tokens, {p}", variant) for p in PASSES for variant in ("cggr", "dense, compiled")]
    layer = [(f"decode layer, {n} tokens, forward", "this") for n in (1, 2, 4)]
    steps, kernels = newest(results, step), newest(results, mlp + layer)
    title = "How near to what the card can do?"
    figure, (compute, memory) = new_figure(title, [steps[step[0]], kernels[mlp[0]]], 3.8, 2)
    rows = [(f"training step, {NAMES[key[1].split(',')[0]]}", float(steps[key]["percent_of_matmul"])) for key in step]
    names = {"cggr": "routed MLP", "dense, compiled": "dense MLP"}
    rows += [(f"{names[key[1]]}, {key[0].split(', ')[-1]}", float(kernels[key]["percent_of_matmul"])) for key in mlp]
    is_ours = [label.startswith(("routed", "training step, Complexity")) for label, _ in rows]
    bars(compute, [row[0] for row in rows], [row[1] for row in rows], [OURS if own else DENSE for own in is_ours])
    compute.set_title("arithmetic: % of the matmul rate", fontsize=11)
    shares = [float(kernels[key]["percent_of_copy"]) for key in layer]
    bars(memory, ["1 row", "2 rows", "4 rows"], shares, [OURS] * 3)
    memory.set_title("decode layer: % of the copy rate", fontsize=11)
    return figure


def experts(results: list[dict]) -> Figure:
    counts = (4, 64, 256)
    keys = {which: [(f"MLP, {n} experts, 65536 tokens, {which}", "cggr") for n in counts] for which in PASSES}
    found = newest(results, [key for listed in keys.values() for key in listed])
    title = "What do more experts cost? Speed of the routed MLP, % of that with 4"
    figure, axes = new_figure(title, [found[keys["forward"][0]]], 2.6, 2)
    for axis, which in zip(axes, PASSES):
        times = [float(found[key]["median_ms"]) for key in keys[which]]
        bars(axis, [f"{n} experts" for n in counts], [100 * times[0] / time for time in times], [OURS] * 3)
        axis.set_title(f"{which}, 65,536 tokens", fontsize=11)
    return figure


def tokens_per_s(results: list[dict]) -> Figure:
    cases = {
        "training, compiled": [("1.5b 8x2048 step", f"{name}, sdpa, compiled") for name in NAMES],
        "generate, static cache": [("1.5b batch 1 decode step", f"{name}, static cache") for name in NAMES],
        "forward, 128 tokens": [("1.5b 1x128 forward", name) for name in NAMES],
    }
    found = [newest(results, keys) for keys in cases.values()]
    first = [rows[keys[0]] for rows, keys in zip(found, cases.values())]
    figure, axes = new_figure("Tokens per second, 1.5b shape, bf16", first, 2.9, len(cases))
    for axis, rows, (title, keys) in zip(axes, found, cases.items()):
        labels = [NAMES[key[1].split(",")[0]] for key in keys]
        values = [float(rows[key]["tokens_per_s"]) for key in keys]
        bars(
            axis, labels if axis is axes[0] else [""] * 3, values, [OURS, LIBRARY, DENSE], "{:,.0f}", 1.7 * max(values)
        )
        axis.set_title(f"{title}\n({rows[keys[0]]['device'].split()[1]})", fontsize=10)
        axis.set_xticks([])
    return figure


USERS = {  # row of the table `users` -> its label
    "1.5b generate, default cache, batch 1": "generate, batch 1",
    "1.5b generate, default cache, batch 32": "generate, batch 32",
    "1.5b forward 1x128": "forward, 1 x 128 tokens",
    "1.5b forward 1x2048": "forward, 1 x 2,048",
    "1.5b forward 8x2048": "forward, 8 x 2,048",
    "1.5b generate_batch, 128 requests of 16..511, 128 new tokens": "continuous batching",
    "1.5b train 1x2048, eager": "training step, 1 x 2,048",
    "1.5b train 8x2048, eager": "training step, 8 x 2,048",
    "1.5b train 4x64..1023, 0 kernels compiled after step 8": "training, changing lengths",
    "1.5b first generate, nothing compiled": "first generate of a process",
    "1.5b first training step, nothing compiled": "first training step",
}


def users(results: list[dict]) -> Figure:
    keys = [(case, name) for case in USERS for name in ("complexity-deep", "llama")]
    found = {}
    for case in USERS:  # the parts of the table may come from several calls
        pair = [key for key in keys if key[0] == case]
        rows = newest(results, pair)
        found |= {key: rows[key] for key in pair}
    title = "Times as fast as Llama by default, 1.5b shape, bf16"
    figure, (axis,) = new_figure(title, list(found.values()), 3.8, 1)
    ratios = [float(found[case, "llama"]["median_ms"]) / float(found[case, keys[0][1]]["median_ms"]) for case in USERS]
    colours = [OURS if ratio >= 1 else DENSE for ratio in ratios]
    bars(axis, list(USERS.values()), ratios, colours, "{:.2g}x", 1.2 * max(ratios))
    axis.axvline(1, color=DENSE, linewidth=1, linestyle="--")
    axis.set_xlabel("Llama as wide as all experts together, eager, nothing set by hand; 1 is as fast")
    return figure


CHARTS = {
    "near_dense": near_dense,
    "near_limit": near_limit,
    "experts": experts,
    "tokens_per_s": tokens_per_s,
    "users": users,
}


def draw(directory: Path) -> list[Path]:
    """Write the pictures that `directory`/results.csv has the rows for into `directory`, and return their paths."""
    with (directory / "results.csv").open(newline="", encoding="utf-8") as file:
        results = list(csv.DictReader(file))
    written = []
    for name, chart in CHARTS.items():
        try:
            figure = chart(results)
        except NotMeasuredError:
            continue
        written.append(directory / f"{name}.png")
        write_figure(figure, written[-1])
    return written
