"""Evaluate a causal language model: the benchmarks of the paper and perplexity, with lm-evaluation-harness.

    python scripts/evaluate.py runs/30m
    python scripts/evaluate.py runs/30m --held-out-text HuggingFaceFW/fineweb-edu:sample-10BT --held-out-fraction 0.01
    python scripts/evaluate.py runs/30m --data-dir data --held-out-text data/edu/validation.parquet --stride 512
    python scripts/evaluate.py org/name-on-the-hub --tasks mmlu --num-fewshot 5 --limit 20

Tasks are lm-eval's own, read from the Hub or from local files (evaluation_data.py says which). Writes evaluation.json,
evaluation.md and evaluation.png, with the score of guessing and the standard error beside every score. Takes any model
that AutoModelForCausalLM loads, and runs the code that comes with it.
"""

import argparse
import contextlib
import functools
import json
import logging
import math
import os
import re
import sys
import tempfile
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

try:
    import datasets
    import lm_eval
except ImportError as error:
    sys.exit(f"A package is missing ({error}): run `pip install -e .[eval]` in the repository first.")
import matplotlib
import torch
import transformers
from command_line import ArgumentParser, InputError, check_output_folder, run_script
from evaluation_data import HELD_OUT_DOCUMENTS, TASKS, StagedTasks, stage
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from perplexity_metric import perplexity_scores, with_error
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

with contextlib.suppress(ImportError):
    import complexity_deep  # noqa: F401  (for published folders, which bring no code of their own)

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib import pyplot

# Task -> how sft_data.json may call its data.
TRAINING_DATA = {
    "mmlu": "mmlu",
    "hellaswag": "hellaswag",
    "arc_challenge": "(?<![a-z])arc[^a-z]*c(hallenge)?(?![a-z])",
    "arc_easy": "(?<![a-z])arc[^a-z]*e(asy)?(?![a-z])",
    "winogrande": "winogrande",
}


class HarnessModel(HFLM):
    """lm-eval's model, with overlapping windows over long documents, and a count of the prompts that were cut."""

    def __init__(self, model, tokenizer, batch_size: int, stride: int | None):
        super().__init__(model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float32)
        self.stride = stride or self.max_length
        self.prompts = self.cut_prompts = 0

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        owners, windows = [], []
        for index, request in enumerate(requests):
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=self.max_length - self.stride + 1,
            ):
                owners.append(index)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for index, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)):
            totals[index] += score
        return totals

    def _loglikelihood_tokens(self, requests, **kwargs):
        longest = max(len(answer) for _, _, answer in requests)
        if longest > self.max_length:
            raise InputError(f"An answer of {longest} tokens does not fit the model's {self.max_length} positions.")
        self.prompts += sum(text is not None for text, _, _ in requests)
        self.cut_prompts += sum(len(prompt) + len(answer) > self.max_length + 1 for _, prompt, answer in requests)
        return super()._loglikelihood_tokens(requests, **kwargs)


def say(what: str) -> None:
    """Progress for a person, beside the results."""
    print(f"{what} ...", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_model(args: argparse.Namespace) -> HarnessModel:
    options = {"revision": args.revision, "trust_remote_code": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"'{args.model}' is not a causal language model that loads: {first_line(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"'{args.model}' has no tokenizer that loads: {first_line(error)}") from error
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise InputError(f"'{args.model}' has a tokenizer of {len(tokenizer):,} tokens, which is more than it embeds.")
    model.config.use_cache = False  # nothing is generated
    try:
        model.to(args.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"The device '{args.device}' cannot be used: {first_line(error)}") from error
    harness = HarnessModel(model, tokenizer, args.batch_size, args.stride)
    if harness.stride > harness.max_length:
        raise InputError(f"--stride {args.stride} is more than the model's {harness.max_length} positions.")
    return harness


def read_training_data(model: str) -> list[dict]:
    """The mixture that the model was fine-tuned on, as sft.py recorded it."""
    path = Path(model, "sft_data.json")
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text())
        if not isinstance(records, list):
            raise TypeError("no list")
        for record in records:
            record["source"] = f"{record['name']} {record.get('configuration') or ''}".strip()
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"'{path}' is not a list of sources as scripts/sft.py writes it ({error!r}).") from error
    return records


