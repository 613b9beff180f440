"""The exported folder: its card says what the run's files say, its metadata is what the Hub reads, its snippets run."""

import base64
import copy
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData, parse_eval_result_entries
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.quantization_config import QuantizationMethod

from complexity_deep import ComplexityDeepForCausalLM
from complexity_deep.scripts import export_to_hub
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.text_sources import embedded_documents
from complexity_deep.workflow.data.tokenizer_training import train_bpe
from complexity_deep.workflow.publishing.exported_folder import STRANGER, python_snippets
from complexity_deep.workflow.publishing.model_card import TEMPLATE, write_card
from complexity_deep.workflow.publishing.run_reports import Run, is_hub_id
from complexity_deep.workflow.saved_model import load_model, load_tokenizer_of
from support import GOLDEN, REPOSITORY, outcome_of, run_command, tiny_config

TOKEN = "hf_" + "x" * 34
EVALUATION = {
    "model": "run",
    "revision": None,
    "date": "2031-02-03T04:05:06+00:00",
    "harness": {"name": "lm-eval", "version": "0.4.77"},
    "versions": {"torch": "2.99.0"},
    "dtype": "float32",
    "device": "a device of this test",
    "tasks": [
        {"task": "arc_easy", "metric": "acc", "value": 0.3137, "stderr": 0.0213, "random": 0.2509, "n": 2376}
        | {"num_fewshot": 0, "dataset": "allenai/ai2_arc", "note": "fine-tuned on arc, <all> of it"},
        {"task": "arc_easy", "metric": "acc_norm", "value": 0.3331, "stderr": 0.0217, "random": 0.2509, "n": 2376}
        | {"num_fewshot": 0, "dataset": "allenai/ai2_arc", "note": ""},
        {"task": "arc_challenge", "metric": "acc", "value": 0.2262, "stderr": None, "random": 0.25, "n": 1172}
        | {"num_fewshot": 0, "dataset": "arc_challenge_test.parquet", "note": ""},
        {"task": "winogrande", "metric": "acc", "value": 0.5185, "stderr": 0.014, "random": 0.5, "n": 1267}
        | {"num_fewshot": 5, "dataset": "winogrande_val.parquet", "hub_dataset": "allenai/winogrande", "note": ""},
    ],
    "perplexity": [
        {"corpus": "wikitext", "nll_per_token": 5.4321, "perplexity": 228.62, "bits_per_byte": 2.1987, "stderr": 0.0319}
        | {"tokens": 81234, "bytes": 290117, "documents": 62, "context": 128, "stride": 64, "dataset": "test.txt.gz"},
        {"corpus": "web", "nll_per_token": 3.21, "perplexity": 24.78, "bits_per_byte": 1.1, "stderr": 0.02, "tokens": 9}
        | {
            "bytes": 40,
            "documents": 2,
            "context": 128,
            "stride": 64,
            "dataset": "HuggingFaceFW/fineweb-edu:sample-10BT",
        },
    ],
}
ANALYSIS = {
    "verdict": {"label": "TRAINED", "text": "The experts carry learned structure (loss 6.789)."},
    "figures": {"expert_use.png": {"title": "Use of the experts", "caption": "Loss 7.531 with the next expert."}},
}
SFT_DATA = [
    {"name": "databricks/databricks-dolly-15k", "split": "train", "weight": 0.4375, "rows": 14713},
    {"name": "/home/somebody/private/chats.jsonl", "split": "train", "weight": 0.5625, "rows": 907},
]


def arguments(model: Path, **options) -> SimpleNamespace:
    defaults = {"repo_id": "somebody/small-model", "push": None, "public": False, "revision": "v1", "output_dir": None}
    defaults |= {"tokenizer": None, "license": "apache-2.0", "language": ["en"], "base_model": None, "datasets": []}
    return SimpleNamespace(**{"model": str(model), **defaults, **options})


