"""The whole model on the Triton kernels: on the GPU where there is one, else in Triton's interpreter on the CPU."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from complexity_deep import ComplexityDeepForCausalLM, routing_complexity_deep
from complexity_deep import accelerated_complexity_deep as accelerated
from complexity_deep.compatibility_complexity_deep import CACHE_NAME
from complexity_deep.routing_complexity_deep import ROUTING_PLANS, layer_routing_plans
from support import GOLDEN, random_ids, tiny_model

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The options of configs/*_best.json, small, with more experts than mu may choose among by the decode kernels.
BEST = {
    "use_mu_guidance": False,
    "use_dynamics": False,
    "use_mu_routing": False,
    "num_experts": 40,
    "intermediate_size": 320,
    "shared_expert_intermediate_size": 24,
    "routing": "random",
    "routing_per_layer": True,
    "value_embedding_layers": [1],
}


@pytest.mark.parametrize("folder", ("v0.13-tiny", "v0.13-dense"))
def test_golden_logits_and_gradients(folder):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = ComplexityDeepForCausalLM.from_pretrained(
        GOLDEN / folder, dtype=torch.float32, kernels_implementation="triton", experts_implementation="cggr"
    ).to(DEVICE)
    expected = {key: tensor.to(DEVICE) for key, tensor in load_file(GOLDEN / folder / "golden.safetensors").items()}
    outputs = model(expected["input_ids"], labels=expected["input_ids"])
    assert (outputs.logits - expected["logits"]).abs().max() < 5e-5
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        key = f"grad.{name}"
        if ".mlp.experts." in name:
            reference = expected[key.replace(".experts.", ".")].transpose(1, 2)
        else:
            reference = expected[key]
        assert (parameter.grad - reference).norm() <= 1e-5 * reference.norm(), name


def test_gradients_reach_what_the_published_triton_path_leaves_untouched():
    model = tiny_model(std=0.1, num_hidden_layers=1, mu_router_gradient=True, mu_router_base_logit=2.0).to(DEVICE)
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")
    ids = torch.arange(3, 43).view(1, 40).to(DEVICE)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if any(part in name for part in ("experts", "mu_router", "post_attention_layernorm", "o_proj", "embed")):
            assert parameter.grad.norm() > 0, name
    for weight in (model.model.layers[0].mlp.experts.gate_up_proj, model.model.layers[0].mlp.experts.down_proj):
        assert (weight.grad.flatten(1).norm(dim=1) > 0).all()


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids = tiny_model(std=0.1, num_hidden_layers=2, intermediate_size=64).to(DEVICE).train(), random_ids(1, 8)
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(ids.to(DEVICE), labels=ids.to(DEVICE)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.gradient_checkpointing_enable()
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)


def test_layers_compiled_one_by_one_share_their_code():
    """As under FSDP2: the first layer and all others, not one for every index, which ends at dynamo's limit of 8."""
    model, ids = tiny_model(num_hidden_layers=10, intermediate_size=64).to(DEVICE).train(), random_ids(1, 4)
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")
    torch._dynamo.reset()
    counter = CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=counter)
    model(ids.to(DEVICE), use_cache=False)
    assert counter.frame_count == 2


def test_short_rows_make_no_plans_of_cudnn(monkeypatch):
    """Longer ones may, and all where the caller has left PyTorch too little else; the caller's setting stays."""
    enabled, sdpa = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(*args, **kwargs):
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        if args[1].shape[2] == 7:
            raise MemoryError
        return sdpa(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)
    monkeypatch.setattr(accelerated, "CUDNN_LENGTH", 16)
    model = tiny_model(num_hidden_layers=1).to(DEVICE)
    model.set_kernels_implementation("triton")
    for length in (9, 16):
        model(random_ids(1, length).to(DEVICE), use_cache=False)
    with pytest.raises(MemoryError):
        model(random_ids(1, 7).to(DEVICE), use_cache=False)
    for other in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, other, SDPBackend.MATH]):
            model(random_ids(1, 9).to(DEVICE), use_cache=False)
    model.set_kernels_implementation("eager")
    model(random_ids(1, 9).to(DEVICE), use_cache=False)
    assert enabled == [False, True, False, True, True, True]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def decode_calls(monkeypatch) -> list:
    """Grows by one for every layer that the decode kernels compute."""
    calls = []
    for name in ("decode_layer_tail", "decode_plain_tail"):
        tail = getattr(accelerated, name)
        monkeypatch.setattr(accelerated, name, lambda *a, tail=tail: calls.append(1) or tail(*a))
    return calls


