"""Full and LoRA runs of scripts/sft.py: packed, resumed, merged and refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig

import complexity_deep  # noqa: F401  (registers the architecture)
from complexity_deep.scripts import sft as script
from complexity_deep.workflow.data.conversation_formats import FORMATS
from complexity_deep.workflow.data.conversations import ChatEncoder, load_conversations
from complexity_deep.workflow.evaluation.perplexity import perplexity_scores
from complexity_deep.workflow.training.atomic_checkpoint import write_manifest
from complexity_deep.workflow.training.fine_tuning import ChatTrainer
from complexity_deep.workflow.training.fine_tuning_arguments import FineTuningArguments
from complexity_deep.workflow.training.training_arguments import RENAMED, RecipeParser
from conversations import ACADEMIC, LENGTH, SCIQ, chat, chat_tokenizer, expected_tokens, write_jsonl
from support import REPOSITORY, meeting_place, run_command

pytestmark = pytest.mark.usefixtures("dataset_cache")


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def exchanges(count: int) -> list[dict]:
    """Conversations with a rule that a tiny model can learn: the answer repeats the number."""
    return [{"messages": chat(f"Say {n % 7} and {n}.", f"It is {n % 7} {n % 7} {n % 7}.")} for n in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Conversations, a tiny model with its tokenizer, and the options of runs that take seconds."""
    folder = tmp_path_factory.mktemp("sft")
    write_jsonl(folder / "chat.jsonl", exchanges(60))
    write_jsonl(folder / "validation.jsonl", exchanges(90)[60:])
    for model_type in ("complexity-deep", "llama"):
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        shape |= {"intermediate_size": 64, "vocab_size": len(tokenizer), "max_position_embeddings": 2 * LENGTH}
        # Dropout, so that the random state matters when a run resumes.
        config = AutoConfig.for_model(model_type, **shape, attention_dropout=0.1, eos_token_id=0, pad_token_id=1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / model_type)
        tokenizer.save_pretrained(folder / model_type)
    return folder


def options(folder: Path, recipe: str = "sft_chat", **changed: object) -> list[str]:
    """A recipe, made small; an option that is None is left to it."""
    small = {
        "model-name-or-path": folder / "complexity-deep",
        "sources": folder / "chat.jsonl",
        "validation-sources": folder / "validation.jsonl",
        "max-length": LENGTH,
        "max-steps": 12,
        "per-device-train-batch-size": 2,
        "gradient-accumulation-steps": 2,
        "learning-rate": 0.02,
        "logging-steps": 3,
        "eval-strategy": "no",
        "save-steps": 3,
        "save-total-limit": 9,
        "bf16": "false",
        "use-cpu": "true",
        "report-to": "none",
    }
    small |= {name.replace("_", "-"): value for name, value in changed.items()}
    listed = ["--config", str(REPOSITORY / "recipes" / f"{recipe}.yaml")]
    for name, value in small.items():
        if value is not None:
            listed += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return listed


LORA = {"use_peft": "true", "lora_r": 4, "merge_adapter": "true"}
RUNS = {
    "full": {},
    "lora": LORA,
    "full, unpacked": {"packing": "false"},
    "full, by length": {"packing": "false", "train_sampling_strategy": "group_by_length"},
}


@pytest.fixture(scope="module")
def finished(folder):
    """The output folder of a run of RUNS, made once."""

    def output(name: str) -> Path:
        place = folder / f"finished {name}"
        if not place.exists():
            run_command("sft", *options(folder, output_dir=place, **RUNS[name]))
        return place

    return output


def logits_of(model) -> torch.Tensor:
    ids = torch.arange(16, 64).view(2, 24)
    with torch.no_grad():
        return model.eval()(ids).logits