def write_json(path: Path, value) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder that pretrain.py wrote: three steps of the tiny model on a few documents."""
    root = tmp_path_factory.mktemp("runs")
    documents = list(islice(embedded_documents(), 60))
    for index, text in enumerate(documents):
        (root / f"{index:02}.txt").write_text(text)
    train_bpe(iter(documents), vocab_size=280, model_max_length=64).save_pretrained(root / "tokenizer")
    shape = json.loads((REPOSITORY / "configs" / "tiny.json").read_text())
    (root / "shape.json").write_text(json.dumps({**shape, "vocab_size": None}))
    options = ["--model-config", root / "shape.json", "--tokenizer", root / "tokenizer", "--sources", root / "*.txt"]
    options += ["--row-length", 64, "--max-steps", 3, "--save-steps", 2, "--logging-steps", 1, "--monitor-steps", 1]
    options += ["--per-device-train-batch-size", 2, "--held-out-rows", 4, "--output-dir", root / "run"]
    options += ["--held-out-fraction", 0.2, "--learning-rate", 0.0123, "--report-to", "none", "--use-cpu", "true"]
    run_command("pretrain", *options)
    return root / "run"


@pytest.fixture
def chat_run(pretrained, tmp_path):
    """The same with every report that a fine-tuned, evaluated and analysed run has beside it."""
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    write_json(run / "sft_data.json", SFT_DATA)
    write_json(run / "evaluation" / "evaluation.json", EVALUATION)
    write_json(run / "analysis" / "analysis.json", ANALYSIS)
    for name in ("evaluation/evaluation.png", "analysis/expert_use.png"):
        shutil.copyfile(run / "loss_curve.png", run / name)
    return run


def card_of(run: Path, folder: Path, **options) -> str:
    """The card alone, without the checks in other processes."""
    model = load_model(run, dtype="auto")
    tokenizer = load_tokenizer_of(model, run)
    folder.mkdir()
    model.config.save_pretrained(folder)
    options = {"repo_id": "somebody/small-model", "revision": "v1", "license": "mit", "languages": ["en"], **options}
    write_card(folder, Run(run, run), model, tokenizer, is_published=False, **options)
    return (folder / "README.md").read_text()


@pytest.fixture
def no_checks(monkeypatch):
    monkeypatch.setattr(export_to_hub, "check_folder", lambda *args: None)


# The whole script ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(pretrained, tmp_path_factory):
    """What the command writes, with every check."""
    run = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(pretrained, run)
    write_json(run / "sft_data.json", SFT_DATA)
    write_json(run / "evaluation" / "evaluation.json", EVALUATION)
    options = [run, "--repo-id", "somebody/small-model", "--license", "apache-2.0", "--language", "en"]
    status, _, errors = outcome_of("export_to_hub", *options, "--base-model", "somebody/base")
    assert status == 0, errors
    for step in (
        "loading ",
        "writing weights",
        "the 2 snippets of its card are tried in a process without this package",
    ):
        assert step in errors, "a person sees what takes so long"
    return run.with_name("run-hub")


def test_the_folder_loads_and_the_snippets_run(exported, pretrained):
    names = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    assert {
        "modeling_complexity_deep.py",
        "LICENSE_CODE",
        "figures/loss_curve.png",
        "figures/expert_loads.png",
    } <= names
    assert not [name for name in names if re.search(r"checkpoint-|optimizer|training_args|trainer_state|\.pt$", name)]
    assert not list(exported.parent.glob(".*"))
    weights, found = load_file(pretrained / "model.safetensors"), load_file(exported / "model.safetensors")
    assert weights.keys() == found.keys() and all(torch.equal(weights[name], found[name]) for name in weights)
    card = (exported / "README.md").read_text()
    snippets = python_snippets(card)  # that they ran is why the folder is there
    assert len(snippets) == 2 and "apply_chat_template" in snippets[0]
    for snippet in snippets:
        assert snippet.count("revision=revision, trust_remote_code=True") == 2
        assert 'repo_id, revision = "somebody/small-model", "v1"' in snippet


def test_metadata_passes_the_classes_of_the_hub(exported):
    card = ModelCard.load(exported / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["language"] == ["en"] and data["base_model"] == "somebody/base"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["datasets"] == ["databricks/databricks-dolly-15k"]  # and not the local file
    assert data["tags"] == ["complexity-deep", "conversational"]
    again = ModelCardData(**yaml.safe_load(card.data.to_yaml()))
    assert again.to_dict() == data and again.eval_results == card.data.eval_results
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    expected = {(row["task"], row["metric"]): row["value"] for row in EVALUATION["tasks"]}
    del expected["arc_challenge", "acc"]  # of a file of unknown origin
    expected |= {("web", name): EVALUATION["perplexity"][1][name] for name in ("perplexity", "bits_per_byte")}
    assert found == expected
    types = {result.dataset_name: (result.dataset_type, result.dataset_config) for result in card.data.eval_results}
    assert types["web"] == ("HuggingFaceFW/fineweb-edu", "sample-10BT")
    assert all(is_hub_id(dataset) for dataset, _ in types.values())


@pytest.mark.parametrize("where", ["limit", "note"])
def test_results_of_the_first_documents_are_not_those_of_a_dataset(chat_run, tmp_path, where):
    """The card shows them with their note, and its metadata does not. An older report has nothing but the note."""
    evaluation = copy.deepcopy(EVALUATION)
    rows = [*evaluation["tasks"], *evaluation["perplexity"]]
    for row in rows[1:]:
        row["note"] = "only the first 3 documents of each task"
    if where == "limit":
        evaluation["limit"] = 3
    write_json(chat_run / "evaluation" / "evaluation.json", evaluation)
    card = card_of(chat_run, tmp_path / "limited")
    results = ModelCard(card).data.eval_results or []
    assert [(result.dataset_name, result.metric_type) for result in results] == [("arc_easy", "acc")] * (
        where == "note"
    )
    assert "only the first 3 documents" in card and "| arc_easy | acc_norm |" in card
    written = [
        entry for file in (tmp_path / "limited").glob(".eval_results/*") for entry in yaml.safe_load(file.read_text())
    ]
    assert len(written) == (where == "note")


def test_what_does_not_run_is_on_the_card_but_not_what_does_not_load(exported):
    points = yaml.safe_load((REPOSITORY / "hub_card" / "not_supported.yaml").read_text())
    card = (exported / "README.md").read_text()
    assert [f"- {point['text']}" in card for point in points] == [point["on_cards"] for point in points]


def test_eval_results_pass_the_classes_of_the_hub(exported):
    files = sorted((exported / ".eval_results").iterdir())
    assert [file.name for file in files] == [
        "arc_easy.yaml",
        "winogrande.yaml",
    ]  # arc_challenge is a file of unknown origin
    entries = [entry for file in files for entry in parse_eval_result_entries(yaml.safe_load(file.read_text()))]
    assert [(entry.task_id, entry.value) for entry in entries] == [
        ("arc_easy", 0.3137),
        ("arc_easy", 0.3331),
        ("winogrande", 0.5185),
    ]
    assert entries[0].dataset_id == "allenai/ai2_arc" and entries[0].date == EVALUATION["date"]
    assert "lm-eval 0.4.77" in entries[0].notes and "0.0213" in entries[0].notes and "fine-tuned" in entries[0].notes
    assert entries[2].dataset_id == "allenai/winogrande" and "file winogrande_val.parquet" in entries[2].notes


def test_a_published_folder_is_converted(published_folder, tmp_path):
    words = {f"w{index}": index for index in range(257)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w3", eos_token="w0", pad_token="w1")
    fast.save_pretrained(tmp_path / "tokenizer")
    output = tmp_path / "converted"
    options = {"tokenizer": str(tmp_path / "tokenizer"), "output_dir": str(output), "license": None}
    export_to_hub.main(arguments(published_folder, **options))
    native, published = (
        ComplexityDeepForCausalLM.from_pretrained(folder).eval() for folder in (output, published_folder)
    )
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(output / "model.safetensors")
    golden = load_file(GOLDEN / "v0.13-tiny" / "golden.safetensors")  # written by the published package
    with torch.no_grad():
        logits = native(golden["input_ids"]).logits
        assert torch.equal(logits, published(golden["input_ids"]).logits)
    assert (logits - golden["logits"]).abs().max() < 5e-5
    card = (output / "README.md").read_text()
    assert ModelCard(card).data.license == "cc-by-nc-4.0" and "does not change their licence" in card
    assert "without a change to what it computes" in card  # rows of zeros are nearly zero in our layout
    for heading in ("## Training", "## Evaluation", "## What the experts learned"):
        assert heading not in card  # nothing is known about them


# The card ------------------------------------------------------------------------------------------------------------


def test_every_fact_is_that_of_a_file(chat_run, tmp_path):
    card = card_of(chat_run, tmp_path / "first")
    summary = json.loads((chat_run / "training_summary.json").read_text())
    state = json.loads((chat_run / "trainer_state.json").read_text())
    last = [entry["eval_nll_per_token"] for entry in state["log_history"] if "eval_loss" in entry][-1]
    error = [entry["eval_stderr"] for entry in state["log_history"] if "eval_loss" in entry][-1]
    model = AutoModelForCausalLM.from_pretrained(chat_run)
    for shown in (
        *(f"{count:,}" for count in model.parameter_counts().values()),
        "| learning rate | 0.0123 |",
        f"| tokens | {summary['tokens']:,} |",
        f"| device | {summary['device']} |",
        f"| 3 | {last:.4f}&nbsp;±&nbsp;{error:.4f} | {math.exp(last):,.2f}&nbsp;±&nbsp;{math.exp(last) * error:.2f} |",
        "| arc_easy | acc | 31.4&nbsp;±&nbsp;2.1 | 25.1 | 2,376 | 0 |",
        "- arc_easy: fine-tuned on arc, &lt;all&gt; of it",
        "| arc_challenge | acc | 22.6 | 25.0 |",
        "lm-eval 0.4.77",
        "| wikitext | 228.62&nbsp;±&nbsp;7.29 | 5.4321&nbsp;±&nbsp;0.0319 | 2.1987 | 81,234 | 62 | 128 / 64 |",
        "loss 6.789",
        "Loss 7.531",
        "| 43.8 % | 14,713 |",
        "`chats.jsonl`",
    ):
        assert shown in card, shown
    assert "/home/somebody" not in card and str(chat_run) not in card and str(tmp_path) not in card
    assert "None" not in card and "Undefined" not in card

    evaluation, data, analysis = copy.deepcopy((EVALUATION, SFT_DATA, ANALYSIS))
    evaluation["tasks"][0]["value"], evaluation["harness"]["version"] = 0.7777, "0.5.1"
    evaluation["perplexity"][0]["perplexity"], data[0]["rows"] = 33.21, 4242
    analysis["verdict"]["text"], summary["device"], summary["tokens"] = "Loss 1.357.", "another device", 987654
    summary["options"]["learning_rate"] = 0.0456
    state["log_history"][-1]["eval_nll_per_token"] = 1.2345
    write_json(chat_run / "evaluation" / "evaluation.json", evaluation)
    write_json(chat_run / "sft_data.json", data)
    write_json(chat_run / "analysis" / "analysis.json", analysis)
    write_json(chat_run / "training_summary.json", summary)
    write_json(chat_run / "trainer_state.json", state)
    changed = card_of(chat_run, tmp_path / "second")
    for shown in (
        "77.8&nbsp;±&nbsp;2.1",
        "lm-eval 0.5.1",
        "33.21",
        "4,242",
        "1.357",
        "another device",
        "987,654",
        "0.0456",
        "1.2345",
    ):
        assert shown in changed and shown not in card, shown


def test_names_with_bars_do_not_break_tables(chat_run, tmp_path):
    evaluation, data = copy.deepcopy((EVALUATION, SFT_DATA))
    evaluation["perplexity"][0]["corpus"], data[1]["name"] = "data/<a>|b.txt", "/data/c|d.jsonl"
    write_json(chat_run / "evaluation" / "evaluation.json", evaluation)
    write_json(chat_run / "sft_data.json", data)
    card = card_of(chat_run, tmp_path / "card")
    assert "| &lt;a&gt;\\|b.txt | 228.62" in card and "| local files, `c\\|d.jsonl` | train |" in card


def test_every_figure_that_is_copied_is_shown(chat_run, tmp_path):
    shutil.copyfile(chat_run / "loss_curve.png", chat_run / "evaluation" / "long_context.png")
    card = card_of(chat_run, tmp_path / "card")
    for path in (tmp_path / "card" / "figures").iterdir():
        assert f"](figures/{path.name})" in card, path.name


def test_the_context_is_that_of_the_training(pretrained, tmp_path):
    """Its rows were half as long as the model's positions reach."""
    assert "is meant for a context of 64 tokens." in card_of(pretrained, tmp_path / "card")


