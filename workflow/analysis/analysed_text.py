"""The text that an analysis reads, in packed rows, and the class of each token."""

from itertools import islice

from torch import Tensor
from transformers import PreTrainedConfig

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.packed_rows import PackedCollator, pack, tokenize
from complexity_deep.workflow.data.text_sources import load_sources, read_documents

LONGEST_ROW = 512  # tokens; enough context for every figure, and many rows at the default --max-tokens
TOKEN_CLASSES = ("word start", "continuation", "digits", "punctuation", "whitespace", "special")


def load_rows(
    text: list[str],
    tokenizer,
    config: PreTrainedConfig,
    *,
    text_column: str,
    max_tokens: int,
    batch_size: int,
    device: str,
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Batches of packed rows of the sources, each tensor [B, S] on the device, and the class of each token id, [V]."""
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer has no eos_token to end documents with; name another with --tokenizer.")
    length = min(LONGEST_ROW, config.max_position_embeddings)
    if max_tokens < length:
        raise InputError(f"--max-tokens {max_tokens} is less than one row of {length} tokens.")
    texts = read_documents(load_sources(text, text_column=text_column))
    rows = pack((({}, tokenize(tokenizer, [document])[0]) for document in texts), length)
    rows = [{name: row[name] for name in ("input_ids", "position_ids")} for row in islice(rows, max_tokens // length)]
    if not rows:
        raise InputError(f"The text does not fill one row of {length} tokens: give more of it.")
    collate = PackedCollator(mask_across_documents=True)
    batches = [collate(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]
    for batch in batches:
        batch.update((name, batch[name].to(device)) for name in ("input_ids", "position_ids", "labels"))
    return batches, [token_class(tokenizer, token) for token in range(config.vocab_size)]


def token_class(tokenizer, token_id: int) -> str:
    """One of TOKEN_CLASSES; a word that begins a document has no space before it and counts as continuation."""
    raw = tokenizer.convert_ids_to_tokens(token_id)
    if raw is None or token_id in tokenizer.all_special_ids:
        return "special"
    text = tokenizer.decode([token_id])
    if not text.strip():
        return "whitespace"
    if any(character.isalpha() for character in text):
        return "word start" if raw.startswith(("Ġ", "▁", " ")) else "continuation"
    return "digits" if any(character.isdigit() for character in text) else "punctuation"
