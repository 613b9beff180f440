"""Monitors, balanced routing, token budgets and the shipped recipes of scripts/pretrain.py."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from trl import TrlParser

from complexity_deep.decode_graph_complexity_deep import state_of
from complexity_deep.routing_complexity_deep import balanced_routing
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.packed_rows import tokenize
from complexity_deep.workflow.data.text_sources import is_held_out, load_sources
from complexity_deep.workflow.training import routing_balance
from complexity_deep.workflow.training.architecture_monitors import (
    COMPONENTS,
    component_of,
    gradient_norms,
    read_monitors,
)
from complexity_deep.workflow.training.new_model import load_tokenizer, new_model
from complexity_deep.workflow.training.pretraining_arguments import PretrainingArguments
from pretraining import ROW, small_texts, write_recipe
from support import REPOSITORY, random_ids, run_command, tiny_model

RECIPES = sorted(path.name for path in (REPOSITORY / "recipes").glob("*.yaml") if not path.name.startswith("sft_"))


@pytest.fixture(scope="module")
def texts():
    return small_texts()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small recipe and what it needs, and the shape of a small Llama."""
    folder = tmp_path_factory.mktemp("monitors")
    watching = {"max_grad_norm": 0.1, "logging_steps": 1, "monitor_steps": 2}
    write_recipe(folder, {"use_mu_routing": True}, **watching)
    llama = {"model_type": "llama", "vocab_size": None, "hidden_size": 32, "intermediate_size": 64}
    llama.update(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128)
    (folder / "llama.json").write_text(json.dumps(llama))
    return folder


def pretrain(folder: Path, *options: object) -> None:
    run_command("pretrain", "--config", folder / "recipe.yaml", *options)


def log_of(run: Path) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def run(folder):
    """A run with balanced routing over 5 steps' tokens, and a little more so that a sixth is needed."""
    run = folder / "run"
    options = ("--routing", "balanced", "--lr-scheduler-type", "constant")  # which lets a run be made longer
    pretrain(folder, "--output-dir", run, "--max-tokens", 5 * 8 * ROW + 1, *options)
    return run


def test_monitors_are_logged_and_gradient_norms_add_up(run):
    log = log_of(run)
    monitored = {entry["step"]: entry for entry in log if "expert_imbalance/layer_0" in entry}
    assert list(monitored) == [2, 4, 6], "every 2 steps, and max_tokens gives 6"
    totals = {entry["step"]: entry["grad_norm"] for entry in log if "loss" in entry}
    for step, entry in monitored.items():
        for layer in range(2):
            tokens = [entry[f"expert_tokens/layer_{layer}/expert_{expert}"] for expert in range(4)]
            assert sum(tokens) == 4 * ROW
            assert entry[f"expert_imbalance/layer_{layer}"] == pytest.approx(max(tokens) / ROW)
            assert entry[f"mu_rerouted/layer_{layer}"] == 0.0  # the router of a new model is zero
            assert entry[f"velocity_rms/layer_{layer}"] > 0 and entry[f"velocity_clamped/layer_{layer}"] == 0.0
        norms = {name: entry[f"gradient_norm/{name}"] for name in COMPONENTS}
        assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(totals[step], rel=1e-4)
        assert totals[step] > 0.1, "the test is of norms before clipping"


def test_the_report_shows_loads_and_both_tables(run):
    summary = (run / "training_summary.md").read_text()
    assert "![tokens per expert](expert_loads.png)" in summary
    assert (run / "expert_loads.png").read_bytes()[:4] == b"\x89PNG"
    for table in ("modulo", "balanced"):
        assert f"| expert imbalance {table} | total " in summary
    assert AutoConfig.from_pretrained(run).routing == "balanced"


