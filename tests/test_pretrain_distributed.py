"""Two gloo processes of scripts/pretrain.py on the CPU train like one process with the same global batch.

One process with two DataLoader workers and twice the accumulation reads the shares that the two processes read.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretraining import ROOT, finish, start, write_recipe
from safetensors.torch import load_file
from transformers import TrainingArguments

STEPS = 6
ONE_PROCESS = ["--dataloader-num-workers", 2, "--gradient-accumulation-steps", 4]
# The library renamed it after 5.17.
RENAMED = hasattr(TrainingArguments, "activation_checkpointing")
RECOMPUTE = "--activation-checkpointing" if RENAMED else "--gradient-checkpointing"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    # A small learning rate, for Adam makes much of the rounding of a gradient close to zero.
    return write_recipe(folder, {}, max_steps=STEPS, learning_rate=1e-3, logging_steps=1, save_steps=4)


@pytest.fixture(scope="module")
def one_process(recipe):
    folder, log = recipe.parent / "one", recipe.parent / "one.log"
    finish(start(log, "--config", recipe, "--output-dir", folder, *ONE_PROCESS), log)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_on_two(recipe: Path, folder: Path, *options: object) -> list[str]:
    """What each of the two processes printed."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [folder.with_suffix(f".rank{rank}.log") for rank in range(2)]
    options = ["--config", recipe, "--output-dir", folder, *options]
    processes = [
        start(log, *options, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, log in enumerate(logs)
    ]
    return [finish(process, log) for process, log in zip(processes, logs)]


def assert_same_training(folder: Path, reference: Path) -> None:
    logs = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in (folder, reference)]
    for name in ("loss", "grad_norm", "eval_loss"):
        measured, expected = ([entry[name] for entry in log if name in entry] for log in logs)
        assert len(expected) >= 2 and measured == pytest.approx(expected, rel=1e-5), name
    weights, expected = load_file(folder / "model.safetensors"), load_file(reference / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [[], [RECOMPUTE, "true"]], ids=["DDP", "DDP with activation checkpointing"])
def test_ddp_trains_like_one_process(recipe, one_process, options, tmp_path):
    run_on_two(recipe, tmp_path / "run", *options)
    assert_same_training(tmp_path / "run", one_process)


@pytest.mark.skipif(not RENAMED, reason="transformers 5.17 loads no optimizer onto more than one CPU process")
def test_ddp_resumes(recipe, one_process, tmp_path):
    folder = tmp_path / "run"
    run_on_two(recipe, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    assert "checkpoint-4" in run_on_two(recipe, folder)[0]
    assert (folder / "model.safetensors").read_bytes() == weights


def test_other_number_of_processes_is_refused_on_resume(recipe, one_process, tmp_path):
    shutil.copytree(one_process / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    log = tmp_path / "log"
    printed = finish(start(log, "--config", recipe, "--output-dir", tmp_path / "run"), log, exitcode=1)
    assert "was written with processes x dataloader workers = 2, but it is now 1" in printed.splitlines()[-1]


def launch(
    config: str, recipe: Path, folder: Path, *options: str, precision: str = "no", **environment: str
) -> subprocess.CompletedProcess:
    """By accelerate and a shipped config, as on GPUs; see accelerated_on_cpu.py for the one thing that is not."""
    path = str(ROOT / "recipes" / "accelerate" / f"{config}.yaml")
    environment = {**os.environ, **environment, "ACCELERATE_TORCH_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path]
    command += ["--mixed_precision", precision, "--num_processes", "2", "--main_process_port", str(free_port())]
    command += [str(ROOT / "tests" / "accelerated_on_cpu.py"), "--config", str(recipe), "--output-dir", str(folder)]
    return subprocess.run([*command, "--use-cpu", "false", *options], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name, written", [("fsdp2", "pytorch_model_fsdp.bin"), ("zero2", "latest")])
def test_sharded_training_is_that_of_one_process(recipe, one_process, name, written, tmp_path):
    if name == "zero2":
        pytest.importorskip("deepspeed", reason="needs `pip install deepspeed` and a C++ compiler")
    folder = tmp_path / "run"
    process = launch(name, recipe, folder, DS_ACCELERATOR="cpu")
    assert process.returncode == 0, process.stderr
    assert (folder / "checkpoint-4" / written).exists(), "it was not DDP that ran"
    assert_same_training(folder, one_process)


def test_compiled_fsdp2_in_bf16(recipe, one_process, tmp_path):
    """As the recipes train on GPUs: weights are rounded to bf16 for the computation, but not the loss."""
    options = ["--bf16", "true", "--torch-compile-backend", "aot_eager", "--save-strategy", "no"]
    process = launch("fsdp2", recipe, tmp_path / "run", *options, precision="bf16")
    assert process.returncode == 0, process.stderr
    folders = tmp_path / "run", one_process
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in folders]
    for name in ("loss", "eval_loss"):
        measured, expected = ([entry[name] for entry in log if name in entry] for log in logs)
        assert measured[0] == pytest.approx(expected[0], rel=2**-9), name  # later ones: Adam makes much of rounding
        assert measured[-1] < measured[0]
        # Between 4 and 8 the numbers of bf16 are multiples of 1/32.
        assert min(measured) > 4 and max(measured) < 8 and any(loss * 32 % 1 for loss in measured)


def test_parallelism_within_a_row_is_refused(recipe, tmp_path):
    parallelism = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}
    process = launch("ddp", recipe, tmp_path, **parallelism)
    assert process.returncode != 0
    assert "error: Processes that share a row (tensor" in process.stderr, process.stderr
