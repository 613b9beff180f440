"""scripts/generate.py as a person uses it."""

import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from complexity_deep.scripts import generate as script
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.text_sources import embedded_documents
from complexity_deep.workflow.data.tokenizer_training import train_bpe
from complexity_deep.workflow.saved_model import load_model
from support import tiny_model

CONTEXT = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = train_bpe((text[:500] for text in islice(embedded_documents(), 20)), 300, CONTEXT)
    tokenizer.save_pretrained(folder)
    tiny_model(vocab_size=300, max_position_embeddings=CONTEXT).save_pretrained(folder)
    return folder


def chat(monkeypatch, folder: Path, lines: list[str], reply: str, *options: str) -> list[str]:
    """The prompts that the model saw; it always answers `reply`."""
    seen = []

    def answer(self, input_ids, streamer=None, **more):
        seen.append(input_ids[0])
        tokens = tokenizer(reply, return_tensors="pt")["input_ids"]
        end = torch.tensor([[tokenizer.convert_tokens_to_ids("<|im_end|>")]])
        return torch.cat([input_ids, tokens, end], dim=1)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    typed = iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed, ""))
    monkeypatch.setattr("transformers.generation.GenerationMixin.generate", answer)
    monkeypatch.setattr(sys, "argv", ["generate.py", str(folder), "--interactive", "--device", "cpu", *options])
    script.main(script.parse_args())
    return [tokenizer.decode(ids) for ids in seen]


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def test_interactive_keeps_the_conversation(monkeypatch, folder):
    first, second, third = chat(monkeypatch, folder, ["a", "b", "c"], "d", "--max-new-tokens", "2")
    end = "<|im_start|>assistant\n"
    assert first == turn("user", "a") + end
    assert second == turn("user", "a") + turn("assistant", "d") + turn("user", "b") + end
    assert third == second + "d<|im_end|>\n" + turn("user", "c") + end


def test_the_oldest_turns_make_room(monkeypatch, folder, capsys):
    """Of a context of 64 tokens, 4 are left for the answer."""
    prompts = chat(monkeypatch, folder, [f"line {number}" for number in range(8)], "yes", "--max_tokens", "4")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert all(len(tokenizer(prompt)["input_ids"]) <= CONTEXT - 4 for prompt in prompts)
    assert "line 7" in prompts[-1] and "line 6" in prompts[-1] and "line 0" not in prompts[-1]
    assert prompts[-1].startswith("<|im_start|>user") and "oldest turn" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    (
        ("--top-k", "-1"),
        ("--top-p", "1.5"),
        ("--top-p", "most"),
        ("--repetition-penalty", "0"),
        ("--temperature", "nan"),
        ("--temperature", "-1"),
        ("--seed", "-1"),
        ("--seed", str(2**64)),
    ),
)
def test_a_number_that_cannot_be_meant_is_refused_before_anything_is_loaded(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", "nowhere", "Once", *options])
    with pytest.raises(SystemExit) as stop:
        script.parse_args()
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and options[0] in line and options[1] in line


def test_the_device_is_tried_before_weights_are_read(monkeypatch, folder):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(InputError, match="The device 'abacus' cannot be used"):
        load_model(folder, "abacus")


def test_bad_input_is_one_sentence(monkeypatch, folder, tmp_path):
    for model, options, sentence in (
        (tmp_path / "nothing", [], "is not a causal language model that loads: there is no such folder"),
        ("no/folder", [], "loads: no folder has this name, and from the Hub it does not load: "),
        (tmp_path, [], "is not a causal language model that loads: Unrecognized model"),
        (folder, ["--tokenizer", "no/such/folder"], "has no tokenizer that loads .there is no such folder.: name one"),
        (folder, ["--device", "abacus"], "The device 'abacus' cannot be used"),
        (folder, ["--tokenizer", str(tmp_path)], "has no tokenizer that loads .*: name one with --tokenizer"),
        (folder, [], "The prompt is empty"),
    ):
        monkeypatch.setattr(sys, "argv", ["generate.py", str(model), "", "--device", "cpu", *options])
        with pytest.raises(InputError, match=sentence) as refused:
            script.main(script.parse_args())
        assert "\n" not in str(refused.value)
