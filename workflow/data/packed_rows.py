"""A stream of fixed-length rows packed from documents, which can be stopped after any row and resumed exactly there.

Documents are read in blocks, each block is shuffled, tokenized and cut into rows with an EOS after every document; what
does not fit into a row opens the next one, so no token is lost. Because the shuffle of a block is a function of (seed,
epoch, block), the place in the stream is a small cursor, and neither the shuffle buffer nor the packer's remainder has
to be stored: resuming reads the block again, shuffles it the same way and skips to the cursor's document and token.

    epoch, block          pass over the text, block in it
    source                where `datasets` stood before that block (its own `state_dict`)
    document, token       what is already used up: documents of the shuffled block, tokens of the next one
    documents_read        how many documents were finished, over all epochs

Text is divided into one share per consumer, which is one DataLoader worker of one rank. Each consumer goes round its
own share without end, so ranks never wait for one that ran out of text.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator

import datasets
import fsspec.asyn
import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets.distributed import split_dataset_by_node
from tqdm.auto import tqdm

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.text_sources import is_held_out, read_blocks

# Enough documents for the tokenizer's threads, few enough that a resumed run soon has its first row.
TOKENIZED_TOGETHER = 64


def tokenize(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text with EOS at its end; text that merely looks like a special token stays text.

    What the tokenizer puts before a text, such as Llama's BOS, stays there: prompts begin with it as well.
    """
    end = tokenizer.eos_token_id
    ids = tokenizer(texts, split_special_tokens=True, return_attention_mask=False, verbose=False)["input_ids"]
    return [document if document[-1:] == [end] else [*document, end] for document in ids]


def pack(documents: Iterable[tuple[dict, list[int]]], row_length: int) -> Iterator[dict]:
    """Cut documents into full rows; a row's cursor says where the row after it begins."""
    tokens, positions = [], []
    for cursor, ids in documents:
        used = cursor.get("token", 0)
        while used < len(ids):
            piece = ids[used : used + row_length - len(tokens)]
            tokens += piece
            positions += range(len(piece))
            used += len(piece)
            if len(tokens) == row_length:
                yield {"input_ids": tokens, "position_ids": positions, "cursor": {**cursor, "token": used}}
                tokens, positions = [], []


class PackedDocuments(torch.utils.data.IterableDataset):
    """Training rows without end; start it anywhere by setting `cursors`, one for each DataLoader worker."""

    def __init__(
        self,
        stream: datasets.IterableDataset,
        tokenizer,
        row_length: int,
        shuffle_buffer: int,
        seed: int,
        held_out_fraction: float,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 1,
    ):
        self.stream = stream
        self.tokenizer = tokenizer
        self.row_length = row_length
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.held_out_fraction = held_out_fraction
        self.consumers = world_size * workers
        start = {"epoch": 0, "block": 0, "source": None, "document": 0, "token": 0, "documents_read": 0}
        self.cursors = [{"consumer": rank * workers + worker, **start} for worker in range(workers)]

    @property
    def settings(self) -> dict:
        """What a cursor depends on: with any of it changed, a cursor points elsewhere."""
        return {
            "row_length": self.row_length,
            "shuffle_buffer": self.shuffle_buffer,
            "seed": self.seed,
            "held_out_fraction": self.held_out_fraction,
            "processes x dataloader workers": self.consumers,
            "tokenizer": hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        }

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        if worker:
            fsspec.asyn.reset_lock()  # a lock copied by fork would hang the first read from the Hub
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # "true" would wait for threads that a fork does not copy
        return pack(self._documents(self.cursors[worker.id if worker else 0]), self.row_length)

    def _documents(self, cursor: dict) -> Iterator[tuple[dict, list[int]]]:
        cursor = dict(cursor)
        consumer = cursor["consumer"]
        while True:
            # A new object every time: a stream that was given a state starts there on every later pass too.
            share = split_dataset_by_node(self.stream, rank=consumer, world_size=self.consumers)
            whole_pass = cursor["source"] is None
            if not whole_pass:
                share.load_state_dict(cursor["source"])
            documents_before = cursor["documents_read"]
            for texts in read_blocks(share, self.shuffle_buffer):
                texts = [text for text in texts if not is_held_out(text, self.held_out_fraction)]
                generator = np.random.default_rng([self.seed, consumer, cursor["epoch"], cursor["block"]])
                texts = [texts[index] for index in generator.permutation(len(texts))]
                for first in range(cursor["document"], len(texts), TOKENIZED_TOGETHER):
                    for ids in tokenize(self.tokenizer, texts[first : first + TOKENIZED_TOGETHER]):
                        yield dict(cursor), ids
                        cursor.update(
                            document=cursor["document"] + 1, token=0, documents_read=cursor["documents_read"] + 1
                        )
                cursor.update(block=cursor["block"] + 1, source=share.state_dict(), document=0)
            if whole_pass and cursor["documents_read"] == documents_before:
                raise InputError(
                    f"Data consumer {consumer + 1} of {self.consumers} (processes x workers) found no document to "
                    "train on: give more text, or use fewer of them."
                )
            cursor.update(epoch=cursor["epoch"] + 1, block=0, source=None)


