"""scripts/pretrain.py and its checkpoints, on text of the standard library."""

import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.utils import is_compiled_module
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.packed_rows import PackedCollator, held_out_rows, tokenize
from complexity_deep.workflow.data.text_sources import is_held_out, load_sources
from complexity_deep.workflow.training.atomic_checkpoint import UNFINISHED, damage, last_good_checkpoint, write_manifest
from complexity_deep.workflow.training.new_model import new_model
from complexity_deep.workflow.training.pretraining import PretrainTrainer
from pretraining import ROW, documents_in, finish, small_texts, small_tokenizer, start, write_recipe
from support import run_command, tiny_tokenizer

STEPS = 100  # of the recipe below: two passes over its text and a little more


def test_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, capsys):
    for step in (5, 10, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(1000))
        write_manifest(folder)
        assert damage(folder) is None
    (tmp_path / "checkpoint-100" / "model.safetensors").write_bytes(bytes(999))  # truncated
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(bytes(999) + b"x")  # one byte changed
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    printed = capsys.readouterr().out
    assert "checkpoint-100 is damaged: model.safetensors has 999 bytes instead of 1,000" in printed
    assert "checkpoint-10 is damaged: model.safetensors does not have the bytes" in printed
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """With dropout, so that the random state matters, and a checkpoint every other step."""
    folder = tmp_path_factory.mktemp("recipe")
    saving = {"save_steps": 2, "save_total_limit": 3}
    return write_recipe(folder, {"attention_dropout": 0.1}, max_steps=STEPS, logging_steps=4, **saving)


@pytest.fixture(scope="module")
def uninterrupted(recipe):
    folder, log = recipe.parent / "uninterrupted", recipe.parent / "uninterrupted.log"
    return folder, finish(start(log, "--config", recipe, "--output-dir", folder), log)


def held_out_log(folder: Path) -> list[dict]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "eval_loss" in entry]


def test_the_result_is_ready_for_the_hub(uninterrupted):
    folder, output = uninterrupted
    lines = [line for line in output.splitlines() if "held-out perplexity" in line]
    shown = [line.split("perplexity ")[1].replace(",", "") for line in lines]
    perplexities = [float(line.split(" ± ")[0]) for line in shown]
    entries = held_out_log(folder)
    assert perplexities[-1] == pytest.approx(math.exp(entries[-1]["eval_nll_per_token"]), abs=0.006)
    error = perplexities[-1] * entries[-1]["eval_stderr"]
    assert float(shown[-1].split(" ± ")[1]) == pytest.approx(error, abs=0.006), "one standard error"
    assert perplexities[-1] < 0.8 * perplexities[0], "training helps on held-out text"
    assert {"loss_curve.png", "training_summary.md", "generation_config.json"} <= {p.name for p in folder.iterdir()}
    assert (folder / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id in (0, [0]) and tokenizer.eos_token_id == 0  # a list in 5.17
    generated = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=4, min_new_tokens=4)
    assert generated.shape[1] == len(tokenizer("The")["input_ids"]) + 4


def is_being_written(folder: Path, since: float) -> bool:
    """Whether a checkpoint was begun after `since` and is not complete."""
    try:
        return (folder / UNFINISHED).stat().st_mtime > since
    except FileNotFoundError:
        return False


def kill_at_a_random_moment(process, log: Path, folder: Path, inside_a_write: bool, chance: random.Random) -> bool:
    """kill -9 during a checkpoint write, or some passes after the start, which may be before the first.

    Returns whether a write was cut short.
    """
    passes, since = chance.randrange(8), time.time()
    rows = Path(f"{log}.rows")
    while process.is_alive():
        if inside_a_write:
            if is_being_written(folder, since):
                break
        elif rows.exists() and rows.read_bytes().count(b"\n") >= passes:
            break
        time.sleep(0.0005)
    time.sleep((0.02 if inside_a_write else 0.2) * chance.random())
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"the run was over before it could be killed:\n{log.read_text()}"
    return is_being_written(folder, since)


