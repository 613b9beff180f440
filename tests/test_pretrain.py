"""Packing, the resumable stream, checkpoints and the script itself, on text of the standard library."""

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from atomic_checkpoint import damage, last_good_checkpoint, write_manifest  # noqa: E402
from packed_dataset import PackedCollator, PackedDocuments, ResumableLoader, held_out_rows, tokenize  # noqa: E402
from text_sources import InputError, embedded_documents, is_held_out, load_sources, read_documents  # noqa: E402
from train_tokenizer import train  # noqa: E402

ROW = 48


@pytest.fixture(scope="module")
def texts():
    return [text[:600] for text in islice(embedded_documents(), 60)]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train(iter(texts), vocab_size=300, model_max_length=ROW)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts):
    """The texts in three jsonl files, as a folder to read with a pattern."""
    folder = tmp_path_factory.mktemp("corpus")
    for shard in range(3):
        lines = [json.dumps({"text": text}) for text in texts[shard::3]]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def packed(stream, tokenizer, **options) -> PackedDocuments:
    options = {"shuffle_buffer": 7, "seed": 0, "held_out_fraction": 0.0, **options}
    return PackedDocuments(stream, tokenizer, ROW, **options)


def rows_of_one_pass(dataset: PackedDocuments) -> list[dict]:
    """Rows up to and including the one in which the second pass begins."""
    rows = []
    for row in dataset:
        rows.append(row)
        if row["cursor"]["epoch"] == 1:
            return rows


def documents_in(rows: list[dict], eos: int) -> list[tuple]:
    """The whole documents of consecutive rows."""
    flat = [token for row in rows for token in row["input_ids"]]
    ends = [index + 1 for index, token in enumerate(flat) if token == eos]
    return [tuple(flat[start:end]) for start, end in zip([0, *ends], ends)]


def test_packing_loses_no_token_and_positions_restart(corpus, texts, tokenizer):
    dataset = packed(load_sources([f"{corpus}/*.jsonl"]), tokenizer)
    rows = rows_of_one_pass(dataset)
    first_pass = documents_in(rows, tokenizer.eos_token_id)[: len(texts)]
    assert sorted(first_pass) == sorted(tuple(ids) for ids in tokenize(tokenizer, texts))
    assert first_pass != [tuple(ids) for ids in tokenize(tokenizer, texts)], "documents are shuffled"
    for row in rows:
        assert len(row["input_ids"]) == ROW
        expected, position = [], 0
        for token in row["input_ids"]:
            expected.append(position)
            position = 0 if token == tokenizer.eos_token_id else position + 1
        assert row["position_ids"] == expected


def test_text_that_looks_like_a_special_token_is_text(tokenizer):
    ids = tokenize(tokenizer, ["a<|endoftext|>b<|im_start|>"])[0]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in ids


