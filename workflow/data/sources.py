"""What a source may be, for text and for conversations alike, and how several of them are mixed."""

import glob
import os
from pathlib import Path
from typing import TypeVar

import datasets
import pyarrow.parquet

from complexity_deep.workflow.command import InputError, first_line

# File suffix -> the `datasets` builder that reads it; each may also be gzipped.
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
Rows = TypeVar("Rows", datasets.Dataset, datasets.IterableDataset)


def builder_of(source: str) -> str | None:
    """The `datasets` builder of a file pattern; None where the source is no file."""
    return BUILDERS.get(Path(source.removesuffix(".gz")).suffix)


def matching_files(source: str) -> list[str]:
    """The files that a pattern matches, sorted. The name of a file may have the signs of a pattern in it."""
    path = os.path.expanduser(source)
    return [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))


def files_of_pattern(source: str) -> list[str]:
    """What `datasets` takes as `data_files`: each file that a pattern matches, sorted.

    Raises `InputError` where there is none, or one of them is empty: `datasets` would fail when it comes to that one.
    """
    files = matching_files(source)
    if not files:
        raise InputError(f"No file matches the source '{source}'.")
    for file in files:
        if is_empty(file):
            raise InputError(f"The file '{file}' is empty.")
    return [glob.escape(file) for file in files]  # for `datasets` takes names for patterns, and leaves out "a[1].txt"


def is_empty(file: str) -> bool:
    """Whether a file has no bytes or, of parquet, no rows; `InputError` for one that is no parquet file."""
    size = os.path.getsize(file)
    if size == 0 or not file.endswith(".parquet"):
        return size == 0
    try:
        return pyarrow.parquet.read_metadata(file).num_rows == 0
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"The file '{file}' cannot be read: {first_line(error)}") from error


def is_hub_name(name: str) -> bool:
    """Whether a source is written owner/name and is no path on this machine."""
    return name.count("/") == 1 and not os.path.exists(name)


def check_weights(sources: list, weights: list[float] | None) -> None:
    """Raise `InputError` where there are weights, but not a positive one for each source."""
    if weights is not None and (len(weights) != len(sources) or min(weights) <= 0):
        raise InputError(f"{len(sources)} sources need as many positive weights, but the weights are {weights}.")


def mix(parts: list[Rows], weights: list[float] | None, seed: int) -> Rows:
    """One dataset or stream of the parts.

    With weights, each row is drawn from part i with probability weights[i]. It ends when every part was read to its
    end; shorter ones start again meanwhile. Without weights the parts follow each other.
    """
    check_weights(parts, weights)
    if weights is None:
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    probabilities = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(parts, probabilities, seed=seed, stopping_strategy="all_exhausted")
