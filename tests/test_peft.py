"""LoRA through PEFT, on the projections and on the 3D expert weights."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from complexity_deep import ComplexityDeepForCausalLM
from support import random_ids, tiny_model

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


def test_an_adapter_folder_loads_through_the_auto_class(published_folder, tmp_path):
    model = ComplexityDeepForCausalLM.from_pretrained(published_folder)
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "mu_to_v"]))
    ids = random_ids(1, 12)
    expected = adapted(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    for loader in (AutoModelForCausalLM, ComplexityDeepForCausalLM):
        loaded = loader.from_pretrained(tmp_path / "adapter")  # names the published folder as its base
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
