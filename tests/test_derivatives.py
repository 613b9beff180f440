"""Derivatives of every order, and what `torch.func` makes of them, on the paths that a model takes by default.

The truth is the same model in fp64 with the library's "batched_mm" experts and plain PyTorch kernels: ordinary
operations alone. Native models give second derivatives under "eager" attention or the math backend of SDPA, not under
its fused backends, and so does this one.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from complexity_deep.kernels import kernel_reference as reference
from complexity_deep.kernels.grouped_linear import grouped_linear
from support import random_ids, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = ("eager", "triton")
OPTIONS = (
    pytest.param({}, id="published"),
    pytest.param({"use_mu_routing": False, "use_qk_norm": False}, id="plain-routing"),
    pytest.param({"mu_router_gradient": True, "mu_router_base_logit": 1.0, "hidden_act": "gelu"}, id="router-learns"),
)


def build(path: str, attention: str = "eager", **options):
    """A small model on its default path ("eager" in fp64, "triton" in fp32), or, for "truth", of plain operations."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "dynamics_controller_hidden": 16, "num_hidden_layers": 2}
    model = tiny_model(std=0.2, **sizes | options)
    model = model.to(DEVICE, torch.float32 if path == "triton" else torch.float64)
    model.set_attn_implementation(attention)
    if path == "triton":
        pytest.importorskip("triton")
        torch.backends.cuda.matmul.allow_tf32 = False
    model.set_kernels_implementation("triton" if path == "triton" else "eager")
    model.set_experts_implementation({"eager": "eager", "triton": "cggr", "truth": "batched_mm"}[path])
    return model


def assert_equal_to(found: dict, truth: dict, path: str) -> None:
    limit = 1e-9 if path == "eager" else 2e-4
    scale = max(tensor.norm() for tensor in truth.values())
    for name, tensor in truth.items():
        assert (found[name] - tensor).norm() <= limit * scale, name
    assert scale > 0


def parameters(model) -> dict:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def directions(model) -> dict:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        for name, parameter in model.named_parameters()
    }


def loss_of(model, values: dict, ids: torch.Tensor) -> torch.Tensor:
    logits = functional_call(model, values, (ids,), {"use_cache": False}).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def hessian_vector_product(model, ids: torch.Tensor) -> dict:
    names, weights = zip(*model.named_parameters())
    gradients = torch.autograd.grad(loss_of(model, {}, ids), weights, create_graph=True)
    product = sum((g * v).sum() for g, v in zip(gradients, directions(model).values()))
    return dict(zip(names, torch.autograd.grad(product, weights, materialize_grads=True)))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("path", ("eager", pytest.param("triton", marks=pytest.mark.gpu)))
def test_hessian_vector_product(path, options):
    ids = random_ids(2, 6).to(DEVICE)
    truth = hessian_vector_product(build("truth", **options), ids)
    model = build(path, **options)
    assert_equal_to(hessian_vector_product(model, ids), truth, path)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_to(hessian_vector_product(model, ids), truth, path)


@pytest.mark.parametrize("path", PATHS)
def test_second_derivatives_under_the_math_backend_of_sdpa(path):
    """The Triton path runs here in the interpreter too."""
    ids = random_ids(1, 4).to(DEVICE)
    truth = hessian_vector_product(build("truth"), ids)
    with sdpa_kernel(SDPBackend.MATH):
        assert_equal_to(hessian_vector_product(build(path, "sdpa"), ids), truth, path)


def penalty_gradients(model, ids: torch.Tensor) -> dict:
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, routing_ids=ids, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits.logsumexp(-1).sum(), embeds, create_graph=True)
    gradient.square().sum().sqrt().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("path", ("eager", pytest.param("triton", marks=pytest.mark.gpu)))
def test_gradient_penalty(path):
    ids = random_ids(2, 6).to(DEVICE)
    truth = penalty_gradients(build("truth"), ids)
    assert_equal_to(penalty_gradients(build(path), ids), truth, path)


@pytest.mark.parametrize("attention", ("eager", "sdpa"))
@pytest.mark.parametrize("path", PATHS)
def test_gradients_of_each_sample(path, attention):
    """`vmap(grad)`, also in chunks, equals a loop over the rows by ordinary autograd."""
    model, ids = build(path, attention), random_ids(3, 5).to(DEVICE)
    of_row = vmap(grad(lambda values, row: loss_of(model, values, row[None])), in_dims=(None, 0), chunk_size=2)
    found = of_row(parameters(model), ids)
    for index, row in enumerate(ids):
        truth = build("truth")
        loss_of(truth, dict(truth.named_parameters()), row[None]).backward()
        truth = {name: parameter.grad for name, parameter in truth.named_parameters()}
        assert_equal_to({name: tensor[index] for name, tensor in found.items()}, truth, path)