def test_the_result_is_ready_for_the_hub(finished, tokenizer, capsys):
    output = finished("full")
    model, loaded = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == [end_of_turn, tokenizer.eos_token_id]
    assert loaded.chat_template == tokenizer.chat_template
    assert {"modeling_complexity_deep.py", "loss_curve.png", "training_summary.md"} <= {
        p.name for p in output.iterdir()
    }
    assert json.loads((output / "sft_data.json").read_text())[0]["rows"] == 60
    held_out = [
        e["eval_loss"]
        for e in json.loads((output / "trainer_state.json").read_text())["log_history"]
        if "eval_loss" in e
    ]
    assert held_out[-1] < 0.6 * held_out[0]
    prompt = loaded.apply_chat_template(
        chat("Say 3 and 66."), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    def end_turn_after_three(ids, scores):
        if ids.shape[1] == prompt["input_ids"].shape[1] + 3:
            scores[:, end_of_turn] = 1e9
        return scores

    reply = model.generate(**prompt, max_new_tokens=20, min_new_tokens=3, logits_processor=[end_turn_after_three])
    assert reply.shape[1] == prompt["input_ids"].shape[1] + 4 and reply[0, -1] == end_of_turn


def test_adapter_loads_and_merges(folder, finished):
    output = finished("lora")
    base = AutoModelForCausalLM.from_pretrained(folder / "complexity-deep")
    plain = logits_of(base)
    adapted = PeftModel.from_pretrained(base, output)
    expected = logits_of(adapted)
    assert (expected - plain).abs().max() > 0.1
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(adapted.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(output)), expected, rtol=1e-5, atol=1e-5)
    names = {path.name for path in (output / "merged").iterdir()}
    assert names >= {"modeling_complexity_deep.py", "chat_template.jinja", "sft_data.json", "training_summary.json"}
    assert "adapter_config.json" not in names and not list(output.glob(".merged-*"))
    assert merged.generation_config.eos_token_id == [4, 0]


def test_an_adapter_of_a_tied_embedding_is_merged_into_the_embedding_alone(folder, tmp_path):
    changed = {**LORA, "lora_target_modules": ["embed_tokens", "q_proj"], "merge_adapter": "true"}
    run_command("sft", *options(folder, output_dir=tmp_path, **{**changed, "max_steps": 3}))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "complexity-deep"), tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), rtol=1e-5, atol=1e-5)


def test_experts_learn_through_lora(finished):
    """B starts at zero, so that it is not zero where a gradient came."""
    weights = load_file(finished("lora") / "adapter_model.safetensors")
    assert sum("mlp.experts" in name and "lora_B" in name for name in weights) == 2 * 2  # weights x layers
    for name, weight in weights.items():
        if "mlp.experts" in name and "lora_B" in name:  # [out, experts x rank]: every expert has its own part
            assert (weight.abs().amax(dim=0) > 0).all(), name


def assert_same_weights(output: Path, expected: Path) -> None:
    name = "adapter_model.safetensors" if (expected / "adapter_model.safetensors").exists() else "model.safetensors"
    weights, reference = load_file(output / name), load_file(expected / name)
    assert weights.keys() == reference.keys()
    assert all(torch.equal(weights[name], reference[name]) for name in reference)


