"""Token files for ablate.py: text tokenized once, so that every run reads the same rows without waiting for them.

    train.bin          uint16 token ids of whole documents, an EOS after each, documents shuffled by a fixed seed
    held_out_NAME.bin  the same for each held-out text, in the order of the text
    data.json          what the files were made of, their SHA-256 and the `id` that every result carries
    tokenizer/         the tokenizer that made them

A row is `row_length` tokens from a multiple of it on. Nothing else is stored: where documents begin is read off EOS.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from complexity_deep.workflow.command import InputError, whole_files
from complexity_deep.workflow.data.packed_rows import TOKENIZED_TOGETHER, tokenize
from complexity_deep.workflow.data.sources import check_weights
from complexity_deep.workflow.data.text_sources import load_sources, read_blocks
from complexity_deep.workflow.data.tokenizer_training import save_whole
from complexity_deep.workflow.saved_model import ids_of
from complexity_deep.workflow.training.new_model import load_tokenizer

SHUFFLE_SEED = 0
LARGEST_VOCABULARY = 2**16  # what two bytes hold


def read_tokens(source: str, tokenizer, limit: float, text_column: str = "text") -> list[np.ndarray]:
    """Documents from the beginning of `source`, each uint16 [length] with its EOS, until `limit` tokens are full."""
    documents, tokens = [], 0
    with tqdm(desc=f"tokenizing {source}", unit=" tokens", unit_scale=True) as progress:
        for texts in read_blocks(load_sources([source], text_column=text_column), TOKENIZED_TOGETHER * 8):
            for ids in tokenize(tokenizer, texts):
                if tokens >= limit:
                    return documents
                documents.append(np.array(ids, dtype=np.uint16))
                tokens += len(ids)
                progress.update(len(ids))
    if tokens < limit < float("inf"):
        raise InputError(
            f"The source '{source}' holds {tokens:,} tokens, but its share is {limit:,.0f}: lower --tokens or its "
            "weight, so that no text is repeated."
        )
    return documents


def prepare(
    output_dir: str, tokenizer_path: str, sources: list[str], weights: list[float], tokens: float, held_out: dict
) -> dict:
    """Write the token files; `held_out` maps a name to a source. Returns what data.json holds.

    Raises `InputError` for a source with fewer tokens than its share of `tokens`, and for what cannot be read.
    """
    check_weights(sources, weights)
    tokenizer = load_tokenizer(tokenizer_path)
    if ids_of(tokenizer) > LARGEST_VOCABULARY:
        raise InputError(f"The tokenizer has {ids_of(tokenizer):,} tokens, and a token file holds ids below 65,536.")
    output = Path(output_dir)
    shares = [tokens * weight / sum(weights) for weight in weights]
    parts = {name: read_tokens(source, tokenizer, float("inf")) for name, source in held_out.items()}
    documents = [ids for source, share in zip(sources, shares) for ids in read_tokens(source, tokenizer, share)]
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(documents))
    files = {"train": [documents[index] for index in order]}
    files.update({f"held_out_{name}": part for name, part in parts.items()})
    facts = {"sources": [Path(source).name for source in sources], "weights": weights, "files": {}}
    with whole_files(output) as folder:
        for name, part in files.items():
            data = np.concatenate(part).tobytes()
            (folder / f"{name}.bin").write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            facts["files"][name] = {"tokens": len(data) // 2, "documents": len(part), "sha256": digest}
        facts["eos_token_id"] = tokenizer.eos_token_id
        facts["vocab_size"] = ids_of(tokenizer)
        facts["tokenizer"] = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        facts["id"] = data_id(facts)
        (folder / "data.json").write_text(json.dumps(facts, indent=1) + "\n")
        save_whole(tokenizer, output / "tokenizer")  # last: token files that stay after an error keep theirs
    return facts


def data_id(facts: dict) -> str:
    """Twelve hexadecimal digits over the contents of all token files."""
    digests = [facts["files"][name]["sha256"] for name in sorted(facts["files"])]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


def token_rows(folder: str, name: str, row_length: int, device: torch.device | str) -> Tensor:
    """All whole rows of a token file on the device, int32 [rows, S]; a last, shorter one is left out."""
    path = Path(folder, f"{name}.bin")
    if not path.exists():
        raise InputError(f"There is no token file {path}: write it with `ablate.py prepare`.")
    tokens = np.fromfile(path, dtype=np.uint16)
    rows = len(tokens) // row_length
    if not rows:
        raise InputError(f"{path} holds {len(tokens):,} tokens, fewer than one row of {row_length:,}.")
    table = torch.from_numpy(tokens[: rows * row_length].astype(np.int32))
    return table.view(rows, row_length).to(device)


def token_counts(folder: str, vocab_size: int) -> Tensor:
    """How often each id [V] occurs in the training tokens."""
    tokens = np.fromfile(Path(folder, "train.bin"), dtype=np.uint16)
    return torch.from_numpy(np.bincount(tokens, minlength=vocab_size))


def batch_of(input_ids: Tensor, eos_token_id: int) -> dict:
    """Model inputs for packed rows [B, S]: positions restart after an EOS, which keeps documents apart.

    The first token of a document, or of a row, has no label: there is nothing before it to predict it from.
    """
    input_ids = input_ids.long()
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)  # [B, S]
    is_first = torch.ones_like(input_ids, dtype=torch.bool)
    is_first[:, 1:] = input_ids[:, :-1] == eos_token_id
    start = torch.where(is_first, positions, 0).cummax(dim=1).values
    labels = input_ids.masked_fill(is_first, -100)
    return {"input_ids": input_ids, "position_ids": positions - start, "labels": labels, "use_cache": False}


class TrainingBatches:
    """Batches of `rows_per_step` rows in an order that depends on the seed alone.

    No row comes twice, unless `repeat` allows for more steps than the rows suffice for: then every pass takes each row
    once, in an order of its own, the first as without `repeat`. Everything is on the device already, so that a step
    waits for no copy.
    """

    def __init__(
        self, rows: Tensor, rows_per_step: int, steps: int, seed: int, eos_token_id: int, repeat: bool = False
    ):
        needed = steps * rows_per_step
        if needed > len(rows) and not repeat:
            raise InputError(
                f"{steps:,} steps of {rows_per_step} rows are more than the {len(rows):,} rows of train.bin: lower the "
                "tokens of the run, prepare more, or set repeat_data in the plan."
            )
        generator = torch.Generator().manual_seed(seed)
        passes = max(1, math.ceil(needed / len(rows)))
        order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(passes)])
        self.rows, self.order = rows, order.to(rows.device)
        self.rows_per_step, self.steps, self.eos_token_id = rows_per_step, steps, eos_token_id

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict]:
        for chosen in self.order.split(self.rows_per_step)[: self.steps]:
            yield batch_of(self.rows[chosen], self.eos_token_id)
