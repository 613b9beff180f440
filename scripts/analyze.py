"""What a Complexity-Deep checkpoint has learned, in figures and in one sentence: were its experts ever trained?

    python scripts/analyze.py runs/demo/model --text embedded
    python scripts/analyze.py user/model-on-the-hub --text 'data/edu/validation.parquet' --output-dir runs/analysis
    python scripts/analyze.py path/to/published/folder --tokenizer runs/tokenizer --text 'data/*.jsonl'

Writes analysis.json (every number), one PNG per figure and analysis.html (one file, no network) to MODEL/analysis.
Everything is measured on an untrained model too: the same config, fresh weights by the same initializer, the same text
and routing table. Text that the model was not trained on is best.

The verdict rests on the weights. The largest singular value of a matrix of independent random entries is known within
narrow bounds (the Tracy-Widom law). They hold for entries of any scale, so weight decay and initializer_range do not
matter. Training adds directions whose singular values lie far above. Whether the model relies on its experts is read
off the loss: without them, with every token sent to the next expert, and with random experts in their place.
"""

import argparse
import json

import torch
from transformers import logging

from complexity_deep.workflow.command import ArgumentParser, InputError, at_least, needs, run_script, whole_files
from complexity_deep.workflow.saved_model import output_folder

with needs("eval"):
    from complexity_deep.workflow.analysis.figures import FIGURES, draw_figures
    from complexity_deep.workflow.analysis.model_analysis import analyse
    from complexity_deep.workflow.analysis.page import write_page


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hub id or folder, also in a published layout")
    parser.add_argument("--text", nargs="+", required=True, help="file patterns, Hub datasets or 'embedded'")
    parser.add_argument("--text-column", default="text", help="column that holds the text")
    parser.add_argument("--tokenizer", help="Hub id or folder of the tokenizer; default: the model's")
    parser.add_argument("--output-dir", help="default: MODEL/analysis, or NAME/analysis for a Hub id")
    parser.add_argument("--max-tokens", type=at_least(1), default=16_384, help="tokens of the text to read")
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="rows in one forward pass")
    parser.add_argument("--seed", type=int, default=0, help="seed of the untrained model, the random experts and t-SNE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    logging.disable_progress_bar()
    if not 0 <= args.seed < 2**32:  # what scikit-learn takes
        raise InputError(f"--seed must be from 0 to {2**32 - 1}, but is {args.seed}.")
    output_dir = output_folder(args.model, "analysis", args.output_dir)
    analysis, drawn = analyse(
        args.model,
        args.text,
        text_column=args.text_column,
        tokenizer=args.tokenizer,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        seed=args.seed,
        device=args.device,
    )
    with whole_files(output_dir) as folder:
        analysis["figures"] = draw_figures(analysis, drawn, folder)
        (folder / "analysis.json").write_text(json.dumps(analysis, indent=1))
        write_page(analysis, folder)
    for file in {f"{draw.__name__}.png" for draw in FIGURES} - set(analysis["figures"]):
        (output_dir / file).unlink(missing_ok=True)  # of an earlier analysis
    for sentence in analysis["not_measured"]:
        print(sentence)
    print(f"{output_dir / 'analysis.html'}: {len(analysis['figures'])} figures in {analysis['seconds']:.0f} s")
    print(f"{analysis['verdict']['label']}. {analysis['verdict']['text']}")


if __name__ == "__main__":
    run_script(main, parse_args())
