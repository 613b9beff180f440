"""scripts/benchmark.py generate --speculate: what it counts, compares and refuses."""

import csv
import sys

import pytest
import torch

from complexity_deep.scripts import benchmark
from complexity_deep.workflow.benchmarks import speculation
from complexity_deep.workflow.command import InputError
from pretraining import small_texts, small_tokenizer, write_corpus
from support import random_ids, tiny_model, tiny_tokenizer

PROMPT, NEW = 8, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, one that drafts for it, and text. The draft is the model's first layer, so that it is right at times."""
    folder, tokenizer = tmp_path_factory.mktemp("speculate"), small_tokenizer()
    write_corpus(folder / "text", small_texts())
    model = tiny_model(std=0.15, vocab_size=300)
    draft = tiny_model(std=0.15, vocab_size=300, num_hidden_layers=1)
    draft.load_state_dict({name: x for name, x in model.state_dict().items() if name in draft.state_dict()})
    for name, saved in (("model", model), ("draft", draft)):
        saved.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def run(monkeypatch, folder, output, *options: object) -> list[dict]:
    """The rows that the command writes."""
    given = ["generate", "--speculate", "--device", "cpu", "--model", folder / "model", "--repeats", 1]
    given += ["--prompts", f"{folder}/text/*.jsonl", "--sequence-length", PROMPT, "--new-tokens", NEW]
    monkeypatch.setattr(benchmark, "ceilings", lambda device: (1.0, 1.0))
    monkeypatch.setattr(speculation, "PROMPTS", 3)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, [*given, "--output-dir", output, *options])])
    benchmark.main(benchmark.parse_args())
    with open(output / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_way_has_a_row_with_its_acceptance(monkeypatch, folder, tmp_path, capsys):
    rows = run(monkeypatch, folder, tmp_path, "--assistant-model", folder / "draft", "--early-exit", 2)
    names = [row["variant"].partition(":")[0] for row in rows]
    assert names == ["greedy", "prompt lookup of 5", "early exit after layer 2", "assisted by draft"]
    assert {row["case"] for row in rows} == {f"model, 3 prompts of {PROMPT}, up to {NEW} new tokens, float32"}
    assert all("tokens a step" in row["variant"] and "of drafts taken" in row["variant"] for row in rows[1:])
    assert not any("differ" in row["variant"] for row in rows)
    assert all(float(row["median_ms"]) * float(row["tokens_per_s"]) == pytest.approx(1000, rel=1e-3) for row in rows)
    assert "vs first" in capsys.readouterr().out  # the speed-up, losses too


def test_drafts_are_counted_exactly():
    """A model that drafts for itself is always right; one of its own seed hardly ever is."""
    model, other = tiny_model(std=0.15), tiny_model(std=0.15, seed=1)
    ids = random_ids(1, PROMPT)
    model.generation_config.eos_token_id = None

    def count(draft) -> tuple[int, int]:
        draft.generation_config.num_assistant_tokens = 3
        draft.generation_config.assistant_confidence_threshold = 0.0
        with speculation.counted_drafts(model) as drafts:
            options = {"assistant_model": draft, "max_new_tokens": NEW, "do_sample": False}
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert "_get_candidate_generator" not in vars(model)
        return drafts.steps, drafts.tokens

    assert count(model) == (3, 9)  # each step gains its draft of three tokens and one of its own
    steps, tokens = count(other)
    assert steps > 6 and tokens > 2 * steps


def test_differences_are_found_and_told(monkeypatch, folder, tmp_path, capsys):
    """In float32 no figure is reported; in bfloat16, where steps of several tokens round in another way, they count."""
    model = tiny_model()
    expected = random_ids(1, 8)
    assert speculation.first_difference(expected, expected.clone()) is None
    assert speculation.first_difference(expected[:, :6], expected) == 6
    other = expected.clone()
    other[0, 5] = (other[0, 5] + 1) % 257
    assert speculation.first_difference(other, expected) == 5
    with torch.no_grad():
        logits = model(expected[:, :5]).logits[0, -1]
        apart = f"{float((logits[expected[0, 5]] - logits[other[0, 5]]).abs()):.2g}"
        said = speculation.describe_difference(model, other, expected, 5, prompt=3)
        assert said == f"at new token 3, whose logits lie {apart} apart"
        assert speculation.describe_difference(model, expected[:, :6], expected, 6, 3).endswith("one of them ends")

        def compare(dtype):
            return speculation._comparison(model, "lookup", [expected, other], [expected] * 2, 3, dtype)

        with pytest.raises(InputError, match=r"lookup: 1 of 2 texts are not greedy's; prompt 2 .* no figure"):
            compare(torch.float32)
        assert (
            compare(torch.bfloat16) == ", 1 texts differ" and "prompt 2 parts at new token 3" in capsys.readouterr().err
        )


def test_refused_before_the_work(monkeypatch, folder, tmp_path):
    other = tmp_path / "other"
    tiny_model(vocab_size=300).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    short = tmp_path / "short.txt"
    short.write_text("a")
    strict = tmp_path / "strict"
    strict.mkdir()
    (strict / "config.json").write_text('{"model_type": "complexity-deep", "vocab_size": null}')
    for options, sentence in (
        (["--batch-size", 2], "speculates for one row only"),
        (["--assistant-model", other], "other' has another vocabulary than .*: train it with --tokenizer"),
        (["--assistant-model", tmp_path], "is no model that loads"),
        (["--assistant-model", strict], "is no model that loads: .*'vocab_size'"),
        (["--assistant-model", tmp_path / "absent"], "is no model that loads: there is no such folder"),
        (["--early-exit", 3], "must be from 1 to 2"),
        (["--sequence-length", 100_000], "more than the model's .* positions"),
        (["--prompts", short], "No document of --prompts is longer than 8 tokens"),
    ):
        with pytest.raises(InputError, match=sentence):
            run(monkeypatch, folder, tmp_path / "out", *options)
    for given, sentence in (
        (["train", "--speculate"], "goes with `generate`"),
        (["generate", "--speculate"], "needs --model and --prompts: what is accepted with random"),
    ):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *given, "--device", "cpu", "--output-dir", str(tmp_path)])
        with pytest.raises(InputError, match=sentence):
            benchmark.main(benchmark.parse_args())
