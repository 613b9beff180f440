"""Muon and AdamW in one optimizer, beside torch.optim.Muon and torch.optim.AdamW one parameter at a time."""

import io
import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.training import muon
from complexity_deep.workflow.training.muon import MuonWithAdamW, check_muon, parameter_groups
from support import random_ids, tiny_model

ADAM = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8}
DECAY = 0.1


class Shapes(nn.Module):
    """Parameters of every kind: stacks, matrices of equal and of other shapes, an embedding and a vector."""

    def __init__(self, dtype=torch.float32, experts: int = 3):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"up": (experts, 48, 20), "down": (experts, 20, 24), "q": (20, 20), "o": (20, 20), "k": (8, 20)}
        shapes |= {"tall": (36, 20), "router": (4, 20), "norm": (20,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        self.embedding = nn.Embedding(16, 20, _weight=torch.randn(16, 20, generator=generator).to(dtype))

    def get_output_embeddings(self):
        return None

    def set_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def optimizer_of(model: nn.Module, **options) -> MuonWithAdamW:
    return MuonWithAdamW(parameter_groups(model, DECAY), **{**ADAM, **options})


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_elements", [muon.BATCH_ELEMENTS, 1])
def test_every_matrix_gets_what_torch_gives_it(monkeypatch, dtype, batch_elements):
    """Bit by bit on the CPU, where a product in a batch is rounded as one alone."""
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", batch_elements)
    model, twin = Shapes(dtype), Shapes(dtype)
    twin.load_state_dict(model.state_dict())
    optimizer = optimizer_of(model)
    slices = {name: [nn.Parameter(part.clone()) for part in twin.get_parameter(name)] for name in ("up", "down")}
    matrices = {name: [twin.get_parameter(name)] for name in ("q", "o", "k", "tall", "router")} | slices
    alone = [part for parts in matrices.values() for part in parts]
    torch_muon = torch.optim.Muon(alone, ADAM["lr"], DECAY, adjust_lr_fn="match_rms_adamw")
    others = [{"params": [twin.embedding.weight], "weight_decay": DECAY}, {"params": [twin.norm], "weight_decay": 0.0}]
    torch_adamw = torch.optim.AdamW(others, **ADAM, fused=True)
    for step in range(3):
        model.set_gradients(step), twin.set_gradients(step)
        for name, parts in slices.items():
            for part, gradient in zip(parts, twin.get_parameter(name).grad):
                part.grad = gradient.clone()
        optimizer.step(), torch_muon.step(), torch_adamw.step()
    expected = values(twin) | {name: torch.stack([p.detach() for p in parts]) for name, parts in slices.items()}
    assert_equal(values(model), expected)
    assert not torch.equal(model.up, Shapes(dtype).up)


def orthogonalized_in_float64(matrix: torch.Tensor) -> torch.Tensor:
    """[A, B] with A <= B, by the quintic of the iteration on its singular values."""
    u, s, vh = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    a, b, c = muon.COEFFICIENTS
    for _ in range(muon.ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    return u @ s.diag() @ vh


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 512, 512), (4, 256, 512)])
def test_a_batch_on_the_gpu_errs_no_more_than_torch(shape):
    """By at most twice what torch.optim.Muon errs one by one, because its products are other kernels."""
    gradients = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    found = muon.orthogonalized(gradients)
    alone = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(alone, gradients):
        parameter.grad = gradient
    rate = 1 / (muon.UPDATE_RMS * math.sqrt(max(shape[1:])))
    torch.optim.Muon(alone, rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    exact = torch.stack([orthogonalized_in_float64(gradient) for gradient in gradients])
    error, allowed = ((values.double() - exact).norm() for values in (found, -torch.stack(alone).detach()))
    assert error <= 2 * allowed


def test_state_is_saved_and_loaded_exactly():
    whole, stopped = Shapes(), Shapes()
    optimizer, first = optimizer_of(whole), optimizer_of(stopped)
    for step in range(4):
        if step == 2:
            file = io.BytesIO()
            torch.save(first.state_dict(), file)
            file.seek(0)
            resumed = Shapes()
            resumed.load_state_dict(stopped.state_dict())
            second = optimizer_of(resumed, lr=9.0)  # the checkpoint has the rate
            second.load_state_dict(torch.load(file, weights_only=True))
            stopped, first = resumed, second
        for model, its in ((whole, optimizer), (stopped, first)):
            model.set_gradients(step)
            its.step()
    assert_equal(values(stopped), values(whole))


def test_a_schedule_scales_both_kinds_and_vectors_do_not_decay():
    model = Shapes()
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (step + 1))
    before = values(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    schedule.step()
    optimizer.step()
    kept = (1 - ADAM["lr"] * 0.5 * DECAY) * (1 - ADAM["lr"] * 0.25 * DECAY)
    for name, value in values(model).items():
        expected = before[name] if name == "norm" else before[name] * kept
        torch.testing.assert_close(value, expected, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def test_an_update_is_as_large_as_adamw_makes_it():
    for shape in ((64, 64), (16, 96), (96, 16)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        groups = [{"params": [weight], "use_muon": True, "weight_decay": 0.0}]
        groups += [{"params": [nn.Parameter(torch.zeros(1))], "use_muon": False}]
        MuonWithAdamW(groups, lr=1.0).step()
        rms = weight.detach().square().mean().sqrt().item()
        # Singular values end between 0.7 and 1.2.
        assert 0.7 * muon.UPDATE_RMS < rms < 1.2 * muon.UPDATE_RMS


class Operations(TorchDispatchMode):
    """Counts what is launched."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


def test_more_experts_are_not_more_operations():
    numbers = []
    for experts in (2, 32):
        model = Shapes(experts=experts)
        optimizer = optimizer_of(model)
        model.set_gradients(0)
        with Operations() as operations:
            optimizer.step()
        numbers.append(operations.number)
    assert numbers[0] == numbers[1]


ROUTED = {"value_embedding_layers": [1], "shared_expert_intermediate_size": 16, "mu_router_gradient": True}
DENSE = {"use_token_routed_mlp": False, "use_mu_guidance": False, "use_dynamics": False, "use_mu_routing": False}


@pytest.mark.parametrize("options", [ROUTED, DENSE, {"tie_word_embeddings": False}], ids=["routed", "dense", "untied"])
def test_matrices_go_to_muon_and_embeddings_and_vectors_to_adamw(options):
    model = tiny_model(**options)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, DECAY)
    found = {names[p]: (group["use_muon"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    for parameter, name in names.items():
        is_table = name.endswith(("embed_tokens.weight", "value_embedding.weight")) or name.startswith("lm_head")
        use_muon = parameter.ndim > 1 and not is_table
        assert found[name] == (use_muon, DECAY if parameter.ndim > 1 else 0.0), name
    matrices = {name for name, (use_muon, _) in found.items() if use_muon}
    if options is ROUTED:
        parts = ("experts.gate_up_proj", "experts.down_proj", "mu_router", "mu_proj", "controller_in", "value_gate")
        assert all(any(part in name for name in matrices) for part in parts)
    if options is DENSE:
        assert {name.split(".")[-2] for name in matrices} == {
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        }


def test_convolutions_and_frozen_weights_are_left_out():
    shape = {"vocab_size": 32, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **shape))
    frozen = model.backbone.layers[0].mixer.in_proj.weight.requires_grad_(False)
    groups = parameter_groups(model, DECAY)
    by_muon = {parameter for group in groups if group["use_muon"] for parameter in group["params"]}
    assert model.backbone.layers[0].mixer.out_proj.weight in by_muon
    assert model.backbone.layers[0].mixer.conv1d.weight not in by_muon
    assert not any(parameter is frozen for group in groups for parameter in group["params"])


def test_experts_without_tokens_only_decay_and_the_model_learns():
    model = tiny_model(std=0.1, num_experts=4).train()
    optimizer = optimizer_of(model)
    ids = random_ids(2, 8) // 4 * 4  # by modulo, of one expert
    unused = model.base_model.layers[0].mlp.experts.down_proj.detach()[1:].clone()
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    kept = (1 - ADAM["lr"] * DECAY) ** 5
    now = model.base_model.layers[0].mlp.experts.down_proj.detach()[1:]
    torch.testing.assert_close(now, unused * kept, rtol=1e-5, atol=0)


def arguments(tmp_path, **options) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "PARALLELISM_CONFIG_TP_SIZE"])
def test_divided_matrices_are_refused(tmp_path, monkeypatch, name):
    args = arguments(tmp_path)
    check_muon(args, 1)
    with pytest.raises(InputError, match="goes with DDP, but not with FSDP, DeepSpeed, tensor or expert parallelism"):
        check_muon(args, 2)
    monkeypatch.setenv(name, "2" if name.endswith("SIZE") else "true")
    with pytest.raises(InputError, match="Muon needs whole matrices on every process"):
        check_muon(args, 1)


def test_parameters_that_cannot_be_are_refused():
    with pytest.raises(InputError, match=r"Muon is for matrices, and a parameter has the shape \(3,\)"):
        MuonWithAdamW([{"params": [nn.Parameter(torch.zeros(3))], "use_muon": True, "weight_decay": 0.0}], lr=1.0)
    # Not gloo, whose threads would hang what later tests fork from this process.
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        divided = nn.Parameter(distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (2,))))
        with pytest.raises(InputError, match="Muon needs whole matrices"):
            MuonWithAdamW([{"params": [divided], "use_muon": True, "weight_decay": 0.0}], lr=1.0)
    finally:
        torch.distributed.destroy_process_group()