def held_out_rows(
    stream: datasets.IterableDataset, tokenizer, row_length: int, rows: int, fraction: float
) -> datasets.Dataset:
    """The first `rows` rows of held-out documents, in the order of the text."""
    texts = (text for block in read_blocks(stream, TOKENIZED_TOGETHER) for text in block if is_held_out(text, fraction))
    packed = pack((({}, tokenize(tokenizer, [text])[0]) for text in texts), row_length)
    collected = []
    with tqdm(total=rows, desc="reading held-out rows", leave=False) as progress:
        while len(collected) < rows and (row := next(packed, None)):
            collected.append(row)
            progress.update()
    if not collected:
        raise InputError(
            f"The held-out documents do not fill one row of {row_length} tokens: raise held_out_fraction "
            f"(now {fraction}) or give validation_sources."
        )
    return datasets.Dataset.from_list(collected).remove_columns("cursor")


class PackedCollator:
    """Stack rows into a batch."""

    def __init__(self, mask_across_documents: bool):
        self.mask_across_documents = mask_across_documents

    def __call__(self, rows: list[dict]) -> dict:
        input_ids = torch.tensor([row["input_ids"] for row in rows])  # (B, T)
        position_ids = torch.tensor([row["position_ids"] for row in rows])  # (B, T)
        labels = input_ids.clone()
        if self.mask_across_documents:
            # The first token of a document would be predicted from the document before it.
            labels[position_ids == 0] = -100
        else:
            # A row each: memory that rows share cannot be pinned.
            position_ids = torch.arange(input_ids.shape[1]).repeat(len(rows), 1)  # (B, T)
        # With a cache the library takes restarting positions for decoding and builds no mask between documents.
        batch = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "use_cache": False}
        if "cursor" in rows[-1]:
            batch["cursor"] = rows[-1]["cursor"]
        return batch


class ResumableLoader(torch.utils.data.DataLoader):
    """A DataLoader whose `cursors` follow the batches handed out, not the rows that workers have prefetched.

    Workers deliver in turn, so the worker of the next batch is always the one whose cursor is oldest: cursors are kept
    in that order, and a resumed loader begins with worker 0 on the oldest one.

    Batches are copied to `device` without waiting for it. Trainer would wait for its own copies, and by then for every
    step before, so that the GPU ran dry at each step while the host launched the next one.
    """

    def __init__(self, *args, device: torch.device | str = "cpu", **options):
        super().__init__(*args, **options)
        self.device = device
        self.seconds_waited = 0.0  # by whoever takes the batches

    def __iter__(self) -> Iterator[dict]:
        batches = super().__iter__()
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)  # without end
            except InputError as error:  # a worker's arrives as the text of its traceback
                name = f"{InputError.__module__}.{InputError.__qualname__}: "
                raise InputError(str(error).splitlines()[-1].removeprefix(name)) from None
            self.seconds_waited += time.perf_counter() - start
            self.dataset.cursors = [*self.dataset.cursors[1:], batch.pop("cursor")]
            yield send_to_device(batch, self.device, non_blocking=True)
