"""Where text comes from. A source is one of

    embedded                                  English text that every Python installation carries (about 2 MB)
    HuggingFaceFW/fineweb-edu:sample-10BT     a Hub dataset and its configuration, streamed from its train split
    "data/edu/train-*.parquet"                local files: .parquet, .jsonl or .txt (one document per .txt file)

and several sources make a mixture, weighted by document. Every source comes out as a streamed
`datasets.IterableDataset` with the single column "text". scripts/show_data.py shows what is in one.
"""

import ast
import functools
import hashlib
import importlib
import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import datasets

from complexity_deep.workflow.command import InputError, first_line, one_line
from complexity_deep.workflow.data.sources import BUILDERS, builder_of, files_of_pattern, is_hub_name, mix

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
    """Open every source and `mix` them."""
    if not sources:
        raise InputError("No text source is given: name at least one, for example 'embedded'.")
    streams = [_load_source(source, text_column) for source in sources]
    return mix(streams, weights, seed)


@functools.cache  # parsing the standard library takes seconds, and a command opens its sources several times
def _embedded_dataset() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(embedded_documents())})


def _load_source(source: str, text_column: str) -> datasets.IterableDataset:
    if source == "embedded":
        return _embedded_dataset().to_iterable_dataset()

    if path := builder_of(source):
        options = {"data_files": files_of_pattern(source)}
        if path == "text":
            options["sample_by"] = "document"
            text_column = "text"
    else:
        path, _, configuration = source.partition(":")
        if not is_hub_name(path):
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
        raise InputError(f"The source '{source}' cannot be read: {_kind_and_line(error)}") from error
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
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"A source is not UTF-8 text all through: {error.reason} in {error.object[:40]!r}.") from error
    except datasets.table.CastError as error:
        raise InputError(
            "A source cannot be read to its end, for some of its rows have other columns than the first: make them "
            f"alike, or give files of other columns as a source of their own ({one_line(error)})."
        ) from error
    except Exception as error:  # the network and each file format raise classes of their own
        raise InputError(f"A source cannot be read to its end: {_kind_and_line(error.__cause__ or error)}") from error


def read_documents(stream: datasets.IterableDataset) -> Iterator[str]:
    """Yield the texts of one pass over the stream."""
    for block in read_blocks(stream, documents=100):
        yield from block


def _kind_and_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error) if str(error).strip() else 'no message'}"
