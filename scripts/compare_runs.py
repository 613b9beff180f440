"""Put runs of pretrain.py or sft.py side by side: a table and a picture of their held-out losses, and of their scores.

    python scripts/compare_runs.py runs/30m runs/30m_llama_total runs/30m_llama_active --output benchmarks/30m

Writes OUTPUT.md, and OUTPUT.png from the training_summary.json and trainer_state.json that the runs left. Where
evaluate.py measured a run, its scores get a table too, and a picture, OUTPUT_scores.png. A folder with nothing but an
evaluation, as of a model from elsewhere, is in these alone.
"""

import argparse
from pathlib import Path
from urllib.parse import quote

from complexity_deep.workflow.command import ArgumentParser, InputError, check_output_folder, needs, run_script

with needs("train"):
    from complexity_deep.workflow.charts import write_figure
    from complexity_deep.workflow.evaluation.evaluation_report import draw as draw_scores
    from complexity_deep.workflow.evaluation.run_comparison import (
        comparison_table,
        draw,
        evaluation_file,
        read,
        read_evaluation,
        score_table,
    )


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of the runs")
    parser.add_argument("--output", required=True, type=Path, help="where to write, without a suffix")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    check_output_folder(args.output.parent, "--output in the folder")
    # Not with_suffix, which would take the .5b of runs/1.5b for one.
    page, losses, scores = (args.output.with_name(args.output.name + end) for end in (".md", ".png", "_scores.png"))
    for file in (page, losses, scores):
        if file.is_dir():
            raise InputError(f"--output '{args.output}' cannot be written, for '{file}' is a folder: name another.")
    names = [path.resolve().name for path in args.runs]
    if len(set(names)) < len(names):  # as of runs/one/model and runs/other/model
        names = [str(path) for path in args.runs]
    evaluations, runs = {}, []
    for path, name in zip(args.runs, names):
        if file := evaluation_file(path):
            evaluations[name] = read_evaluation(file)
        if not file or (path / "training_summary.json").exists():
            runs.append(read(path, name))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {args.output.name}"]
    if runs:
        write_figure(draw(runs), losses)
        lines += [comparison_table(runs), f"![held-out loss]({quote(losses.name)})"]  # an address takes no space
    if evaluations:
        write_figure(draw_scores(evaluations), scores)
        lines += [score_table(evaluations), f"![scores]({quote(scores.name)})"]
    text = "\n\n".join(lines) + "\n"
    page.write_text(text)
    print(text)


if __name__ == "__main__":
    run_script(main, parse_args())