def test_table_is_counted_on_training_documents_and_kept_on_resume(folder, run, texts, monkeypatch):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    documents = tokenize(tokenizer, [text for text in texts if not is_held_out(text, 0.2)])
    counts = Counter(token for document in documents for token in document)
    expected = torch.tensor([counts[token] for token in range(300)])
    stream = load_sources([f"{folder}/text/*.jsonl"])
    assert torch.equal(routing_balance.count_tokens(stream, tokenizer, 300, 20e6, 0.2), expected)
    monkeypatch.setattr(routing_balance, "TOKENIZED_TOGETHER", 8)
    assert 100 <= routing_balance.count_tokens(stream, tokenizer, 300, 100, 0.2).sum() < expected.sum()
    table = balanced_routing(expected, 4)
    assert torch.equal(load_file(run / "model.safetensors")["model.token_to_expert"], table)

    def count_again(*arguments):
        raise AssertionError("counted again")

    monkeypatch.setattr(routing_balance, "count_tokens", count_again)
    endless = ("--output-dir", run, "--lr-scheduler-type", "constant")
    pretrain(folder, *endless, "--max-tokens", 7 * 8 * ROW, "--routing", "balanced")
    assert log_of(run)[-1]["step"] == 7
    assert torch.equal(load_file(run / "model.safetensors")["model.token_to_expert"], table)
    with pytest.raises(SystemExit, match="was written with routing = balanced, but it is now modulo"):
        pretrain(folder, *endless, "--max-tokens", 7 * 8 * ROW)


def test_imbalance_by_hand():
    table = torch.tensor([0, 0, 1])
    rows = torch.tensor([[0, 1, 2, 2], [0, 1, 0, 1], [2, 2, 2, 2], [2, 2, 0, 2]])
    total, mean, worst = routing_balance.imbalance(table, 2, rows, rows_per_batch=2)  # 6 + 2, then 1 + 7
    assert (total, mean, worst) == pytest.approx((9 / 8, (1.5 + 1.75) / 2, 1.75))


def test_imbalance_of_a_table_for_each_layer():
    tables = torch.tensor([[0, 0, 1], [1, 0, 1]])
    rows = torch.tensor([[0, 1, 2, 2], [0, 1, 0, 1]])
    total, mean, worst = routing_balance.imbalance(tables, 2, rows, rows_per_batch=1)  # 6 + 2, and 3 + 5
    assert (total, mean, worst) == pytest.approx(((1.5 + 1.25) / 2, (1 + 2 + 1.5 + 1) / 4, 2))


def test_a_table_for_each_layer_and_many_experts(folder):
    config = json.loads((folder / "model.json").read_text())
    config |= {"num_experts": 32, "intermediate_size": 256, "routing": "random", "routing_per_layer": True}
    config |= {"shared_expert_intermediate_size": 8, "value_embedding_layers": [1]}
    (folder / "layers.json").write_text(json.dumps(config))
    run = folder / "layers"
    pretrain(folder, "--model-config", folder / "layers.json", "--output-dir", run, "--max-steps", 2)
    entry = next(entry for entry in log_of(run) if "mu_rerouted/layer_1" in entry)
    assert entry["mu_rerouted/layer_0"] == entry["mu_rerouted/layer_1"] == 0.0  # the router of a new model is zero
    assert "| expert imbalance random | total " in (run / "training_summary.md").read_text()
    assert (run / "expert_loads.png").is_file()


def test_counting_no_documents(folder):
    stream = load_sources([f"{folder}/text/*.jsonl"])
    with pytest.raises(InputError, match="no document to count"):
        routing_balance.count_tokens(stream, None, 300, 20e6, held_out_fraction=1.0)


def test_rerouted_and_clamped_shares():
    model = tiny_model(use_mu_routing=True).train()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.dynamics.controller_out.weight.zero_()
            layer.dynamics.mu_proj.weight.zero_()
            layer.dynamics.mu.fill_(1e4)  # pulls every velocity to the limit ...
            layer.mlp.mu_router.weight.zero_()[0] = 1.0  # ... and every token to expert 0
    ids = random_ids(3, 16)
    state, batch = state_of(model), {"input_ids": ids, "position_ids": torch.arange(16).expand(3, 16)}
    measured = read_monitors(model, batch)
    assert state_of(model) == state  # with hooks left behind, no training step would be replayed any more
    assert read_monitors(model, batch) == measured
    assert model.training
    moved = (model.model.token_to_expert[ids] != 0).float().mean().item()
    for layer in range(3):
        assert [measured[f"expert_tokens/layer_{layer}/expert_{expert}"] for expert in range(4)] == [48, 0, 0, 0]
        assert measured[f"expert_imbalance/layer_{layer}"] == 4.0
        assert measured[f"mu_rerouted/layer_{layer}"] == pytest.approx(moved)
        assert measured[f"velocity_clamped/layer_{layer}"] == 1.0
        assert measured[f"velocity_rms/layer_{layer}"] == pytest.approx(10.0)
        assert measured[f"mu_rms/layer_{layer}"] == pytest.approx(1e4)