def contamination(task: str, records: list[dict]) -> str:
    """Which part of the fine-tuning data came from this benchmark."""
    found = [
        f"{record['source']} ({record.get('split')}, {record.get('rows')} rows)"
        for record in records
        if task in TRAINING_DATA and re.search(TRAINING_DATA[task], record["source"], re.IGNORECASE)
    ]
    return f"fine-tuned on {', '.join(found)}" if found else ""


def leaves_of(task: str, children: dict[str, list[str]]) -> list[str]:
    """The tasks of a group, through its groups; a task itself."""
    return [leaf for child in children[task] for leaf in leaves_of(child, children)] if children.get(task) else [task]


def accuracy_rows(results: dict, task: str) -> list[dict]:
    """Scores of a task, or of a group such as MMLU, one row per metric."""
    leaves = leaves_of(task, results["group_subtasks"])
    samples = [sample for leaf in leaves for sample in results["samples"][leaf]]
    scores = results["results"][task]
    rows = []
    for metric in ("acc", "acc_norm"):
        if f"{metric},none" in scores:
            stderr = scores[f"{metric}_stderr,none"]
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "value": scores[f"{metric},none"],
                    "stderr": None if isinstance(stderr, str) or math.isnan(stderr) else stderr,  # of a single question
                    # Guessing, with as many choices as each question has.
                    "random": sum(1 / len(sample["arguments"]) for sample in samples) / len(samples),
                    "n": len(samples),
                    "num_fewshot": results["n-shot"][leaves[0]],
                }
            )
    return rows


def perplexity_row(samples: list[dict], model: HarnessModel) -> dict:
    nll = [-sample["filtered_resps"][0] for sample in samples]
    tokens = [len(model.tok_encode(sample["arguments"][0][0])) for sample in samples]
    # lm-eval counts the bytes and words of WikiText before it is detokenized, and so do we.
    size = sum(sample["bits_per_byte"][1] for sample in samples)
    words = sum(sample["word_perplexity"][1] for sample in samples)
    scores = perplexity_scores(nll, tokens, size)
    return {
        **scores,
        "perplexity_stderr": scores["stderr"] and scores["stderr"] * scores["perplexity"],
        "word_perplexity": math.exp(sum(nll) / words),
        "random": math.log(model.config.get_text_config().vocab_size),  # nats per token of a uniform guess
        "tokens": sum(tokens),
        "bytes": size,
        "documents": len(samples),
        "context": model.max_length,
        "stride": model.stride,
    }


