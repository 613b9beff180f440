"""Two gloo processes of scripts/pretrain.py on the CPU train like one process with the same global batch.

One process with two DataLoader workers and twice the accumulation reads the shares that the two processes read.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.run
import transformers
from accelerate.commands.launch import launch_command, launch_command_parser
from packaging.version import Version
from safetensors.torch import load_file
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.training.tensor_parallel import requested_parallelism, shard
from pretraining import finish, start, write_recipe
from support import REPOSITORY, meeting_place, tiny_model

STEPS = 6
ONE_PROCESS = ["--dataloader-num-workers", 2, "--gradient-accumulation-steps", 4]
# The library renamed it after 5.17.
RENAMED = hasattr(TrainingArguments, "activation_checkpointing")
RECOMPUTE = "--activation-checkpointing" if RENAMED else "--gradient-checkpointing"
# The monitors twice, gradients clipped, and held-out rows that do not fill their last batch.
WATCHED = ["--monitor-steps", 3, "--max-grad-norm", 0.5, "--held-out-rows", 11]
needs_sharded_trainer = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="the Trainer of older transformers takes no model that is sharded when it is loaded",
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    # A small learning rate and a large epsilon, for Adam makes much of the rounding of a gradient close to zero.
    adam = {"learning_rate": 1e-3, "adam_epsilon": 1e-6}
    return write_recipe(folder, {}, max_steps=STEPS, logging_steps=1, save_steps=4, **adam)


@pytest.fixture(scope="module")
def one_process(recipe):
    folder, log = recipe.parent / "one", recipe.parent / "one.log"
    finish(start(log, "--config", recipe, "--output-dir", folder, *ONE_PROCESS), log)
    return folder


def run_on_several(
    recipe: Path, folder: Path, *options: object, processes: int = 2, as_on_gpus: bool = False, **environment: str
) -> list[str]:
    """What each of the processes printed."""
    logs = [folder.with_suffix(f".rank{rank}.log") for rank in range(processes)]
    options = ["--config", recipe, "--output-dir", folder, *options]
    with meeting_place() as meeting:
        shared = environment | meeting | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        started = [
            start(log, *options, environment=shared | {"RANK": rank, "LOCAL_RANK": rank}, as_on_gpus=as_on_gpus)
            for log, rank in zip(logs, map(str, range(processes)))
        ]
        return [finish(process, log) for process, log in zip(started, logs)]


def assert_same_training(folder: Path, reference: Path) -> None:
    logs = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in (folder, reference)]
    for name in ("loss", "grad_norm", "eval_loss"):
        measured, expected = ([entry[name] for entry in log if name in entry] for log in logs)
        assert len(expected) >= 2 and measured == pytest.approx(expected, rel=1e-5), name
    weights, expected = load_file(folder / "model.safetensors"), load_file(reference / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


def forget_the_end(folder: Path) -> bytes:
    """Leave of a finished run what it had at step 4; returns its weights."""
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    return weights


def test_ddp_trains_like_one_process_and_resumes(recipe, one_process, tmp_path):
    folder = tmp_path / "run"
    run_on_several(recipe, folder)
    assert_same_training(folder, one_process)
    if RENAMED:  # transformers 5.17 loads no optimizer onto more than one CPU process
        weights = forget_the_end(folder)
        assert "checkpoint-4" in run_on_several(recipe, folder)[0]
        assert (folder / "model.safetensors").read_bytes() == weights


def test_ddp_with_activation_checkpointing_is_one_process(recipe, one_process, tmp_path):
    run_on_several(recipe, tmp_path / "run", RECOMPUTE, "true")
    assert_same_training(tmp_path / "run", one_process)


def test_other_number_of_processes_is_refused_on_resume(recipe, one_process, tmp_path):
    shutil.copytree(one_process / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    log = tmp_path / "log"
    printed = finish(start(log, "--config", recipe, "--output-dir", tmp_path / "run"), log, exitcode=1)
    assert "was written with processes x dataloader workers = 2, but it is now 1" in printed.splitlines()[-1]


def environment_of(config: str, processes: int, precision: str, sizes: dict[str, int]) -> dict[str, str]:
    """What `accelerate launch` with a shipped config sets for the processes that it would start now by torchrun."""
    words = ["--config_file", str(REPOSITORY / "recipes" / "accelerate" / f"{config}.yaml")]
    words += ["--num_processes", str(processes), "--mixed_precision", precision]
    words += [f"--parallelism_config_{name}_size={size}" for name, size in sizes.items()]
    environment = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed.run, "run", lambda _: environment.update(os.environ))
        launch_command(launch_command_parser().parse_args([*words, "scripts/pretrain.py"]))
    return environment


def launch(
    config: str,
    recipe: Path,
    folder: Path,
    *options: object,
    processes: int = 2,
    sizes: dict[str, int] | None = None,
    precision: str = "no",
    **environment: str,
) -> list[str]:
    """What each process printed, run as `accelerate launch` runs it with a shipped config on GPUs.

    They are forked from a process that has done the imports; see `take_cpu_for_gpus` for what else is not as on GPUs.
    """
    environment = {**environment_of(config, processes, precision, sizes or {}), **environment}
    environment |= {"ACCELERATE_TORCH_DEVICE": "cpu"}
    return run_on_several(
        recipe, folder, "--use-cpu", "false", *options, processes=processes, as_on_gpus=True, **environment
    )


def test_ddp_compiled_layer_by_layer_is_one_process(recipe, one_process, tmp_path):
    options = ["--torch-compile-backend", "aot_eager", "--save-strategy", "no"]
    run_on_several(recipe, tmp_path / "run", *options)
    assert_same_training(tmp_path / "run", one_process)


@pytest.mark.parametrize("name, written", [("fsdp2", "pytorch_model_fsdp.bin"), ("zero2", "latest")])
def test_sharded_training_is_that_of_one_process(recipe, one_process, name, written, tmp_path):
    if name == "zero2":
        pytest.importorskip("deepspeed", reason="needs `pip install deepspeed` and a C++ compiler")
    folder = tmp_path / "run"
    launch(name, recipe, folder, DS_ACCELERATOR="cpu")
    assert (folder / "checkpoint-4" / written).exists(), "it was not DDP that ran"
    assert_same_training(folder, one_process)


def test_fsdp2_gathers_weights_once_a_step(recipe, tmp_path):
    """Not for each of its two batches: two layers and what is around them, in four steps and the last evaluation."""
    printed = launch("fsdp2", recipe, tmp_path / "run", "--max-steps", 4, "--save-strategy", "no")
    assert all(f"weights gathered {3 * (4 + 1)} times" in text for text in printed)


def test_compiled_fsdp2_in_bf16(recipe, one_process, tmp_path):
    """As the recipes train on GPUs: weights are rounded to bf16 for the computation, but not the loss."""
    options = ["--bf16", "true", "--torch-compile-backend", "aot_eager", "--save-strategy", "no"]
    launch("fsdp2", recipe, tmp_path / "run", *options, precision="bf16")
    folders = tmp_path / "run", one_process
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in folders]
    for name in ("loss", "eval_loss"):
        measured, expected = ([entry[name] for entry in log if name in entry] for log in logs)
        assert measured[0] == pytest.approx(expected[0], rel=2**-9), name  # later ones: Adam makes much of rounding
        assert measured[-1] < measured[0]
        # Between 4 and 8 the numbers of bf16 are multiples of 1/32.
        assert min(measured) > 4 and max(measured) < 8 and any(loss * 32 % 1 for loss in measured)


@pytest.fixture(scope="module")
def one_process_with_one_share(recipe):
    """Reads what a single tensor-parallel group reads."""
    folder, log = recipe.parent / "one_share", recipe.parent / "one_share.log"
    finish(start(log, "--config", recipe, "--output-dir", folder, *WATCHED), log)
    return folder


def assert_same_monitors(folder: Path, reference: Path) -> None:
    logs = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in (folder, reference)]
    measured, expected = (
        {name: value for entry in log for name, value in entry.items() if "/" in name or name == "eval_perplexity"}
        for log in logs
    )
    assert any("gradient_norm/" in name for name in expected)
    assert measured == pytest.approx(expected, rel=1e-4)


@needs_sharded_trainer
@pytest.mark.parametrize(
    "options",
    [["--expert-parallel-size", 2], ["--chunked-loss", "false", RECOMPUTE, "true"]],
    ids=["tensor and expert", "plain loss, activation checkpointing"],
)
def test_tensor_parallel_training_is_that_of_one_process(recipe, one_process_with_one_share, options, tmp_path):
    folder = tmp_path / "run"
    launch("tp", recipe, folder, *WATCHED, *options, sizes={"tp": 2, "dp_shard": 1})
    assert_same_training(folder, one_process_with_one_share)
    assert_same_monitors(folder, one_process_with_one_share)


@needs_sharded_trainer
def test_tensor_parallel_training_is_that_of_one_process_and_resumes(recipe, one_process_with_one_share, tmp_path):
    folder = tmp_path / "run"
    launch("tp", recipe, folder, *WATCHED, sizes={"tp": 2, "dp_shard": 1})
    assert_same_training(folder, one_process_with_one_share)
    assert_same_monitors(folder, one_process_with_one_share)
    weights = forget_the_end(folder)
    printed = launch("tp", recipe, folder, *WATCHED, sizes={"tp": 2, "dp_shard": 1})
    assert "checkpoint-4" in printed[0]
    assert (folder / "model.safetensors").read_bytes() == weights

    log = tmp_path / "log"
    printed = finish(start(log, "--config", recipe, "--output-dir", folder), log, exitcode=1)
    assert "tensor x expert parallelism = [2, 1], but it is now [1, 1]" in printed.splitlines()[-1]


@needs_sharded_trainer
@pytest.mark.parametrize(
    "processes, tensor, options",
    [(4, 2, []), (2, 1, ["--expert-parallel-size", 2])],
    ids=["two groups of two", "experts over data-parallel processes"],
)
def test_parallelism_of_both_kinds_is_that_of_one_process(recipe, one_process, processes, tensor, options, tmp_path):
    folder = tmp_path / "run"
    sizes = {"tp": tensor, "dp_shard": 2}
    launch("tp", recipe, folder, *options, processes=processes, sizes=sizes)
    assert_same_training(folder, one_process)


@needs_sharded_trainer
def test_tensor_parallel_training_of_a_dense_llama_is_that_of_one_process(recipe, tmp_path):
    """Its plan has no part that `shard` replaces."""
    shape = {"model_type": "llama", "vocab_size": None, "hidden_size": 64, "intermediate_size": 96}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = tmp_path / "llama.json"
    model.write_text(json.dumps({**shape, "max_position_embeddings": 64}))
    log, options = tmp_path / "log", ["--model-config", model, "--max-grad-norm", 0.5]
    finish(start(log, "--config", recipe, "--output-dir", tmp_path / "one", *options), log)
    launch("tp", recipe, tmp_path / "run", *options, sizes={"tp": 2, "dp_shard": 1})
    assert_same_training(tmp_path / "run", tmp_path / "one")


@pytest.fixture(scope="module")
def recommended(recipe) -> list:
    """Options for the kind of model of the `_best` configs, which has tables and value embeddings in layers."""
    shape = json.loads((recipe.parent / "model.json").read_text())
    best = json.loads((REPOSITORY / "configs" / "30m_best.json").read_text())
    names = ("routing", "routing_per_layer", "use_mu_guidance", "use_dynamics", "use_mu_routing")
    shape |= {name: best[name] for name in names}
    shape |= {"num_experts": 16, "intermediate_size": 256, "shared_expert_intermediate_size": 32}
    shape |= {"value_embedding_layers": [1]}
    path = recipe.parent / "recommended.json"
    path.write_text(json.dumps(shape))
    return ["--model-config", path]


@pytest.fixture(scope="module")
def recommended_alone(recipe, recommended):
    """One process with one share of the text, as processes of one tensor-parallel group have it."""
    folder, log = recipe.parent / "recommended", recipe.parent / "recommended.log"
    finish(start(log, "--config", recipe, "--output-dir", folder, *recommended, *WATCHED), log)
    return folder


@needs_sharded_trainer
@pytest.mark.parametrize("options", [[], ["--expert-parallel-size", 2]], ids=["matrices", "experts"])
def test_tensor_parallel_training_of_the_recommended_kind(recipe, recommended, recommended_alone, options, tmp_path):
    folder = tmp_path / "run"
    launch("tp", recipe, folder, *recommended, *WATCHED, *options, sizes={"tp": 2, "dp_shard": 1})
    assert_same_training(folder, recommended_alone)
    assert_same_monitors(folder, recommended_alone)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_data_parallel_training_of_the_recommended_kind(recipe, recommended, name, tmp_path):
    log, one = tmp_path / "log", tmp_path / "one"
    finish(start(log, "--config", recipe, "--output-dir", one, *recommended, *ONE_PROCESS), log)
    if name == "ddp":
        run_on_several(recipe, tmp_path / "run", *recommended)
    else:
        launch(name, recipe, tmp_path / "run", *recommended)
    assert_same_training(tmp_path / "run", one)


@pytest.mark.parametrize(
    "environment, experts, version, sentence",
    [
        ({"PARALLELISM_CONFIG_CP_SIZE": "2"}, 1, "5.23.0", "Context and sequence parallelism, which"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, 1, "5.17.0", "need transformers 5.23 or newer, and this is 5.17.0"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, 1, "5.23.0", "the library shards the"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "3"}, 1, "5.23.0", "3 x parallelism_config_dp_shard_size 1 must be the number"),
        ({}, 2, "5.23.0", "1 x parallelism_config_dp_shard_size 1 must be the number of processes, which is 2"),
    ],
)
def test_parallelism_that_cannot_be_is_refused(monkeypatch, environment, experts, version, sentence):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # The module that the function sees: importing a processor makes another one of `transformers`.
    monkeypatch.setattr(requested_parallelism.__globals__["transformers"], "__version__", version)
    with pytest.raises(InputError, match=sentence):
        requested_parallelism(2, experts)


@pytest.mark.parametrize(
    "sizes, sentence",
    [
        ({"tp_size": 3}, "num_attention_heads is 4, which 3 processes cannot divide"),
        ({"fsdp_size": 3, "ep_size": 3}, "num_experts is 4, which 3 processes cannot divide"),
    ],
)
@needs_sharded_trainer
def test_a_model_that_cannot_be_divided_is_refused(sizes, sentence):
    with pytest.raises(InputError, match=sentence):
        shard(tiny_model(), DistributedConfig(**sizes), checkpoint=None)
