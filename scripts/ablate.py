"""Train variants of the architecture and their controls on the same tokens in the same order, and report.

    python scripts/ablate.py prepare --tokenizer runs/tokenizer --sources 'edu/train-*.parquet' 'more/*.parquet' \\
        --source-weights 0.25 0.75 --tokens 1.06e8 --held-out-edu edu/validation.parquet --held-out-books books.parquet
    python scripts/ablate.py run --plan recipes/evidence/headline.yaml --runs-per-gpu 2
    python scripts/ablate.py run --plan recipes/evidence/headline.yaml --only shared_64 --seeds 0
    python scripts/ablate.py report

A plan names variants of recipes/evidence/30m.yaml, seeds, tokens and learning rates; each combination is a run, and a
row of docs/evidence/runs.csv. Every run has a process of its own; `run` starts as many at once as there are places on
the GPUs, and leaves out those that runs.csv already has with the same settings. Runs that diverged or failed have
their rows too; a failed one is tried again by the next `run`. `--smoke` trains the same plan at a toy size.
"""

import argparse
import csv
import datetime
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import yaml
from command_line import ArgumentParser, InputError, run_script

SCRIPTS = Path(__file__).resolve().parent
FIELDS = (
    "variant", "seed", "size", "tokens", "seconds", "held_out_edu", "held_out_books", "curve", "device", "versions",
    "commit", "data", "plan", "learning_rate", "parameters", "active_parameters", "status", "reason", "steps",
    "tokens_per_second", "wall_seconds", "runs_per_gpu", "train_loss", "spikes", "max_grad_norm", "median_grad_norm",
    "shifted_edu", "expert_norm_ratio", "peak_memory_gib", "date", "settings",
)  # fmt: skip
IDENTITY = ("variant", "seed", "size", "tokens", "learning_rate", "settings")  # of a run, whatever came of it
# Columns whose cells are text, even where a hash looks like a number.
TEXT = ("variant", "size", "device", "versions", "commit", "data", "plan", "status", "reason", "date", "settings")
DONE = ("ok", "diverged")
TIMED_OUT = 3


class PlanError(InputError):
    """A plan that cannot be run; the message is one sentence for the person who gave it."""


def read_yaml(path: Path) -> dict:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise PlanError(f"'{path}' is not a readable YAML file ({error}).") from None