def evaluate(model: HarnessModel, staged: StagedTasks, records: list[dict], args: argparse.Namespace) -> dict:
    """The contents of evaluation.json."""
    say(f"making the prompts of {len(staged.loaded['tasks'])} tasks")
    results = lm_eval.evaluate(model, staged.loaded, limit=args.limit)
    for task, samples in results["samples"].items():
        answers = [answer for sample in samples for answer in sample["filtered_resps"]]
        if not all(math.isfinite(answer[0] if isinstance(answer, tuple) else answer) for answer in answers):
            raise InputError(f"'{args.model}' gives scores that are no numbers (in {task}); try --dtype float32.")
    limit = f"only the first {args.limit} documents of each task" if args.limit else ""

    def described(row: dict, task: str) -> dict:
        notes = filter(None, [staged.notes.get(task), contamination(task, records), limit])
        # Data that differs from the Hub's gives scores that are not of the Hub's dataset.
        hub_dataset = None if staged.notes.get(task) else staged.hub_datasets[task]
        dataset = staged.files[task].name if task in staged.files else hub_dataset
        return {**row, "dataset": dataset, "hub_dataset": hub_dataset, "note": "; ".join(notes)}

    tasks, subtasks, perplexity = [], [], []
    for task in staged.benchmarks:
        if task == "wikitext":
            row = {"corpus": "wikitext", **perplexity_row(results["samples"][task], model)}
            perplexity.append(described(row, task))
            continue
        tasks += [described(row, task) for row in accuracy_rows(results, task)]
        for name in results["group_subtasks"].get(task, []):
            for part in [name, *results["group_subtasks"].get(name, [])]:
                subtasks += [described(row, task) for row in accuracy_rows(results, part)]
    for task, source in staged.texts.items():
        row = perplexity_row(results["samples"][task], model)
        corpus = "/".join(Path(source).parts[-2:])  # not the whole path, which tells about the machine and its user
        perplexity.append({"corpus": corpus, **row, "dataset": corpus, "note": limit})
    device = model.device.type
    return {
        "model": Path(args.model).resolve().name if Path(args.model).is_dir() else args.model,
        "revision": getattr(model.config, "_commit_hash", None) or args.revision,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "harness": {"name": "lm-eval", "version": version("lm-eval")},
        "versions": {name: version(name) for name in ("torch", "transformers", "datasets")},
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU x {torch.get_num_threads()}",
        "batch_size": args.batch_size,
        "limit": args.limit,
        "prompts": model.prompts,
        "cut_prompts": model.cut_prompts,
        "tasks": tasks,
        "subtasks": subtasks,
        "perplexity": perplexity,
        "left_out": staged.left_out,
    }


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; the last cell of a row is a note, which becomes a number and a line below."""
    notes = list(dict.fromkeys(row[-1] for row in rows if row[-1]))
    cells = [[*row[:-1], str(1 + notes.index(row[-1])) if row[-1] else ""] for row in rows]
    lines = [f"| {' | '.join(line)} |" for line in (header, ["---"] + ["---:"] * (len(header) - 1), *cells)]
    return [*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1)), ""]


def accuracy_table(rows: list[dict]) -> list[str]:
    def cells(row):
        stderr = "" if row["stderr"] is None else f"{row['stderr']:.2%}"
        score = [f"{row['value']:.2%}", stderr, f"{row['random']:.2%}", f"{row['n']:,}", str(row["num_fewshot"])]
        return [f"{row['task']}, {row['metric']}", *score, row["note"]]

    header = ["task, metric", "score", "standard error", "guessing", "questions", "examples", "note"]
    return table(header, [cells(row) for row in rows])


def perplexity_table(rows: list[dict]) -> list[str]:
    def cells(row):
        stderr = "" if row["stderr"] is None else f"{row['stderr']:.4f}"
        scores = [f"{row['nll_per_token']:.4f}", stderr, f"{row['random']:.4f}", with_error(row, "perplexity", 2)]
        scores += [f"{row['bits_per_byte']:.4f}", f"{row['word_perplexity']:,.2f}", f"{row['tokens']:,}"]
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
    return table([*header, "documents", "context / stride", "note"], [cells(row) for row in rows])


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
    if report["subtasks"]:
        parts = accuracy_table(report["subtasks"])
        lines += ["<details><summary>Parts of MMLU</summary>", "", *parts, "</details>", ""]
    return "\n".join(lines)


def draw(report: dict, path: Path) -> None:
    """Bars with their standard errors and the score of guessing; accuracy on the left, perplexity on the right."""
    panels = [kind for kind in ("tasks", "perplexity") if report[kind]]
    widths = [1 + len(report[kind]) for kind in panels]
    figure, all_axes = pyplot.subplots(
        1, len(panels), figsize=(2 + 0.8 * sum(widths), 4.2), width_ratios=widths, layout="constrained", squeeze=False
    )
    for axes, kind in zip(all_axes[0], panels):
        rows = report[kind]
        values = [row["value" if kind == "tasks" else "nll_per_token"] for row in rows]
        errors = [row["stderr"] or 0 for row in rows]
        names = [
            f"{row['task']}\n{row['metric']}" if kind == "tasks" else row["corpus"].replace("/", "/\n") for row in rows
        ]
        axes.bar(names, values, width=0.6, yerr=errors, capsize=4)
        for x, value in enumerate(values):  # at the foot of each bar, where no line passes
            text = f"{value:.1%}" if kind == "tasks" else f"{value:.2f}"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.text(x, 0.02, text, ha="center", transform=axes.get_xaxis_transform(), bbox=box)
        guessing = [row["random"] for row in rows]
        places = range(len(rows))
        axes.hlines(guessing, [x - 0.4 for x in places], [x + 0.4 for x in places], "black", "dotted", label="guessing")
        axes.set_ylabel("accuracy" if kind == "tasks" else "nats per token")
        axes.set_ylim(0, 1.3 * max(*guessing, *(value + error for value, error in zip(values, errors))))
        axes.tick_params(axis="x", labelrotation=30)
        axes.legend()
    figure.suptitle(f"{report['model']}, lm-eval {report['harness']['version']}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write_report(report: dict, output: Path) -> None:
    """Write the three files under other names first, so that each is there as a whole or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".new-") as name:
        folder = Path(name)
        draw(report, folder / "evaluation.png")
        (folder / "evaluation.md").write_text(render_markdown(report))
        (folder / "evaluation.json").write_text(json.dumps(report, indent=1, allow_nan=False))
        for file in ("evaluation.png", "evaluation.md", "evaluation.json"):
            os.replace(folder / file, output / file)