@pytest.mark.parametrize("options", OPTIONS[:2])  # a router that learns has a surrogate gradient in reverse mode only
@pytest.mark.parametrize("path", PATHS)
def test_forward_mode_and_its_compositions(path, options):
    """Forward mode must not pass over an operator: that would be a wrong number without an error."""
    model, truth, ids = build(path, **options), build("truth", **options), random_ids(1, 5).to(DEVICE)
    values, tangents = parameters(model), directions(model)
    _, found = jvp(lambda values: loss_of(model, values, ids), (values,), (tangents,))
    weights = dict(truth.named_parameters())
    gradients = torch.autograd.grad(loss_of(truth, weights, ids), list(weights.values()))
    expected = sum((g * v).sum() for g, v in zip(gradients, directions(truth).values()))
    torch.testing.assert_close(found.double(), expected, rtol=1e-9 if path == "eager" else 1e-3, atol=0)

    _, found = jvp(grad(lambda values: loss_of(model, values, ids)), (values,), (tangents,))
    assert_equal_to(found, hessian_vector_product(truth, ids), path)
    with torch.autograd.forward_ad.dual_level():
        duals = {n: torch.autograd.forward_ad.make_dual(value, tangents[n]) for n, value in values.items()}
        found = torch.autograd.forward_ad.unpack_dual(loss_of(model, duals, ids)).tangent
    torch.testing.assert_close(found.double(), expected, rtol=1e-9 if path == "eager" else 1e-3, atol=0)


