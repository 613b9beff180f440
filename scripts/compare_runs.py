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


ERRORS = (
    "± is one standard error over the documents or questions of a score. The error of a difference between models that "
    "were measured on the same ones is another, which these files do not hold. Neither is about other seeds."
)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of the runs")
    parser.add_argument("--output", required=True, type=Path, help="where to write, without a suffix")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # Not with_suffix, which would take the .5b of runs/1.5b for one.
    name = args.output.name.removesuffix(".md").removesuffix(".png")
    if name in ("", ".."):
        raise InputError(f"--output '{args.output}' is a folder: name a file in it, without a suffix.")
    check_output_folder(args.output.parent, "--output in the folder")
    page, losses, scores = (args.output.with_name(name + end) for end in (".md", ".png", "_scores.png"))
    for file in (page, losses, scores):
        if file.is_dir():
            raise InputError(f"--output '{args.output}' cannot be written, for '{file}' is a folder: name another.")
    places = [path.resolve() for path in args.runs]
    for path, place in zip(args.runs, places):
        if places.count(place) > 1:
            raise InputError(f"'{path}' is named twice: name each run once.")
    names = [place.name for place in places]
    if len(set(names)) < len(names):  # as of runs/one/model and runs/other/model
        names = [str(path) for path in args.runs]
    evaluations, runs = {}, []
    for path, run_name in zip(args.runs, names):
        trained = (path / "training_summary.json").exists()
        if file := evaluation_file(path):
            evaluations[run_name] = read_evaluation(file)
        elif not trained:
            missing = "neither training_summary.json nor evaluation/evaluation.json"
            raise InputError(f"'{path}' is not the output folder of a finished run or evaluation: it has {missing}.")
        if trained:
            runs.append(read(path, run_name))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {name}"]
    if runs:
        write_figure(draw(runs), losses)
        lines += [comparison_table(runs), f"![held-out loss]({quote(losses.name)})"]  # an address takes no space
    if evaluations:
        write_figure(draw_scores(evaluations), scores)
        lines += [score_table(evaluations), f"![scores]({quote(scores.name)})"]
        if without := [run_name for run_name in names if run_name not in evaluations]:
            lines.append(f"Without an evaluation: {', '.join(without)}.")
    if any(" ± " in part for part in lines):
        lines.append(ERRORS)
    text = "\n\n".join(lines) + "\n"
    page.write_text(text)
    print(text)


if __name__ == "__main__":
    run_script(main, parse_args())