def main(args: argparse.Namespace) -> None:
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)  # 60 bars that last no second
    output = args.output_dir or Path(args.model if Path(args.model).is_dir() else Path(args.model).name, "evaluation")
    check_output_folder(output)
    data = (args.tasks, args.data_dir, args.held_out_text, args.held_out_fraction, args.num_fewshot)
    with tempfile.TemporaryDirectory(prefix="evaluation-") as folder:
        records = read_training_data(args.model)
        say(f"loading {args.model}")
        model = load_model(args)
        say("reading the tasks")
        staged = stage(Path(folder), *data)
        try:
            report = evaluate(model, staged, records, args)
        except torch.OutOfMemoryError as error:
            raise InputError(f"A batch of {args.batch_size} does not fit into memory: lower --batch-size.") from error
    write_report(report, output)
    print(render_markdown({**report, "subtasks": []}))
    print(f"{output}: evaluation.json, evaluation.md, evaluation.png")


def at_least(minimum: int, text: str) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {minimum}")
    return int(text)


def parse_args() -> argparse.Namespace:
    natural, positive = functools.partial(at_least, 0), functools.partial(at_least, 1)
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument(
        "--tasks", nargs="*", choices=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)}; default: all"
    )
    parser.add_argument("--data-dir", type=Path, help="read the tasks from files below this folder, not from the Hub")
    parser.add_argument("--held-out-text", nargs="+", default=[], metavar="SOURCE", help="text for perplexity")
    parser.add_argument(
        "--held-out-fraction",
        type=float,
        default=1.0,
        help="share of its documents to use, chosen as pretrain.py holds them out; the first "
        f"{HELD_OUT_DOCUMENTS:,} of these are read (default: all)",
    )
    parser.add_argument(
        "--num-fewshot", type=natural, default=0, help="solved examples before each question (default: 0)"
    )
    parser.add_argument("--stride", type=positive, help="tokens that each window over long text adds (default: all)")
    parser.add_argument("--limit", type=positive, help="use the first so many documents of each task, for a quick look")
    parser.add_argument("--batch-size", type=positive, default=16, help="prompts per forward pass (default: 16)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of weights"
    )
    parser.add_argument("--output-dir", type=Path, help="default: evaluation/ in the folder of the model")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main, parse_args())
