"""A byte-level BPE tokenizer trained on a stream of text."""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from complexity_deep.workflow.command import InputError, check_output_folder, whole_folder
from complexity_deep.workflow.data.text_sources import is_held_out, read_documents

# Ids 0, 1 and 2 are those of the published checkpoints; the reserved ones are for what fine-tuning may need.
SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|begin|>", "<|im_start|>", "<|im_end|>"]
SPECIAL_TOKENS += [f"<|reserved_{index}|>" for index in range(16 - len(SPECIAL_TOKENS))]
FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}  # of a tokenizer
# ChatML. What the assistant has to learn is inside the generation marks, its end-of-turn token included. Tools, calls
# and results are JSON between tags, in the form that the Hermes models made common. A name goes into the header of its
# turn; the result of a call that has an id takes the name of the function that was called.
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


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


def train_bpe(texts: Iterator[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
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


def save_whole(tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Save so that a folder of that name is always a whole tokenizer."""
    with whole_folder(output) as folder:
        tokenizer.save_pretrained(folder)


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
