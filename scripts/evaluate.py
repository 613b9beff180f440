"""Evaluate a causal language model: the benchmarks of the paper and perplexity, with lm-evaluation-harness.

    python scripts/evaluate.py runs/30m
    python scripts/evaluate.py runs/30m --held-out-text HuggingFaceFW/fineweb-edu:sample-10BT --held-out-fraction 0.01
    python scripts/evaluate.py runs/30m --data-dir data --held-out-text data/edu/validation.parquet --stride 512
    python scripts/evaluate.py runs/30m --tasks --held-out-text data/books.parquet --context-factor 4
    accelerate launch --config_file recipes/accelerate/ddp.yaml scripts/evaluate.py runs/30m      every GPU a share
    python scripts/evaluate.py org/name-on-the-hub --tasks mmlu --num-fewshot 5 --limit 20

Tasks are lm-eval's own, read from the Hub or from local files; workflow/evaluation/task_data.py says how these are
named. Writes evaluation.json, evaluation.md and evaluation.png, with the score of guessing and the standard error
beside every score. --context-factor adds long_context.png, the perplexity by position beyond the trained length, with
positions as they are and scaled by yarn. Takes any model that AutoModelForCausalLM loads, and runs the code that comes
with it.
"""

import argparse
import functools
import logging
import tempfile
from pathlib import Path

import torch
import transformers

from complexity_deep.workflow.command import ArgumentParser, InputError, at_least, needs, run_script, say
from complexity_deep.workflow.saved_model import output_folder

with needs("eval"):
    import datasets
    import lm_eval
    from tqdm.auto import tqdm

    from complexity_deep.workflow.evaluation.contamination import read_training_data
    from complexity_deep.workflow.evaluation.evaluation_report import render_markdown, write_evaluation
    from complexity_deep.workflow.evaluation.harness import load_harness, run_tasks
    from complexity_deep.workflow.evaluation.long_context import measure_long_context
    from complexity_deep.workflow.evaluation.processes import join_processes
    from complexity_deep.workflow.evaluation.task_data import HELD_OUT_DOCUMENTS, TASKS, stage


def main(args: argparse.Namespace) -> None:
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)  # it would draw 60 bars, each for less than a second
    output = output_folder(args.model, "evaluation", args.output_dir)
    if not 0 < args.held_out_fraction <= 1:
        raise InputError(f"--held-out-fraction must be above 0 and at most 1, but is {args.held_out_fraction}.")
    if args.context_factor and not args.held_out_text:
        raise InputError("--context-factor needs long documents: give --held-out-text.")
    if args.tasks == [] and not args.held_out_text:
        raise InputError("There is nothing to evaluate: name a benchmark after --tasks, or give --held-out-text.")
    state, device = join_processes(args.device)
    data = (args.tasks, args.data_dir, args.held_out_text, args.held_out_fraction, args.num_fewshot)
    with tempfile.TemporaryDirectory(prefix="evaluation-") as folder:
        records = read_training_data(args.model)
        say(f"loading {args.model}")
        model = load_harness(
            args.model,
            revision=args.revision,
            dtype=args.dtype,
            device=device,
            batch_size=args.batch_size,
            stride=args.stride,
            state=state,
        )
        say("reading the tasks")
        staged = stage(Path(folder), *data)
        try:
            if args.context_factor:  # before the tasks, which take longer, because text or model may not fit
                long_context = measure_long_context(
                    model.model,
                    model.tokenizer,
                    state,
                    path=args.model,
                    revision=args.revision,
                    dtype=args.dtype,
                    texts=args.held_out_text,
                    fraction=args.held_out_fraction,
                    factor=args.context_factor,
                    batch_size=args.batch_size,
                    limit=args.limit,
                )
            report = run_tasks(model, staged, records, path=args.model, revision=args.revision, limit=args.limit)
        except torch.OutOfMemoryError as error:
            raise InputError(f"A batch of {args.batch_size} does not fit into memory: lower --batch-size.") from error
    if report is not None:  # the first of the processes has it
        report |= {"long_context": long_context} if args.context_factor else {}
        write_evaluation(report, output)
        print(render_markdown({**report, "subtasks": []}))
        print(f"{output}: evaluation.json, evaluation.md, evaluation.png")
    state.destroy_process_group()


def parse_args() -> argparse.Namespace:
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
        "--num-fewshot", type=at_least(0), default=0, help="solved examples before each question (default: 0)"
    )
    parser.add_argument("--stride", type=at_least(1), help="tokens that each window over long text adds (default: all)")
    parser.add_argument(
        "--context-factor",
        type=at_least(2),
        metavar="N",
        help="also read long documents of the held-out text, up to N times the trained length",
    )
    parser.add_argument(
        "--limit", type=at_least(1), help="use the first so many documents of each task, for a quick look"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=16, help="prompts per forward pass (default: 16)")
    parser.add_argument("--device", help="torch device; default: cuda where there is one")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of weights"
    )
    parser.add_argument("--output-dir", type=Path, help="default: evaluation/ in the folder of the model")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main, parse_args())
