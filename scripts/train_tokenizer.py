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

from command_line import ArgumentParser, InputError, check_output_folder, run_script
from text_sources import is_held_out, load_sources, read_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

# Ids 0, 1 and 2 are those of the published checkpoints; the reserved ones are for what fine-tuning may need.
SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|begin|>", "<|im_start|>", "<|im_end|>"]
SPECIAL_TOKENS += [f"<|reserved_{index}|>" for index in range(16 - len(SPECIAL_TOKENS))]

FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}  # of a tokenizer

# ChatML. What the assistant has to learn is inside the generation marks, its end-of-turn token included. Tools, calls
# and results are JSON between tags, in the form that the Hermes models made common. A name goes into the header of its
# turn; the result of a call that has an id takes the name of the function that was called.
CHAT_TEMPLATE = """\
{%- macro header(message, name) -%}
    {{- "<|im_start|>" + message["role"] + (" name=" + name if name else "") + "\\n" -}}
{%- endmacro -%}
{%- set names = namespace(by_id={}) -%}
{%- if tools -%}
    {{- "<|im_start|>system\\n" -}}
    {%- if messages[0]["role"] == "system" and messages[0]["content"] -%}
        {{- messages[0]["content"] + "\\n\\n" -}}
    {%- endif -%}
    {{- "You can call these functions, each given as a JSON schema:\\n<tools>\\n" -}}
    {%- for tool in tools -%}
        {{- tool | tojson + "\\n" -}}
    {%- endfor -%}
    {{- "</tools>\\nTo call one, write its name and its arguments as a JSON object between tags:\\n" -}}
    {{- '<tool_call>\\n{"name": "...", "arguments": {...}}\\n</tool_call><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set content = message["content"] or "" -%}
    {%- if message["role"] == "assistant" -%}
        {{- header(message, message["name"]) -}}
        {%- generation -%}
            {%- if message["reasoning_content"] -%}
                {{- "<think>\\n" + message["reasoning_content"] + "\\n</think>\\n\\n" -}}
            {%- endif -%}
            {{- content -}}
            {%- for call in message["tool_calls"] or [] -%}
                {%- set function = call["function"] or call -%}
                {%- if call["id"] -%}
                    {%- set names.by_id = dict(names.by_id, **{call["id"] | string: function["name"]}) -%}
                {%- endif -%}
                {{- "\\n" if content or not loop.first -}}
                {{- '<tool_call>\\n{"name": ' + function["name"] | tojson + ', "arguments": ' -}}
                {%- if function["arguments"] is string -%}
                    {{- function["arguments"] -}}
                {%- else -%}
                    {{- function["arguments"] | tojson -}}
                {%- endif -%}
                {{- "}\\n</tool_call>" -}}
            {%- endfor -%}
            {{- "<|im_end|>" -}}
        {%- endgeneration -%}
        {{- "\\n" -}}
    {%- elif message["role"] == "tool" -%}
        {{- header(message, message["name"] or names.by_id[message["tool_call_id"] | string]) -}}
        {{- "<tool_response>\\n" + content + "\\n</tool_response><|im_end|>\\n" -}}
    {%- elif not (tools and loop.first and message["role"] == "system") -%}
        {{- header(message, message["name"]) + content + "<|im_end|>\\n" -}}
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


def check_output(output: Path) -> None:
    """Raise `InputError` where the tokenizer could not be written, or would replace more than a tokenizer."""
    check_output_folder(output)
    check_output_folder(output.absolute().parent)  # the folder is written beside its place and renamed
    others = sorted(path.name for path in output.iterdir() if path.name not in FILES) if output.is_dir() else []
    if others:
        raise InputError(
            f"'{output}' is not a tokenizer folder, for it holds '{others[0]}', which would be lost: name another "
            "--output-dir."
        )


def check_split(stream, held_out_fraction: float) -> None:
    """Raise `InputError` where there would be nothing to train on, or nothing to measure on when training is over."""
    if not 0 < held_out_fraction < 1:
        raise InputError(f"--held-out-fraction must be between 0 and 1, but is {held_out_fraction}.")
    missing = {True, False}
    for text in read_documents(stream):
        missing.discard(is_held_out(text, held_out_fraction))
        if not missing:
            return
    if False in missing:
        raise InputError("No document is left to train on: lower --held-out-fraction or give more text.")
    raise InputError("No document is held out to measure fertility on: raise --held-out-fraction or give more text.")


def main(args: argparse.Namespace) -> None:
    output = Path(args.output_dir)
    check_output(output)
    stream = load_sources(args.sources, args.source_weights, args.text_column)
    check_split(stream, args.held_out_fraction)

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
    parser = ArgumentParser(description=__doc__)
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
    arguments, smallest = parser.parse_args(), len(SPECIAL_TOKENS) + 256
    if arguments.vocab_size < smallest:
        parser.error(
            f"--vocab-size {arguments.vocab_size} is too small: special tokens and bytes alone are {smallest}."
        )
    run_script(main, arguments)