def recorded_rows(logs: list[Path]) -> list[list[int]]:
    """The rows trained on, in order; passes that a resumed run made once more must have had the same rows."""
    passes = {}
    for log in logs:
        seen = Counter()
        for line in Path(f"{log}.rows").read_text().splitlines():
            try:
                step, rows = json.loads(line)
            except ValueError:  # cut short by the kill
                break
            assert passes.setdefault((step, seen[step]), rows) == rows
            seen[step] += 1
    assert sorted(passes) == [(step, half) for step in range(STEPS) for half in range(2)]
    return [row for key in sorted(passes) for row in passes[key]]


def test_killed_ten_times_the_run_ends_with_the_same_bytes(recipe, uninterrupted):
    """Three of the ten kills hit the writing of a checkpoint. KILL_SEED in the environment chooses other moments."""
    chance = random.Random(os.environ.get("KILL_SEED", "0"))
    inside_a_write = [True] * 3 + [False] * 7
    chance.shuffle(inside_a_write)
    folder = recipe.parent / "killed"
    logs = [recipe.parent / f"killed_{number}.log" for number in range(11)]
    cut_short = 0
    for log, inside in zip(logs, inside_a_write):
        process = start(log, "--config", recipe, "--output-dir", folder)
        cut_short += kill_at_a_random_moment(process, log, folder, inside, chance)
    assert cut_short >= 1, "no kill hit the writing of a checkpoint"
    assert "Resuming from" in finish(start(logs[10], "--config", recipe, "--output-dir", folder), logs[10])
    assert_same_run(folder, uninterrupted[0])

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [{"input_ids": row} for row in recorded_rows(logs)]
    assert rows == [{"input_ids": row} for row in recorded_rows([recipe.parent / "uninterrupted.log"])]
    trained_on = documents_in(rows, tokenizer.eos_token_id)
    expected = sorted(tuple(ids) for ids in tokenize(tokenizer, [t for t in small_texts() if not is_held_out(t, 0.2)]))
    first, second = trained_on[: len(expected)], trained_on[len(expected) : 2 * len(expected)]
    assert sorted(first) == sorted(second) == expected, "every document once in every pass"
    assert first != second, "every pass has an order of its own"


def test_finished_run_given_again_changes_nothing(recipe, uninterrupted, capsys, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder, output = uninterrupted
    before = (folder / "model.safetensors").read_bytes()
    run_command("pretrain", "--config", recipe, "--output-dir", folder)
    assert capsys.readouterr().out.splitlines()[-1] == output.splitlines()[-1]
    assert "single sample" not in caplog.text, "Trainer guesses that the text was too short"
    assert (folder / "model.safetensors").read_bytes() == before
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == STEPS


def test_models_are_compiled_layer_by_layer(recipe, tmp_path, monkeypatch):
    """Also where `accelerate launch` says what it says by default."""
    trainers, train = [], PretrainTrainer.train_and_evaluate
    monkeypatch.setattr(
        PretrainTrainer, "train_and_evaluate", lambda self, *a: trainers.append(self) or train(self, *a)
    )
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "False")
    options = ["--torch-compile-backend", "aot_eager", "--max-steps", 4, "--save-strategy", "no"]
    run_command("pretrain", "--config", recipe, "--output-dir", tmp_path / "run", *options)
    compiled = [x for x in trainers[0].model_wrapped.modules() if is_compiled_module(x)]
    assert trainers[0].model_wrapped not in compiled
    assert {type(x._orig_mod).__name__ for x in compiled} >= {"ComplexityDeepDecoderLayer"}


