"""Finished runs side by side: a table and a picture of their held-out losses, and of their evaluations."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from complexity_deep.workflow.charts import subplots
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.evaluation.evaluation_report import table_with_notes
from complexity_deep.workflow.evaluation.perplexity import with_error
from complexity_deep.workflow.markdown_table import as_text, table

# What must be the same for a comparison to mean anything; the table says where it is not. The options, and the number
# of held-out conversations, say which text the losses are of and in which tokens.
COMMON = ("text", "conversations", "tokens", "rows_per_step", "row_length", "held_out_conversations")
COMMON_OPTIONS = ("tokenizer", "validation_sources", "held_out_fraction", "held_out_rows")
MADE_WITH = ("device", "torch", "transformers", "commit", "date")


def read(run: Path, name: str) -> dict:
    """The summary of a run, with its curve of (step, training loss)."""
    try:
        summary = json.loads((run / "training_summary.json").read_text())
        history = json.loads((run / "trainer_state.json").read_text())["log_history"]
        summary["curve"] = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        return {"name": name, **summary, "last": summary["held_out"][-1]}
    except (OSError, ValueError, LookupError) as error:
        raise InputError(f"'{run}' is not the output folder of a finished run: {error}.") from error


def evaluation_file(run: Path) -> Path | None:
    """The evaluation.json that evaluate.py left in the folder of a model, or in the folder that it wrote to itself."""
    files = [run / "evaluation" / "evaluation.json", run / "evaluation.json"]
    return next((file for file in files if file.is_file()), None)


def read_evaluation(file: Path) -> dict:
    try:
        report = json.loads(file.read_text())
        if not score_rows({"": report}):
            raise ValueError("it holds no scores")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"'{file}' is not a report of evaluate.py ({error}): evaluate again, or remove it.") from error
    return report


def joined_notes(notes: dict[str, str]) -> str:
    """One note for all models, or each with its model: one that was fine-tuned on a benchmark may be alone in that."""
    different = set(notes.values())
    if len(different) == 1:
        return different.pop()
    return "; ".join(f"{name}: {note}" for name, note in notes.items() if note)


def score_rows(reports: dict[str, dict]) -> list[list[str]]:
    """Rows of scores: what was measured, a cell for each report, the score of guessing, and a note on the measurement.

    Scores share a row only where they were measured alike, so that what stands beside each other can be compared.
    """
    cells, guessing, notes = {}, {}, {}
    for name, report in reports.items():
        for row in report["tasks"]:
            label = f"{row['task']}, {row['metric']} ({row['n']:,} questions, {row['num_fewshot']} examples)"
            error = "" if row["stderr"] is None else f" ± {row['stderr']:.2%}"
            cells.setdefault(label, {})[name] = f"{row['value']:.2%}{error}"
            guessing[label] = f"{row['random']:.2%}"
            notes.setdefault(label, {})[name] = row["note"]
        for row in report["perplexity"]:
            where = f"({row['documents']:,} documents, context {row['context']:,}, stride {row['stride']:,})"
            # Nats per token compare only within one tokenizer, bits per byte across tokenizers.
            label = f"{row['corpus']}, nats per token, of {row['tokens']:,} {where}"
            error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
            cells.setdefault(label, {})[name] = f"{row['nll_per_token']:.4f}{error}"
            guessing[label] = f"{row['random']:.4f}"
            notes.setdefault(label, {})[name] = row["note"]
            label = f"{row['corpus']}, bits per byte {where}"
            cells.setdefault(label, {})[name] = f"{row['bits_per_byte']:.4f}"
            notes.setdefault(label, {})[name] = row["note"]
    rows = []
    for label, found in cells.items():
        note = joined_notes(notes[label])
        rows.append([label, *(found.get(name, "") for name in reports), guessing.get(label, ""), note])
    for name in ("dtype", "device", "limit", "harness", "versions"):
        values = [report.get(name) for report in reports.values()]
        if any(value != values[0] for value in values):
            rows.append([f"**differs: {name}**", *map(as_text, values), "", ""])
    return rows


def score_table(reports: dict[str, dict]) -> str:
    """Markdown: a column for each report and one for guessing. ± is one standard error."""
    return "\n".join(table_with_notes(["", *reports, "guessing", "note"], score_rows(reports))).rstrip()


def comparison_table(runs: list[dict]) -> str:
    """Markdown: a column for each run, and below it what is the same for all of them."""

    def optional(name: str, shown) -> list[str]:
        return [shown(run[name]) if name in run else "" for run in runs]

    rows = [
        ["model", *(run["model_type"] for run in runs)],
        ["parameters", *(f"{run['parameters']:,}" for run in runs)],
        ["active per token", *(f"{run['active_parameters']:,}" for run in runs)],
        ["held-out loss, nats per token", *(with_error(run["last"], "loss", 4) for run in runs)],
        ["held-out perplexity", *(with_error(run["last"], "perplexity", 2) for run in runs)],
        ["tokens per second (median)", *optional("tokens_per_second", "{:,.0f}".format)],
        ["MFU", *optional("mfu", "{:.1%}".format)],
        ["waiting for data", *optional("data_wait_share", "{:.1%}".format)],
        ["peak GPU memory, GiB", *optional("peak_memory_gib", "{:.2f}".format)],
        ["seed", *(str(run["options"].get("seed", "")) for run in runs)],
    ]
    rows = [row for row in rows if any(row[1:])]  # sft.py, say, measures no waiting for data
    shared = {}
    for name in (*COMMON, *COMMON_OPTIONS, *MADE_WITH):
        values = [run["options"].get(name) if name in COMMON_OPTIONS else run.get(name) for run in runs]
        if any(value != values[0] for value in values):
            rows.append([f"**differs: {name.replace('_', ' ')}**", *map(as_text, values)])
        elif values[0] is not None:
            shared[name] = values[0]
    same = "; ".join(f"{name.replace('_', ' ')} {as_text(value)}" for name, value in shared.items())
    return "\n".join([*table(["", *(run["name"] for run in runs)], rows), "", same])


def draw(runs: list[dict]) -> Figure:
    """Held-out loss over steps. The untrained model's, some 7 nats above, is left out: runs differ by hundredths."""
    figure, axes = subplots(figsize=(8, 4.5))
    shown = []
    for run in runs:
        held_out = [
            (entry["step"], entry["loss"]) for entry in run["held_out"] if entry["step"] or len(run["held_out"]) == 1
        ]
        line = axes.plot(*zip(*held_out), "o-", label=f"{run['name']}: {run['last']['loss']:.3f}")[0]
        axes.plot(*zip(*run["curve"]), alpha=0.3, zorder=0, color=line.get_color())
        shown += [loss for _, loss in held_out]
    margin = 0.1 * (max(shown) - min(shown)) + 0.02
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Held-out loss (faint: training)")
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.grid(alpha=0.3)
    axes.legend(title="at the end")
    return figure
