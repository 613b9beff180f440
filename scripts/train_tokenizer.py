"""Train a byte-level BPE tokenizer by streaming text.

    python scripts/train_tokenizer.py --sources embedded --vocab-size 4096 --output-dir runs/demo/tokenizer
    python scripts/train_tokenizer.py --sources HuggingFaceFW/fineweb-edu:sample-10BT --max-characters 5e9
    python scripts/train_tokenizer.py --sources "data/en/*.parquet" "data/fr/*.parquet" --source-weights 0.7 0.3

Writes a standard fast tokenizer (no custom code) with the special ids of the published checkpoints, tokens and a
template for chat, and prints its fertility on held-out documents, which it was not trained on.
"""

import argparse
from pathlib import Path

from complexity_deep.workflow.command import ArgumentParser, at_least, needs, positive, run_script

with needs("train"):
    from complexity_deep.workflow.data.text_sources import is_held_out, load_sources, read_documents
    from complexity_deep.workflow.data.tokenizer_training import (
        SPECIAL_TOKENS,
        check_output,
        check_split,
        fertility,
        save_whole,
        take_characters,
        train_bpe,
    )


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", default="runs/tokenizer", help="folder to write (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=32000, help="tokens, special ones included (default: %(default)s)"
    )
    parser.add_argument(
        "--model-max-length", type=at_least(1), default=2048, help="context the model will have (default: %(default)s)"
    )
    parser.add_argument(
        "--sources", nargs="+", default=["HuggingFaceFW/fineweb-edu:sample-10BT"], help="see scripts/show_data.py"
    )
    parser.add_argument("--source-weights", nargs="+", type=float, help="share of documents from each source")
    parser.add_argument("--text-column", default="text", help="column that holds the text (default: %(default)s)")
    parser.add_argument(
        "--max-characters", type=positive, default=2e9, help="train on at most this much text (default: 2e9)"
    )
    parser.add_argument(
        "--held-out-fraction", type=float, default=0.01, help="share of documents kept out (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out-characters", type=positive, default=1e6, help="measure fertility on this much (default: 1e6)"
    )
    args, smallest = parser.parse_args(), len(SPECIAL_TOKENS) + 256
    if args.vocab_size < smallest:
        parser.error(f"--vocab-size {args.vocab_size} is too small: special tokens and bytes alone are {smallest}.")
    return args


def main(args: argparse.Namespace) -> None:
    output = Path(args.output_dir)
    check_output(output)
    stream = load_sources(args.sources, args.source_weights, args.text_column)
    check_split(stream, args.held_out_fraction)

    training = (text for text in read_documents(stream) if not is_held_out(text, args.held_out_fraction))
    tokenizer = train_bpe(
        take_characters(training, args.max_characters, "reading text"), args.vocab_size, args.model_max_length
    )
    if len(tokenizer) < args.vocab_size:
        print(f"The text has pairs for {len(tokenizer):,} tokens only, of the {args.vocab_size:,} asked for.")

    held_out = (text for text in read_documents(stream) if is_held_out(text, args.held_out_fraction))
    measured = fertility(tokenizer, take_characters(held_out, args.held_out_characters, "measuring"))
    save_whole(tokenizer, output)
    print("For comparison, OpenAI's BPEs have about 4 bytes per token on English (github.com/openai/tiktoken, README).")
    print(
        f"{output}: {len(tokenizer):,} tokens, on held-out text {measured['tokens_per_word']:.3f} tokens per word, "
        f"{measured['bytes_per_token']:.3f} bytes per token"
    )


if __name__ == "__main__":
    run_script(main, parse_args())