@pytest.mark.parametrize("model_type", ["complexity-deep", "llama"])
def test_packed_row_trains_like_its_documents_apart(model_type, tokenizer):
    """Mean loss over a packed row = token-weighted mean over its documents, each alone."""
    import complexity_deep  # noqa: F401  (registers the architecture)

    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(model_type, vocab_size=300, hidden_size=32, intermediate_size=64, **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    documents = [torch.randint(16, 300, (length,)).tolist() for length in (20, 3, 25)]
    row = {
        "input_ids": [token for document in documents for token in document],
        "position_ids": [position for document in documents for position in range(len(document))],
    }
    together = model(**PackedCollator(mask_across_documents=True)([row])).loss
    losses = []
    for document in documents:
        alone = torch.tensor([document])
        losses.append(model(input_ids=alone, labels=alone).loss * (len(document) - 1))
    torch.testing.assert_close(together, sum(losses) / sum(len(d) - 1 for d in documents), atol=1e-5, rtol=1e-5)
    concatenated = model(**PackedCollator(mask_across_documents=False)([row])).loss
    assert abs(concatenated - together) > 1e-4


@pytest.mark.parametrize(
    "files, weights", [(["*"], None), (["0", "[12]"], None), (["0", "[12]"], [0.3, 0.7])], ids=["one", "two", "mixture"]
)
def test_resumed_stream_continues_at_the_next_row(corpus, tokenizer, files, weights):
    """Stopped after any row, also in the second pass, a new stream with the saved cursors gives what follows."""
    sources = [f"{corpus}/{name}.jsonl" for name in files]
    whole = list(islice(packed(load_sources(sources, weights), tokenizer), 700))
    assert whole[-1]["cursor"]["epoch"] >= 1
    for stop in (1, 2, 37, 311, 600):
        resumed = packed(load_sources(sources, weights), tokenizer)
        resumed.cursors = json.loads(json.dumps([whole[stop - 1]["cursor"]]))
        for row, expected in zip(islice(resumed, 40), whole[stop : stop + 40], strict=True):
            assert row == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_state_follows_the_batches_handed_out(corpus, tokenizer, workers):
    def loader(cursors=None):
        dataset = packed(load_sources([f"{corpus}/*.jsonl"]), tokenizer, workers=max(1, workers))
        if cursors:
            dataset.cursors = cursors
        return ResumableLoader(dataset, batch_size=3, collate_fn=PackedCollator(True), num_workers=workers)

    whole = [batch["input_ids"] for batch in islice(loader(), 17)]
    first = loader()
    for _ in islice(first, 7):  # an odd number, so that the workers' turns are interrupted in the middle
        pass
    cursors = json.loads(json.dumps(first.dataset.cursors))
    rest = [batch["input_ids"] for batch in islice(loader(cursors), 10)]
    assert all(torch.equal(batch, expected) for batch, expected in zip(rest, whole[7:], strict=True))


@pytest.mark.parametrize("world_size, workers", [(2, 1), (2, 2), (3, 1)])  # 3 files: shared by document, or by file
def test_ranks_and_workers_read_disjoint_shares_that_cover_everything(corpus, texts, tokenizer, world_size, workers):
    seen = []
    for rank in range(world_size):
        dataset = packed(
            load_sources([f"{corpus}/*.jsonl"]), tokenizer, rank=rank, world_size=world_size, workers=workers
        )
        for cursor in dataset.cursors:
            share = [ids for place, ids in iter_first_pass(dataset, cursor)]
            assert share
            seen += [tuple(ids) for ids in share]
    assert sorted(seen) == sorted(tuple(ids) for ids in tokenize(tokenizer, texts))


def iter_first_pass(dataset: PackedDocuments, cursor: dict):
    for place, ids in dataset._documents(cursor):
        if place["epoch"] > 0:
            return
        yield place, ids


def test_held_out_documents_are_disjoint_from_training(corpus, texts, tokenizer):
    stream = load_sources([f"{corpus}/*.jsonl"])
    kept_out = [text for text in texts if is_held_out(text, 0.3)]
    assert 5 < len(kept_out) < 35
    training = packed(stream, tokenizer, held_out_fraction=0.3)
    trained_on = {tuple(ids) for _, ids in iter_first_pass(training, training.cursors[0])}
    assert trained_on == {tuple(ids) for ids in tokenize(tokenizer, [t for t in texts if t not in kept_out])}
    validation = held_out_rows(stream, tokenizer, ROW, rows=5, fraction=0.3)
    assert len(validation) == 5
    in_order = [ids for text in read_documents(stream) if text in kept_out for ids in tokenize(tokenizer, [text])[0]]
    assert [token for row in validation["input_ids"] for token in row] == in_order[: 5 * ROW]


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
def recipe(tmp_path_factory, corpus, tokenizer):
    """A recipe of a few seconds, with dropout so that the random state matters."""
    folder = tmp_path_factory.mktemp("recipe")
    tokenizer.save_pretrained(folder / "tokenizer")
    shape = json.loads((ROOT / "configs" / "tiny.json").read_text())
    shape.update(vocab_size=None, num_hidden_layers=2, attention_dropout=0.1)
    (folder / "model.json").write_text(json.dumps(shape))
    options = {
        "model_config": str(folder / "model.json"),
        "tokenizer": str(folder / "tokenizer"),
        "sources": [f"{corpus}/*.jsonl"],
        "held_out_fraction": 0.2,
        "held_out_rows": 8,
        "row_length": ROW,
        "shuffle_buffer": 7,
        "max_steps": 24,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "logging_steps": 4,
        "save_steps": 2,
        "save_total_limit": 3,
        "use_cpu": True,
        "report_to": "none",
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(options))  # JSON is YAML
    return path


def pretrain(recipe: Path, *options: object, **popen) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), "--config", str(recipe), *map(str, options)]
    popen = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": recipe.parent, **popen}
    return subprocess.Popen(command, env=environment, **popen)


