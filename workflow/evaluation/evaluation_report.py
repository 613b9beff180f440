"""The files of an evaluation: numbers, tables and a chart."""

import html
import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from complexity_deep.workflow.charts import subplots, write_figure
from complexity_deep.workflow.command import whole_files
from complexity_deep.workflow.evaluation.long_context import by_length, draw_long_context
from complexity_deep.workflow.evaluation.perplexity import with_error
from complexity_deep.workflow.markdown_table import table


def table_with_notes(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; the last cell of a row is a note, which becomes a number and a line below."""
    notes = list(dict.fromkeys(row[-1] for row in rows if row[-1]))
    cells = [[*row[:-1], str(1 + notes.index(row[-1])) if row[-1] else ""] for row in rows]
    # A page would take the <unk> of a note for a tag, and show nothing in its place.
    lines = (f"{number}. {html.escape(note, quote=False)}" for number, note in enumerate(notes, 1))
    return [*table(header, cells), "", *lines, ""]


def accuracy_table(rows: list[dict]) -> list[str]:
    def cells(row):
        stderr = "" if row["stderr"] is None else f"{row['stderr']:.2%}"
        score = [f"{row['value']:.2%}", stderr, f"{row['random']:.2%}", f"{row['n']:,}", str(row["num_fewshot"])]
        return [f"{row['task']}, {row['metric']}", *score, row["note"]]

    header = ["task, metric", "score", "standard error", "guessing", "questions", "examples", "note"]
    return table_with_notes(header, [cells(row) for row in rows])


def perplexity_table(rows: list[dict]) -> list[str]:
    def cells(row):
        stderr = "" if row["stderr"] is None else f"{row['stderr']:.4f}"
        scores = [f"{row['nll_per_token']:.4f}", stderr, f"{row['random']:.4f}", with_error(row, "perplexity", 2)]
        by_words = "" if row["word_perplexity"] is None else f"{row['word_perplexity']:,.2f}"
        scores += [f"{row['bits_per_byte']:.4f}", by_words, f"{row['tokens']:,}"]
        return [row["corpus"], *scores, f"{row['documents']:,}", f"{row['context']} / {row['stride']}", row["note"]]

    header = [
        "text",
        "nats per token",
        "standard error",
        "guessing",
        "perplexity",
        "bits per byte",
        "per word",
        "tokens",
    ]
    return table_with_notes([*header, "documents", "context / stride", "note"], [cells(row) for row in rows])


def render_markdown(report: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"# Evaluation of {report['model']}",
        "",
        f"{report['harness']['name']} {report['harness']['version']}, {report['dtype']} on {report['device']}, "
        f"{report['date']}; {versions}.",
        "",
    ]
    if report["tasks"]:
        lines += accuracy_table(report["tasks"])
    if report["cut_prompts"]:
        cut = f"{report['cut_prompts']:,} of {report['prompts']:,} prompts were longer than the model's context"
        lines += [f"{cut} and lost their beginning.", ""]
    if report["perplexity"]:
        lines += perplexity_table(report["perplexity"])
    if report["left_out"]:
        lines += [f"Left out, for want of a file: {', '.join(report['left_out'])}.", ""]
    lines += ["![scores](evaluation.png)", ""]
    for entry in report.get("long_context", []):
        about = f"Perplexity of {entry['documents']} long documents of {entry['corpus']} by position. The model was "
        lines += [f"{about}trained on rows of {entry['trained_length']:,} tokens.", ""]
        lines += [*table(["position", *entry["curves"]], by_length(entry)), ""]
    if report.get("long_context"):
        lines += ["![perplexity by position](long_context.png)", ""]
    if report["subtasks"]:
        parts = accuracy_table(report["subtasks"])
        lines += ["<details><summary>Parts of MMLU</summary>", "", *parts, "</details>", ""]
    return "\n".join(lines)


def scores_of(report: dict, kind: str) -> dict[tuple[str, str], dict]:
    """What was measured, and how -> row of what is drawn: accuracies (`kind` "tasks") or nats per token ("perplexity").

    Scores that were measured differently have different keys, so that they get places of their own.
    """
    if kind == "tasks":
        return {
            (f"{row['task']}\n{row['metric']}", f"{row['n']:,} questions, {row['num_fewshot']} examples"): row
            for row in report["tasks"]
        }
    return {
        (row["corpus"].replace("/", "/\n"), f"{row['tokens']:,} tokens, {row['context']} / {row['stride']}"): row
        for row in report["perplexity"]
    }


def places_of(reports: list[dict[tuple[str, str], dict]]) -> list[tuple[str, str]]:
    """Every key of `scores_of` once; those that differ only in how they were measured stand beside each other."""
    keys = list(dict.fromkeys(key for rows in reports for key in rows))
    names = [name for name, _ in keys]
    return sorted(keys, key=lambda key: names.index(key[0]))


def place_names(keys: list[tuple[str, str]]) -> list[str]:
    """What stands below each place; how it was measured only where that tells two places apart."""
    names = [name for name, _ in keys]
    return [name if names.count(name) == 1 else f"{name}\n{how}" for name, how in keys]


def draw(reports: dict[str, dict]) -> Figure:
    """Bars with their standard errors, side by side for each name of `reports`, and the score of guessing.

    Accuracy is on the left, perplexity on the right. A model without a score has no bar there.
    """
    kinds = [kind for kind in ("tasks", "perplexity") if any(report[kind] for report in reports.values())]
    found = {kind: {name: scores_of(report, kind) for name, report in reports.items()} for kind in kinds}
    keys = {kind: places_of(list(found[kind].values())) for kind in kinds}
    widths = [1 + len(keys[kind]) for kind in kinds]
    width = 0.6 if len(reports) == 1 else 0.8 / len(reports)
    versions = dict.fromkeys(report["harness"]["version"] for report in reports.values())
    about = f"{'Scores' if len(reports) > 1 else next(iter(reports))}, lm-eval {', '.join(versions)}"
    size = (max(2 + 0.8 * sum(widths), 0.12 * len(about)), 4.4 + 0.1 * len(reports))  # inches
    figure, all_axes = subplots(1, len(kinds), figsize=size, width_ratios=widths, squeeze=False)
    for axes, kind in zip(all_axes[0], kinds):
        highest = 0.0
        for number, rows in enumerate(found[kind].values()):
            for key, row in rows.items():
                value, error = row["value" if kind == "tasks" else "nll_per_token"], row["stderr"] or 0
                x = keys[kind].index(key) + (number - (len(reports) - 1) / 2) * width
                axes.bar(x, value, width, yerr=error, capsize=4 / len(reports), color=f"C{number}")
                # At the foot of each bar, where no line passes.
                text = f"{value:.1%}" if kind == "tasks" else f"{value:.2f}"
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                turned = {} if len(reports) == 1 else {"rotation": 90, "fontsize": 7}
                axes.text(x, 0.02, text, ha="center", transform=axes.get_xaxis_transform(), bbox=box, **turned)
                highest = max(highest, value + error, row["random"])
        guessing = [next(rows[key]["random"] for rows in found[kind].values() if key in rows) for key in keys[kind]]
        places = range(len(guessing))
        line = axes.hlines(guessing, [x - 0.4 for x in places], [x + 0.4 for x in places], "black", "dotted")
        # A name ends below its place, for the middle of a long one would lie below its neighbours. Names of three lines
        # are turned further, so that they do not overlap.
        shown = place_names(keys[kind])
        turn = 30 if max(name.count("\n") for name in shown) < 2 else 50
        axes.set_xticks(places, shown, rotation=turn, ha="right", rotation_mode="anchor")
        axes.set_ylabel("accuracy" if kind == "tasks" else "nats per token")
        axes.set_ylim(0, 1.1 * highest)
    # One legend below the panels, where it covers no bar, and has every model: some may be in one panel alone.
    names = dict(zip(reports, (Patch(color=f"C{number}") for number in range(len(reports)))))
    names = {"guessing": line, **(names if len(reports) > 1 else {})}
    columns = max(1, min(len(names), int(size[0] / (1 + 0.09 * max(map(len, names))))))
    figure.legend(names.values(), names, loc="outside lower center", ncols=columns)
    figure.suptitle(about)
    return figure


def write_evaluation(report: dict, output: Path) -> None:
    """Write evaluation.png, .md and .json, and long_context.png where it was measured; they change together."""
    with whole_files(output) as folder:
        write_figure(draw({report["model"]: report}), folder / "evaluation.png")
        if report.get("long_context"):
            draw_long_context(report["long_context"], folder / "long_context.png")
        (folder / "evaluation.md").write_text(render_markdown(report))
        (folder / "evaluation.json").write_text(json.dumps(report, indent=1, allow_nan=False))
    if not report.get("long_context"):
        (output / "long_context.png").unlink(missing_ok=True)  # of an earlier evaluation
