"""LoRA through PEFT, on the projections and on the 3D expert weights."""

import copy

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from complexity_deep import ComplexityDeepForCausalLM
from support import GOLDEN, random_ids, tiny_config, tiny_model

TARGETS = {
    "attention": {"target_modules": ["q_proj", "v_proj", "mu_to_k"]},
    "every linear layer": {"target_modules": "all-linear"},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}


# In the interpreter the Triton kernels take long; what they must not do is go round an adapter on a projection.
CASES = [(target, "eager") for target in TARGETS] + [("attention", "triton")]


@pytest.mark.parametrize("target, kernels", CASES)
def test_lora_trains_counts_reloads_and_merges(target, kernels, tmp_path):
    pytest.importorskip("triton") if kernels == "triton" else None

    def base():
        model = tiny_model(std=0.1, num_hidden_layers=2)
        model.set_kernels_implementation(kernels)
        return model

    ids = random_ids(1, 12)
    plain = base()(ids).logits
    model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, **TARGETS[target]))
    torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-4)  # B starts at zero
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in trained.values())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(0.0, 0.1)
    adapted = model(ids).logits
    assert (adapted - plain).abs().max() > 1e-2  # no fast path goes round the adapter
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(reloaded(ids).logits, adapted, rtol=1e-5, atol=1e-5)
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("file", ("model.safetensors", "model.pt"))
def test_an_adapter_folder_loads_through_the_auto_class(file, published_folder, tmp_path):
    if file == "model.pt":
        torch.save(load_file(published_folder / "model.safetensors"), published_folder / file)
        (published_folder / "model.safetensors").unlink()
    model = ComplexityDeepForCausalLM.from_pretrained(published_folder)
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "mu_to_v"]))
    ids = random_ids(1, 12)
    expected = adapted(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    for loader in (AutoModelForCausalLM, ComplexityDeepForCausalLM):
        loaded = loader.from_pretrained(tmp_path / "adapter")  # names the published folder as its base
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)


ADAPTERS = {
    "DoRA": LoraConfig(use_dora=True, target_modules="all-linear"),
    "OFT": OFTConfig(r=0, oft_block_size=16, target_modules="all-linear"),
    "VeRA": VeraConfig(r=16, target_modules="all-linear"),
    "LoHa": LoHaConfig(target_modules="all-linear"),
    "IA3": IA3Config(target_modules="all-linear", feedforward_modules=[]),
}


def new_model(_, **options):
    torch.manual_seed(0)
    return ComplexityDeepForCausalLM(tiny_config(num_hidden_layers=2, initializer_range=0.1, **options))


def new_model_with_every_option(path):
    options = {"value_embedding_layers": [0, 1], "shared_expert_intermediate_size": 48, "mu_router_gradient": True}
    return new_model(path, **options)


def earlier_folder(path):
    """As code wrote it that started these weights at zero: no gradient reaches layer 0's first rows."""
    model = new_model(path, value_embedding_layers=[1])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.dynamics.controller_out.weight.zero_()
            layer.dynamics.mu_proj.weight.zero_()
        model.model.layers[1].self_attn.value_gate.weight.zero_()
    model.save_pretrained(path)
    return ComplexityDeepForCausalLM.from_pretrained(path)


def published_folder_of_tests(_):
    return ComplexityDeepForCausalLM.from_pretrained(GOLDEN / "v0.13-tiny")


@pytest.mark.parametrize("base", [new_model, new_model_with_every_option, earlier_folder, published_folder_of_tests])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_of_every_linear_layer_train(adapter, base, tmp_path):
    """DoRA divides by the norms of the weights' rows; none of them may be zero."""
    model = get_peft_model(base(tmp_path), copy.deepcopy(ADAPTERS[adapter]))
    layers = model.get_base_model().model.layers
    assert not hasattr(layers[0].self_attn, "mu_to_q") and isinstance(layers[1].self_attn.mu_to_q, BaseTunerLayer)
    for name in ("mu_proj", "controller_in", "controller_out"):
        assert isinstance(getattr(layers[0].dynamics, name), BaseTunerLayer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, ids, losses = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0), random_ids(2, 12), []
    for _ in range(4):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[3] < losses[0]


@pytest.mark.parametrize("kept", ["mlp", "experts", "dynamics", "self_attn"])
def test_modules_trained_whole_beside_adapters(kept, tmp_path):
    """`modules_to_save` puts a class of PEFT's around the module."""
    target = "q_proj" if kept == "dynamics" else "controller_in"
    config = LoraConfig(r=4, target_modules=[target], modules_to_save=[kept])
    model, ids = get_peft_model(tiny_model(std=0.1), config), random_ids(1, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [parameter for name, parameter in model.named_parameters() if f".{kept}.modules_to_save." in name]
    assert trained and all(parameter.grad is not None for parameter in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
    adapted = model(ids).logits
    assert (adapted - tiny_model(std=0.1)(ids).logits).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_model(std=0.1), tmp_path)
    torch.testing.assert_close(reloaded(ids).logits, adapted, rtol=1e-5, atol=1e-5)


def test_embeddings_without_ids_are_routed_by_adapted_rows():
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["embed_tokens"])
    model = get_peft_model(tiny_model(tie_word_embeddings=False), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 1.0)  # far enough that the rows below the adapter are no longer the nearest
    ids = random_ids(2, 12)
    logits = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("whose", ["LoRA", "single tokens"])
def test_adapted_value_embeddings_are_counted(whose):
    model = tiny_model(num_hidden_layers=2, value_embedding_layers=[1])
    before = model.parameter_counts()
    if whose == "LoRA":
        config = LoraConfig(r=4, target_modules=["value_embedding"])
    else:
        config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"value_embedding": [3, 5]})
    after = get_peft_model(model, config).get_base_model().parameter_counts()
    assert after["total"] > before["total"]
    assert after["total"] - after["active"] == before["total"] - before["active"]  # the same rows are idle


def test_guidance_is_adapted_by_name_where_it_takes_part():
    config = LoraConfig(r=4, target_modules=["mu_to_q", "mu_to_k", "mu_to_v", "mu_proj"])
    for options in ({}, {"use_dynamics": False}):  # then mu of the last layer cannot learn either
        model = get_peft_model(tiny_model(**options), copy.deepcopy(config))
        adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
        body = "base_model.model.model.layers"
        expected = {f"{body}.{layer}.self_attn.mu_to_{letter}" for layer in (1, 2) for letter in "qkv"}
        expected |= {f"{body}.{layer}.dynamics.mu_proj" for layer in (range(3) if not options else range(2))}
        assert adapted == expected
        ids = random_ids(1, 8)
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # as DDP wants it
