"""Measured rows: a table, benchmarks/results.csv and a line of JSON."""

import csv
import io
import json
import statistics
from datetime import datetime
from pathlib import Path

import complexity_deep  # noqa: F401 (registers the architecture)
from complexity_deep.workflow.benchmarks.charts import draw
from complexity_deep.workflow.command import InputError, check_output_folder, uninterrupted
from complexity_deep.workflow.markdown_table import table
from complexity_deep.workflow.provenance import provenance

FIELDS = (
    "benchmark", "case", "variant", "median_ms", "p20_ms", "p80_ms", "tokens_per_s", "tflops", "percent_of_matmul",
    "gb_per_s", "percent_of_copy", "peak_gib", "device", "torch", "transformers", "triton", "commit", "date",
)  # fmt: skip


def measured_row(
    benchmark: str, case: str, variant: str, times: list[float], tokens: int, flops: float = 0.0, **more
) -> dict:
    low, high = (statistics.quantiles(times, n=5, method="inclusive")[i] if times[1:] else times[0] for i in (0, 3))
    median = statistics.median(times)
    result = {"benchmark": benchmark, "case": case, "variant": variant}
    result |= {"median_ms": median, "p20_ms": low, "p80_ms": high, "tokens_per_s": tokens / median * 1e3}
    return result | ({"tflops": flops / median / 1e9} if flops else {}) | more


def report(rows: list[dict], directory: Path, matmul: float, copy: float) -> None:
    """Print the table and the JSON line, append to results.csv of `directory`, draw the charts.

    `matmul` (TFLOP/s) and `copy` (GB/s) are the rates that the shares of the rows refer to.
    """
    # With the time of day, which tells the rows of two calls of one day apart.
    source = provenance() | {"date": datetime.now().isoformat(timespec="seconds")}
    for entry in rows:
        if entry.get("tflops"):
            entry["percent_of_matmul"] = 100 * entry["tflops"] / matmul
        if entry.get("gb_per_s"):
            entry["percent_of_copy"] = 100 * entry["gb_per_s"] / copy
        entry |= source
    print(f"\n{source['device']}, torch {source['torch']}, transformers {source['transformers']}, {source['commit']}")
    print(f"matmul ceiling {matmul:.4g} TFLOP/s, copy ceiling {copy:.4g} GB/s\n")
    shown = [field for field in FIELDS[1:12] if any(entry.get(field) is not None for entry in rows)]
    first, lines = {}, []
    for entry in rows:
        first.setdefault(entry["case"], entry["median_ms"])
        cells = [f"{v:.4g}" if isinstance(v := entry.get(field, ""), float) else str(v) for field in shown]
        lines.append([*cells, f"{first[entry['case']] / entry['median_ms']:.3g}x"])
    print("\n".join(table([*shown, "vs first"], lines)))

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "results.csv"
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, FIELDS)
    if not path.exists():
        writer.writeheader()
    writer.writerows({key: f"{v:.5g}" if isinstance(v, float) else v for key, v in entry.items()} for entry in rows)
    with uninterrupted(), path.open("a", newline="", encoding="utf-8") as file:
        file.write(lines.getvalue())
    draw(directory)
    print(json.dumps({"matmul_tflops": matmul, "copy_gb_per_s": copy, "rows": rows}))


def check_results(directory: Path) -> None:
    """Raise `InputError` where results could not be added to those of `directory`."""
    check_output_folder(directory)
    path = directory / "results.csv"
    if path.exists():
        try:
            header = path.open(encoding="utf-8").readline().strip()
        except (OSError, ValueError) as error:
            raise InputError(f"'{path}' cannot be read ({error}): name another --output-dir.") from error
        if header != ",".join(FIELDS):
            raise InputError(f"'{path}' is no table of this script's results: name another --output-dir.")
