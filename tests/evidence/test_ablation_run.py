"""ablate.py: what one run learns, measures and reads, and the token files it reads."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeConfig, TrainerControl

from ablation_rows import PLANS
from complexity_deep import training_graph_complexity_deep as training_graph
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.evidence import ablation_data, ablation_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Token files of a made-up language in which the next id is mostly the last plus one."""
    folder = tmp_path_factory.mktemp("data")
    words = {word: index for index, word in enumerate(["<eos>", "<pad>", "<bos>", *(f"w{i}" for i in range(61))])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        eos_token="<eos>",
        pad_token="<pad>",
        bos_token="<bos>",
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    generator = np.random.default_rng(0)

    def write(name, tokens):
        ids = 3 + (np.arange(tokens) + generator.integers(0, 2, tokens)) % 61
        ids[generator.random(tokens) < 0.02] = 0
        ids.astype(np.uint16).tofile(folder / f"{name}.bin")

    write("train", 20_000), write("held_out_edu", 64 * 5 + 3), write("held_out_books", 64 * 2)
    return str(folder)


def toy_run(**changes):
    shape = {"model_type": "complexity-deep", "vocab_size": None, "hidden_size": 32, "intermediate_size": 64}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4}
    training = yaml.safe_load((PLANS / "30m.yaml").read_text())["training"] | {"row_length": 64, "rows_per_step": 4}
    run = {"variant": "toy", "seed": 0, "tokens": 64 * 4 * 40, "learning_rate": 1e-2, "init": "default", **training}
    config = {**shape, "max_position_embeddings": 64, "scaled_residual_init": True, **changes.pop("config", {})}
    return {**run, "freeze_mlp": False, "balance_loss": 0.0, "config": config, **changes}


def test_a_run_learns_and_measures_itself(data):
    result = ablation_run.train(toy_run(), data, eos_token_id=0, compiled=False)
    assert result["status"] == "ok" and result["steps"] == 40
    tokens, edu, books = zip(*result["curve"])
    assert len(tokens) == 4 and tokens[-1] == 64 * 4 * 40 and edu[-1] == result["held_out_edu"]
    assert edu[-1] < edu[0] < math.log(64) and edu[-1] < 2 and books[-1] < 2
    assert 0 < result["seconds"] < result["wall_seconds"] and result["expert_norm_ratio"] > 1
    again = ablation_run.train(toy_run(), data, eos_token_id=0, compiled=False)
    assert again["curve"] == result["curve"]
    assert ablation_run.train(toy_run(seed=1), data, eos_token_id=0, compiled=False)["curve"] != result["curve"]


def test_a_run_without_gradient_is_stopped(data, monkeypatch):
    """As one that blew up and gives every id the same score: it would take its whole time for nothing."""
    monkeypatch.setattr(ablation_run.RunTrainer, "_clip_grad_norm", clip_to_nothing)
    result = ablation_run.train(toy_run(tokens=64 * 4 * 400, repeat_data=True), data, eos_token_id=0, compiled=False)
    assert result["status"] == "diverged" and result["steps"] == 20 * ablation_run.DEAD_WINDOWS
    assert result["median_grad_norm"] == 0 and "held_out_edu" not in result


def test_windows_without_gradient_are_counted_in_a_row():
    clock, control = ablation_run.RunClock(400, 1, None), TrainerControl()
    for norms, stops in (([0.0] * 4 + [0.1] + [0.0] * 4, False), ([0.0], True)):
        for norm in norms:
            clock.on_log(None, None, control, {"loss": 9.7, "grad_norm": norm})
        assert clock.diverged == control.should_training_stop == stops


def clip_to_nothing(trainer, model):
    for parameter in model.parameters():
        parameter.grad = None
    trainer.gradient_norms.append(torch.zeros(()))
    return torch.zeros(())


LEARNED = {"model_type": "qwen3_moe", "head_dim": 16, "num_experts_per_tok": 1, "norm_topk_prob": False}
LEARNED |= {"moe_intermediate_size": 16, "scaled_residual_init": True}


@pytest.mark.parametrize("config", [{}, LEARNED])
def test_the_model_of_a_run_is_saved_whole(data, tmp_path, config):
    run = toy_run(plan="headline", settings="0a1", tokens=64 * 4 * 4, config=config)
    (tmp_path / "headline-toy-0-0a1" / "old").mkdir(parents=True)
    result = ablation_run.train(run, data, 0, False, models=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["headline-toy-0-0a1"] and "reason" not in result
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "headline-toy-0-0a1")
    AutoTokenizer.from_pretrained(tmp_path / "headline-toy-0-0a1")
    ablation_run.use_chunked_loss(model)
    held_out = ablation_run.HeldOut(model, data, 64, 4, eos_token_id=0)
    assert held_out()["edu"] == pytest.approx(result["held_out_edu"], abs=1e-4)
    (tmp_path / "file").touch()
    again = ablation_run.train(run, data, 0, False, models=str(tmp_path / "file"))
    assert again["curve"] == result["curve"] and again["reason"].startswith("its model was not saved: ")


