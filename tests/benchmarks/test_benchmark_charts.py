"""Charts of benchmarks/results.csv."""

import csv
import shutil
from datetime import datetime
from types import SimpleNamespace

import pytest
from PIL import Image

from complexity_deep.scripts import benchmark_charts as command
from complexity_deep.workflow.benchmarks import charts as benchmark_charts
from complexity_deep.workflow.benchmarks import results
from complexity_deep.workflow.command import InputError
from support import REPOSITORY

RUN = {"device": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "commit": "abc", "date": "2026-11-26"}
STEP = "1.5b batch 1 decode step"


def row(variant: str, tokens_per_s: float, **run) -> dict:
    return {"case": STEP, "variant": variant, "tokens_per_s": tokens_per_s, **RUN, **run}


def test_every_chart_is_drawn_at_page_width(tmp_path):
    shutil.copy(REPOSITORY / "benchmarks" / "results.csv", tmp_path)
    written = benchmark_charts.draw(tmp_path)
    assert [path.stem for path in written] == list(benchmark_charts.CHARTS)
    for path in written:
        width, height = Image.open(path).size
        assert width == 1200 and height < width


def test_what_was_not_measured_is_left_out(tmp_path):
    measured = list(csv.DictReader((REPOSITORY / "benchmarks" / "results.csv").open(newline="")))
    kept = [entry for entry in measured if entry["benchmark"] == "kernels" and "MLP" in entry["case"]]
    with (tmp_path / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(measured[0]))
        writer.writeheader()
        writer.writerows(kept)
    assert [path.stem for path in benchmark_charts.draw(tmp_path)] == ["near_dense", "experts"]


def test_no_picture_at_all_is_said(tmp_path):
    (tmp_path / "results.csv").write_text((REPOSITORY / "benchmarks" / "results.csv").read_text().splitlines()[0])
    with pytest.raises(InputError, match=r"results.csv' has not all rows of any picture, so none is drawn."):
        command.main(SimpleNamespace(directory=tmp_path))


def test_only_rows_of_one_measurement_are_compared():
    needed = [(STEP, "ours"), (STEP, "peer")]
    together = [row("ours", 1.0), row("peer", 2.0)]
    alone = [row("ours", 9.0)]  # measured again on an idle machine, without the peer
    assert benchmark_charts.newest(together + alone, needed)[needed[0]]["tokens_per_s"] == 1.0
    newer = [row("ours", 3.0, date="2026-11-27"), row("peer", 4.0, date="2026-11-27")]
    assert benchmark_charts.newest(together + alone + newer, needed)[needed[0]]["tokens_per_s"] == 3.0
    with pytest.raises(benchmark_charts.NotMeasuredError):
        benchmark_charts.newest([*alone, row("peer", 4.0, commit="other")], needed)


def test_calls_of_one_day_are_not_one_measurement(tmp_path, monkeypatch, capsys):
    """Each with --only; their rows have the same device, versions and commit."""
    times = iter([datetime(2026, 11, 28, 10, 0, second) for second in (1, 9)])
    monkeypatch.setattr(results, "datetime", SimpleNamespace(now=lambda: next(times)))
    for name in ("ours", "peer"):
        results.report([results.measured_row("generate", STEP, name, [1.0], 1)], tmp_path, 1.0, 1.0)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert benchmark_charts.newest(rows, [(STEP, "peer")])
    with pytest.raises(benchmark_charts.NotMeasuredError):
        benchmark_charts.newest(rows, [(STEP, "ours"), (STEP, "peer")])


def test_a_row_that_cannot_be_written_leaves_the_others_out(tmp_path, capsys):
    """A half of a measurement would be drawn as a whole one."""
    rows = [results.measured_row("generate", STEP, name, [1.0], 1) for name in ("ours", "peer")]
    with pytest.raises(ValueError, match="unknown"):
        results.report([rows[0], {**rows[1], "unknown": 1}], tmp_path, 1.0, 1.0)
    assert not (tmp_path / "results.csv").exists()


def test_a_benchmark_writes_every_row_of_its_picture():
    """Rows named otherwise, as by an older `generate`, would keep the picture from ever being drawn anew."""
    rows = []
    for number, name in enumerate(benchmark_charts.NAMES, 1):
        for case, variant in (
            ("1.5b 8x2048 step", f"{name}, sdpa, compiled"),
            (STEP, f"{name}, static cache"),
            ("1.5b 1x128 forward", name),
        ):
            rows.append({**row(variant, number), "case": case})
    assert len(benchmark_charts.tokens_per_s(rows).axes) == 3


def test_users_takes_each_row_from_its_own_measurement():
    """Part of the table was measured again: the rest stays as it was, and only that."""

    def call(commit: str, ours: float, cases) -> list[dict]:
        pairs = [(name, case) for name in ("complexity-deep", "llama") for case in cases]
        times = {"complexity-deep": ours, "llama": 8.0}
        return [
            {**RUN, "commit": commit, "case": case, "variant": name, "median_ms": times[name]} for name, case in pairs
        ]

    cases = list(benchmark_charts.USERS)
    figure = benchmark_charts.users(call("old", 4.0, cases) + call("new", 1.0, cases[:1]))
    assert [text.get_text().strip() for text in figure.axes[0].texts] == ["8x"] + ["2x"] * (len(cases) - 1)
    assert "commit old" in figure.get_supxlabel() and "commit new" in figure.get_supxlabel()
