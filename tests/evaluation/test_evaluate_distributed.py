"""Two gloo processes of scripts/evaluate.py give the scores of one, and its perplexity by position."""

import contextlib
import functools
import json
import multiprocessing
import os
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.text_sources import embedded_documents
from complexity_deep.workflow.data.tokenizer_training import train_bpe
from complexity_deep.workflow.evaluation import harness, long_context
from complexity_deep.workflow.evaluation.processes import join_processes
from support import REPOSITORY, meeting_place, run_command, tiny_model

TRAINED, VOCABULARY, FACTOR = 32, 300, 4


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text[:600] for text in islice(embedded_documents(), 40) if len(text) > 50]


@pytest.fixture(scope="module")
def data(tmp_path_factory, texts):
    """Small files of two benchmarks, of an odd number of questions, of WikiText, and held-out text."""
    folder = tmp_path_factory.mktemp("data")

    def write(name, rows):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)

    parts = [text[:20] for text in texts]
    choices = [{"text": parts[at : at + 4], "label": list("ABCD")} for at in range(9)]
    write("arc_easy_test.parquet", [{"question": c["text"][0], "choices": c, "answerKey": "B"} for c in choices])
    activity = {"activity_label": "Reading", "ctx_a": "Somebody reads.", "ctx_b": "it says"}
    write("hellaswag_val.parquet", [{**activity, "endings": c["text"], "label": "2"} for c in choices[:5]])
    (folder / "wikitext2").mkdir()
    pages = "".join(f" = Page {number} = \n \n {' '.join(text.split())} \n" for number, text in enumerate(texts[:5]))
    (folder / "wikitext2" / "test.txt").write_text(pages)
    write("held_out.parquet", [{"text": text} for text in texts])
    return folder


def save(folder: Path, model, texts: list[str]) -> Path:
    model.save_pretrained(folder)
    train_bpe(iter(texts), VOCABULARY, TRAINED).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    rope = {"rope_type": "default", "rope_theta": 5_000.0}
    model = tiny_model(std=0.15, vocab_size=VOCABULARY, max_position_embeddings=TRAINED, rope_parameters=rope)
    return save(tmp_path_factory.mktemp("model") / "ours", model, texts)


def options_for(data: Path, output: Path) -> tuple:
    held_out = ("--held-out-text", data / "held_out.parquet", "--context-factor", FACTOR)
    return ("--data-dir", data, *held_out, "--batch-size", 1, "--output-dir", output)


def run_and_keep_answers(model: Path, output: Path, *options: object) -> None:
    """The command; what the model answered to each request of each document goes to answers.json beside the report."""
    evaluate = harness.lm_eval.evaluate

    def kept(*arguments, **named):
        results = evaluate(*arguments, **named)
        if results is not None:
            answers = [
                (task, sample["doc_id"], sample["filtered_resps"])
                for task, samples in results["samples"].items()
                for sample in samples
            ]
            output.with_suffix(".answers").write_text(json.dumps(sorted(answers)))
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.lm_eval, "evaluate", kept)
        run_command("evaluate", model, "--output-dir", output, *options)


def _in_process(environment: dict[str, str], log: Path, arguments: tuple) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
        with contextlib.redirect_stdout(file):
            run_and_keep_answers(*arguments)


def run_on_two(environment: dict[str, str], log: Path, *arguments: object, exitcode: int = 0) -> list[str]:
    """What each of two processes printed, forked from one that has done the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evaluation.test_evaluate_distributed", "complexity_deep.scripts.evaluate"])
    logs, processes = [log.with_suffix(f".{rank}") for rank in range(2)], []
    with meeting_place() as meeting:
        for rank, own in enumerate(logs):
            place = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
            processes.append(context.Process(target=_in_process, args=(environment | meeting | place, own, arguments)))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
                processes[-1].start()
        for process in processes:
            process.join(300)
    assert [process.exitcode for process in processes] == [exitcode] * 2, [own.read_text()[-2000:] for own in logs]
    return [own.read_text() for own in logs]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, folder, data):
    output = tmp_path_factory.mktemp("one") / "out"
    run_and_keep_answers(folder, output, *options_for(data, output))
    return output


def read(output: Path) -> dict:
    report = json.loads((output / "evaluation.json").read_text())
    return {name: value for name, value in report.items() if name not in ("date", "processes")}


def assert_same(found, expected) -> None:
    """Equal but for the order of sums: the numbers of a report, whatever holds them."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected):
            assert_same(*pair)
    else:
        assert type(found) is type(expected)
        assert found == (pytest.approx(expected, rel=1e-6) if isinstance(expected, float) else expected)


def test_two_processes_give_the_scores_of_one(tmp_path, folder, data, one_process):
    output = tmp_path / "out"
    first, second = run_on_two({}, tmp_path / "log", folder, output, *options_for(data, output))
    assert json.loads((output / "evaluation.json").read_text())["processes"] == 2
    answers, expected = (json.loads(path.with_suffix(".answers").read_text()) for path in (output, one_process))
    assert answers == expected  # bit by bit, for with single prompts in a batch no other prompt has a say
    assert len(answers) > 9 + 5 + 5 + 30
    report, reference = read(output), read(one_process)
    assert len(reference["tasks"]) == 4 and len(reference["perplexity"]) == 2 and reference["cut_prompts"] > 0
    assert_same(report, reference)
    for name in ("evaluation.md", "evaluation.png", "long_context.png"):
        assert (output / name).stat().st_size > 100
    assert "loading " in first and "| arc_easy, acc |" in first and "long documents, yarn" in first
    told = [line for line in second.splitlines() if "WARNING" not in line and "warn" not in line.lower()]
    assert not [line for line in told if "Running" in line or "reading" in line or "|" in line], told