def read_rows(results: Path) -> list[dict]:
    """The rows of runs.csv, numbers as numbers and an empty cell as None."""
    if not results.exists():
        return []
    with results.open(newline="") as file:
        rows = [{name: _value(name, cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    return [{**row, "status": "diverged"} if is_dead(row) else row for row in rows]


def is_dead(row: dict) -> bool:
    """Whether a run ended worse than at the first point of its curve: at ln V, for example, without a gradient."""
    return row["status"] == "ok" and row["curve"][-1][1] > row["curve"][0][1]


def _value(name: str, cell: str):
    if name in TEXT:
        return cell
    return json.loads(cell) if cell else None


def read_data(folder: str) -> dict:
    """What data.json says of the token files."""
    try:
        return json.loads(Path(folder, "data.json").read_text())
    except (OSError, ValueError) as error:
        raise PlanError(f"'{folder}' holds no token files ({error}): write them with `ablate.py prepare`.") from None


class Results:
    """runs.csv, to which a finished run is appended at once; of several threads one writes at a time."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()

    def append(self, row: dict) -> None:
        with self.lock:
            is_new = not self.path.exists()
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                if is_new:
                    writer.writeheader()
                cells = {name: row.get(name) for name in FIELDS}
                cells = {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in cells.items()}
                writer.writerow(cells)
                file.flush()
                os.fsync(file.fileno())


def expand(plan_path: Path, rows: list[dict], data: dict) -> list[dict]:
    """The runs of a plan, seed by seed; `rows` are those of runs.csv and `data` the contents of data.json.

    Raises `PlanError` for an unknown variant, and for a plan that needs runs which runs.csv does not have yet.
    """
    plan = read_yaml(plan_path)
    base = read_yaml(plan_path.parent / plan["base"])
    known = [row for row in rows if row["size"] == base["size"] and row["data"] == data["id"] and row["status"] == "ok"]
    unknown = [name for name in plan["variants"] if name not in base["variants"]]
    if unknown:
        raise PlanError(f"{plan_path} names {', '.join(unknown)}, which {plan['base']} does not have.")
    runs = []
    for seed in plan["seeds"]:
        for name in plan["variants"]:
            variant = base["variants"][name]
            rates = plan["learning_rates"]
            if rates == "swept":
                rates = [swept_rate(variant["family"], base, known)]
            tokens = float(plan["tokens"])
            if reference := plan.get("equal_seconds_to"):
                tokens *= speed(name, known) / speed(reference, known)
            for rate in rates:
                for factor in plan.get("learning_rate_factors", [1]):
                    run = {
                        "variant": name,
                        "seed": seed,
                        "size": base["size"],
                        "tokens": tokens,
                        "learning_rate": float(rate) * factor,
                        "data": data["id"],
                        "config": {**base["shape"], **variant["config"]},
                        "init": variant.get("init", "default"),
                        "freeze_mlp": variant.get("freeze_mlp", False),
                        "balance_loss": variant.get("balance_loss", 0.0),
                        **base["training"],
                    }
                    runs.append({**run, "plan": plan_path.stem})
    return runs


def swept_rate(family: str, base: dict, rows: list[dict]) -> float:
    """The rate of a family's sweep with the lowest mean loss on the held-out educational text."""
    losses = {}
    for row in rows:
        if row["plan"] == "learning_rates" and base["variants"].get(row["variant"], {}).get("family") == family:
            losses.setdefault(row["learning_rate"], []).append(row["held_out_edu"])
    if not losses:
        raise PlanError(f"The family '{family}' has no swept learning rate yet: run learning_rates.yaml first.")
    return min(losses, key=lambda rate: sum(losses[rate]) / len(losses[rate]))


def speed(variant: str, rows: list[dict]) -> float:
    """Tokens a second of a variant that had its GPU to itself, as last measured."""
    measured = [row["tokens_per_second"] for row in rows if row["plan"] == "speed" and row["variant"] == variant]
    if not measured:
        raise PlanError(f"The speed of '{variant}' is not measured yet: run speed.yaml first.")
    return measured[-1]


def finish(run: dict, smoke: bool) -> dict:
    """The run as it will be trained: a whole number of steps, the toy size if asked for, and a hash of everything."""
    run = {**run, "config": dict(run["config"])}
    if smoke:
        config = run["config"]
        widths = [n for n in config if n.endswith("intermediate_size")]
        config.update({n: config[n] // 16 for n in [*widths, "hidden_size"]})
        config.update(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
        config.update({"head_dim": 16} if "head_dim" in config else {})
        config.update({"value_embedding_layers": [1]} if "value_embedding_layers" in config else {})
        run.update(size=f"{run['size']} smoke", row_length=64, rows_per_step=2, tokens=run["tokens"] * 4e-5)
    step = run["row_length"] * run["rows_per_step"]
    run["tokens"] = int(run["tokens"] // step * step)
    described = {name: value for name, value in run.items() if name != "plan"}
    run["settings"] = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:10]
    return run


def identity(run: dict) -> tuple:
    return tuple(str(run[name]) for name in IDENTITY)


def missing_of(runs: list[dict], rows: list[dict]) -> list[dict]:
    """The runs, each once, that no row of runs.csv has finished."""
    finished = {identity(row) for row in rows if row["status"] in DONE}
    return list({identity(run): run for run in runs if identity(run) not in finished}.values())


def commit() -> str:
    """The commit of this checkout, or none in a copy without its history."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=SCRIPTS, capture_output=True, text=True)
    return found.stdout.strip() or "none"


class Runner:
    """Places on the GPUs, each of which takes the next run from the queue when it is free."""

    def __init__(self, args: argparse.Namespace, results: Results, train_in_child, options: dict):
        self.args, self.results, self.train_in_child, self.options = args, results, train_in_child, options
        self.context = multiprocessing.get_context(args.start_method)
        self.started = time.monotonic()
        self.logs = Path(args.log_dir)
        self.logs.mkdir(parents=True, exist_ok=True)
        self.queue, self.failed = deque(), 0

    def work(self, runs: list[dict], gpus: list[str]) -> None:
        self.queue.extend(runs)
        places = [gpu for _ in range(self.args.runs_per_gpu) for gpu in gpus]
        self.threads = max(1, (os.cpu_count() or 1) // len(places))
        threads = [threading.Thread(target=self._serve, args=(gpu,)) for gpu in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _serve(self, gpu: str) -> None:
        while time.monotonic() - self.started < self.args.minutes * 60:
            try:
                run = self.queue.popleft()
            except IndexError:
                return
            row = {**run, **self._train(run, gpu), "commit": self.args.commit, "runs_per_gpu": self.args.runs_per_gpu}
            row["versions"] = ", ".join(f"{n} {row.get(n, '')}" for n in ("torch", "transformers", "triton"))
            row["versions"] += ", steps as CUDA graphs" if row.pop("recorded", False) else ""
            row["date"] = datetime.date.today().isoformat()
            row["status"] = "diverged" if is_dead(row) else row["status"]
            self.results.append(row)
            self.failed += row["status"] == "failed"
            print(self._line(row), flush=True)

    def _train(self, run: dict, gpu: str) -> dict:
        receiver, sender = self.context.Pipe(duplex=False)
        log = self.logs / f"{run['plan']}-{run['variant']}-{run['seed']}-{run['settings']}.log"
        arguments = (run, gpu, self.threads, str(log), sender)
        process = self.context.Process(target=self.train_in_child, args=arguments, kwargs=self.options)
        process.start()
        sender.close()
        try:
            result = receiver.recv()
        except EOFError:  # it was killed, or crashed below Python
            process.join()
            result = {"status": "failed", "reason": f"the process ended with exit code {process.exitcode}"}
        process.join()
        return result

    def _line(self, row: dict) -> str:
        minutes = (time.monotonic() - self.started) / 60
        what = f"{minutes:5.1f} min  {row['plan']}: {row['variant']} seed {row['seed']} lr {row['learning_rate']:g}"
        if row["status"] != "ok":
            return f"{what}: {row['status']} {row.get('reason', '')}"
        return (
            f"{what}: edu {row['held_out_edu']:.4f}, books {row['held_out_books']:.4f}, {row['seconds']:.0f} s of "
            f"{row['wall_seconds']:.0f}, {row['tokens_per_second']:,} tokens/s"
        )


def run_plans(args: argparse.Namespace) -> None:
    """Train what the plans have and runs.csv has not."""
    # Of the children: they look for GPUs without starting CUDA, which a process that is forked later must not do.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH")]))
    if args.start_method == "forkserver":
        multiprocessing.get_context("forkserver").set_forkserver_preload(
            ["ablation_run", "provenance"]
        )  # imported once for all
    import torch
    from ablation_process import train_in_child

    results = Results(Path(args.output_dir, "runs.csv"))
    results.path.parent.mkdir(parents=True, exist_ok=True)
    data = read_data(args.data)
    runs = []
    for plan in args.plan:
        rows = read_rows(results.path)
        length = {"tokens": args.tokens} if args.tokens else {}
        runs += [finish({**run, **length}, args.smoke) for run in expand(Path(plan), rows, data)]
    runs = [run for run in runs if not args.only or run["variant"] in args.only]
    runs = [run for run in runs if args.seeds is None or run["seed"] in args.seeds]
    missing = missing_of(runs, [] if args.repeat else read_rows(results.path))
    gpus = [str(index) for index in range(torch.cuda.device_count())] or [""]
    print(
        f"{len(runs)} runs, of which {len(missing)} are missing, on {len(gpus)} x {args.runs_per_gpu} places",
        flush=True,
    )
    options = {"data": args.data, "eos_token_id": data["eos_token_id"], "compiled": not args.eager}
    options["recorded"] = args.cuda_graphs
    runner = Runner(args, results, train_in_child, options)
    runner.work(missing, gpus[: args.gpus])
    if runner.queue:
        print(f"{len(runner.queue)} runs were not begun within --minutes {args.minutes:g}: give the command again.")
        sys.exit(TIMED_OUT)
    if runner.failed:
        sys.exit(f"{runner.failed} runs failed: see the reason in {results.path} and the logs in {args.log_dir}.")


def prepare_data(args: argparse.Namespace) -> None:
    from ablation_data import prepare

    held_out = {"edu": args.held_out_edu, "books": args.held_out_books}
    weights = args.source_weights or [1.0] * len(args.sources)
    facts = prepare(args.data, args.tokenizer, args.sources, weights, args.tokens, held_out)
    counts = ", ".join(f"{name} {file['tokens']:,} tokens" for name, file in facts["files"].items())
    print(f"{args.data}: {counts}; data {facts['id']}")


def write_report(args: argparse.Namespace) -> None:
    from ablation_report import report

    print(report(Path(args.output_dir), read_rows(Path(args.output_dir, "runs.csv")), args.recipes))


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="tokenize the text into token files")
    prepare.add_argument("--tokenizer", required=True, help="folder written by train_tokenizer.py")
    prepare.add_argument("--sources", nargs="+", required=True, help="training text, see text_sources.py")
    prepare.add_argument("--source-weights", nargs="+", type=float, help="share of the tokens from each source")
    prepare.add_argument("--tokens", type=float, default=1.06e8, help="training tokens (default: %(default)g)")
    prepare.add_argument("--held-out-edu", required=True, help="held-out educational text")
    prepare.add_argument("--held-out-books", required=True, help="held-out books")
    run = commands.add_parser("run", help="train what is missing of the plans")
    run.add_argument("--plan", nargs="+", required=True, help="files of recipes/evidence")
    run.add_argument("--only", nargs="+", help="only these variants")
    run.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    run.add_argument("--repeat", action="store_true", help="train what runs.csv has once more")
    run.add_argument("--tokens", type=float, help="train on so many tokens instead of the plan's")
    run.add_argument("--gpus", type=int, help="use so many GPUs (default: all)")
    run.add_argument("--runs-per-gpu", type=int, default=1, help="runs that share a GPU (default: %(default)s)")
    run.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many minutes")
    run.add_argument("--smoke", action="store_true", help="toy size, to try the plan out")
    run.add_argument("--eager", action="store_true", help="compile nothing")
    run.add_argument("--cuda-graphs", action="store_true", help="replay steps as CUDA graphs where that can be done")
    run.add_argument("--start-method", default="forkserver", choices=("forkserver", "spawn"), help="of the processes")
    run.add_argument("--log-dir", default="runs/evidence/logs", help="what each run prints (default: %(default)s)")
    run.add_argument("--commit", default=commit(), help="commit to record (default: that of this checkout)")
    report = commands.add_parser("report", help="write tables, figures and docs/evidence.md from runs.csv")
    report.add_argument("--recipes", default=str(SCRIPTS.parent / "recipes/evidence"), help="where the plans lie")
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
