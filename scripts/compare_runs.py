"""Put runs of pretrain.py or sft.py side by side: one table and one picture of their held-out losses.

    python scripts/compare_runs.py runs/30m runs/30m_llama_total runs/30m_llama_active --output benchmarks/30m

Writes OUTPUT.md and OUTPUT.png from the training_summary.json and trainer_state.json that the runs left.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from command_line import ArgumentParser, InputError, check_output_folder, run_script
from perplexity_metric import with_error

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib import pyplot

# What must be the same for a comparison to mean anything; the table says where it is not.
COMMON = ("text", "tokens", "rows_per_step", "row_length", "device", "torch", "transformers", "commit", "date")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of the runs")
    parser.add_argument("--output", required=True, type=Path, help="where to write, without a suffix")
    return parser.parse_args()


def read(run: Path) -> dict:
    """The summary of a run, with its curve of (step, training loss)."""
    try:
        summary = json.loads((run / "training_summary.json").read_text())
        history = json.loads((run / "trainer_state.json").read_text())["log_history"]
        summary["curve"] = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        return {"name": run.name, **summary, "last": summary["held_out"][-1]}
    except (OSError, ValueError, LookupError) as error:
        raise InputError(f"'{run}' is not the output folder of a finished run: {error}.") from error


def table(runs: list[dict]) -> str:
    lines = ["| | " + " | ".join(run["name"] for run in runs) + " |", "|---|" + "---:|" * len(runs)]

    def add(title: str, cell) -> None:
        lines.append(f"| {title} | " + " | ".join(cell(run) for run in runs) + " |")

    add("model", lambda run: run["model_type"])
    add("parameters", lambda run: f"{run['parameters']:,}")
    add("active per token", lambda run: f"{run['active_parameters']:,}")
    add("held-out loss, nats per token", lambda run: with_error(run["last"], "loss", 4))
    add("held-out perplexity", lambda run: with_error(run["last"], "perplexity", 2))
    add(
        "tokens per second (median)",
        lambda run: f"{run['tokens_per_second']:,.0f}" if "tokens_per_second" in run else "",
    )
    add("MFU", lambda run: f"{run['mfu']:.1%}" if "mfu" in run else "")
    add("waiting for data", lambda run: f"{run['data_wait_share']:.1%}" if "data_wait_share" in run else "")
    add("peak GPU memory, GiB", lambda run: f"{run['peak_memory_gib']:.2f}" if "peak_memory_gib" in run else "")
    add("seed", lambda run: str(run["options"].get("seed", "")))
    for name in COMMON:
        values = [run.get(name) for run in runs]
        if any(value != values[0] for value in values):
            add(f"**differs: {name.replace('_', ' ')}**", lambda run, name=name: str(run.get(name)))
    shared = {name: runs[0].get(name) for name in COMMON if len({str(run.get(name)) for run in runs}) == 1}
    return "\n".join(
        [
            *lines,
            "",
            "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in shared.items() if value is not None),
        ]
    )


def draw(runs: list[dict], path: Path) -> None:
    """Held-out loss over steps. The untrained model's, some 7 nats above, is left out: runs differ by hundredths."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
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
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(args: argparse.Namespace) -> None:
    check_output_folder(args.output.parent, "--output in the folder")
    for suffix in ("png", "md"):
        if (file := args.output.with_name(f"{args.output.name}.{suffix}")).is_dir():
            raise InputError(f"--output '{args.output}' cannot be written, for '{file}' is a folder: name another.")
    runs = [read(run) for run in args.runs]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # Not with_suffix, which would take the .5b of runs/1.5b for one.
    draw(runs, args.output.with_name(f"{args.output.name}.png"))
    text = f"# {args.output.name}\n\n{table(runs)}\n\n![held-out loss]({args.output.name}.png)\n"
    args.output.with_name(f"{args.output.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_script(main, parse_args())