def test_a_dense_model_has_no_heading_of_experts(tmp_path, pretrained):
    run = tmp_path / "run"
    ComplexityDeepForCausalLM(tiny_config(vocab_size=280, num_experts=1)).save_pretrained(run)
    AutoTokenizer.from_pretrained(pretrained).save_pretrained(run)
    write_json(run / "analysis" / "analysis.json", {**ANALYSIS, "figures": {}})
    card = card_of(run, tmp_path / "card")
    assert "## Analysis" in card and "What the experts learned" not in card


def test_no_number_is_typed_into_the_template():
    text = re.sub(r"{#.*?#}|{%.*?%}|{{.*?}}", "", TEMPLATE.read_text(), flags=re.DOTALL)
    text = re.sub(r"^```python\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    numbers = [line for line in text.splitlines() if re.search(r"\d", line.replace("Apache-2.0", ""))]
    assert not numbers


def test_sections_without_facts_are_left_out(pretrained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    card = card_of(run, tmp_path / "all")
    assert "### Procedure" in card and "A causal language model" in card and "apply_chat_template" not in card
    assert "## Evaluation" not in card and "not evaluated on benchmarks" in card and "model-index" not in card
    for name in ("training_summary.json", "trainer_state.json", "loss_curve.png", "expert_loads.png"):
        (run / name).unlink()
    card = card_of(run, tmp_path / "none")
    assert "## Training" not in card and "figures/" not in card and "It has seen" not in card


def test_the_error_of_an_old_transformers_is_that_of_the_shipped_code(monkeypatch):
    """It comes before whatever the old release lacks."""
    monkeypatch.setattr("transformers.__version__", "4.40.0")
    with pytest.raises(ImportError) as refused:
        runpy.run_path(str(REPOSITORY / "configuration_complexity_deep.py"))
    told = str(refused.value).split(" 5.")[0]
    assert told == "Complexity-Deep needs transformers" and f"`ImportError: {told}`" in TEMPLATE.read_text()


def test_the_card_names_every_part_of_the_architecture(pretrained, tmp_path):
    """Of a model without mu and dynamics, and with what the study of the architecture found better."""
    more = {"routing": "random", "routing_per_layer": True, "shared_expert_intermediate_size": 16}
    more |= {"value_embedding_layers": [1], "use_mu_guidance": False, "use_dynamics": False, "use_mu_routing": False}
    ComplexityDeepForCausalLM(tiny_config(vocab_size=280, **more)).save_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(pretrained).save_pretrained(tmp_path / "run")
    card = card_of(tmp_path / "run", tmp_path / "card")
    for part in (
        "looked up in a table by the token's id, and every layer has its own table.",
        "Shared expert",
        "in 1 of",
    ):
        assert part in card
    assert "| routing table | random, one for each layer |" in card and "INL dynamics" not in card


def test_a_quantized_model_needs_its_quantizer(pretrained, tmp_path):
    model, tokenizer = load_model(pretrained, dtype="auto"), AutoTokenizer.from_pretrained(pretrained)
    model.config.save_pretrained(tmp_path)
    model.config.quantization_config = SimpleNamespace(quant_method=QuantizationMethod.TORCHAO)
    options = {"repo_id": "somebody/small-model", "revision": "v1", "license": "mit", "languages": ["en"]}
    write_card(tmp_path, Run(pretrained, pretrained), model, tokenizer, is_published=False, **options)
    card = (tmp_path / "README.md").read_text()
    assert '"transformers>=5.17" "torchao"\n' in card
    assert "| dtype of the weights | float32, where torchao did not quantize them |" in card


def test_another_architecture(pretrained, tmp_path, no_checks):
    run = tmp_path / "llama"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=280, **shape))
    model.save_pretrained(run)
    AutoTokenizer.from_pretrained(pretrained).save_pretrained(run)
    export_to_hub.main(arguments(run))
    card = (tmp_path / "llama-hub" / "README.md").read_text()
    assert f"{model.num_parameters():,} parameters." in card and "`llama`" in card
    assert "Complexity" not in card and "trust_remote_code" not in card and "Apache" not in card