@pytest.mark.parametrize(
    "options, layers",
    (
        pytest.param({}, 2, id="published"),
        pytest.param({"use_mu_routing": False, "use_qk_norm": False}, 2, id="plain-routing"),
        pytest.param({"use_mu_guidance": False, "mu_router_gradient": True}, 2, id="no-guidance-router-learns"),
        pytest.param({"sliding_window": 3}, 2, id="window"),
        pytest.param({"use_mu_norm": True}, 2, id="mu-norm"),
        pytest.param({"use_dynamics": False}, 0, id="no-dynamics"),
        pytest.param({"shared_expert_intermediate_size": 16}, 2, id="shared-expert"),
        pytest.param(BEST, 2, id="best"),
        pytest.param(BEST | {"use_token_routed_mlp": False, "num_experts": 1}, 0, id="best-dense"),
        pytest.param({"use_token_routed_mlp": False}, 0, id="dense"),
        pytest.param(
            {"routing": "random", "routing_per_layer": True, "value_embedding_layers": [1]},
            2,
            id="routing-per-layer-values-in-one",
        ),
    ),
)
def test_decoding_equals_the_full_forward(monkeypatch, options, layers):
    """A step of one token by the decode kernels where they apply (in `layers` of the two), of more by the others."""
    model = tiny_model(std=0.1, num_hidden_layers=2, **options).to(DEVICE)
    calls = decode_calls(monkeypatch)
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")
    ids, cache = random_ids(2, 6).to(DEVICE), None
    with torch.no_grad():
        full = model(ids).logits
        for start, size in ((0, 3), (3, 1), (4, 2)):
            part = model(ids[:, start : start + size], cache=cache, use_cache=True)
            cache = part[CACHE_NAME]
            torch.testing.assert_close(part.logits, full[:, start : start + size], rtol=1e-4, atol=1e-4)
    assert len(calls) == layers


def test_the_decode_kernels_pass_over_no_module_that_does_more(monkeypatch):
    """A recording hook, an adapter, a module of another class, a gradient: each keeps the layer module by module."""
    calls, model = decode_calls(monkeypatch), tiny_model(num_hidden_layers=1).to(DEVICE)
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")
    layer, ids = model.model.layers[0], random_ids(1, 1).to(DEVICE)
    expected = model(ids).logits
    assert not calls and expected.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert len(calls) == 1
        assert model(ids, output_expert_ids=True).expert_ids[0].shape == (1, 1)  # hooks that stay from now on
        model(ids)
        for module in model.modules():
            module._forward_hooks.clear()
        model(ids)
        assert len(calls) == 2
        norm, layer.post_attention_layernorm = layer.post_attention_layernorm, torch.nn.RMSNorm(64).to(DEVICE)
        model(ids)
        layer.post_attention_layernorm = norm
        layer.self_attn.o_proj = torch.nn.Sequential(layer.self_attn.o_proj)
        model(ids)
        assert len(calls) == 2