def test_forward_mode_of_embeddings_without_ids():
    """Their nearest rows, which choose the experts, have no derivative."""
    model, truth, ids = build("eager"), build("truth"), random_ids(2, 5).to(DEVICE)
    embeds = truth.get_input_embeddings()(ids).detach()
    tangent = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(embeds)
    _, found = jvp(lambda embeds: model(inputs_embeds=embeds, use_cache=False).logits.sum(), (embeds,), (tangent,))
    (gradient,) = torch.autograd.grad(truth(inputs_embeds=embeds.requires_grad_()).logits.sum(), embeds)
    torch.testing.assert_close(found, (gradient * tangent).sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_jacobian(path):
    model, truth, ids = build(path), build("truth"), random_ids(1, 5).to(DEVICE)
    name = "model.layers.0.mlp.experts.down_proj"

    def logits(model, weight):
        return functional_call(model, {name: weight}, (ids,), {"use_cache": False}).logits[0, -1, :3]

    found = jacrev(lambda weight: logits(model, weight))(model.get_parameter(name).detach())
    weight = truth.get_parameter(name)
    expected = torch.stack([torch.autograd.grad(x, weight, retain_graph=True)[0] for x in logits(truth, weight)])
    assert_equal_to({name: found}, {name: expected}, path)
    if path == "triton" and DEVICE == "cpu":
        return  # the interpreter takes half a minute
    weight = model.get_parameter(name)
    outputs = logits(model, weight)
    (found,) = torch.autograd.grad(outputs, weight, torch.eye(3).to(outputs), is_grads_batched=True)
    assert_equal_to({name: found}, {name: expected}, path)


@pytest.mark.parametrize("path", PATHS)
def test_an_ensemble_of_weights(path):
    """`vmap` over the weights: the logits of each member are those of a model that holds its weights."""
    model, ids = build(path, "sdpa"), random_ids(2, 5).to(DEVICE)
    members = [parameters(model), {name: 1.25 * value for name, value in parameters(model).items()}]
    stacked = {name: torch.stack([member[name] for member in members]) for name in members[0]}
    forward = lambda values: functional_call(model, values, (ids,), {"use_cache": False}).logits  # noqa: E731
    alone = build("truth", "sdpa")
    for found, member in zip(vmap(forward)(stacked), members):
        alone.load_state_dict(member, strict=False)
        torch.testing.assert_close(found.double(), alone(ids).logits, rtol=1e-4, atol=1e-4)


def test_derivatives_compile():
    model, ids = build("eager", "sdpa", num_hidden_layers=1), random_ids(2, 5).to(DEVICE)
    of_row = vmap(grad(lambda values, row: loss_of(model, values, row[None])), in_dims=(None, 0))
    torch._dynamo.reset()
    found, expected = (f(parameters(model), ids) for f in (torch.compile(of_row, backend="aot_eager"), of_row))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_grouped_linear_to_third_order():
    """Rows that belong to no expert and an expert without rows included."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in ((6, 3), (3, 2, 3)))
    offsets = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    linear = lambda x, weight: grouped_linear(x, weight, offsets)  # noqa: E731
    torch.autograd.gradcheck(linear, (x, weight))
    torch.autograd.gradgradcheck(linear, (x, weight))

    def gradients(x, weight):
        return torch.autograd.grad(linear(x, weight).pow(3).sum(), (x, weight), create_graph=True)

    torch.autograd.gradgradcheck(gradients, (x, weight))


def kernel_cases() -> dict:
    """name -> (kernel, twin, inputs in fp64), of the operators that carry a gradient."""
    pytest.importorskip("triton")
    from complexity_deep.kernels import fused_dynamics, mu_guided_qkv, token_routed_gemm

    generator = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE) * 0.7  # noqa: E731
    T, H, C, D, E, I = 5, 12, 8, 8, 3, 10  # noqa: E741
    plan = reference.routing_plan_reference(torch.tensor([2, 0, 2, 2, 0], device=DEVICE), E)
    angles = make(1, T, D).float()
    cos, sin = angles.cos(), angles.sin()
    block = (make(H), make(H, H), make(C, 2 * H), make(C), make(3 * H, C), make(3 * H))
    projections = tuple(make(n, H) for n in (D, D, D, D, D, D))
    return {
        "token_routed_mlp": (
            lambda *x: token_routed_gemm.token_routed_mlp(*x, *plan),
            lambda *x: reference.token_routed_mlp_reference(*x, *plan),
            (make(T, H), make(E, 2 * I, H), make(E, H, I)),
        ),
        "qk_norm_rope": (
            lambda *x: mu_guided_qkv.qk_norm_rope(*x, cos, sin, 1e-6),
            lambda *x: reference.qk_norm_rope_reference(*x, cos.to(x[0]), sin.to(x[0]), 1e-6),
            (make(1, T, 2, D), make(1, T, 1, D), make(D), make(D)),
        ),
        "mu_guided_qkv": (
            lambda x, m, *w: mu_guided_qkv.mu_guided_qkv(x, m, w),
            lambda x, m, *w: x @ torch.cat(w[:3]).T + m @ torch.cat(w[3:]).T,
            (make(T, H), make(T, H), *projections),
        ),
        "mu_guided_qkv-first": (
            lambda x, *w: mu_guided_qkv.mu_guided_qkv(x, None, w),
            lambda x, *w: x @ torch.cat(w).T,
            (make(T, H), *projections[:3]),
        ),
        "inl_dynamics_block": (
            lambda *x: fused_dynamics.inl_dynamics_block(*x, 0.1),
            lambda *x: reference.inl_dynamics_block_reference(*x, 0.1),
            (make(T, H), make(T, H), make(T, H), *block),
        ),
        "inl_dynamics_block-first": (
            lambda h, v, *x: fused_dynamics.inl_dynamics_block(h, v, None, *x, 0.1),
            lambda h, v, *x: reference.inl_dynamics_block_reference(h, v, None, *x, 0.1),
            (make(T, H), make(T, H), *block),
        ),
    }


CASES = ("token_routed_mlp", "qk_norm_rope", "mu_guided_qkv", "mu_guided_qkv-first")


def second_derivatives(function, inputs, dtype) -> list:
    """First gradients of a sum of squares of all outputs, and the gradients of the sum of their squares."""
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    first = torch.autograd.grad(sum(y.square().sum() for y in outputs), inputs, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]


@pytest.mark.parametrize("name", [*CASES, "inl_dynamics_block", "inl_dynamics_block-first"])
def test_second_derivatives_of_the_kernels(name):
    kernel, twin, inputs = kernel_cases()[name]
    truth = second_derivatives(twin, inputs, torch.float64)
    for index, (found, expected) in enumerate(zip(second_derivatives(kernel, inputs, torch.float32), truth)):
        assert (found - expected).norm() <= 2e-5 * expected.norm(), index
