"""Train variants of the architecture and their controls on the same tokens in the same order, and report.

    python scripts/ablate.py prepare --tokenizer runs/tokenizer --sources 'edu/train-*.parquet' 'more/*.parquet' \\
        --source-weights 0.25 0.75 --tokens 1.06e8 --held-out-edu edu/validation.parquet --held-out-books books.parquet
    python scripts/ablate.py run --plan recipes/evidence/headline.yaml --runs-per-gpu 2
    python scripts/ablate.py run --plan recipes/evidence/headline.yaml --only v0 --seeds 0 --save-models runs/models
    python scripts/ablate.py report
    python scripts/ablate.py report --data runs/evidence/data      counts the tokens of each expert too

A plan names variants of recipes/evidence/30m.yaml, seeds, tokens and learning rates; each combination is a run, and a
row of docs/evidence/runs.csv. Every run has a process of its own; `run` starts as many at once as there are places on
the GPUs, and leaves out those that runs.csv already has with the same settings. Runs that diverged or failed have
their rows too; a failed one is tried again by the next `run`. `--smoke` trains the same plan at a toy size, on 1/25,000
of its tokens. `report` has tables for the plans of recipes/evidence by their names, at 10m, 30m and 150m: rows of other
plans and of `--smoke` stay in runs.csv alone.
"""

import argparse
import multiprocessing
import os
import sys
from pathlib import Path

from complexity_deep.workflow.command import ArgumentParser, at_least, check_output_folder, needs, positive, run_script
from complexity_deep.workflow.provenance import REPOSITORY, commit

with needs("eval"):
    from complexity_deep.workflow.evidence.ablation_data import prepare
    from complexity_deep.workflow.evidence.ablation_plan import check_length, missing_of, read_yaml, runs_of
    from complexity_deep.workflow.evidence.ablation_process import train_in_child
    from complexity_deep.workflow.evidence.ablation_results import Results, check_data, read_data, read_rows
    from complexity_deep.workflow.evidence.ablation_runner import Runner, visible_gpus
    from complexity_deep.workflow.evidence.balance import measure_balance
    from complexity_deep.workflow.evidence.study_page import write_pages

TIMED_OUT = 3


def run_plans(args: argparse.Namespace) -> None:
    """Train what the plans have and runs.csv has not."""
    # The processes of the runs read this. They then look for GPUs without starting CUDA, which a process that is
    # forked later must not do.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if args.start_method == "forkserver":  # the imports are done once for all
        multiprocessing.get_context("forkserver").set_forkserver_preload(
            ["complexity_deep.workflow.evidence.ablation_run"]
        )
    folders = {"--output-dir": args.output_dir, "--log-dir": args.log_dir, "--save-models": args.save_models}
    for option, folder in folders.items():
        if folder is not None:
            check_output_folder(folder, option)
    results = Results(Path(args.output_dir, "runs.csv"))
    results.path.parent.mkdir(parents=True, exist_ok=True)
    data, rows = read_data(args.data), read_rows(results.path)
    runs = runs_of(args.plan, rows, data, args.only, args.seeds, args.tokens, args.smoke, args.repeat)
    missing = missing_of(runs, [] if args.repeat else rows)
    for run in missing:
        check_length(run, data)
    for row_length in {run["row_length"] for run in missing}:
        check_data(args.data, data, row_length)
    gpus = visible_gpus()
    print(
        f"{len(runs)} runs, of which {len(missing)} are missing, on {len(gpus)} x {args.runs_per_gpu} places",
        flush=True,
    )
    options = {
        "data": args.data,
        "eos_token_id": data["eos_token_id"],
        "compiled": not args.eager,
        "models": args.save_models,
    }
    runner = Runner(
        results,
        train_in_child,
        options,
        log_dir=args.log_dir,
        commit=args.commit,
        runs_per_gpu=args.runs_per_gpu,
        minutes=args.minutes,
        start_method=args.start_method,
    )
    runner.work(missing, gpus[: args.gpus])
    if runner.queue:
        print(f"{len(runner.queue)} runs were not begun within --minutes {args.minutes:g}: give the command again.")
        sys.exit(TIMED_OUT)
    if runner.failed:
        sys.exit(f"{runner.failed} runs failed: see the reason in {results.path} and the logs in {args.log_dir}.")


