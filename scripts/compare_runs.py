"""Put runs of pretrain.py or sft.py side by side: one table and one picture of their held-out losses.

    python scripts/compare_runs.py runs/30m runs/30m_llama_total runs/30m_llama_active --output benchmarks/30m

Writes OUTPUT.md and OUTPUT.png from the training_summary.json and trainer_state.json that the runs left.
"""

import argparse
from pathlib import Path
from urllib.parse import quote

from complexity_deep.workflow.command import ArgumentParser, InputError, check_output_folder, needs, run_script

with needs("train"):
    from complexity_deep.workflow.charts import write_figure
    from complexity_deep.workflow.evaluation.run_comparison import comparison_table, draw, read


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of the runs")
    parser.add_argument("--output", required=True, type=Path, help="where to write, without a suffix")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    check_output_folder(args.output.parent, "--output in the folder")
    for suffix in ("png", "md"):
        if (file := args.output.with_name(f"{args.output.name}.{suffix}")).is_dir():
            raise InputError(f"--output '{args.output}' cannot be written, for '{file}' is a folder: name another.")
    runs = [read(run) for run in args.runs]
    names = [run["name"] for run in runs]
    if len(set(names)) < len(names):  # as of runs/one/model and runs/other/model
        for run, path in zip(runs, args.runs):
            run["name"] = str(path)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # Not with_suffix, which would take the .5b of runs/1.5b for one.
    write_figure(draw(runs), args.output.with_name(f"{args.output.name}.png"))
    picture = quote(f"{args.output.name}.png")  # Markdown takes no space in an address
    text = f"# {args.output.name}\n\n{comparison_table(runs)}\n\n![held-out loss]({picture})\n"
    args.output.with_name(f"{args.output.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_script(main, parse_args())