def assert_same_run(folder: Path, reference: Path) -> None:
    weights, expected = load_file(folder / "model.safetensors"), load_file(reference / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    states = [json.loads((run / f"checkpoint-{STEPS}/data_state_0.json").read_text()) for run in (folder, reference)]
    for state in states:
        for cursor in state["cursors"]:
            # `datasets` resumes from previous_state; where it stood in the stream itself differs after a resume.
            if cursor["source"]:  # none in the first block of a pass
                cursor["source"] = cursor["source"]["examples_iterable"]["examples_iterable"]["previous_state"]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--sources", "nowhere/*.jsonl"], "No file matches the source 'nowhere/*.jsonl'."),
        (["--text-column", "body"], "has no column 'body'; its columns are: text."),
        (["--tokenizer", "nothing"], "There is no tokenizer at 'nothing'"),
        (["--model-config", "nothing.json"], "There is no model config 'nothing.json': name a file such as"),
        (["--model-config", "list.json"], "'list.json' is not a readable JSON model config"),
        (["--model-config", "untyped.json"], "'untyped.json' is no model config, for it has no model_type."),
        (["--tokenizer", "broken"], "There is no tokenizer at 'broken'"),
        (["--model-config", "strict.json"], "'strict.json' is not a model that can be built: Validation error"),
        (["--row-length", "4096"], "row_length 4096 is more than the model's 128 positions."),
        (["--max-steps", "0"], "max_steps is needed"),
        (["--sources", "empty.txt"], "The file 'empty.txt' is empty."),
        (["--sources", "latin.jsonl"], "The source 'latin.jsonl' is not UTF-8 text"),
        (["--chunked-loss", "false", "--z-loss", "1e-4"], "z_loss is a part of the chunked loss"),
        (["--optimiser", "x"], "unrecognized arguments: --optimiser x: did you mean --optimizer?"),
        (["--sorces", "embedded"], "unrecognized arguments: --sorces embedded: did you mean --sources?"),
        (["--max-steps", "many"], "--max-steps"),
        (["--z-loss", "1e-4", "--label-smoothing-factor", "0.1"], "z_loss and label_smoothing_factor"),
        (["--per-device-train-batch-size", "0"], "per_device_train_batch_size must be at least 1, but is 0."),
        (["--gradient-accumulation-steps", "0"], "gradient_accumulation_steps must be at least 1, but is 0."),
        (["--held-out-fraction", "2"], "held_out_fraction is a share and must be from 0 to 1, but is 2.0."),
        (["--sources", "null.jsonl"], "The column 'text' of the source 'null.jsonl' holds no text in any row."),
        (["--sources", "number.jsonl"], "'number.jsonl' has 3 in it (int), so it does not hold text."),
        (["--report-to", "wandb"], "--report-to wandb cannot be used"),
        (["--push-to-hub"], "--push-to-hub does not reach the Hub"),
        (["--optimizer", "adam"], "optimizer can be muon, but is 'adam': others are named by optim."),
        (["--optimizer", "muon", "--optim", "adafactor"], "optimizer muon and optim do not go together"),
        (["--optimizer", "muon", "--optim-args", "a=1"], "optimizer muon and optim_args do not go together"),
        (["--optimizer", "muon", "--expert-parallel-size", "2"], "Muon needs whole matrices on every process"),
        (["--auto-find-batch-size", "true"], "auto_find_batch_size would change the rows of a step"),
        (["--resume-from-checkpoint", "run/checkpoint-2"], "resume_from_checkpoint is not taken"),
        (["--output-dir", "empty.txt"], "'empty.txt' cannot be a folder, for "),
        (["--output-dir", "empty.txt/run"], "is a file: name another."),
        (["--output-dir", "/proc/run"], "--output-dir '/proc/run' cannot be written ("),
        (["--output-dir", "tokenizer"], "holds 'tokenizer.json', which no run of this script wrote"),
    ],
)
def test_bad_input_gives_one_sentence(recipe, options, sentence, monkeypatch, capsys):
    monkeypatch.chdir(recipe.parent)
    Path("empty.txt").touch()
    Path("broken").mkdir(exist_ok=True)
    Path("broken/tokenizer.json").write_text("{}")
    Path("strict.json").write_text('{"model_type": "complexity-deep", "hidden_size": "64"}')
    Path("list.json").write_text("[1]")
    Path("untyped.json").write_text("{}")
    Path("latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    Path("null.jsonl").write_text('{"text": null}\n' * 3)
    Path("number.jsonl").write_text('{"text": "one"}\n{"text": 3}\n')
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(SystemExit) as stop:
        run_command("pretrain", "--config", recipe, "--output-dir", recipe.parent / "bad", *options)
    printed = capsys.readouterr().err
    (line,) = (stop.value.code if isinstance(stop.value.code, str) else printed).splitlines()  # without the usage
    assert sentence in line and line.startswith("pretrain.py: error: ")
    assert not (recipe.parent / "bad").exists()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--optim", "adamw_bnb_8bit"], "install `bitsandbytes`"),
        (["--learning-rate", "-1"], "Invalid learning rate: -1.0"),
        (["--lr-scheduler-type", "warmup_stable_decay"], "num_decay_steps"),
        (["--use-liger-kernel", "true"], "install liger-kernel"),
        (["--learning-rate", "1e30", "--logging-steps", "9"], "The loss is nan by step 2: start again"),
        (["--learning-rate", "1e30", "--max-steps", "1"], "The held-out loss is nan by step 1: start again"),
    ],
)
def test_what_shows_when_training_begins_is_one_sentence(recipe, tmp_path, options, sentence):
    changed = ["--output-dir", tmp_path, "--max-steps", 2, "--save-strategy", "no", *options]
    with pytest.raises(SystemExit) as stop:
        run_command("pretrain", "--config", recipe, *changed)
    assert sentence in stop.value.code and len(stop.value.code.splitlines()) == 1
    assert not (tmp_path / "training_summary.md").exists()


@pytest.mark.parametrize(
    "content, sentence",
    [
        (
            {"learning_rat": 0.1},
            "error: the recipe has an unknown option 'learning_rat': did you mean --learning-rate?",
        ),
        ({"colour": "red"}, "error: the recipe has an unknown option 'colour'"),
        ([1], "YAML mapping"),
    ],
)
def test_unusable_recipe(recipe, content, sentence, capsys):
    path = recipe.with_name("typo.yaml")
    path.write_text(json.dumps({**json.loads(recipe.read_text()), **content} if isinstance(content, dict) else content))
    with pytest.raises(SystemExit) as stop:
        run_command("pretrain", "--config", path)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("given", (["--config", "recipes/none.yaml"], ["--config", "configs"], ["--config"]))
def test_a_recipe_that_is_no_file_is_one_sentence(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_command("pretrain", *given)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.endswith("is no file: name a recipe, such as recipes/demo.yaml.")


@pytest.mark.parametrize("given", (["--config", "recipes/demo.yaml"], ["--config=recipes/demo.yaml"]))
def test_recipes_and_configs_of_the_package_are_found_from_any_folder(given, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"of 'configs/demo.json' is 4,096 and the tokenizer has 300 tokens"):
        run_command("pretrain", *given, "--tokenizer", recipe.parent / "tokenizer", "--output-dir", tmp_path / "run")
    Path("configs").mkdir()
    Path("configs/demo.json").write_text("[1]")  # what lies here comes first
    with pytest.raises(SystemExit, match=r"'configs/demo.json' is not a readable JSON model config"):
        run_command("pretrain", *given, "--tokenizer", recipe.parent / "tokenizer", "--output-dir", tmp_path / "run")


@pytest.mark.parametrize("vocab_size, fits", [(None, True), (300, True), (320, True), (299, False), (1000, False)])
def test_vocabulary_of_model_and_tokenizer(recipe, vocab_size, fits):

    path = recipe.with_name("vocabulary.json")
    path.write_text(json.dumps({**json.loads((recipe.parent / "model.json").read_text()), "vocab_size": vocab_size}))
    if not fits:
        with pytest.raises(InputError, match="set vocab_size to null"):
            new_model(str(path), small_tokenizer(), "sdpa")
        return
    model = new_model(str(path), small_tokenizer(), "sdpa")
    assert model.config.vocab_size == (vocab_size or 300)
    assert (model.config.eos_token_id, model.config.pad_token_id, model.config.bos_token_id) == (0, 1, 2)


def test_a_tokenizer_that_leaves_numbers_out(recipe, tmp_path):
    """Its highest id counts, and not how many tokens it has."""
    tokenizer = tiny_tokenizer(60)
    backend = Tokenizer(models.WordLevel({f"w{index}": 2 * index for index in range(60)}, unk_token="w3"))
    backend.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    named = {"unk_token": "w3", "eos_token": "w0", "pad_token": "w1"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(tmp_path / "tokenizer")
    text = tmp_path / "text.jsonl"
    lines = [" ".join(f"w{number % 60}" for number in range(start, start + 90)) for start in range(40)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    options = ["--tokenizer", tmp_path / "tokenizer", "--sources", text, "--routing", "balanced", "--max-steps", 2]
    run_command("pretrain", "--config", recipe, *options, "--output-dir", tmp_path / "run")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.vocab_size == 119
    options = ["--text", text, "--max-tokens", 256, "--device", "cpu", "--output-dir", tmp_path / "analysis"]
    run_command("analyze", tmp_path / "run", *options)


def test_changed_data_options_are_refused_on_resume(recipe, uninterrupted):
    with pytest.raises(SystemExit, match="shuffle_buffer = 7, but it is now 8"):
        run_command("pretrain", "--config", recipe, "--output-dir", uninterrupted[0], "--shuffle-buffer", 8)


OTHER_RUNS = {
    "rows per step": (["--per-device-train-batch-size", 8], {}, "rows per step = 8, but it is now 16"),
    "longer, with a schedule over all steps": (["--max-steps", 200], {}, "max_steps = 100, but it is now 200"),
    "learning rate": (["--learning-rate", 0.02], {}, "learning_rate = 0.01, but it is now 0.02"),
    "schedule": (["--lr-scheduler-type", "cosine"], {}, "lr_scheduler_type = linear, but it is now cosine"),
    "warm-up": (["--warmup-steps", 5], {}, r"warmup_steps = .*, but it is now 5"),
    "optimizer": (["--optim", "adafactor"], {}, "optim = adamw_torch.*, but it is now adafactor"),
    "Muon": (["--optimizer", "muon"], {}, "optimizer = None, but it is now muon"),
    "decay": (["--weight-decay", 0.3], {}, "weight_decay = 0.0, but it is now 0.3"),
    "smoothing": (["--label-smoothing-factor", 0.1], {}, "label_smoothing_factor = 0.*, but it is now 0.1"),
    "seed": (["--seed", 7], {}, "seed = 0, but it is now 7|seed = 42, but it is now 7"),
    "documents that see each other": (["--mask-across-documents", "false"], {}, "mask_across_documents = True"),
    "as many weights": ([], {"num_attention_heads": 8}, "num_attention_heads = 4, but it is now 8"),
    "step size": ([], {"dynamics_dt": 0.2}, "dynamics_dt = 0.1, but it is now 0.2"),
    "norm": ([], {"use_qk_norm": False}, "use_qk_norm = True, but it is now False"),
    "router": ([], {"mu_router_base_logit": 5.0}, "mu_router_base_logit = 10.0, but it is now 5.0"),
    "other shapes": ([], {"hidden_size": 128}, "hidden_size = 64, but it is now 128"),
    "more layers": ([], {"num_hidden_layers": 3}, "num_hidden_layers = 2, but it is now 3"),
    "another architecture": ([], {"model_type": "llama"}, "model_type = complexity-deep, but it is now llama"),
}


def as_before_this_check(checkpoint: Path) -> None:
    """The settings that checkpoints held when nothing but the data was compared."""
    path = checkpoint / "data_state_0.json"
    state = json.loads(path.read_text())
    kept = ("sources", "source_weights", "routing", "tensor x expert parallelism", "row_length", "shuffle_buffer")
    kept += ("seed", "held_out_fraction", "processes x dataloader workers", "tokenizer")
    state["settings"] = {name: state["settings"][name] for name in kept}
    path.write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)


def run_with_shape(recipe: Path, folder: Path, shape: dict, *options: object) -> None:
    path = folder / "other_model.json"
    path.write_text(json.dumps({**json.loads((recipe.parent / "model.json").read_text()), **shape}))
    run_command("pretrain", "--config", recipe, "--output-dir", folder / "run", "--model-config", path, *options)


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_another_run_is_refused_on_resume(recipe, uninterrupted, tmp_path, name):
    options, shape, sentence = OTHER_RUNS[name]
    checkpoint = f"checkpoint-{STEPS - 2}"
    shutil.copytree(uninterrupted[0] / checkpoint, tmp_path / "run" / checkpoint)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=sentence) as stop:
        run_with_shape(recipe, tmp_path, shape, *options)
    assert len(stop.value.code.splitlines()) == 1
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_begun_before_the_check_goes_on(recipe, uninterrupted, tmp_path):
    checkpoint = tmp_path / "run" / f"checkpoint-{STEPS - 2}"
    shutil.copytree(uninterrupted[0] / checkpoint.name, checkpoint)
    as_before_this_check(checkpoint)
    for name in ("rows per step", "longer, with a schedule over all steps", "Muon", "step size", "other shapes"):
        options, shape, _ = OTHER_RUNS[name]
        with pytest.raises(SystemExit, match="would be another run"):
            run_with_shape(recipe, tmp_path, shape, *options)
    run_with_shape(recipe, tmp_path, {})
    assert_same_run(tmp_path / "run", uninterrupted[0])


def test_a_run_with_muon_goes_on_bit_by_bit(recipe, tmp_path):
    options = ("--config", recipe, "--optimizer", "muon", "--max-steps", 4, "--weight-decay", 0.1, "--save-steps", 2)
    run_command("pretrain", *options, "--output-dir", tmp_path / "whole")
    entries = held_out_log(tmp_path / "whole")
    assert entries[-1]["eval_loss"] < entries[0]["eval_loss"] - 0.5
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    with pytest.raises(SystemExit, match="optimizer = muon, but it is now None"):
        run_command("pretrain", "--config", recipe, "--max-steps", 4, "--output-dir", tmp_path / "resumed")
    run_command("pretrain", *options, "--output-dir", tmp_path / "resumed")
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("resumed", "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    state = torch.load(tmp_path / "resumed" / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    assert {"momentum_buffer", "exp_avg"} == {
        next(k for k in s if k in ("momentum_buffer", "exp_avg")) for s in state.values()
    }
    summary = json.loads((tmp_path / "resumed" / "training_summary.json").read_text())
    assert summary["options"]["optimizer"] == "muon"


def test_tokens_are_those_that_were_trained(recipe, tmp_path):
    """The two commands of the report: twice the tokens in rows twice as many are as many steps."""
    common = (
        "--config",
        recipe,
        "--output-dir",
        tmp_path / "run",
        "--max-steps",
        0,
        "--gradient-accumulation-steps",
        1,
    )
    common += ("--per-device-train-batch-size", 2, "--lr-scheduler-type", "constant_with_warmup", "--warmup-steps", 2)
    run_command("pretrain", *common, "--max-tokens", 6 * 2 * ROW)
    summary = tmp_path / "run" / "training_summary.json"
    assert json.loads(summary.read_text())["tokens"] == 6 * 2 * ROW
    with pytest.raises(SystemExit, match="rows per step = 2, but it is now 4"):
        run_command("pretrain", *common, "--max-tokens", 12 * 2 * ROW, "--per-device-train-batch-size", 4)
    assert json.loads(summary.read_text())["tokens"] == 6 * 2 * ROW
    # a schedule that does not span all steps lets a run go on
    run_command("pretrain", *common, "--max-tokens", 12 * 2 * ROW)
    report = json.loads(summary.read_text())
    assert (report["tokens"], report["steps"]) == (12 * 2 * ROW, 12)
    whole = tmp_path / "whole"
    run_command("pretrain", *common, "--max-tokens", 12 * 2 * ROW, "--output-dir", whole)
    weights, expected = load_file(tmp_path / "run" / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected), (
        "as if it had been as long from the start"
    )
    with pytest.raises(SystemExit, match="is at step 12 already, and max_steps is 6"):
        run_command("pretrain", *common, "--max-tokens", 6 * 2 * ROW)


def test_checkpoints_without_optimizer_are_not_resumed(recipe, tmp_path, capsys):
    options = ("--config", recipe, "--output-dir", tmp_path / "run", "--max-steps", 4, "--save-only-model", "true")
    run_command("pretrain", *options)
    assert "this run cannot be resumed" in capsys.readouterr().out
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match=r"checkpoint-4 holds no state of the optimizer \(save_only_model\)"):
        run_command("pretrain", *options)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("model_type", ["complexity-deep", "llama", "mixtral"])
@pytest.mark.parametrize("options", [(), ("--chunked-loss", "false")], ids=["chunked", "plain"])
def test_perplexity_is_that_of_the_plain_cross_entropy(recipe, tmp_path, model_type, options):
    """Though the training loss has smoothed labels, and Mixtral's its router's loss besides."""
    shape = {"model_type": model_type}
    if model_type == "mixtral":
        shape |= {"num_local_experts": 2, "output_router_logits": True, "router_aux_loss_coef": 7.0}
        if not options:
            with pytest.raises(SystemExit, match="set chunked_loss to false"):
                run_with_shape(recipe, tmp_path, shape, "--max-steps", 2)
            return
    smoothing = ("--label-smoothing-factor", 0.1, "--max-steps", 2)
    run_with_shape(recipe, tmp_path, shape, *smoothing, *options)
    folder = tmp_path / "run"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = held_out_rows(load_sources([f"{recipe.parent}/text/*.jsonl"]), tokenizer, ROW, rows=8, fraction=0.2)
    sums, counts = [], []
    for row in rows.to_list():
        batch = PackedCollator(True)([row])
        with torch.no_grad():
            log_probs = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        labels = batch["labels"][0, 1:]
        nll = torch.nn.functional.cross_entropy(log_probs[0, :-1], labels, reduction="none")
        sums.append(nll.sum().item())
        counts.append(int((labels != -100).sum()))
    mean = sum(sums) / sum(counts)
    last = json.loads((folder / "training_summary.json").read_text())["held_out"][-1]
    assert last["loss"] == pytest.approx(mean, rel=1e-4)
    assert last["perplexity"] == pytest.approx(math.exp(mean), rel=1e-3)
    assert last["perplexity_stderr"] == pytest.approx(last["perplexity"] * last["loss_stderr"])
    assert abs(held_out_log(folder)[-1]["eval_loss"] - mean) > 1e-3, "the training loss is another"
    assert f"| {last['loss']:.4f} ± {last['loss_stderr']:.4f} |" in (folder / "training_summary.md").read_text()


def test_the_best_model_is_the_one_of_the_lowest_perplexity(recipe, tmp_path):
    options = ["--max-steps", 6, "--learning-rate", 0.3, "--metric-for-best-model", "perplexity"]
    options += ["--load-best-model-at-end", "true", "--eval-strategy", "steps", "--eval-steps", 2]
    run_command("pretrain", "--config", recipe, "--output-dir", tmp_path, *options, "--eval-do-concat-batches", "false")
    entries = held_out_log(tmp_path)
    assert entries[-1]["eval_perplexity"] == min(entry["eval_perplexity"] for entry in entries if entry["step"])
    assert len({entry["eval_perplexity"] for entry in entries}) > 2


def test_a_checkpoint_asked_for_within_a_step_is_of_a_whole_step(recipe, tmp_path, monkeypatch):
    """SIGTERM with `enable_jit_checkpoint`: rows that were drawn and not yet learned from come again."""
    options, plain = ["--config", recipe, "--max-steps", 6], PretrainTrainer.training_step
    run_command("pretrain", *options, "--output-dir", tmp_path / "whole")

    def asked_in_the_third_step(trainer, *arguments, **options):
        if trainer.state.global_step == 2:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, JITCheckpointCallback):
                    callback.jit_manager.is_checkpoint_requested = True
        return plain(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "training_step", asked_in_the_third_step)
        jit = ["--save-strategy", "no", "--enable-jit-checkpoint", "true"]
        run_command("pretrain", *options, *jit, "--output-dir", tmp_path / "stopped")
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-3"]
    run_command("pretrain", *options, "--output-dir", tmp_path / "stopped")
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_no_held_out_row_is_left_out(recipe, tmp_path):
    """`dataloader_drop_last` is for training, and the labels have the name that the collator gives them."""
    losses = []
    for name, options in {"plain": [], "other": ["--dataloader-drop-last", "true", "--label-names", "targets"]}.items():
        changed = ["--output-dir", tmp_path / name, "--max-steps", 1, "--per-device-eval-batch-size", 3, *options]
        run_command("pretrain", "--config", recipe, *changed)
        losses.append([entry["eval_loss"] for entry in held_out_log(tmp_path / name)])
    assert losses[0] == losses[1]


def test_ctrl_c_is_one_line_and_leaves_whole_checkpoints(recipe, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    process = start(log, "--config", recipe, "--output-dir", folder, "--max-steps", 5000)
    while process.is_alive() and not (folder / "checkpoint-4").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    printed = finish(process, log, exitcode=130)
    assert "pretrain.py: stopped by Ctrl-C; every file that is there is whole" in printed.splitlines()
    assert "Traceback" not in printed and not (folder / UNFINISHED).exists()
    checkpoints = list(folder.glob("checkpoint-*"))
    assert checkpoints and all(damage(checkpoint) is None for checkpoint in checkpoints)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 5 MB, which takes two checkpoints, and what makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_disk_full_while_a_checkpoint_is_written(recipe, uninterrupted, small_disk, tmp_path):
    """One sentence, the checkpoints before stay as they are, and with more room the same command goes on from there."""
    disk, enlarge = small_disk
    folder, log = disk / "run", tmp_path / "log"
    printed = finish(start(log, "--config", recipe, "--output-dir", folder), log, exitcode=1)
    last_line = printed.splitlines()[-1]
    assert "pretrain.py: error: checkpoint-6 could not be written" in last_line and "Traceback" not in printed
    assert "checkpoint-4 is intact. Make room and give the same command again." in last_line
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert damage(folder / "checkpoint-4") is None
    enlarge()
    assert "checkpoint-4" in finish(start(log, "--config", recipe, "--output-dir", folder), log)
    assert_same_run(folder, uninterrupted[0])


def test_file_too_large_for_the_disk(recipe, uninterrupted, tmp_path):
    """Where no tmpfs may be mounted, a limit on the size of files stands for the full disk."""
    folder, log, last = tmp_path / "run", tmp_path / "log", f"checkpoint-{STEPS - 2}"
    shutil.copytree(uninterrupted[0] / last, folder / last)
    limit = (folder / last / "model.safetensors").stat().st_size + 100_000  # the optimizer's file is larger
    process = start(log, "--config", recipe, "--output-dir", folder, file_limit=limit)
    last_line = finish(process, log, exitcode=1).splitlines()[-1]
    assert f"checkpoint-{STEPS} could not be written" in last_line and f"{last} is intact" in last_line
    assert [path.name for path in folder.iterdir()] == [last]
    assert damage(folder / last) is None


@pytest.mark.parametrize("workers", [0, 2])
def test_text_that_turns_out_bad_during_training(recipe, workers, capsys):
    """The first file is long enough to start with; the second one is not UTF-8."""
    folder = recipe.parent / f"late_{workers}"
    folder.mkdir()
    shutil.copy(recipe.parent / "text" / "0.jsonl", folder / "0.jsonl")
    (folder / "1.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    options = ["--sources", f"{folder}/*.jsonl", "--held-out-rows", 1, "--dataloader-num-workers", workers]
    with pytest.raises(SystemExit) as stop:
        run_command("pretrain", "--config", recipe, "--output-dir", folder / "run", *options)
    assert "not UTF-8 text" in stop.value.code and len(stop.value.code.splitlines()) == 1