@pytest.mark.parametrize("config", [{}, {"use_token_routed_mlp": False, "use_mu_guidance": False}])
def test_a_run_with_muon_learns_and_repeats(data, config):
    short = {"config": config, "tokens": 64 * 4 * 12}
    run = toy_run(optimizer="muon", **short)
    result, again = (ablation_run.train(run, data, eos_token_id=0, compiled=False) for _ in range(2))
    assert result["status"] == "ok" and result["held_out_edu"] < 3 and again["curve"] == result["curve"]
    with_adamw = ablation_run.train(toy_run(**short), data, eos_token_id=0, compiled=False)
    assert with_adamw["curve"] != result["curve"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config", [{}, {"value_embedding_layers": [1], "routing": "random", "routing_per_layer": True}]
)
def test_replayed_steps_give_the_same_run(data, config, monkeypatch):
    config = {**config, "use_mu_routing": False, "hidden_size": 64}
    recorded = ablation_run.train(toy_run(config=config), data, 0, True)
    monkeypatch.setattr(training_graph, "MAX_PRODUCTS", 0)
    plain = ablation_run.train(toy_run(config=config), data, 0, True)
    assert recorded["recorded"] and not plain["recorded"]
    assert recorded["held_out_edu"] == pytest.approx(plain["held_out_edu"], abs=0.02)
    assert recorded["max_grad_norm"] == pytest.approx(plain["max_grad_norm"], rel=0.05)


def test_a_run_that_diverges_says_so(data):
    result = ablation_run.train(toy_run(learning_rate=1e30), data, eos_token_id=0, compiled=False)
    assert result["status"] == "diverged" and "held_out_edu" not in result


def test_a_run_that_diverges_in_its_warm_up_says_so(data):
    result = ablation_run.train(toy_run(learning_rate=1e30, warmup=0.9), data, eos_token_id=0, compiled=False)
    assert result["status"] == "diverged" and result["steps"] < 36


def test_frozen_experts_do_not_move_and_a_learned_router_trains(data):
    frozen = ablation_run.train(toy_run(freeze_mlp=True), data, eos_token_id=0, compiled=False)
    assert frozen["expert_norm_ratio"] == 1.0
    learned = ablation_run.train(toy_run(config=LEARNED, balance_loss=0.01), data, eos_token_id=0, compiled=False)
    assert learned["status"] == "ok" and learned["held_out_edu"] < 3.5 and "shifted_edu" not in learned


def test_frozen_mlps_get_and_pass_no_gradient(data):
    model = ablation_run.build(toy_run(freeze_mlp=True), data)
    ids = torch.arange(3, 23)[None]
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        assert layer.post_attention_layernorm.weight.grad is None
        assert all(parameter.grad is None for parameter in layer.mlp.parameters())
    # With the branch detached, what layer 0 gets is what it would get if the branch were a constant.
    expected = model.model.layers[0].self_attn.o_proj.weight.grad.clone()
    outputs = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, out: (out[0].detach(), out[1]))
        outputs.append(layer)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    assert torch.equal(model.model.layers[0].self_attn.o_proj.weight.grad, expected)


def test_published_init(data):
    model = ablation_run.build(toy_run(init="published", config={"hidden_size": 128}), data)
    dynamics = model.model.layers[1].dynamics
    for weight in (
        dynamics.mu_proj.weight,
        dynamics.controller_out.weight,
        model.model.layers[1].self_attn.o_proj.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not dynamics.controller_out.bias.any() and (model.model.norm.weight == 1).all()


def test_held_out_loss_is_that_of_the_rows_one_by_one(data):
    model = ablation_run.build(toy_run(), data)
    rows = ablation_data.token_rows(data, "held_out_edu", 64, "cpu")
    assert len(rows) == 5
    total = count = 0
    for row in rows:  # documents apart, so that no mask is needed
        starts = [0, *(1 + torch.where(row[:-1] == 0)[0]).tolist(), 64]
        for start, end in itertools.pairwise(starts):
            ids = row[start:end].long()[None]
            if end - start > 1:
                logits = model(ids).logits[0, :-1]
                total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
                count += end - start - 1
    ablation_run.use_chunked_loss(model)
    held_out = ablation_run.HeldOut(model, data, 64, 4, 0)
    assert held_out(["edu"])["edu"] == pytest.approx(total / count, rel=1e-5)


def test_the_order_of_rows_depends_on_the_seed_alone():
    rows = torch.arange(40, dtype=torch.int32).view(10, 4)
    first, same, other = (
        [batch["input_ids"] for batch in ablation_data.TrainingBatches(rows, 2, 4, seed, 0)] for seed in (0, 0, 1)
    )
    assert len(first) == 4 and all(torch.equal(a, b) for a, b in zip(first, same))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))
    assert len({int(row[0]) for batch in first for row in batch}) == 8  # no row twice
    with pytest.raises(InputError, match="6 steps of 2 rows are more than the 10 rows"):
        ablation_data.TrainingBatches(rows, 2, 6, 0, 0)


