"""scripts/benchmark.py: what it refuses before it measures."""

import csv
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from complexity_deep.scripts import benchmark
from complexity_deep.workflow.benchmarks import kernel_speed, user_paths
from complexity_deep.workflow.benchmarks.results import FIELDS
from complexity_deep.workflow.command import InputError
from support import REPOSITORY


def run(monkeypatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "generate", "--device", "cpu", *map(str, options)])
    benchmark.main(benchmark.parse_args())


def test_refused_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "ceilings", lambda device: pytest.fail("the work began"))
    (tmp_path / "file").touch()
    (tmp_path / "results.csv").write_text("name,value\n")
    strict = tmp_path / "strict.json"
    strict.write_text('{"model_type": "complexity-deep", "vocab_size": null}')
    for options, sentence in (
        (["--output-dir", tmp_path / "file"], "is a file"),
        (["--output-dir", "/proc/out"], "cannot be written"),
        (["--output-dir", tmp_path], "is no table of this script's results"),
        (["--output-dir", tmp_path / "new", "--tensor-parallel"], "start it by torchrun"),
        (["--output-dir", tmp_path / "new", "--device", "nonsense"], "The device 'nonsense' cannot be used"),
        (["--output-dir", tmp_path / "new", "--model-config", strict], "is no config that loads: .*'vocab_size'"),
        (["--output-dir", tmp_path / "new", "--model-config", "configs/absent.json"], "loads: .*No such file"),
    ):
        with pytest.raises(InputError, match=sentence):
            run(monkeypatch, *options)
    for option, number, minimum in (("--document-length", -3, 1), ("--batch-size", 0, 1), ("--new-tokens", 1, 2)):
        with pytest.raises(SystemExit):
            run(monkeypatch, "--output-dir", tmp_path / "new", option, number)
        sentence = f"argument {option}: '{number}' is not a whole number of at least {minimum}"
        assert sentence in capsys.readouterr().err
    assert (tmp_path / "results.csv").read_text() == "name,value\n" and not (tmp_path / "new").exists()


def test_kernel_tests_without_pytest(tmp_path, monkeypatch):
    """It comes with the extra dev only. Without it the tests would seem to fail."""
    monkeypatch.setattr(benchmark, "check_device", lambda device: None)
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: pytest.fail("the tests began"))
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="The kernel tests need pytest: run `pip install pytest`"):
        run(monkeypatch, "--device", "cuda", "--output-dir", tmp_path / "new")


def test_an_attention_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ceilings", lambda device: (1.0, 1.0))
    with pytest.raises(InputError, match="--attn-implementation 'foo' cannot be used"):
        run(monkeypatch, "--attn-implementation", "foo", "--output-dir", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_rows_are_added_with_the_count_of_flops(tmp_path, monkeypatch, capsys):
    options = ("--model-config", REPOSITORY / "configs" / "tiny.json", "--sequence-length", 16, "--new-tokens", 2)
    monkeypatch.setattr(benchmark, "ceilings", lambda device: (1.0, 1.0))
    for _ in range(2):
        run(monkeypatch, *options, "--repeats", 1, "--only", "complexity-deep", "--output-dir", tmp_path)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0] == ",".join(FIELDS) and len(lines) == 1 + 2 * 2


def test_quantiles_of_kernels_are_those_that_were_measured(monkeypatch):
    """The timer gives them: they are not taken once more from median and quantiles."""
    pytest.importorskip("triton")
    for name in ("cggr", "dynamics", "dynamics_decode", "qkv", "qkv_decode", "decode_attention", "decode_layer"):
        part = {"cggr": "experts", "decode_attention": "decode", "decode_layer": "decode"}.get(name, "dynamics")
        module = f"complexity_deep.workflow.benchmarks.kernel_cases_{part}"
        entry = {"op": name, "variant": "this", "tokens": 1, "pass": "forward", "ms": 2.0, "low": 1.0, "high": 9.0}
        monkeypatch.setattr(f"{module}.{name}_rows", lambda *args, entry=entry, **options: [entry])
    for row in kernel_speed.benchmark_kernels("cuda"):
        assert (row["p20_ms"], row["median_ms"], row["p80_ms"]) == (1.0, 2.0, 9.0)


def test_tokens_of_changing_lengths_are_those_that_were_timed(monkeypatch):
    """With a model that takes one millisecond a token."""

    def clock(call, repeats, device="cuda", warmup=3):
        return [call() for _ in range(warmup + repeats)][warmup:]

    model = SimpleNamespace(eval=lambda: lambda input_ids, attention_mask: float(input_ids.numel()))
    monkeypatch.setattr(user_paths, "build", lambda *args: model)
    monkeypatch.setattr(user_paths, "zipf_ids", lambda vocab_size, *shape, device: torch.ones(shape))
    monkeypatch.setattr(user_paths, "timed", clock)
    monkeypatch.setattr(user_paths, "host_times", clock)
    config = SimpleNamespace(vocab_size=8, num_hidden_layers=1)
    for row in user_paths.forward_rows("1.5b", "complexity-deep", config, repeats=7):
        assert row["tokens_per_s"] == pytest.approx(1e3), row["case"]


def test_models_divided_among_two_processes(tmp_path):
    """As torchrun starts them: each peer by its own plan, and rows by the first process alone."""
    tiny = json.loads((REPOSITORY / "configs" / "tiny.json").read_text())
    config = tmp_path / "tiny.json"
    # Transformers 5.17 divides the vocabulary only evenly. Half an expert must fit the library's grouped product.
    config.write_text(json.dumps({**tiny, "vocab_size": 256, "intermediate_size": 256}))
    options = ["--device", "cpu", "--model-config", config, "--batch-size", 2, "--sequence-length", 16]
    options += ["--new-tokens", 3, "--repeats", 1, "--tensor-parallel", "--output-dir", tmp_path / "out"]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        2,
        "--master-port",
        0,
        "--standalone",
    ]
    command = [*launcher, REPOSITORY / "scripts" / "benchmark.py", "generate", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("complexity-deep", "qwen3-moe", "llama")
    variants = {f"{name}, tensor parallel 2{cache}" for name in names for cache in ("", ", default cache")}
    assert len(rows) == 6 and {row["variant"] for row in rows} == variants
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)
    assert len(json.loads(run.stdout.splitlines()[-1])["rows"]) == 6