@pytest.mark.parametrize(
    "options, absent",
    [
        ({}, ("mu_rerouted",)),
        ({"num_experts": 1}, ("expert_", "mu_rerouted")),
        ({"use_dynamics": False}, ("velocity_", "gradient_norm/dynamics")),
        ({"use_dynamics": False, "use_mu_guidance": False}, ("velocity_", "mu_", "gradient_norm/dynamics")),
        (
            {"use_token_routed_mlp": False, "use_dynamics": False, "use_mu_guidance": False},
            ("expert_", "velocity_", "mu_", "gradient_norm/dynamics"),
        ),
    ],
    ids=["no mu routing", "dense", "no dynamics", "plain", "plain and dense"],
)
def test_monitors_of_ablated_models(options, absent):
    model = tiny_model(use_mu_routing=False, **options)
    ids = random_ids(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    measured = {
        **read_monitors(model, {"input_ids": ids, "position_ids": torch.arange(16).expand(2, 16)}),
        **gradient_norms(model),
    }
    assert measured and not [name for name in measured if name.startswith(absent)]


def test_every_parameter_has_its_component():
    parts = {}
    for name, _ in tiny_model(mu_router_gradient=True).named_parameters():
        parts.setdefault(component_of(name), set()).add(name.split("layers.1.")[-1])
    assert parts.keys() == COMPONENTS.keys()
    assert {"self_attn.q_norm.weight", "post_attention_layernorm.weight", "model.norm.weight"} <= parts["norms"]
    assert {"self_attn.mu_to_q.weight", "dynamics.mu", "dynamics.mu_proj.weight"} <= parts["mu_guidance"]
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} <= parts["experts_and_mlp"]
    assert parts["embeddings"] == {"model.embed_tokens.weight"}


def test_the_summary_holds_the_measurements(run):
    summary = json.loads((run / "training_summary.json").read_text())
    assert summary["tokens"] == summary["steps"] * 8 * ROW and summary["options"]["learning_rate"] == 0.01
    assert summary["parameters"] > summary["active_parameters"] > 0
    evaluated = {entry["step"]: entry["eval_nll_per_token"] for entry in log_of(run) if "eval_loss" in entry}
    assert {entry["step"]: entry["loss"] for entry in summary["held_out"]} == evaluated
    entries = [entry for entry in log_of(run) if "loss" in entry]
    assert summary["training_seconds"] == pytest.approx(sum(8 * ROW / entry["tokens_per_second"] for entry in entries))
    assert all(0 < entry["data_wait_share"] < 1 for entry in entries)
    assert {"device", "torch", "transformers", "commit", "date", "tokens_per_second"} <= summary.keys()


@pytest.mark.parametrize("steps, logged", [(3, [2, 3]), (1, [1])])
def test_the_last_steps_are_logged(folder, tmp_path, steps, logged):
    """Else a run that is shorter than `logging_steps` would have taken no time, and have no curve."""
    short = ("--max-steps", steps, "--logging-steps", 2, "--monitor-steps", 0, "--save-strategy", "no")
    pretrain(folder, "--output-dir", tmp_path, *short)
    assert [entry["step"] for entry in log_of(tmp_path) if "loss" in entry] == logged
    summary = json.loads((tmp_path / "training_summary.json").read_text())
    assert summary["training_seconds"] > 0 and summary["tokens_per_second"] > 0


def test_a_run_that_logs_nothing_says_no_seconds(folder, tmp_path):
    pretrain(folder, "--output-dir", tmp_path, "--max-steps", 1, "--logging-strategy", "no", "--save-strategy", "no")
    assert "training_seconds" not in json.loads((tmp_path / "training_summary.json").read_text())