def test_repeated_data_are_shuffled_anew_in_each_pass():
    rows = torch.arange(36, dtype=torch.int32).view(9, 4)

    def chosen(steps, repeat):
        batches = ablation_data.TrainingBatches(rows, 2, steps, 5, 0, repeat)
        return [int(row[0]) // 4 for batch in batches for row in batch["input_ids"]]

    order = chosen(14, True)  # 28 rows of three passes and one row of a fourth
    passes = [order[start : start + 9] for start in (0, 9, 18)]
    assert len(order) == 28 and all(sorted(found) == list(range(9)) for found in passes)
    assert len({tuple(found) for found in passes}) == 3
    assert order[:8] == chosen(4, False) == chosen(4, True)  # the first pass is that of runs that make no second


def test_a_run_may_take_its_data_twice(data):
    run = toy_run(tokens=64 * 4 * 100)
    with pytest.raises(InputError, match="100 steps of 4 rows are more than the 312 rows"):
        ablation_run.train(run, data, eos_token_id=0, compiled=False)
    assert ablation_run.train({**run, "repeat_data": True}, data, eos_token_id=0, compiled=False)["steps"] == 100


def test_a_batch_keeps_documents_apart():
    batch = ablation_data.batch_of(torch.tensor([[5, 6, 0, 7, 0, 0, 8]], dtype=torch.int32), eos_token_id=0)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 0, -100, 0, -100, -100]]
    assert batch["input_ids"].dtype == torch.int64


def test_prepare_takes_whole_documents_up_to_each_share(data, tmp_path):
    for name, word, number in (("a", "w1", 30), ("b", "w2", 30), ("held", "w3", 2)):
        lines = [json.dumps({"text": word}) for _ in range(number)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    held_out = {"edu": str(tmp_path / "held.jsonl"), "books": str(tmp_path / "held.jsonl")}
    facts = ablation_data.prepare(str(tmp_path / "out"), f"{data}/tokenizer", sources, [1, 3], 40, held_out)
    tokens = np.fromfile(tmp_path / "out" / "train.bin", dtype=np.uint16)
    ids = {4: 5, 5: 15, 0: 20}  # w1, w2 and an EOS after each: documents of two tokens, 10 and 30 tokens
    assert dict(zip(*(part.tolist() for part in np.unique(tokens, return_counts=True)))) == ids
    assert facts["files"]["train"]["documents"] == 20 and facts["files"]["held_out_edu"]["tokens"] == 4
    assert json.loads((tmp_path / "out" / "data.json").read_text())["id"] == facts["id"]
    with pytest.raises(InputError, match="holds 60 tokens, but its share is 75"):
        ablation_data.prepare(str(tmp_path / "out"), f"{data}/tokenizer", sources, [1, 3], 100, held_out)


def test_token_files_keep_the_tokenizer_that_made_them(data, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("w1 w2 w3")
    text = str(tmp_path / "text.txt")

    def prepare(tokenizer):
        ablation_data.prepare(str(tmp_path / "out"), tokenizer, [text], [1], 2, {"edu": text, "books": text})

    prepare(f"{data}/tokenizer")
    other = AutoTokenizer.from_pretrained(f"{data}/tokenizer")
    other.add_tokens(["w99"])
    other.save_pretrained(tmp_path / "other")
    before = (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(Path, "write_bytes", lambda path, found: (_ for _ in ()).throw(OSError("the disk is full")))
        prepare(str(tmp_path / "other"))
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_bytes() == before
    prepare(str(tmp_path / "other"))
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_bytes() != before


def test_weighted_experts_are_those_of_the_library():
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    shape |= {"num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**shape, norm_topk_prob=False, initializer_range=0.3))
    experts = model.model.layers[0].mlp.experts
    hidden, chosen, weights = torch.randn(9, 32), torch.randint(0, 4, (9, 1)), torch.rand(9, 1)
    model.set_experts_implementation("eager")
    expected = experts(hidden, chosen, weights)
    model.set_experts_implementation("cggr_weighted")
    with torch.no_grad():  # the weights count without a gradient too
        assert torch.allclose(experts(hidden, chosen, weights), expected, atol=1e-5)