@torch.no_grad()
def test_the_decode_kernels_pass_over_no_shared_expert_or_value_embedding_that_does_more(monkeypatch):
    options = BEST | {"num_hidden_layers": 1, "value_embedding_layers": [0]}
    calls, model, ids = decode_calls(monkeypatch), tiny_model(std=0.1, **options).to(DEVICE), random_ids(1, 1)
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")
    layer, ids = model.model.layers[0], ids.to(DEVICE)
    model(ids)
    assert len(calls) == 1
    shared, embedding = layer.mlp.shared_expert, layer.self_attn.value_embedding
    for module in (shared, shared.up_proj, embedding, layer.self_attn.value_gate):
        handle = module.register_forward_hook(lambda *_: None)
        model(ids)
        handle.remove()
    embedding.max_norm = 1.0
    model(ids)
    embedding.max_norm = None
    act, shared.act_fn = shared.act_fn, torch.nn.ReLU()  # other than that of the experts
    model(ids)
    shared.act_fn = act
    layer.self_attn.value_embedding = torch.nn.Sequential(embedding)
    model(ids)
    assert len(calls) == 1
    layer.self_attn.value_embedding = embedding
    model(ids)
    assert len(calls) == 2


@torch.no_grad()
def test_a_layer_without_mu_hands_on_what_it_gets(monkeypatch):
    model = tiny_model(num_hidden_layers=1, **BEST | {"value_embedding_layers": None}).to(DEVICE)
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")
    x, ids = torch.ones(1, 1, 64, device=DEVICE), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    calls, tables = decode_calls(monkeypatch), model.model.rotary_emb(x, ids)
    given = {"expert_ids": ids, "position_embeddings": tables, "attention_mask": None}
    states = model.model.layers[0](x, x + 1, x + 2, x + 3, **given)[1:]
    assert len(calls) == 1 and all(torch.equal(state, x + 1 + index) for index, state in enumerate(states))


@pytest.mark.parametrize("name", ("self_attn.q_proj", "dynamics.controller_in", "mlp.shared_expert.down_proj"))
@torch.no_grad()
def test_modules_that_a_caller_put_around_ours_need_no_sizes(monkeypatch, name):
    model = tiny_model(std=0.1, num_hidden_layers=1, shared_expert_intermediate_size=24).to(DEVICE)
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")
    calls, ids, layer = decode_calls(monkeypatch), random_ids(1, 1).to(DEVICE), model.model.layers[0]
    expected = model(ids).logits
    assert len(calls) == 1
    layer.set_submodule(name, torch.nn.Sequential(layer.get_submodule(name)))
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1


@torch.no_grad()
def test_the_decode_kernels_take_no_more_experts_than_mu_can_choose_among():
    hidden = torch.zeros(1, 1, 64, device=DEVICE)
    for experts, mu_chooses, taken in ((32, True, True), (33, True, False), (1024, True, False), (1024, False, True)):
        options = {"num_experts": experts, "intermediate_size": 4 * experts, "num_hidden_layers": 1}
        model = tiny_model(**options, use_mu_routing=mu_chooses, experts_implementation="cggr").to(DEVICE)
        assert accelerated._takes_decode_kernels(model.model.layers[0], hidden, None, None) == taken