def prepare_data(args: argparse.Namespace) -> None:
    check_output_folder(args.data, "--data")
    held_out = {"edu": args.held_out_edu, "books": args.held_out_books}
    weights = args.source_weights or [1.0] * len(args.sources)
    facts = prepare(args.data, args.tokenizer, args.sources, weights, args.tokens, held_out)
    counts = ", ".join(f"{name} {file['tokens']:,} tokens" for name, file in facts["files"].items())
    print(f"{args.data}: {counts}; data {facts['id']}")


def write_report(args: argparse.Namespace) -> None:
    output = Path(args.output_dir).absolute()  # "." has no name
    for folder in (args.output_dir, output.parent):  # the page lies beside the folder
        check_output_folder(folder)
    output.mkdir(parents=True, exist_ok=True)
    if args.data:
        measure_balance(output, args.data, read_yaml(Path(args.recipes, "30m.yaml")))
    print(write_pages(output, read_rows(output / "runs.csv"), args.recipes))


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="tokenize the text into token files")
    prepare.add_argument("--tokenizer", required=True, help="folder written by train_tokenizer.py")
    prepare.add_argument("--sources", nargs="+", required=True, help="training text, see scripts/show_data.py")
    prepare.add_argument("--source-weights", nargs="+", type=float, help="share of the tokens from each source")
    prepare.add_argument("--tokens", type=positive, default=1.06e8, help="training tokens (default: %(default)g)")
    prepare.add_argument("--held-out-edu", required=True, help="held-out educational text")
    prepare.add_argument("--held-out-books", required=True, help="held-out books")
    run = commands.add_parser("run", help="train what is missing of the plans")
    run.add_argument("--plan", nargs="+", required=True, help="files of recipes/evidence")
    run.add_argument("--only", nargs="+", help="only these variants")
    run.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    run.add_argument("--repeat", action="store_true", help="train what runs.csv has once more, as it was")
    run.add_argument("--tokens", type=positive, help="train on so many tokens instead, for no table of the plan's")
    run.add_argument("--gpus", type=at_least(1), help="use so many GPUs (default: all)")
    run.add_argument("--runs-per-gpu", type=at_least(1), default=1, help="runs that share a GPU (default: 1)")
    run.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many minutes")
    run.add_argument("--smoke", action="store_true", help="toy size, to try the plan out")
    run.add_argument("--eager", action="store_true", help="compile nothing")
    run.add_argument("--start-method", default="forkserver", choices=("forkserver", "spawn"), help="of the processes")
    run.add_argument("--log-dir", default="runs/evidence/logs", help="what each run prints (default: %(default)s)")
    run.add_argument("--save-models", metavar="FOLDER", help="keep the trained models, for evaluate.py and analyze.py")
    run.add_argument("--commit", default=commit(), help="commit to record (default: that of this checkout)")
    report = commands.add_parser("report", help="write docs/evidence.md, its pages and figures from runs.csv")
    report.add_argument("--data", help="count the tokens of each expert in these token files first, into balance.json")
    report.add_argument("--recipes", default=str(REPOSITORY / "recipes/evidence"), help="where the plans lie")
    for command in (prepare, run):
        command.add_argument(
            "--data", default="runs/evidence/data", help="folder of token files (default: %(default)s)"
        )
    for command in (run, report):
        command.add_argument("--output-dir", default="docs/evidence", help="where runs.csv lies (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    run_script({"prepare": prepare_data, "run": run_plans, "report": write_report}[arguments.command], arguments)