@pytest.mark.parametrize("step", [3, 9])  # 9 is in a later pass over the conversations
@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_ends_with_the_same_bytes(folder, finished, tmp_path, capsys, name, step):
    shutil.copytree(finished(name) / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    run_command("sft", *options(folder, output_dir=tmp_path, **RUNS[name]))
    assert f"Resuming from {tmp_path / f'checkpoint-{step}'}" in capsys.readouterr().out
    assert_same_weights(tmp_path, finished(name))
    states = [json.loads((run / "checkpoint-12/trainer_state.json").read_text()) for run in (tmp_path, finished(name))]
    tokens = [[entry["num_tokens"] for entry in state["log_history"] if "loss" in entry] for state in states]
    assert tokens[0] == tokens[1]


def test_killed_run_ends_with_the_same_bytes(folder, finished, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    listed = options(folder, output_dir=tmp_path, **RUNS["full"])
    process = subprocess.Popen([sys.executable, str(REPOSITORY / "scripts" / "sft.py"), *listed], env=environment)
    while process.poll() is None and not (tmp_path / "checkpoint-3").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    run_command("sft", *listed)
    assert_same_weights(tmp_path, finished("full"))


def test_finished_run_given_again_changes_nothing(folder, finished):
    before = (finished("full") / "model.safetensors").read_bytes()
    run_command("sft", *options(folder, output_dir=finished("full")))
    assert (finished("full") / "model.safetensors").read_bytes() == before
    assert json.loads((finished("full") / "trainer_state.json").read_text())["global_step"] == 12


def trainer_on(folder: Path, model_type: str, **changed: object):
    """The trainer that the script builds for some options, without its run."""
    listed = options(folder, model_name_or_path=folder / model_type, **changed)
    arguments = parsed(*listed)
    with pytest.MonkeyPatch.context() as patch:
        built = []
        patch.setattr(ChatTrainer, "train", lambda self, **kwargs: built.append(self) or sys.exit())
        with pytest.raises(SystemExit):
            script.main(*arguments)
    return built[0]


def conversations_in(ids, positions, labels) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids [1, L] and labels [1, L] of each conversation in a packed row, whose tensors are [S]."""
    begins = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
    parts = [(ids[None, begin:end], labels[None, begin:end]) for begin, end in pairwise(begins)]
    return [part for part in parts if part[0].shape[1] > 1]  # one token is padding


@pytest.mark.parametrize("model_type", ["complexity-deep", "llama"])
def test_packed_conversations_do_not_see_each_other(folder, tokenizer, tmp_path, model_type):
    """The loss of a batch and its gradients are those of the conversations one by one."""
    trainer = trainer_on(folder, model_type, output_dir=tmp_path / "out", max_length=LENGTH - 1)
    expected = [expected_tokens(tokenizer, row["messages"]) for row in exchanges(60)]
    model, found = trainer.model, []
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)  # large enough for attention to matter
    for batch in trainer.get_train_dataloader():
        assert batch.keys() == {"input_ids", "position_ids", "labels"}
        assert {tuple(x.shape) for x in batch.values()} == {(2, LENGTH - 1)}
        rows = list(zip(batch["input_ids"], batch["position_ids"], batch["labels"]))
        parts = [part for row in rows for part in conversations_in(*row)]
        for ids, labels in parts:
            learned = labels != -100
            assert torch.equal(labels[learned], ids[learned]) and not learned[0, 0]
            found.append((ids[0].tolist(), learned[0].int().tolist()))
        number = sum((labels != -100).sum() for _, labels in parts)
        assert number == (batch["labels"] != -100).sum() and len(parts) > len(rows)
        model.train()
        before = trainer._total_train_tokens
        trainer.compute_loss(model, dict(batch))
        assert trainer._total_train_tokens - before == sum(ids.shape[1] for ids, _ in parts)
        model.eval()  # without dropout
        loss = trainer.compute_loss(model, dict(batch))
        packed = torch.autograd.grad(loss, list(model.parameters()))
        apart = sum(model(ids, labels=labels).loss * (labels != -100).sum() for ids, labels in parts) / number
        torch.testing.assert_close(loss, apart, rtol=1e-5, atol=1e-5)
        for gradient, truth in zip(packed, torch.autograd.grad(apart, list(model.parameters()))):
            assert (gradient - truth).norm() <= 1e-5 * truth.norm()
        del batch["position_ids"]
        assert (trainer.compute_loss(model, dict(batch)) - apart).abs() > 0.01, "a leak would be seen"
    assert sorted(found) == sorted(expected)
    assert trainer._total_train_tokens == sum(len(ids) for ids, _ in expected)


IN_ONE_ROW = {
    "flash_attention_2": lambda model: setattr(model.config, "_attn_implementation", "flash_attention_2"),
    "a kernel": lambda model: setattr(model.config, "_attn_implementation", "kernels-community/vllm-flash-attn3"),
    "recurrence": lambda model: setattr(model.model, "_is_stateful", True),
    "convolution": lambda model: setattr(model.model, "convolution", torch.nn.Conv1d(1, 1, 1)),
}


@pytest.mark.parametrize("name", IN_ONE_ROW)
def test_what_tells_conversations_apart_in_one_row_only_gets_one(folder, tmp_path, monkeypatch, name):
    load = script.load_model_to_tune

    def changed(*arguments):
        model = load(*arguments)
        IN_ONE_ROW[name](model)
        return model

    monkeypatch.setattr(script, "load_model_to_tune", changed)
    monkeypatch.setattr(ChatTrainer, "check_packing", lambda _: None)  # there is no flash attention here
    trainer = trainer_on(folder, "llama", output_dir=tmp_path / "out")
    for batch in trainer.get_train_dataloader():
        assert len(batch["input_ids"]) == 1 and "cu_seq_lens_q" in batch and "attention_mask" not in batch


@pytest.mark.parametrize(
    "model_type, shape",
    [
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),  # takes no heed of positions that begin again
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),  # needs a package for that
    ],
)
def test_models_whose_packed_conversations_see_each_other_are_refused(folder, tokenizer, tmp_path, model_type, shape):
    shape |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"vocab_size": len(tokenizer), "max_position_embeddings": 2 * LENGTH, "eos_token_id": 0, "pad_token_id": 1}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    changed = {"model_name_or_path": tmp_path / "model", "output_dir": tmp_path / "out", "max_steps": 1}
    with pytest.raises(SystemExit) as stop:
        run_command("sft", *options(folder, **changed))
    assert "set packing to false" in stop.value.code and len(stop.value.code.splitlines()) == 1
    assert not list((tmp_path / "out").glob("*"))
    run_command("sft", *options(folder, **changed, packing="false"))


def test_held_out_scores_do_not_depend_on_packing(folder, tmp_path, monkeypatch):
    """A batch has several conversations in each of several rows, all of them in one, or one in each row."""
    found = [trainer_on(folder, "complexity-deep", output_dir=tmp_path / "rows").evaluate()]
    apart = {"packing": "false", "batch_eval_metrics": "true"}  # the latter is of no use here, and does no harm
    found.append(trainer_on(folder, "complexity-deep", output_dir=tmp_path / "apart", **apart).evaluate())
    monkeypatch.setattr(ChatTrainer, "takes_packed_rows", lambda _: False)
    found.append(trainer_on(folder, "complexity-deep", output_dir=tmp_path / "one row").evaluate())
    for name in ("eval_nll_per_token", "eval_stderr", "eval_perplexity"):
        assert [scores[name] for scores in found] == pytest.approx([found[1][name]] * 3, rel=1e-6), name


@pytest.fixture(scope="module")
def with_a_router(folder, tokenizer):
    """A tiny model that learns to route: several packed rows become one, so that its loss counts no padding."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    shape |= {"vocab_size": len(tokenizer), "max_position_embeddings": 2 * LENGTH, "router_aux_loss_coef": 0.01}
    config = AutoConfig.for_model("qwen3_moe", **shape, eos_token_id=0, pad_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "qwen3_moe")
    tokenizer.save_pretrained(folder / "qwen3_moe")
    return folder / "qwen3_moe"


def test_held_out_scores_of_two_processes_are_those_of_one(folder, with_a_router, tmp_path):
    """Though rows of the first batch fill up the last one, and several packed rows have become one."""
    one = trainer_on(folder, "qwen3_moe", output_dir=tmp_path / "one", per_device_eval_batch_size=4)
    assert len(one.eval_dataset) % 8 and len(next(iter(one.get_eval_dataloader()))["input_ids"]) == 1
    expected = one.evaluate()
    listed = options(folder, model_name_or_path=with_a_router, output_dir=tmp_path / "two", learning_rate=0)
    listed += ["--max-steps", "1", "--save-strategy", "no", "--per-device-eval-batch-size", "4"]
    with meeting_place() as meeting:
        shared = {**os.environ, **meeting, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "WORLD_SIZE": "2"}
        processes = [
            subprocess.Popen(
                [sys.executable, str(REPOSITORY / "scripts" / "sft.py"), *listed],
                env=shared | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            )
            for rank in "01"
        ]
        assert [process.wait(300) for process in processes] == [0, 0]
    log = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"]
    for entry in (entry for entry in log if "eval_loss" in entry):
        for name in ("eval_nll_per_token", "eval_stderr"):
            assert entry[name] == pytest.approx(expected[name], rel=1e-5), name


def test_a_model_with_a_router_is_resumed(folder, with_a_router, tmp_path):
    """With its experts, which it saves one by one, and with another weight of the router's loss."""
    changed = {"model_name_or_path": with_a_router, "router_aux_loss_coef": 0.0, "max_steps": 4, "save_steps": 2}
    run_command("sft", *options(folder, output_dir=tmp_path, **changed))
    weights = load_file(tmp_path / "model.safetensors")
    for path in (tmp_path / "checkpoint-4", tmp_path / "model.safetensors"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_command("sft", *options(folder, output_dir=tmp_path, **changed))
    resumed = load_file(tmp_path / "model.safetensors")
    assert resumed.keys() == weights.keys() and "model.layers.0.mlp.experts.1.down_proj.weight" in weights
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    with pytest.raises(SystemExit, match=r"router_aux_loss_coef = 0\.0, but it is now 0\.1"):
        run_command("sft", *options(folder, output_dir=tmp_path, **{**changed, "router_aux_loss_coef": 0.1}))


def test_too_few_rows_for_a_whole_batch(folder, tmp_path):
    """Without a step, the model would be saved as it was."""
    changed = {"dataloader_drop_last": "true", "per_device_train_batch_size": 64, "output_dir": tmp_path / "out"}
    with pytest.raises(SystemExit, match="a batch has 64 rows, and there are"):
        run_command("sft", *options(folder, **changed))


def test_compiled_run_reports_what_another_does(folder, finished, tmp_path):
    """Also between evaluations."""
    changed = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no"}
    run_command(
        "sft", *options(folder, output_dir=tmp_path, torch_compile="true", torch_compile_backend="eager", **changed)
    )
    logs = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in (tmp_path, finished("full"))]
    found, expected = ([entry for entry in log if "loss" in entry] for log in logs)
    for entry, other in zip(found, expected[:2], strict=True):
        assert entry.keys() == other.keys() and entry["num_tokens"] == other["num_tokens"]


def test_academic_recipe_on_another_architecture(folder, tmp_path):
    rows = {name: row for name, (row, _, _) in ACADEMIC.items()} | {"SciQ": SCIQ}
    names = ["MMLU", "SciQ", "HellaSwag", "ARC", "WinoGrande", "ARC"]  # in the order of the recipe
    sources = [write_jsonl(tmp_path / f"{i}.jsonl", [rows[name]] * (i + 3)) for i, name in enumerate(names)]
    changed = {"sources": sources, "max_steps": 2, "max_length": 2 * LENGTH, "model_name_or_path": folder / "llama"}
    run_command("sft", *options(folder, "sft_academic", **changed, output_dir=tmp_path / "out"))
    recorded = json.loads((tmp_path / "out" / "sft_data.json").read_text())
    assert [(r["name"], r["format"], r["weight"], r["rows"]) for r in recorded] == [
        (str(source), name, weight, index + 3)
        for index, (source, name, weight) in enumerate(zip(sources, names, [40, 15, 15, 12, 10, 8]))
    ]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "LlamaForCausalLM"


def without_marks(template: str) -> str:
    return template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


def marks_before_the_end(template: str) -> str:
    said = '{{- "<|im_end|>" -}}\n        {%- endgeneration -%}'
    assert said in template
    return template.replace(said, '{%- endgeneration -%}{{- "<|im_end|>" -}}')


@pytest.mark.parametrize(
    "change, sentence",
    [
        (without_marks, "no {% generation %} marks"),
        (marks_before_the_end, "never learn to stop"),
        (lambda template: template + "{% if %}", "cannot be rendered"),
    ],
)
def test_unusable_templates(folder, tokenizer, tmp_path, change, sentence):
    (tmp_path / "template.jinja").write_text(change(tokenizer.chat_template))
    with pytest.raises(SystemExit) as stop:
        run_command(
            "sft", *options(folder, output_dir=tmp_path / "out", chat_template_path=tmp_path / "template.jinja")
        )
    assert sentence in stop.value.code and len(stop.value.code.splitlines()) == 1
    assert not (tmp_path / "out").exists()


LONG = {"messages": chat("Count.", " ".join(map(str, range(200))))}
BAD_ROWS = {
    "no rows": ([], "is empty"),
    "no messages": ([{"text": "Hello"}], "has no column 'messages', nor 'prompt' and 'completion'"),
    "the assistant starts": ([*exchanges(2), {"messages": chat("a", "b")[1:]}], "Row 2 of "),
    "nobody answers": ([{"messages": chat("Hello")}], "the assistant says nothing"),
    "no turns": ([*exchanges(1), {"messages": []}], "it has no messages"),
    "no text": ([*exchanges(1), {"messages": [{"role": "user", "content": None}]}], "Row 1 of "),
    "another shape": ([{"messages": "Hello"}], "its messages are not a list"),
    "no such answer": (
        [{**ACADEMIC["ARC"][0], "answerKey": "Z"}],
        "a value of answerKey, choices, question is missing",
    ),
    "a number": ([{"instruction": 3, "output": "b"}], "a value of instruction, output is missing, or not what this"),
    "parts": ([{"messages": [{"role": "user", "content": [{"type": "text"}]}]}], "message 0 is not text, but a list"),
    "too long": ([*exchanges(2), LONG], "1 of 3 conversations"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_unusable_conversations(folder, tmp_path, name):
    rows, sentence = BAD_ROWS[name]
    changed = {"sources": write_jsonl(tmp_path / "rows.jsonl", rows), "output_dir": tmp_path / "out"}
    with pytest.raises(SystemExit) as stop:
        run_command("sft", *options(folder, **changed, drop_long_conversations="false"))
    assert sentence in stop.value.code and len(stop.value.code.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_long_conversations_are_left_out_whole(tokenizer, tmp_path):
    source = str(write_jsonl(tmp_path / "rows.jsonl", [*exchanges(2), LONG, *exchanges(5)[2:]]))
    rows, record = load_conversations(source, ChatEncoder(tokenizer), LENGTH, drop_long=True)
    assert rows["messages"][:] == [row["messages"] for row in exchanges(5)] and record["too_long"] == 1


BAD_OPTIONS = {
    "no file": ({"sources": "nowhere/*.jsonl"}, "No file matches the source 'nowhere/*.jsonl'."),
    "no source": ({"sources": "nowhere"}, "Unknown source 'nowhere'"),
    "every row held out": ({"validation_sources": None, "held_out_fraction": 1}, "is left to train on"),
    "no row held out": ({"validation_sources": None, "held_out_fraction": 0}, "No conversation is held out"),
    "every row too long": ({"max_length": 8}, "holds no conversation of at most 8 tokens"),
    "more weights than sources": ({"source_weights": [1, 2]}, "1 sources need as many"),
    "longer than the model": ({"max_length": 4096}, f"more than the model's {2 * LENGTH} positions"),
    "packing that leaks": ({"packing_strategy": "wrapped"}, "lets them see each other"),
    "held-out text that leaks": ({"packing": "false", "eval_packing": "true"}, "held-out conversations see each"),
    "rows without padding or packing": ({"packing": "false", "padding_free": "true"}, "padding_free without packing"),
    "weights rounded by an evaluation": ({"bf16_full_eval": "true"}, "round the weights themselves"),
    "no model": ({"model_name_or_path": "nowhere"}, "'nowhere'"),
    "no tokenizer": ({"tokenizer": "nowhere"}, "There is no tokenizer at 'nowhere'"),
    "no folder of weights": (
        {"model_name_or_path": "no/such/folder", "tokenizer": "{folder}/llama"},
        "'no/such/folder' cannot be loaded: there is no such folder",
    ),
    "broken weights": ({"model_name_or_path": "broken"}, "'broken' cannot be loaded: "),
    "broken tokenizer": ({"tokenizer": "broken tokenizer"}, "There is no tokenizer at 'broken tokenizer'"),
    "dropout on the experts": ({**LORA, "lora_dropout": 0.1}, "--lora-dropout 0"),
    "no such layer": ({**LORA, "lora_target_modules": "out_proj"}, "no 'out_proj' for LoRA"),
    "no such weights": ({**LORA, "lora_target_parameters": ["experts.down_proj", "w1"]}, "no 'w1' for LoRA"),
    "no such module": ({**LORA, "lora_modules_to_save": ["lm_heat"]}, "no 'lm_heat' for lora_modules_to_save"),
    "nothing to offload from": ({"activation_offloading": "true"}, "this run has no GPU"),
    "a router's loss": ({"router_aux_loss_coef": 0.01}, "a token-routed model has none"),
    "no rows in a step": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
    "no length": ({"max_length": 0}, "max_length must be at least 1, but is 0."),
    "no such logger": ({"report_to": "abacus"}, "--report-to abacus cannot be used"),
    "no network": ({"push_to_hub": "true"}, "--push-to-hub does not reach the Hub"),
    "a read-only folder": ({"output_dir": "/proc/run"}, "--output-dir '/proc/run' cannot be written"),
    "nothing to merge": ({"merge_adapter": "true"}, "--merge-adapter is for LoRA"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_unusable_options(folder, tmp_path, monkeypatch, name):
    changed, sentence = BAD_OPTIONS[name]
    changed = {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in changed.items()}
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "llama", "broken")
    Path("broken/model.safetensors").write_bytes(b"cut")
    Path("broken tokenizer").mkdir()
    Path("broken tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        run_command("sft", *options(folder, **{"output_dir": tmp_path / "out", **changed}))
    assert sentence in stop.value.code and len(stop.value.code.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_model_is_not_written_over(folder, tmp_path):
    shutil.copytree(folder / "llama", tmp_path / "model")
    with pytest.raises(SystemExit, match=r"holds 'config\.json', which no run of this script wrote"):
        run_command("sft", *options(folder, output_dir=tmp_path / "model"))


def parsed(*listed: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sft.py", *listed])
        return RecipeParser((FineTuningArguments, SFTConfig, ModelConfig), script.__doc__).parse()


@pytest.mark.parametrize("nothing", [[], ["[]"]])
def test_an_empty_list_on_the_command_line(folder, nothing):
    """For LoRA on a dense model, as the recipes say."""
    *_, model_args = parsed(*options(folder, **LORA), "--lora-target-parameters", *nothing, "--use-cpu", "true")
    assert model_args.lora_target_parameters == []


@pytest.mark.parametrize("recipe", ["sft_chat", "sft_academic"])
def test_recipes_warn_of_nothing_and_recompute_nothing(folder, recipe, recwarn):
    _, training_args, _ = parsed(*options(folder, recipe))
    assert training_args.gradient_checkpointing is False
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]
    name = "activation-checkpointing" if RENAMED else "gradient-checkpointing"
    assert parsed(*options(folder, recipe), f"--{name}", "true")[1].gradient_checkpointing is True


def test_perplexity_is_that_of_the_plain_cross_entropy(folder, tmp_path, capsys):
    """Though the training loss has smoothed labels, and conversations are packed."""
    changed = {"max_steps": 2, "label_smoothing_factor": 0.1, "output_dir": tmp_path / "out"}
    run_command("sft", *options(folder, **changed))
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    sums, counts = [], []
    for row in exchanges(90)[60:]:
        ids, mask = (torch.tensor([part]) for part in expected_tokens(tokenizer, row["messages"]))
        with torch.no_grad():
            log_probs = model.eval()(ids).logits[0, :-1].log_softmax(dim=-1)
        nll = -log_probs.gather(1, ids[0, 1:, None])[:, 0] * mask[0, 1:]
        sums.append(nll.sum().item())
        counts.append(mask.sum().item())
    expected = perplexity_scores(sums, counts)
    last = json.loads((tmp_path / "out" / "training_summary.json").read_text())["held_out"][-1]
    assert last["loss"] == pytest.approx(expected["nll_per_token"], rel=1e-4)
    assert last["loss_stderr"] == pytest.approx(expected["stderr"], rel=1e-3)
    shown = f"held-out perplexity {last['perplexity']:,.2f} ± {last['perplexity_stderr']:,.2f}"
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 'out'}: {shown}"


def test_the_router_of_another_model_is_left_its_loss(folder, tmp_path):
    """TRL weighs it; only a model whose experts are looked up has none."""
    trainer = trainer_on(folder, "llama", output_dir=tmp_path / "llama")
    assert not trainer.aux_loss_enabled
    ours = trainer_on(folder, "complexity-deep", output_dir=tmp_path / "ours")
    assert not ours.aux_loss_enabled and not getattr(ours.model.config, "output_router_logits", False)


def test_another_run_is_refused_on_resume(folder, finished, tmp_path):
    checkpoint = tmp_path / "checkpoint-9"
    shutil.copytree(finished("full") / "checkpoint-9", checkpoint)
    for changed, sentence in (
        ({"max_steps": 20}, "max_steps = 12, but it is now 20, and the learning-rate schedule spans all steps"),
        ({"learning_rate": 0.1}, "learning_rate = 0.02, but it is now 0.1"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type = cosine, but it is now linear"),
        ({"model_name_or_path": folder / "llama"}, "model_type = complexity-deep, but it is now llama"),
        ({"per_device_train_batch_size": 4}, "rows per step = 4, but it is now 8"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy = random, but it is now sequential"),
        ({"shuffle_dataset": "true"}, "shuffle_dataset = False, but it is now True"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            run_command("sft", *options(folder, output_dir=tmp_path, **changed))
    changed_model = tmp_path / "changed"
    shutil.copytree(folder / "complexity-deep", changed_model)
    config = json.loads((changed_model / "config.json").read_text())
    (changed_model / "config.json").write_text(json.dumps({**config, "dynamics_dt": 0.3}))
    with pytest.raises(SystemExit, match=r"dynamics_dt = 0.1, but it is now 0.3"):
        run_command("sft", *options(folder, output_dir=tmp_path, model_name_or_path=changed_model))
    state = json.loads((checkpoint / "sft_state.json").read_text())  # as before these were compared
    kept = ("model", "lora", "data", "tokens", "max_length", "packing", "rows per step", "seed")
    state["settings"] = {name: state["settings"][name] for name in kept}
    (checkpoint / "sft_state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    with pytest.raises(SystemExit, match="max_steps = 12, but it is now 20"):
        run_command("sft", *options(folder, output_dir=tmp_path, max_steps=20))
    run_command("sft", *options(folder, output_dir=tmp_path))
    assert_same_weights(tmp_path, finished("full"))


@pytest.mark.parametrize("option", [{"use_rslora": "true"}, {"lora_modules_to_save": "embed_tokens"}])
def test_another_adapter_is_refused_on_resume(folder, finished, tmp_path, option):
    shutil.copytree(finished("lora") / "checkpoint-9", tmp_path / "checkpoint-9")
    with pytest.raises(SystemExit, match=f"was written with {next(iter(option))} = "):
        run_command("sft", *options(folder, output_dir=tmp_path, **LORA, **option))


def test_vectors_do_not_decay(folder, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(ChatTrainer, "train", lambda trainer, **_: found.append(trainer.create_optimizer()))
    run_command("sft", *options(folder, output_dir=tmp_path, weight_decay=0.1))
    for group in found[0].param_groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] > 0}


def test_unknown_recipe_key(folder, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("learning_rat: 0.1\n")
    with pytest.raises(SystemExit) as stop:
        run_command(
            "sft",
            *[*options(folder)[2:], "--config", str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "out")],
        )
    (line,) = capsys.readouterr().err.splitlines()  # without pages of usage before it
    assert stop.value.code == 2 and line.startswith("sft.py: error: ") and "learning_rat" in line
    assert not (tmp_path / "out").exists()


def test_help_says_which_columns_are_taken(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and script.__doc__.splitlines()[-1] in printed
    for columns, _ in FORMATS.values():
        assert all(re.search(rf"\b{column.rstrip('23')}", printed) for column in columns), columns


def test_folders_of_other_runs_are_left_alone(folder, finished, tmp_path):
    with pytest.raises(SystemExit, match="output_dir is the folder of the model"):
        run_command("sft", *options(folder, output_dir=folder / "complexity-deep"))
    shutil.copytree(finished("full") / "checkpoint-12", tmp_path / "checkpoint-12")
    with pytest.raises(SystemExit, match="written with seed = 0, but it is now 1"):
        run_command("sft", *options(folder, output_dir=tmp_path, seed=1))
    with pytest.raises(SystemExit, match="is a LoRA adapter: merge it"):
        run_command("sft", *options(folder, output_dir=tmp_path / "out", model_name_or_path=finished("lora")))
