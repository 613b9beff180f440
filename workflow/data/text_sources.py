"""Where text comes from: the sources that train_tokenizer.py and pretrain.py share.

    python scripts/text_sources.py --sources embedded

prints the number of documents and bytes and the first document. A source is one of

    embedded                                  English text that every Python installation carries (about 2 MB)
    HuggingFaceFW/fineweb-edu:sample-10BT     a Hub dataset and its configuration, streamed from its train split
    "data/edu/train-*.parquet"                local files: .parquet, .jsonl or .txt (one document per .txt file)

and several sources make a mixture, weighted by document. Every source comes out as a streamed
`datasets.IterableDataset` with the single column "text".
"""

import argparse
import ast
import functools
import glob
import hashlib
import importlib
import itertools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import datasets
from command_line import ArgumentParser, InputError, run_script

# File suffix -> the `datasets` builder that reads it; each may also be gzipped.
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
# Parts of the standard library folder that are third-party code, or tests whose docstrings are fixtures and not prose.
NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"}
SHORTEST_EMBEDDED_DOCUMENT = 200  # characters; below this a module says little more than its own name


def embedded_documents() -> Iterator[str]:
    """Yield pydoc's help topics, then the docstrings of each standard-library module, always in the same order."""
    seen = set()
    for text in itertools.chain(_help_topics(), _module_docstrings()):
        if len(text) >= SHORTEST_EMBEDDED_DOCUMENT and text not in seen:
            seen.add(text)
            yield text


def _help_topics() -> Iterator[str]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield topics[name].strip()


def _module_docstrings() -> Iterator[str]:
    # Sources are parsed and never imported: some standard modules open a window or print when imported.
    folder = Path(sysconfig.get_paths()["stdlib"])
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(folder.rglob("*.py")):
        if NOT_PROSE.intersection(path.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a few files hold deliberately broken code
            continue
        docstrings = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
        yield "\n\n".join(filter(None, docstrings))


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out part.

    Decided by the text alone, so the split is the same in every run, at every world size and in every mixture, and two
    copies of one document never fall on both sides of it.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def load_sources(
    sources: list[str], weights: list[float] | None = None, text_column: str = "text", seed: int = 0
) -> datasets.IterableDataset:
    """Open every source and mix them.

    With weights, each document is drawn from source i with probability weights[i]; a pass ends when every source was
    read to its end, and shorter ones start again meanwhile. Without weights the sources follow each other.
    """
    if not sources:
        raise InputError("No text source is given: name at least one, for example 'embedded'.")
    streams = [_load_source(source, text_column) for source in sources]
    if weights is None:
        return streams[0] if len(streams) == 1 else datasets.concatenate_datasets(streams)
    if len(weights) != len(sources) or min(weights) <= 0:
        raise InputError(f"{len(sources)} sources need as many positive weights, but the weights are {weights}.")
    probabilities = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(streams, probabilities, seed=seed, stopping_strategy="all_exhausted")


def _load_source(source: str, text_column: str) -> datasets.IterableDataset:
    if source == "embedded":
        documents = datasets.Dataset.from_dict({"text": list(embedded_documents())})
        return documents.to_iterable_dataset()

    suffix = Path(source.removesuffix(".gz")).suffix
    if suffix in BUILDERS:
        files = sorted(glob.glob(os.path.expanduser(source), recursive=True))
        if not files:
            raise InputError(f"No file matches the source '{source}'.")
        for file in files:
            if os.path.getsize(file) == 0:
                raise InputError(f"The file '{file}' is empty.")
        options = {"data_files": files}
        if BUILDERS[suffix] == "text":
            options["sample_by"] = "document"
            text_column = "text"
        path = BUILDERS[suffix]
    else:
        path, _, configuration = source.partition(":")
        if path.count("/") != 1 or os.path.exists(path):
            raise InputError(
                f"Unknown source '{source}': it is not 'embedded', not a file or pattern ending in "
                f"{', '.join(BUILDERS)}, and not a Hub dataset written owner/name or owner/name:configuration."
            )
        options = {"name": configuration or None}

    try:
        stream = datasets.load_dataset(path, split="train", streaming=True, **options)
        first = next(iter(stream), None)
    except UnicodeDecodeError as error:
        raise InputError(f"The source '{source}' is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except Exception as error:  # the Hub client, the network and each file format raise classes of their own
        raise InputError(f"The source '{source}' cannot be read: {_first_line(error)}") from error
    if first is None:
        raise InputError(f"The source '{source}' holds no document.")
    if text_column not in first:
        raise InputError(f"The source '{source}' has no column '{text_column}'; its columns are: {', '.join(first)}.")
    as_example = functools.partial(_as_example, where=f"The column '{text_column}' of the source '{source}'")
    as_example(first[text_column])
    # Through Python objects, because Arrow refuses to mix a file of strings with one of large_strings.
    features = datasets.Features({"text": datasets.Value("string")})
    texts = stream.select_columns([text_column]).map(
        as_example, input_columns=text_column, remove_columns=text_column, features=features
    )
    if not (first[text_column] or "").strip() and not any(True for _ in read_documents(texts)):
        raise InputError(f"The column '{text_column}' of the source '{source}' holds no text in any row.")
    return texts


def _as_example(text: str | None, where: str) -> dict[str, str | None]:
    if not isinstance(text, str | None):
        raise InputError(f"{where} has {str(text)[:40]} in it ({type(text).__name__}), so it does not hold text.")
    return {"text": text}


def read_blocks(stream: datasets.IterableDataset, documents: int) -> Iterator[list[str]]:
    """Yield lists of up to `documents` texts, with errors from the depths of a file format said in one sentence."""
    try:
        # `iter` and not `__iter__`: the latter would split the shards over DataLoader workers by itself.
        for block in stream.iter(batch_size=documents):
            yield [text for text in block["text"] if text and not text.isspace()]
    except UnicodeDecodeError as error:
        raise InputError(f"A source is not UTF-8 text all through: {error.reason} in {error.object[:40]!r}.") from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise InputError(f"A source cannot be read to its end: {_first_line(error.__cause__ or error)}") from error


def read_documents(stream: datasets.IterableDataset) -> Iterator[str]:
    """Yield the texts of one pass over the stream."""
    for block in read_blocks(stream, documents=100):
        yield from block


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def main(args: argparse.Namespace) -> None:
    documents = list(read_documents(load_sources(args.sources, text_column=args.text_column)))
    print(documents[0])
    print(f"{len(documents):,} documents, {sum(len(text.encode()) for text in documents):,} bytes")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--sources", nargs="+", default=["embedded"], help="one or more sources, as above")
    parser.add_argument("--text-column", default="text", help="column that holds the text, except in .txt files")
    run_script(main, parser.parse_args())