def test_residual_projections_start_smaller_in_any_architecture(folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    for config, written in (("model.json", "o_proj"), ("llama.json", "o_proj"), ("llama.json", "down_proj")):
        standard_deviations = []
        for scaled in (False, True):
            model = new_model(str(folder / config), tokenizer, "sdpa", scaled_residual_init=scaled)
            weights = {name.split(".")[-2]: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
            standard_deviations.append(weights)
        plain, smaller = standard_deviations
        assert smaller[written] == pytest.approx(plain[written] / (2 * model.config.num_hidden_layers) ** 0.5, rel=0.1)
        assert smaller["q_proj"] == pytest.approx(plain["q_proj"], rel=0.1)
    (folder / "gpt2.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}))
    with pytest.raises(InputError, match="gpt2 has no projection named like"):
        new_model(str(folder / "gpt2.json"), tokenizer, "sdpa", scaled_residual_init=True)


@pytest.mark.parametrize("name, count", [("total", 32_504_832), ("active", 21_888_000)])
def test_dense_peers_of_the_30m_shape(name, count):
    """As many parameters as configs/30m.json has in total, or active, to a fifth of a percent."""
    shapes = [
        json.loads((REPOSITORY / "configs" / file).read_text()) for file in ("30m.json", f"30m_llama_{name}.json")
    ]
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert all(shapes[0][field] == shapes[1][field] for field in same)
    with torch.device("meta"):
        ours, peer = (AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)) for shape in shapes)
    assert ours.parameter_counts()[name] == count
    assert peer.num_parameters() == pytest.approx(count, rel=2e-3)


def test_other_models_are_not_monitored(folder):
    run = folder / "llama"
    pretrain(folder, "--output-dir", run, "--max-steps", 2, "--model-config", folder / "llama.json")
    assert not [name for entry in log_of(run) for name in entry if "/" in name]
    assert "imbalance" not in (run / "training_summary.md").read_text()


@pytest.mark.parametrize(
    "options, sentence",
    [
        ([], "Either max_tokens or max_steps is needed, and only one"),
        (["--max-steps", "2", "--max-tokens", "1e6"], "Either max_tokens or max_steps is needed, and only one"),
        (["--max-tokens", "-5"], "Either max_tokens or max_steps is needed, and only one"),
        (["--max-steps", "2", "--routing", "even"], "routing must be one of modulo, balanced, random, but is 'even'"),
        (["--max-steps", "2", "--routing", "balanced", "--model-config", "llama.json"], "'llama.json' is none"),
    ],
)
def test_bad_input_gives_one_sentence(folder, options, sentence, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        pretrain(folder, "--output-dir", folder / "bad", *options)
    assert sentence in stop.value.code and len(stop.value.code.splitlines()) == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_shipped_recipes_parse(recipe):

    # bf16 and compile reach into the environment of this process, and need a GPU.
    here = ["--use-cpu", "true", "--bf16", "false", "--torch-compile", "false", "--report-to", "none"]
    restarts = ["--lr-scheduler-type", "cosine_with_restarts", "--lr-scheduler-kwargs", '{"num_cycles": 4}']
    parser = TrlParser((PretrainingArguments, TrainingArguments))
    for options in ([], ["--sources", "a/*.parquet", *restarts]):
        script_args, training_args = parser.parse_args_and_config(
            ["--config", str(REPOSITORY / "recipes" / recipe), *here, *options]
        )
    assert (training_args.max_steps > 0) != ((script_args.max_tokens or 0) > 0)
    assert script_args.sources == ["a/*.parquet"]
    assert training_args.lr_scheduler_kwargs == {"num_cycles": 4}
    config = AutoConfig.for_model(**json.loads((REPOSITORY / script_args.model_config).read_text()))
    assert script_args.row_length <= config.max_position_embeddings
    if recipe == "1.5b_modern.yaml":
        assert config.scaled_residual_init and not config.use_mu_routing


@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero2", "DEEPSPEED")])
def test_accelerate_configs_load(name, kind):
    path = REPOSITORY / "recipes" / "accelerate" / f"{name}.yaml"
    assert load_config_from_file(str(path)).distributed_type == kind
    words = path.read_text().splitlines()[0].split()
    assert words[:4] == ["#", "accelerate", "launch", "--config_file"]
    assert all((REPOSITORY / word).is_file() for word in words if word.endswith((".yaml", ".py")))


def test_a_run_that_diverges_stops_with_one_sentence(folder):
    """Trainer's own filter would show loss 0 and train on."""
    options = ("--learning-rate", 1e30, "--max-grad-norm", 0, "--logging-steps", 1, "--max-steps", 4)
    with pytest.raises(SystemExit) as stopped:
        pretrain(folder, *options, "--output-dir", folder / "diverged")
    assert "The loss is nan by step" in str(stopped.value)


def test_several_gpus_in_one_process_are_refused(folder, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(SystemExit) as stopped:
        pretrain(folder, "--max-steps", 2, "--output-dir", folder / "parallel")
    assert "One process sees 2 GPUs" in str(stopped.value) and not (folder / "parallel").exists()
