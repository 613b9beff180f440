"""Train a byte-level BPE tokenizer by streaming text.

    python scripts/train_tokenizer.py --sources embedded --vocab-size 4096 --output-dir runs/demo/tokenizer
    python scripts/train_tokenizer.py --sources HuggingFaceFW/fineweb-edu:sample-10BT --max-characters 5e9
    python scripts/train_tokenizer.py --sources "data/en/*.parquet" "data/fr/*.parquet" --source-weights 0.7 0.3

Writes a standard fast tokenizer (no custom code) with the special ids of the published checkpoints, tokens and a
template for chat, and prints its fertility on held-out documents, which it was not trained on.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from text_sources import InputError, is_held_out, load_sources, read_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

# Ids 0, 1 and 2 are those of the published checkpoints; the reserved ones are for what fine-tuning may need.
SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|begin|>", "<|im_start|>", "<|im_end|>"]
SPECIAL_TOKENS += [f"<|reserved_{index}|>" for index in range(16 - len(SPECIAL_TOKENS))]

# ChatML. What the assistant has to learn is inside the generation marks, its end-of-turn token included.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message["role"] == "assistant" -%}
        {{- "<|im_start|>assistant\\n" -}}
        {%- generation -%}
            {{- message["content"] + "<|im_end|>" -}}
        {%- endgeneration -%}
        {{- "\\n" -}}
    {%- else -%}
        {{- "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""


def take_characters(texts: Iterator[str], limit: float, description: str) -> Iterator[str]:
    """Pass texts on, with a progress bar, until `limit` characters were seen."""
    seen = 0
    with tqdm(desc=description, unit=" characters", unit_scale=True) as progress:
        for text in texts:
            yield text
            progress.update(len(text))
            seen += len(text)
            if seen >= limit:
                return


def train(texts: Iterator[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    # Digits one by one, so that equal numbers are always spelled with equal tokens.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that no text is unknown
        show_progress=True,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[1],
        bos_token=SPECIAL_TOKENS[2],
        extra_special_tokens=SPECIAL_TOKENS[3:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def fertility(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str]) -> dict[str, float]:
    """Tokens per whitespace-separated word and bytes per token."""
    words = tokens = size = 0
    for text in texts:
        words += len(text.split())
        tokens += len(tokenizer(text, verbose=False)["input_ids"])
        size += len(text.encode())
    if not tokens:
        raise InputError(
            "No document is held out to measure fertility on: raise --held-out-fraction or give more text."
        )
    return {"tokens_per_word": tokens / max(words, 1), "bytes_per_token": size / tokens}


def save_atomically(tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Save beside the destination and rename, so that a folder of that name is always a whole tokenizer."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        new, old = Path(folder, "new"), Path(folder, "old")
        tokenizer.save_pretrained(new)
        if output.exists():
            output.rename(old)
        new.rename(output)


def main(args: argparse.Namespace) -> None:
    smallest = len(SPECIAL_TOKENS) + 256
    if args.vocab_size < smallest:
        raise InputError(f"--vocab-size {args.vocab_size} is too small: special tokens and bytes alone are {smallest}.")
    output = Path(args.output_dir)
    if output.exists() and not (output / "tokenizer.json").exists():
        raise InputError(f"'{output}' exists and is not a tokenizer folder: name another --output-dir.")
    stream = load_sources(args.sources, args.source_weights, args.text_column)

    training = (text for text in read_documents(stream) if not is_held_out(text, args.held_out_fraction))
    tokenizer = train(
        take_characters(training, args.max_characters, "reading text"), args.vocab_size, args.model_max_length
    )
    if len(tokenizer) < args.vocab_size:
        print(f"The text has pairs for {len(tokenizer):,} tokens only, of the {args.vocab_size:,} asked for.")

    held_out = (text for text in read_documents(stream) if is_held_out(text, args.held_out_fraction))
    measured = fertility(tokenizer, take_characters(held_out, args.held_out_characters, "measuring"))
    save_atomically(tokenizer, output)
    print("For comparison, OpenAI's BPEs have about 4 bytes per token on English (github.com/openai/tiktoken, README).")
    print(
        f"{output}: {len(tokenizer):,} tokens, on held-out text {measured['tokens_per_word']:.3f} tokens per word, "
        f"{measured['bytes_per_token']:.3f} bytes per token"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="runs/tokenizer", help="folder to write (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=32000, help="tokens, special ones included (default: %(default)s)"
    )
    parser.add_argument(
        "--model-max-length", type=int, default=2048, help="context the model will have (default: %(default)s)"
    )
    parser.add_argument(
        "--sources", nargs="+", default=["HuggingFaceFW/fineweb-edu:sample-10BT"], help="see text_sources.py"
    )
    parser.add_argument("--source-weights", nargs="+", type=float, help="share of documents from each source")
    parser.add_argument("--text-column", default="text", help="column that holds the text (default: %(default)s)")
    parser.add_argument(
        "--max-characters", type=float, default=2e9, help="train on at most this much text (default: 2e9)"
    )
    parser.add_argument(
        "--held-out-fraction", type=float, default=0.01, help="share of documents kept out (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out-characters", type=float, default=1e6, help="measure fertility on this much (default: 1e6)"
    )
    try:
        main(parser.parse_args())
    except InputError as error:
        parser.error(str(error))