def test_a_merged_adapter(chat_run, tmp_path, no_checks):
    run = tmp_path / "lora"
    (run / "merged").mkdir(parents=True)
    for path in chat_run.iterdir():
        is_report = path.name.startswith(("train", "evaluation", "sft_data", "loss_curve"))
        path.rename((run if is_report else run / "merged") / path.name)
    (run / "adapter_config.json").write_text("{}")
    (run / "adapter_model.safetensors").write_text("not of the model")
    export_to_hub.main(arguments(run))
    card = (tmp_path / "lora-hub" / "README.md").read_text()
    assert "### Procedure" in card and "arc_easy" in card and "figures/loss_curve.png" in card
    assert not list((tmp_path / "lora-hub").glob("adapter*"))


def test_ids_of_the_hub_and_paths():
    assert is_hub_id("HuggingFaceFW/fineweb-edu") and is_hub_id("gsm8k-org/v1.1")
    for path in ("/data/x", "data/x.parquet", "embedded", "data/*.txt", "./run", "../run", "x/y/z", "a/b.jsonl.gz"):
        assert not is_hub_id(path)
    assert not is_hub_id("tests/something") or not Path("tests").exists()


# Bad input -----------------------------------------------------------------------------------------------------------


def refusal(run: Path, **options) -> str:
    """The sentence, after asserting that nothing was written."""
    before = {path for path in run.parent.rglob("*")}
    with pytest.raises(InputError) as error:
        export_to_hub.main(arguments(run, **options))
    assert {path for path in run.parent.rglob("*")} == before
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_no_model(tmp_path, pretrained):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(tmp_path / "empty")
    assert "There is no folder" in refusal(tmp_path / "absent")
    shutil.copytree(pretrained, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "checkpoint-*"))
    assert "no weights" in refusal(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").write_bytes((pretrained / "model.safetensors").read_bytes()[:1000])
    assert "cannot be read" in refusal(tmp_path / "bare")
    shutil.copyfile(pretrained / "model.safetensors", tmp_path / "bare" / "model.safetensors")
    config = json.loads((pretrained / "config.json").read_text())
    for name, value in (("hidden_size", "64"), ("hidden_size", 128), ("model_type", "no-such-model")):
        write_json(tmp_path / "bare" / "config.json", {**config, name: value, "auto_map": None})
        assert "not a causal language model that loads" in refusal(tmp_path / "bare")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "--merge-adapter" in refusal(tmp_path / "adapter")


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("evaluation/evaluation.json", "", "not readable JSON"),
        ("evaluation/evaluation.json", "{}", "holds no harness"),
        ("evaluation/evaluation.json", json.dumps({**EVALUATION, "tasks": [], "perplexity": []}), "holds no results"),
        ("evaluation/evaluation.json", json.dumps({**EVALUATION, "tasks": [{"task": "x"}]}), "not as our scripts"),
        ("training_summary.json", "[]", "holds no held_out"),
        ("sft_data.json", "[]", "holds no results"),
        ("analysis/analysis.json", '{"verdict": {}}', "holds no figures"),
    ],
)
def test_unusable_report(chat_run, name, content, sentence):
    (chat_run / name).write_text(content)
    assert sentence in refusal(chat_run)