@pytest.mark.parametrize("given", ["arc_easy", "held_out.parquet"])
def test_a_process_without_a_document_is_refused(tmp_path, folder, data, given):
    text = ("--tasks", "--held-out-text", data / given)
    options = ("--data-dir", data, *(text if given.endswith("parquet") else ("--tasks", given)), "--limit", 1)
    for printed in run_on_two({}, tmp_path / "log", folder, tmp_path / "out", *options, exitcode=1):
        assert f"{given} has 1 documents, which is less than one for each of 2 processes" in printed
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_processes_that_cannot_hold_a_model_each_are_refused(monkeypatch):
    environment = {}
    monkeypatch.setattr("torch.distributed.run.run", lambda _: environment.update(os.environ))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        words = ["--config_file", str(REPOSITORY / "recipes/accelerate/fsdp2.yaml"), "scripts/evaluate.py", "runs/30m"]
        launch_command(launch_command_parser().parse_args(words))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", environment["ACCELERATE_USE_FSDP"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"launch with recipes/accelerate/ddp\.yaml"):
        join_processes(None)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    with pytest.raises(InputError, match="--device cuda:1 is one device for 2 processes"):
        join_processes("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="2 processes need a GPU each, and there are 1"):
        join_processes("cuda")


def test_perplexity_by_position_is_that_of_the_model(folder, data, one_process):
    """Against a loop over documents and positions, for positions as they are and scaled by yarn at load."""
    (entry,) = read(one_process)["long_context"]
    width, tokens = TRAINED // long_context.POINTS, TRAINED * FACTOR
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = pyarrow.parquet.read_table(data / "held_out.parquet")["text"].to_pylist()
    rows = [ids for ids in (tokenizer(text)["input_ids"] for text in rows) if len(ids) > tokens]
    assert entry["documents"] == len(rows) > 5 and entry["trained_length"] == TRAINED
    assert entry["position"] == [width * point + width / 2 for point in range(tokens // width)]
    yarn = {"rope_type": "yarn", "factor": float(FACTOR), "original_max_position_embeddings": TRAINED}
    scalings = {"as trained": {}, "yarn, factor 4": {"rope_parameters": yarn}}
    assert entry["curves"].keys() == scalings.keys()
    found = {}
    for name, options in scalings.items():
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        losses = np.zeros((len(rows), tokens))
        for number, ids in enumerate(rows):
            with torch.no_grad():
                scores = model(torch.tensor([ids[: tokens + 1]])).logits[0].log_softmax(-1)
            losses[number] = [-float(scores[at, ids[at + 1]]) for at in range(tokens)]
        means = losses.reshape(len(rows), -1, width).mean(2)
        found[name] = entry["curves"][name]["loss"]
        np.testing.assert_allclose(found[name], means.mean(0), rtol=1e-5)
        errors = means.std(0, ddof=1) / len(rows) ** 0.5
        np.testing.assert_allclose(entry["curves"][name]["stderr"], errors, rtol=1e-4)
    assert not np.allclose(*found.values(), rtol=1e-3)
    page = (one_process / "evaluation.md").read_text()
    assert "| position | as trained | yarn, factor 4 |" in page and "| 96 to 127 |" in page


@pytest.fixture
def long_context_of(data, tmp_path):
    def measure(model: Path, *options) -> list[dict]:
        held_out = ("--tasks", "--held-out-text", data / "held_out.parquet", "--limit", 3)
        run_command("evaluate", model, *held_out, "--context-factor", 2, "--output-dir", tmp_path / "out", *options)
        return read(tmp_path / "out")["long_context"]

    return measure


def test_the_trained_length_is_that_of_the_rows(folder, long_context_of):
    """A model may have more positions than it was trained on."""
    (folder / "training_summary.json").write_text('{"row_length": 20}')
    try:
        (entry,) = long_context_of(folder)
    finally:
        (folder / "training_summary.json").unlink()
    assert entry["trained_length"] == 20 and len(entry["position"]) == 20 and entry["documents"] == 3


def test_other_models_and_scaled_ones(tmp_path, texts, folder, long_context_of):
    """A Llama is scaled the same way; a model that is scaled already is measured as it is, from its first length on."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=TRAINED, **shape))
    (entry,) = long_context_of(save(tmp_path / "llama", llama, texts))
    assert list(entry["curves"]) == ["as trained", "yarn, factor 2"]
    yarn = {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings": 2 * TRAINED}
    (entry,) = long_context_of(save(tmp_path / "long", AutoModelForCausalLM.from_pretrained(folder, **yarn), texts))
    assert list(entry["curves"]) == ["yarn"] and entry["trained_length"] == TRAINED


def test_text_without_long_documents_is_one_sentence(tmp_path, folder, data, capsys):
    refused = functools.partial(run_command, "evaluate", folder, "--output-dir", tmp_path / "out", "--tasks")
    for options, sentence in (
        (("--held-out-text", data / "held_out.parquet", "--context-factor", 99999), "lower --context-factor"),
        (("arc_easy", "--data-dir", data, "--context-factor", 2), "give --held-out-text"),
    ):
        with pytest.raises(SystemExit) as caught:
            refused(*options)
        assert sentence in str(caught.value) and not (tmp_path / "out").exists()
        assert "making the prompts" not in capsys.readouterr().err  # nothing is computed for nothing