def run_here(*options: object) -> None:
    """The script in this process, which saves its imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain.py", *map(str, options)])
        runpy.run_path(str(ROOT / "scripts" / "pretrain.py"), run_name="__main__")


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def uninterrupted(recipe):
    folder = recipe.parent / "uninterrupted"
    return folder, finish(pretrain(recipe, "--output-dir", folder))


def test_the_result_is_ready_for_the_hub(uninterrupted):
    folder, output = uninterrupted
    perplexities = [float(line.split()[-1].replace(",", "")) for line in output.splitlines() if "perplexity" in line]
    assert output.splitlines()[-1] == f"{folder}: held-out perplexity {perplexities[-1]:.2f}"
    assert perplexities[-1] < 0.8 * perplexities[0], "training helps on held-out text"
    assert {"loss_curve.png", "training_summary.md", "generation_config.json"} <= {p.name for p in folder.iterdir()}
    assert (folder / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id in (0, [0]) and tokenizer.eos_token_id == 0  # a list in 5.17
    generated = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=4, min_new_tokens=4)
    assert generated.shape[1] == len(tokenizer("The")["input_ids"]) + 4


def test_killed_run_ends_with_the_same_bytes(recipe, uninterrupted):
    """kill -9 at two random moments soon after a new checkpoint; they come every other step, so it may hit one."""
    folder = recipe.parent / "killed"
    for _ in range(2):
        before = set(folder.glob("checkpoint-*"))
        process = pretrain(recipe, "--output-dir", folder, stdout=subprocess.DEVNULL)
        while process.poll() is None and set(folder.glob("checkpoint-*")) <= before:
            time.sleep(0.005)
        time.sleep(0.3 * random.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    assert "Resuming from" in finish(pretrain(recipe, "--output-dir", folder))
    assert_same_run(folder, uninterrupted[0])


def test_finished_run_given_again_changes_nothing(recipe, uninterrupted, capsys):
    folder, output = uninterrupted
    before = (folder / "model.safetensors").read_bytes()
    run_here("--config", recipe, "--output-dir", folder)
    assert capsys.readouterr().out.splitlines()[-1] == output.splitlines()[-1]
    assert (folder / "model.safetensors").read_bytes() == before
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 24


def assert_same_run(folder: Path, reference: Path) -> None:
    weights, expected = load_file(folder / "model.safetensors"), load_file(reference / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    states = [json.loads((run / "checkpoint-24/data_state_0.json").read_text()) for run in (folder, reference)]
    for state in states:
        for cursor in state["cursors"]:
            # `datasets` resumes from previous_state; where it stood in the stream itself differs after a resume.
            cursor["source"] = cursor["source"]["examples_iterable"]["examples_iterable"]["previous_state"]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--sources", "nowhere/*.jsonl"], "No file matches the source 'nowhere/*.jsonl'."),
        (["--text-column", "body"], "has no column 'body'; its columns are: text."),
        (["--tokenizer", "nothing"], "There is no tokenizer at 'nothing'"),
        (["--model-config", "nothing.json"], "'nothing.json' is not a readable JSON model config"),
        (["--row-length", "4096"], "row_length 4096 is more than the model's 128 positions."),
        (["--max-steps", "0"], "max_steps is needed"),
        (["--optimiser", "x"], "--optimiser"),
        (["--max-steps", "many"], "--max-steps"),
    ],
)
def test_bad_input_gives_one_sentence(recipe, options, sentence, monkeypatch, capsys):
    monkeypatch.chdir(recipe.parent)
    with pytest.raises(SystemExit) as stop:
        run_here("--config", recipe, "--output-dir", recipe.parent / "bad", *options)
    last_line = (stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err).splitlines()[-1]
    assert sentence in last_line and ": error: " in last_line


@pytest.mark.parametrize("content, sentence", [({"learning_rat": 0.1}, "learning_rat"), ([1], "YAML mapping")])
def test_unusable_recipe(recipe, content, sentence, capsys):
    path = recipe.with_name("typo.yaml")
    path.write_text(json.dumps({**json.loads(recipe.read_text()), **content} if isinstance(content, dict) else content))
    with pytest.raises(SystemExit) as stop:
        run_here("--config", path)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("vocab_size, fits", [(None, True), (300, True), (320, True), (299, False), (1000, False)])
def test_vocabulary_of_model_and_tokenizer(recipe, tokenizer, vocab_size, fits):
    import pretrain as script

    path = recipe.with_name("vocabulary.json")
    path.write_text(json.dumps({**json.loads((recipe.parent / "model.json").read_text()), "vocab_size": vocab_size}))
    if not fits:
        with pytest.raises(InputError, match="set vocab_size to null"):
            script.new_model(str(path), tokenizer, "sdpa")
        return
    model = script.new_model(str(path), tokenizer, "sdpa")
    assert model.config.vocab_size == (vocab_size or 300)
    assert (model.config.eos_token_id, model.config.pad_token_id, model.config.bos_token_id) == (0, 1, 2)


def test_changed_data_options_are_refused_on_resume(recipe, uninterrupted):
    with pytest.raises(SystemExit, match="shuffle_buffer = 7, but it is now 8"):
        run_here("--config", recipe, "--output-dir", uninterrupted[0], "--shuffle-buffer", 8)


def test_disk_full_while_a_checkpoint_is_written(recipe, uninterrupted):
    """A limit on the size of files stands for the full disk: the optimizer's file is larger than the weights'."""
    import resource

    folder = recipe.parent / "full"
    shutil.copytree(uninterrupted[0] / "checkpoint-22", folder / "checkpoint-22")
    limit = (folder / "checkpoint-22" / "model.safetensors").stat().st_size + 100_000
    process = pretrain(
        recipe,
        *["--output-dir", folder],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
    )
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 1
    assert "checkpoint-24 could not be written" in output.splitlines()[-1], output
    assert "checkpoint-22 is intact" in output.splitlines()[-1]
    assert [path.name for path in folder.iterdir()] == ["checkpoint-22"]
    assert damage(folder / "checkpoint-22") is None


def test_no_documents(tmp_path, tokenizer):
    stream = datasets.Dataset.from_dict({"text": ["", "  \n"]}).to_iterable_dataset()
    with pytest.raises(InputError, match="found no document to train on"):
        next(iter(packed(stream, tokenizer)))
    with pytest.raises(InputError, match="do not fill one row"):
        held_out_rows(stream, tokenizer, ROW, rows=4, fraction=0.5)