@pytest.mark.parametrize("experts", (2, 64, 2048))
def test_plans_of_all_layers_are_those_of_each(experts):
    """With 2 and 64 experts in one sort, with 2,048 two layers at a time."""
    ids = torch.randint(0, experts, (3, 600), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    make_plan = ROUTING_PLANS["cggr" if experts < 2048 else "eager"]
    plans = layer_routing_plans(make_plan, ids, experts)
    for plan, own in zip(plans, ids, strict=True):
        for found, expected in zip(plan, make_plan(own, experts), strict=True):
            assert found.dtype == expected.dtype == torch.int32 and torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("rows", (1, 5))
def test_a_step_of_one_token_makes_no_plan_of_all_layers(monkeypatch, rows):
    """The decode kernels of up to four rows need none, and the other layers each sort their own few tokens."""
    model, ids = tiny_model(std=0.1, num_hidden_layers=2, **BEST).to(DEVICE), random_ids(rows, 1).to(DEVICE)
    expected = model(ids, use_cache=False).logits
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")
    monkeypatch.setattr(routing_complexity_deep, "layer_routing_plans", None)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_decode_kernels_stand_for_sdpa_and_the_model_s_own_dtype_alone(monkeypatch):
    """Another attention, a mask of floats, autocast, other experts: each keeps the layer module by module."""
    calls, model = decode_calls(monkeypatch), tiny_model(std=0.1, num_hidden_layers=1).to(DEVICE)
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")
    ids = random_ids(1, 1).to(DEVICE)
    expected = model(ids).logits
    assert len(calls) == 1
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("sdpa")
    floats = torch.zeros(1, 1, 1, 1, device=DEVICE)
    torch.testing.assert_close(model(ids, attention_mask=floats).logits, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast(DEVICE, torch.bfloat16):
        model(ids)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ("self_attn.o_proj.weight", "mlp.experts.down_proj", "dynamics.mu_proj.weight"))
@torch.no_grad()
def test_weights_that_are_not_contiguous(name):
    model, ids = tiny_model(num_hidden_layers=1).to(DEVICE), random_ids(1, 1).to(DEVICE)
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")
    expected = model(ids).logits
    weight = model.model.layers[0].get_parameter(name)
    weight.data = weight.data.mT.contiguous().mT
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_static_cache_that_does_not_fit_the_step_is_refused():
    """Of another batch, of another length than its mask, of another dtype: as without the decode kernels."""
    model, ids = tiny_model(num_hidden_layers=1).to(DEVICE), random_ids(4, 5).to(DEVICE)
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")

    def step(rows=4, length=8, dtype=None):
        cache = StaticCache(config=model.config, max_cache_len=8)
        model(ids[:, :4], cache=cache)
        layer = cache.layers[0]
        layer.keys, layer.values = (x.to(dtype or x.dtype) for x in (layer.keys, layer.values))
        seen = (torch.arange(length, device=DEVICE) <= 4).expand(rows, 1, 1, length).contiguous()
        positions = torch.full((rows, 1), 4, device=DEVICE)
        return model(ids[:rows, 4:5], cache=cache, attention_mask=seen, position_ids=positions).logits

    torch.testing.assert_close(step()[:, 0], model(ids).logits[:, 4], rtol=1e-4, atol=1e-4)
    for wrong in ({"rows": 1}, {"length": 6}, {"dtype": torch.float64}):
        with pytest.raises((RuntimeError, ValueError)):
            step(**wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("options", ({}, {"use_mu_routing": False}), ids=str)
def test_fullgraph_compile_and_autocast(options):
    torch.backends.cuda.matmul.allow_tf32 = False
    model, ids = tiny_model(std=0.1, **options).cuda().train(), random_ids(2, 64).cuda()

    def gradients(forward, autocast=False):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = forward(ids, labels=ids).loss
        loss.backward()
        return torch.cat([p.grad.float().flatten() for p in model.parameters()])

    expected = gradients(model)
    assert torch.equal(gradients(model), expected)  # deterministic
    assert (gradients(torch.compile(model, fullgraph=True)) - expected).norm() < 1e-4 * expected.norm()
    assert (gradients(model, autocast=True) - expected).norm() < 0.05 * expected.norm()
    compiled = torch.compile(model, fullgraph=True)
    assert (gradients(compiled, autocast=True) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.gpu
def test_a_decode_step_captures_in_a_cuda_graph():
    model = tiny_model(std=0.1, dtype=torch.bfloat16).cuda()
    ids = random_ids(1, 1).cuda()
    with torch.no_grad():
        for _ in range(3):
            expected = model(ids, use_cache=False).logits
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(ids, use_cache=False).logits
        captured.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(captured, expected)


class Doubled(torch.nn.Module):
    """A class around a part of a layer, without the attributes of the part."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, *args, **kwargs):
        first, *others = self.part(*args, **kwargs)
        return 2 * first, *others


def give_bias(linear):
    """Where the model has none: a repair of a pruned or quantized layer leaves one."""
    linear.bias = torch.nn.Parameter(torch.linspace(-1, 1, linear.out_features, device=DEVICE))


@pytest.mark.parametrize("grad", (False, True))
@pytest.mark.parametrize("tokens", (1, 4))
@pytest.mark.parametrize(
    "change",
    (
        pytest.param(lambda layer: give_bias(layer.self_attn.v_proj), id="bias-of-values"),
        pytest.param(lambda layer: give_bias(layer.self_attn.o_proj), id="bias-of-output"),
        pytest.param(lambda layer: give_bias(layer.dynamics.mu_proj), id="bias-of-mu"),
        pytest.param(lambda layer: setattr(layer.dynamics.controller_out, "bias", None), id="controller-without-bias"),
        pytest.param(lambda layer: setattr(layer.self_attn.k_norm, "eps", 9.0), id="epsilon-of-one-norm"),
        pytest.param(lambda layer: layer.self_attn.q_norm.register_forward_hook(lambda *x: 2 * x[2]), id="norm-hook"),
        pytest.param(lambda layer: setattr(layer.self_attn, "k_norm", torch.nn.Tanh()), id="norm-of-another-class"),
        pytest.param(lambda layer: setattr(layer.self_attn, "q_norm", None), id="one-norm"),
        pytest.param(lambda layer: layer.mlp.experts.act_fn.register_forward_hook(lambda *x: 2 * x[2]), id="act-hook"),
        pytest.param(lambda layer: setattr(layer.mlp.experts, "act_fn", torch.nn.ReLU()), id="known-activation"),
        pytest.param(lambda layer: setattr(layer.mlp.experts, "act_fn", torch.nn.Tanh()), id="other-activation"),
        pytest.param(lambda layer: setattr(layer.config, "use_dynamics", False), id="no-dynamics"),
        pytest.param(lambda layer: setattr(layer, "self_attn", Doubled(layer.self_attn)), id="around-attention"),
        pytest.param(lambda layer: setattr(layer, "dynamics", Doubled(layer.dynamics)), id="around-dynamics"),
        pytest.param(lambda layer: setattr(layer, "mlp", Doubled(layer.mlp)), id="around-mlp"),
    ),
)
def test_what_is_changed_in_a_layer_holds_on_the_kernels(change, tokens, grad):
    """A hook, another module, a setting: the kernels stand for the modules as they are."""
    model, ids = tiny_model(num_hidden_layers=1).to(DEVICE), random_ids(1, tokens).to(DEVICE)
    with torch.no_grad():
        before = model(ids).logits
    change(model.model.layers[0])
    found = []
    for kernels, experts in (("triton", "cggr"), ("eager", "eager")):
        model.set_kernels_implementation(kernels)
        model.set_experts_implementation(experts)
        with torch.set_grad_enabled(grad):
            found.append(model(ids).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert tokens == 1 or not torch.allclose(found[1], before, rtol=1e-2)


def test_adapters_on_experts_and_backward_hooks_are_not_passed_over():
    """What has a say in a module of the layer is asked: an adapter of its 3D weights, a hook on its gradient."""
    ids = random_ids(1, 4).to(DEVICE)
    logits = []
    for kernels, experts in (("triton", "cggr"), ("eager", "eager")):
        model = tiny_model(std=0.1, num_hidden_layers=1).to(DEVICE)
        model.set_kernels_implementation(kernels)
        model.set_experts_implementation(experts)
        options = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "r": 2}
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(**options, init_lora_weights=False)).to(DEVICE)
        logits.append(adapted(ids, use_cache=False).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)

    model, seen = tiny_model(num_hidden_layers=1).to(DEVICE), []
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")
    model.model.layers[0].mlp.register_full_backward_hook(lambda *_: seen.append(1))
    model(ids, use_cache=False).logits.sum().backward()
    assert seen
