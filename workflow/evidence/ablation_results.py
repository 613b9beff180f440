"""runs.csv, with a row for every run, and the description of the token files."""

import contextlib
import csv
import fcntl
import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from complexity_deep.workflow.command import InputError

FIELDS = (
    "variant", "seed", "size", "tokens", "seconds", "held_out_edu", "held_out_books", "curve", "device", "versions",
    "commit", "data", "plan", "learning_rate", "parameters", "active_parameters", "status", "reason", "steps",
    "tokens_per_second", "wall_seconds", "runs_per_gpu", "train_loss", "spikes", "max_grad_norm", "median_grad_norm",
    "shifted_edu", "expert_norm_ratio", "peak_memory_gib", "date", "settings", "optimizer",
)  # fmt: skip
# Columns whose cells are text, even where a hash looks like a number.
TEXT = (
    "variant", "size", "device", "versions", "commit", "data", "plan", "status", "reason", "date", "settings",
    "optimizer",
)  # fmt: skip
NEEDED = ("seed", "tokens", "held_out_edu", "held_out_books", "curve")  # by the report, of a run that finished
STATUSES = ("ok", "diverged", "failed")
ADAMW = "adamw"  # the optimizer of rows without one, which were written before there was a choice


def read_rows(results: Path) -> list[dict]:
    """The rows of runs.csv, numbers as numbers and an empty cell as None; a row without an optimizer has AdamW.

    Raises `InputError` for a file with other columns, and for a line that is no whole row.
    """
    if not results.exists():
        return []
    rows = []
    with opened(results) as file:
        reader = csv.DictReader(file)
        if set(FIELDS) - {"optimizer"} - set(reader.fieldnames or FIELDS):
            raise InputError(f"The first line of '{results}' must be {','.join(FIELDS)}.")
        for cells in reader:
            try:
                row = {name: _value(name, cell) for name, cell in cells.items()}
            except (TypeError, ValueError):
                row = {"status": None}
            is_whole = row["status"] in STATUSES and row["settings"] and row["learning_rate"]
            if not is_whole or (row["status"] == "ok" and any(row[name] in (None, []) for name in NEEDED)):
                raise InputError(
                    f"'{results}' has no whole row on line {reader.line_num}, as after a crash: mend it or take it out."
                )
            rows.append({**row, "optimizer": row.get("optimizer") or ADAMW})
    return [{**row, "status": "diverged"} if is_dead(row) else row for row in rows]


@contextlib.contextmanager
def opened(results: Path) -> Iterator[TextIO]:
    """runs.csv to read, with or without a spreadsheet's byte order mark. Raises `InputError` where it is no text."""
    try:
        with results.open(newline="", encoding="utf-8-sig") as file:
            yield file
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"'{results}' cannot be read ({error}): save it as CSV in UTF-8.") from error


def is_dead(row: dict) -> bool:
    """Whether a run diverged although its last loss is finite: it ended worse than at the first point of its curve, or
    most of its steps had no gradient, as at ln V, which looks better than a first point that had blown up already."""
    return row["status"] == "ok" and (row["curve"][-1][1] > row["curve"][0][1] or row["median_grad_norm"] == 0)


def _value(name: str, cell: str):
    if name in TEXT:
        return cell
    return json.loads(cell) if cell else None


def read_data(folder: str) -> dict:
    """What data.json says of the token files."""
    try:
        data = json.loads(Path(folder, "data.json").read_text())
        if not isinstance(data, dict) or not {"id", "eos_token_id", "files"} <= data.keys():
            raise ValueError("data.json is of another kind")
        return data
    except (OSError, ValueError) as error:
        raise InputError(f"'{folder}' holds no token files ({error}): write them with `ablate.py prepare`.") from None


def check_data(folder: str, data: dict, row_length: int) -> None:
    """Raise `InputError` where the files are not those that data.json describes, or one has no whole row.

    Each run would find out by itself, and leave a row that says it failed.
    """
    if not Path(folder, "tokenizer").is_dir():
        raise InputError(f"There is no tokenizer in '{folder}': write it with `ablate.py prepare`.")
    for name in ("train", "held_out_edu", "held_out_books"):
        path, tokens = Path(folder, f"{name}.bin"), data["files"][name]["tokens"]
        size = path.stat().st_size if path.exists() else None
        if size != 2 * tokens:
            found = "is not there" if size is None else f"has {size:,} bytes"
            raise InputError(
                f"'{path}' should hold {tokens:,} tokens of two bytes, but {found}: copy or prepare it again."
            )
        if tokens < row_length:
            raise InputError(f"'{path}' holds {tokens:,} tokens, fewer than one row of {row_length:,}: give more text.")


class Results:
    """runs.csv, to which a finished run is appended at once; of several threads one writes at a time."""

    def __init__(self, path: Path):
        """Raises `InputError` for a file with other columns than those that a row would be written in."""
        self.path, self.lock = path, threading.Lock()
        if path.exists():
            with opened(path) as file:
                columns = next(csv.reader(file), [])
            if columns != list(FIELDS):
                raise InputError(
                    f"The first line of '{path}' must be {','.join(FIELDS)}; a row may lack the last cells."
                )
            try:
                path.open("ab").close()
            except OSError as error:  # before a run that could not be recorded
                raise InputError(
                    f"'{path}' cannot be written ({error.strerror}): name another --output-dir."
                ) from error

    def append(self, row: dict) -> None:
        """Raises `InputError`, with the row in its message, where it cannot be written; the file is as it was then."""
        cells = {"optimizer": ADAMW, **{name: row[name] for name in FIELDS if name in row}}
        # json has a name for a loss that is no number, which read_rows reads again.
        cells = {k: json.dumps(v) if isinstance(v, list | dict | float) else v for k, v in cells.items()}
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, FIELDS)
        writer.writerow(cells)
        row_as_text = text.getvalue().strip()
        try:
            with self.lock, self.path.open("ab+", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # another command may write to it
                self._append(file, row_as_text)
        except OSError as error:
            raise InputError(
                f"'{self.path}' cannot be written ({error.strerror}), and lacks this row: {row_as_text}"
            ) from error

    @staticmethod
    def _append(file: io.RawIOBase, row: str) -> None:
        size = file.seek(0, os.SEEK_END)
        before = ",".join(FIELDS) + "\r\n"
        if size:
            file.seek(size - 1)
            before = "" if file.read(1) == b"\n" else "\r\n"  # a line that was cut off, or edited by hand
        left = memoryview(f"{before}{row}\r\n".encode())
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise
