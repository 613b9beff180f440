"""Weights in 8 bits: what is quantized, that the model stays the same one, and that its folder loads again."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchao")
from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig, Int8WeightOnlyConfig
from transformers import TorchAoConfig

from complexity_deep import ComplexityDeepForCausalLM
from support import GOLDEN, random_ids, tiny_config, tiny_model

# Every linear layer but the head, and the experts, whose 3D weights are parameters and no layers; "_default" would have
# transformers quantize the biases of linear layers too.
EVERYTHING = {
    r"re:.*(_proj|mu_to_[qkv]|controller_in|controller_out)\.weight": Int8WeightOnlyConfig(version=2),
    r"re:.*\.experts\.(gate_up|down)_proj": Int8WeightOnlyConfig(version=2),
}
PLANS = {
    "int8 linear": Int8WeightOnlyConfig(version=2),
    "int8 everything": FqnToConfig(EVERYTHING),
    "float8 linear": Float8WeightOnlyConfig(),
}


def is_quantized(weight: torch.Tensor) -> bool:
    return type(weight).__module__.startswith("torchao")


def quantized(folder, plan: str, **options):
    return ComplexityDeepForCausalLM.from_pretrained(
        folder, quantization_config=TorchAoConfig(PLANS[plan]), device_map="cpu", **options
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model that has learnt some rows, so that its loss means something, and these rows."""
    torch.manual_seed(0)
    model = ComplexityDeepForCausalLM(tiny_config(initializer_range=0.1))
    rows = random_ids(8, 24, vocab_size=40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(30):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    return folder, rows


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
def test_a_quantized_model_computes_generates_and_reloads(trained, tmp_path, plan):
    folder, rows = trained
    whole = ComplexityDeepForCausalLM.from_pretrained(folder)
    model = quantized(folder, plan)
    layer = model.model.layers[0]
    for linear in (layer.self_attn.q_proj, layer.dynamics.mu_proj, layer.dynamics.controller_out):
        assert is_quantized(linear.weight)
    assert is_quantized(layer.mlp.experts.gate_up_proj) == is_quantized(layer.mlp.experts.down_proj)
    assert is_quantized(layer.mlp.experts.down_proj) == (plan == "int8 everything")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.mu_router.weight"):
        assert not is_quantized(model.get_parameter_or_buffer(name))
    expected = whole(input_ids=rows, labels=rows)
    outputs = model(input_ids=rows, labels=rows)
    assert (outputs.logits - expected.logits).abs().max() > 1e-5  # the quantized weights take part
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), rel=0.01 if "int8" in plan else 0.05)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    generated = model.generate(rows[:2, :6], **arguments)
    model.save_pretrained(tmp_path)
    reloaded = ComplexityDeepForCausalLM.from_pretrained(tmp_path)
    assert is_quantized(reloaded.model.layers[0].self_attn.o_proj.weight)
    assert torch.equal(reloaded(input_ids=rows).logits, outputs.logits)
    assert torch.equal(reloaded.generate(rows[:2, :6], **arguments), generated)


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
def test_a_published_model_is_quantized_while_it_is_loaded(plan):
    model, ids = quantized(GOLDEN / "v0.13-tiny", plan), random_ids(2, 12)
    whole = ComplexityDeepForCausalLM.from_pretrained(GOLDEN / "v0.13-tiny")
    logits, expected = model(ids).logits, whole(ids).logits
    # A token whose expert changes by the rounding is another one.
    assert F.cosine_similarity(logits, expected, dim=-1).median() > 0.99


@torch.no_grad()
def test_quantized_experts_run_whatever_implementation_is_chosen(trained):
    pytest.importorskip("triton")
    folder, rows = trained
    logits = {}
    for kernels, experts in (("eager", "eager"), ("triton", "cggr")):
        model = quantized(folder, "int8 everything", experts_implementation=experts, kernels_implementation=kernels)
        logits[experts] = model(rows).logits
        model.generate(rows[:1, :4], max_new_tokens=2, cache_implementation="static", pad_token_id=1)
    torch.testing.assert_close(logits["cggr"], logits["eager"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_of_a_new_or_an_earlier_model_is_lost_in_float8(tmp_path, dtype):
    """The scale of a row of zeros is zero, and 0 / 0 is NaN."""
    model, ids = ComplexityDeepForCausalLM(tiny_config(value_embedding_layers=[1])).to(dtype), random_ids(2, 8)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "new")
    assert quantized(tmp_path / "new", "float8 linear")(ids).logits.isfinite().all()
    for dynamics in (layer.dynamics for layer in model.model.layers):  # as earlier code initialised them
        dynamics.mu_proj.weight.zero_()
        dynamics.controller_out.weight.zero_()
    model.model.layers[1].self_attn.value_gate.weight.zero_()
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    logits = quantized(tmp_path, "float8 linear")(ids).logits
    assert logits.isfinite().all()
    assert F.cosine_similarity(logits.float(), expected.float(), dim=-1).min() > 0.98


def test_the_inputs_of_quantized_experts_get_their_gradients():
    """For adapters below and above them."""
    from torchao.quantization import quantize_

    whole = tiny_model(std=0.2).model.layers[1].mlp.experts
    experts = copy.deepcopy(whole)
    quantize_(experts, FqnToConfig({r"re:(gate_up|down)_proj": Int8WeightOnlyConfig(version=2)}), filter_fn=None)
    assert is_quantized(experts.gate_up_proj) and is_quantized(experts.down_proj)
    states, chosen = torch.randn(9, 64), torch.arange(9)[:, None] % 5  # expert 4 lies elsewhere
    outputs, gradients = [], []
    for module in (whole, experts):
        x = states.clone().requires_grad_()
        outputs.append(module(x, chosen, torch.ones(9, 1)))
        outputs[-1].square().sum().backward()
        gradients.append(x.grad)
    assert not outputs[1][4].any() and outputs[1][3].any()
    for exact, close in (outputs, gradients):
        assert F.cosine_similarity(exact.flatten(), close.flatten(), dim=0) > 0.999
