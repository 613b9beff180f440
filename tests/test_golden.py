"""The published forward pass and gradients, against tensors computed with the published package (v0.13.0)."""

import pytest
import torch
from safetensors.torch import load_file

from complexity_deep import ComplexityDeepForCausalLM
from support import GOLDEN

FOLDERS = ("v0.13-tiny", "v0.13-dense", "v0.13-tiny-bf16", "v0.13-tiny-converted")
STATES = {"velocities": "velocity", "mus": "mu_current"}


def golden(folder):
    return load_file(GOLDEN / folder / "golden.safetensors")


def run(folder, **kwargs):
    model = ComplexityDeepForCausalLM.from_pretrained(GOLDEN / folder, **kwargs)
    expected = golden(folder)
    ids = expected["input_ids"]
    outputs = model(ids, labels=ids, output_expert_ids=True, output_velocities=True, output_mus=True)
    return model, outputs, expected


def assert_experts_equal(outputs, expected):
    for layer, expert_ids in enumerate(outputs.expert_ids):
        assert torch.equal(expert_ids, expected[f"layers.{layer}.expert_ids"].view_as(expert_ids)), f"layer {layer}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_fp64_logits_within_1e_10(folder):
    _, outputs, expected = run(folder, dtype=torch.float64)
    logits = expected["logits_fp64_compute" if "logits_fp64_compute" in expected else "logits_fp64"]
    assert (outputs.logits - logits).abs().max() < 1e-10
    assert_experts_equal(outputs, expected)


@pytest.mark.parametrize("folder", FOLDERS)
def test_fp32_logits_loss_and_states(folder):
    _, outputs, expected = run(folder, dtype=torch.float32)
    suffix = "_fp32_compute" if "logits_fp32_compute" in expected else ""
    assert (outputs.logits - expected[f"logits{suffix}"]).abs().max() < 5e-5
    torch.testing.assert_close(outputs.loss, expected[f"loss{suffix}"].view(()), rtol=1e-6, atol=1e-6)
    assert_experts_equal(outputs, expected)
    if folder in ("v0.13-tiny", "v0.13-dense"):
        for field, name in STATES.items():
            for layer, state in enumerate(outputs[field]):
                torch.testing.assert_close(state, expected[f"layers.{layer}.{name}"], rtol=1e-4, atol=5e-5)


def test_bf16_model_stays_close_with_equal_experts():
    model, outputs, expected = run("v0.13-tiny-bf16")
    assert model.dtype == torch.bfloat16  # the checkpoint's own dtype is the default
    difference = (outputs.logits.float() - expected["logits"].float()).norm()
    assert difference < 0.03 * expected["logits"].float().norm()
    assert_experts_equal(outputs, expected)


@pytest.mark.parametrize("folder", ("v0.13-tiny", "v0.13-dense"))
def test_fp32_gradients_within_1e_5(folder):
    model, outputs, expected = run(folder, dtype=torch.float32)
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    compared = 0
    for key, reference in expected.items():
        if not key.startswith("grad."):
            continue
        name = key.removeprefix("grad.")
        if name.endswith((".mlp.gate_up_proj", ".mlp.down_proj")):  # [E, in, out] in the published layout
            name, reference = name.replace(".mlp.", ".mlp.experts."), reference.transpose(1, 2)
        error = (gradients.pop(name) - reference).norm()
        assert error <= 1e-5 * reference.norm(), f"{name}: {error / reference.norm()}"
        compared += 1
    assert compared > 40 and not gradients, f"not compared: {list(gradients)}"
