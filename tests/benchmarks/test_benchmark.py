"""scripts/benchmark.py: what it refuses before it measures."""

import sys

import pytest

from complexity_deep.scripts import benchmark
from complexity_deep.workflow.benchmarks.results import FIELDS
from complexity_deep.workflow.command import InputError
from support import REPOSITORY


def run(monkeypatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "generate", "--device", "cpu", *map(str, options)])
    benchmark.main(benchmark.parse_args())


def test_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ceilings", lambda device: pytest.fail("the work began"))
    (tmp_path / "file").touch()
    (tmp_path / "results.csv").write_text("name,value\n")
    for options, sentence in (
        (["--output-dir", tmp_path / "file"], "is a file"),
        (["--output-dir", "/proc/out"], "cannot be written"),
        (["--output-dir", tmp_path], "is no table of this script's results"),
        (["--output-dir", tmp_path / "new", "--batch-size", 0], "--batch-size is too small: 0."),
    ):
        with pytest.raises(InputError, match=sentence):
            run(monkeypatch, *options)
    assert (tmp_path / "results.csv").read_text() == "name,value\n" and not (tmp_path / "new").exists()


def test_rows_are_added_with_the_count_of_flops(tmp_path, monkeypatch, capsys):
    options = ("--model-config", REPOSITORY / "configs" / "tiny.json", "--sequence-length", 16, "--new-tokens", 2)
    monkeypatch.setattr(benchmark, "ceilings", lambda device: (1.0, 1.0))
    for _ in range(2):
        run(monkeypatch, *options, "--repeats", 1, "--only", "complexity-deep", "--output-dir", tmp_path)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0] == ",".join(FIELDS) and len(lines) == 1 + 2 * 2