def test_wrong_options(chat_run, published_folder, tmp_path, monkeypatch):
    assert "--license" in refusal(chat_run, license=None)
    assert "owner/name" in refusal(chat_run, repo_id="name")
    assert "not a repository name" in refusal(chat_run, repo_id="some body/name")
    assert "not a tag" in refusal(chat_run, revision='v1", "')
    assert "--public" in refusal(chat_run, public=True)
    assert "not an ISO code" in refusal(chat_run, language=["English"])
    for license in ("Apache 2.0", "mit: yes", ""):
        assert "not as the Hub spells a licence" in refusal(chat_run, license=license)
    assert "--base-model '/runs/base' is not an id" in refusal(chat_run, base_model="/runs/base")
    assert "--datasets 'data/*.txt' is not an id" in refusal(chat_run, datasets=["a/b", "data/*.txt"])
    (tmp_path / "file").touch()
    assert "is a file" in refusal(chat_run, output_dir=str(tmp_path / "file" / "out"))
    assert "cannot be written" in refusal(chat_run, output_dir="/proc/out")
    (tmp_path / "there").mkdir()
    assert "exists already" in refusal(chat_run, output_dir=str(tmp_path / "there"))
    assert "--tokenizer" in refusal(published_folder, license=None)
    tokenizer = str(chat_run)
    assert "stay under cc-by-nc-4.0" in refusal(published_folder, tokenizer=tokenizer)
    assert "280 tokens, but the model only 257" in refusal(published_folder, tokenizer=tokenizer, license=None)


def test_a_snippet_that_fails(chat_run, tmp_path):
    (tmp_path / "package.py").write_text("import complexity_deep")
    command = [sys.executable, "-P", "-c", STRANGER, str(tmp_path / "package.py")]
    assert "import of complexity_deep halted" in subprocess.run(command, capture_output=True, text=True).stderr
    (chat_run / "chat_template.jinja").write_text("{{ raise_exception('no chat today') }}")
    message = refusal(chat_run)
    assert "Snippet 1" in message and "no chat today" in message and "nothing was written" in message


# The upload ----------------------------------------------------------------------------------------------------------


class FakeHub(BaseHTTPRequestHandler):
    """The few addresses of the Hub's API that an upload asks for; `calls` has what it was sent."""

    repos: ClassVar[dict] = {}
    calls: ClassVar[list] = []

    def log_message(self, *args):
        pass

    def answer(self, value, status=200, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        repo = next((repo for repo in self.repos if f"/api/models/{repo}" in self.path), None)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid token"}, status=401)
        elif self.path == "/api/whoami-v2":
            self.answer({"name": "somebody", "type": "user", "orgs": []})
        elif repo is None:
            self.answer({"error": "Repository not found"}, status=404, X_Error_Code="RepoNotFound")
        elif self.path.endswith("/refs"):
            tags = [
                {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": "0" * 40} for tag in self.repos[repo]["tags"]
            ]
            self.answer({"branches": [], "converts": [], "tags": tags})
        else:
            self.answer({"id": repo, "private": self.repos[repo]["private"], "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.calls.append((self.path, body))
        if self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self.answer({"url": "https://huggingface.co/somebody/pushed", "id": "somebody/pushed"})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.answer({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        elif "/commit/" in self.path and self.repos.get("full"):
            self.answer({"error": "No space left"}, status=403)
        else:
            self.answer(
                {
                    "commitUrl": "https://huggingface.co/somebody/pushed/commit/" + "0" * 40,
                    "commitOid": "0" * 40,
                    "hookOutput": "",
                }
            )

    @classmethod
    def sent(cls, part: str) -> list[str]:
        return [body for path, body in cls.calls if part in path]


@pytest.fixture
def hub(monkeypatch, no_checks):
    """A local Hub that export_to_hub.py talks to over HTTP."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(export_to_hub, "HfApi", lambda: HfApi(endpoint=f"http://127.0.0.1:{server.server_port}"))
    monkeypatch.setattr(FakeHub, "repos", {})
    monkeypatch.setattr(FakeHub, "calls", [])
    yield FakeHub
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("public", [False, True])
def test_push(chat_run, hub, public, capsys):
    (chat_run / "optimizer.pt").write_text("x")
    export_to_hub.main(arguments(chat_run, push="somebody/pushed", repo_id=None, public=public))
    (created,) = map(json.loads, hub.sent("/api/repos/create"))
    assert created["name"] == "pushed" and created["organization"] == "somebody"
    assert (created.get("private"), created.get("visibility")) in (
        (not public, None),
        (None, "public" if public else "private"),
    )
    (validated,) = map(json.loads, hub.sent("/api/validate-yaml"))
    folder = chat_run.with_name("run-hub")
    assert validated["content"] == (folder / "README.md").read_text()
    (commit,) = hub.sent("/commit/main")
    lines = [json.loads(line) for line in commit.splitlines()]
    uploaded = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    written = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert uploaded == written
    assert {".eval_results/arc_easy.yaml", "README.md", "model.safetensors", "modeling_complexity_deep.py"} <= set(
        uploaded
    )
    assert not [name for name in uploaded if re.search(r"checkpoint-|optimizer|training_args|trainer_state", name)]
    assert len(hub.sent("/tag/")) == 1 and "v1" in hub.sent("/tag/")[0]
    assert ("private" in capsys.readouterr().out) != public


def test_push_is_refused_before_the_work(chat_run, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(export_to_hub, "load_model", lambda *args: pytest.fail("the work began"))
    hub.repos |= {"somebody/open": {"private": False, "tags": []}, "somebody/tagged": {"private": True, "tags": ["v1"]}}
    push = {"push": "somebody/new", "repo_id": None}
    assert "is public" in refusal(chat_run, **{**push, "push": "somebody/open"})
    assert "has a tag 'v1'" in refusal(chat_run, **{**push, "push": "somebody/tagged"})
    hub.repos["somebody/closed"] = {"private": True, "tags": []}
    assert "is private" in refusal(chat_run, **{**push, "push": "somebody/closed", "public": True})
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not let us push" in refusal(chat_run, **push)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(export_to_hub, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))  # nobody listens
    assert "Connection refused" in refusal(chat_run, **push)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "offline" in refusal(chat_run, **push)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    assert "hf auth login" in refusal(chat_run, **push)
    assert not hub.calls


def test_an_upload_that_fails_leaves_the_folder(chat_run, hub):
    hub.repos["full"] = True
    with pytest.raises(InputError, match=r"hf upload somebody/pushed .*run-hub"):
        export_to_hub.main(arguments(chat_run, push="somebody/pushed", repo_id=None))
    assert (chat_run.with_name("run-hub") / "README.md").exists() and not hub.sent("/tag/")
