"""What the forward and backward pass must do beyond the golden tensors."""

import copy
import inspect
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    BatchEncoding,
    DynamicCache,
    Qwen2Config,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from complexity_deep import (
    ComplexityDeepConfig,
    ComplexityDeepForCausalLM,
    ComplexityDeepForSequenceClassification,
    ComplexityDeepModel,
)
from complexity_deep.compatibility_complexity_deep import CACHE_NAME
from complexity_deep.kernels.kernel_reference import routing_plan_reference
from complexity_deep.modeling_complexity_deep import ComplexityDeepRMSNorm
from complexity_deep.routing_complexity_deep import ROUTING_PLANS
from support import close, random_ids, tiny_config, tiny_model

ABLATIONS = {
    "published": {},
    "dense": {"use_token_routed_mlp": False},
    "one expert": {"num_experts": 1},
    "plain token-routed": {"use_mu_guidance": False, "use_dynamics": False, "use_mu_routing": False},
    "guidance only": {"use_dynamics": False},
    "dynamics only": {"use_mu_guidance": False},
    "mu norm": {"use_mu_norm": True},
    "routing only": {"use_dynamics": False, "use_mu_guidance": False},
    "router learns": {"mu_router_gradient": True},
    "router learns, no dynamics": {"mu_router_gradient": True, "use_dynamics": False},
    "shared expert": {"shared_expert_intermediate_size": 48},
    "sliding window": {"sliding_window": 5},
    "untied, three experts, one kv head": {
        "tie_word_embeddings": False,
        "num_experts": 3,
        "intermediate_size": 51,
        "num_key_value_heads": 1,
    },
    "gelu, no qk norm": {"hidden_act": "gelu", "use_qk_norm": False},
}


@pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS)
class TestEveryConfiguration:
    def test_cached_decoding_token_by_token_and_in_chunks_equals_the_full_forward(self, options):
        # fp64 where large weights make fp32 itself uncertain by more than 1e-5; the published shape holds in fp32
        model, ids = tiny_model(dtype=torch.float64 if options else torch.float32, **options), random_ids(2, 14)
        full = model(ids, use_cache=False).logits
        for sizes in ([1] * 14, [5, 3, 6], [13, 1]):
            caches = [None, DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)]
            for cache in caches:
                for explicit in (False, True):
                    cache_now, start = copy.deepcopy(cache), 0
                    for size in sizes:
                        positions = torch.arange(start, start + size)[None] if explicit else None
                        part = model(
                            ids[:, start : start + size],
                            cache=cache_now,
                            position_ids=positions,
                            use_cache=True,
                        )
                        close(part.logits, full[:, start : start + size])
                        cache_now, start = part[CACHE_NAME], start + size

    def test_a_token_changes_no_earlier_logit_and_its_own(self, options):
        model, ids = tiny_model(**options), random_ids(1, 12)
        changed = ids.clone()
        changed[0, 7] = (ids[0, 7] + 1) % 257
        before, after = model(ids).logits[0], model(changed).logits[0]
        close(after[:7], before[:7], 1e-6)  # not bitwise: the changed token moves rows between the experts' matmuls
        assert (before[7:] - after[7:]).abs().amax(dim=-1).min() > 1e-3

    def test_left_padding_changes_nothing(self, options):
        model, ids = tiny_model(dtype=torch.float64 if options else torch.float32, **options), random_ids(1, 9)
        padded = torch.cat((torch.ones(1, 4, dtype=torch.int64), ids), dim=1)
        mask = torch.tensor([[0] * 4 + [1] * 9])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = model(ids).logits
        # without position_ids every position is shifted, which the fp32 RoPE tables round differently
        close(model(padded, attention_mask=mask).logits[:, 4:], expected, 1e-5)
        close(model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:], expected)

    @pytest.mark.parametrize("training", (False, True))
    def test_a_packed_row_equals_its_documents_apart(self, options, training):
        model = tiny_model(dtype=torch.float64 if options else torch.float32, **options).train(training)
        documents = [random_ids(1, n, seed=n) for n in (6, 3, 5)]
        row = torch.cat(documents, dim=1)
        positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
        expected = torch.cat([model(d).logits for d in documents], dim=1)
        close(model(row, position_ids=positions).logits, expected)  # with the default use_cache
        close(model(row, position_ids=positions, use_cache=False).logits, expected)

    def test_every_parameter_gets_a_gradient_also_after_reloading(self, options, tmp_path):
        model = tiny_model(std=0.1, **options)  # small enough that mu leaves some tokens to every expert
        model.save_pretrained(tmp_path)
        reloaded = ComplexityDeepForCausalLM.from_pretrained(tmp_path)
        ids = torch.arange(3, 83).view(2, 40)  # reaches every expert
        for candidate in (model, reloaded):
            candidate(ids, labels=ids).loss.backward()
            without = [name for name, p in candidate.named_parameters() if p.requires_grad and p.grad is None]
            assert not without
            for name, parameter in candidate.named_parameters():
                if ".experts." in name:
                    assert (parameter.grad.flatten(1).norm(dim=1) > 0).all(), name
        for (name, a), (_, b) in zip(model.state_dict().items(), reloaded.state_dict().items()):
            assert torch.equal(a, b), name

    @pytest.mark.parametrize("reentrant", (False, True))
    def test_gradient_checkpointing_gives_the_same_gradients(self, options, reentrant):
        model, ids = tiny_model(dtype=torch.float64, **options).train(), random_ids(2, 10)
        model(ids, labels=ids).loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            close(parameter.grad, expected[name])


@pytest.mark.parametrize("implementation", ("eager", "sdpa", "flex_attention"))
def test_attention_implementations_agree_and_the_switch_takes_effect(implementation):
    model, ids = tiny_model(), random_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model.set_attn_implementation("sdpa")
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        close(model(ids, attention_mask=mask).logits[mask.bool()], expected.detach())
    weights = model(ids, output_attentions=True).attentions if implementation == "eager" else None
    assert weights is None or (len(weights) == 3 and weights[0].shape == (2, 4, 11, 11))


@pytest.mark.parametrize("window", (None, 4))
@pytest.mark.parametrize("rows", (1, 2))
def test_flex_attention_separates_packed_documents_without_asking_the_device(window, rows, monkeypatch):
    model, ids = tiny_model(sliding_window=window), random_ids(2, 11)
    positions = torch.tensor([[*range(5), *range(6)], [*range(11)]])[:rows]  # one row stands for both
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        model.set_attn_implementation("flex_attention")
        # It waits for the GPU, once in every forward that is not compiled.
        monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", None)
        close(model(ids, position_ids=positions, use_cache=False).logits, expected)


@pytest.mark.parametrize("implementation", ("batched_mm", "grouped_mm"))
@pytest.mark.parametrize("options", ({}, {"mu_router_gradient": True}, {"use_mu_routing": False}), ids=str)
def test_experts_implementations_agree_in_logits_and_gradients(implementation, options):
    # 2 x 40 tokens and widths that the library's grouped_mm accepts
    model, ids = tiny_model(intermediate_size=192, **options), random_ids(2, 40)
    results = []
    for name in ("eager", implementation):
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == name
        model.zero_grad()
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        results.append((outputs.logits, {n: p.grad.clone() for n, p in model.named_parameters()}))
    close(results[1][0], results[0][0])
    for name, gradient in results[0][1].items():
        close(results[1][1][name], gradient)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("width", (27, 44, 64))
def test_default_experts_work_in_every_dtype_and_width(dtype, width):
    model, ids = tiny_model(std=0.05, dtype=dtype, num_experts=3, intermediate_size=3 * width), random_ids(1, 9)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.logits.dtype == dtype and outputs.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_stays_finite_over_4096_tokens(dtype):
    model = tiny_model(std=0.1, dtype=dtype)
    with torch.no_grad():
        assert model(random_ids(1, 4096)).logits.isfinite().all()


def test_rotary_frequencies_stay_fp32_in_a_half_precision_model():
    model = tiny_model().half()
    expected = 1.0 / 10000.0 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)


def test_positions_beyond_max_position_embeddings_are_exact():
    model = tiny_model(max_position_embeddings=16, dtype=torch.float64)
    longer = tiny_model(max_position_embeddings=64, dtype=torch.float64)
    ids = random_ids(1, 40)
    assert torch.equal(model(ids).logits, longer(ids).logits)


def test_position_ids_are_honoured():
    model, ids = tiny_model(), random_ids(1, 6)
    gap = torch.tensor([[0, 1, 2, 10, 11, 12]])
    assert (model(ids).logits - model(ids, position_ids=gap).logits).abs().max() > 1e-3
    close(model(ids, position_ids=torch.arange(5, 11)[None]).logits, model(ids).logits, 1e-4)  # RoPE is relative


def test_sliding_window_sees_itself_and_the_keys_before():
    narrow, wide, ids = tiny_model(sliding_window=4), tiny_model(), random_ids(1, 12)
    assert torch.allclose(narrow(ids).logits[:, :4], wide(ids).logits[:, :4], atol=1e-5)
    assert (narrow(ids).logits[:, 4:] - wide(ids).logits[:, 4:]).abs().max() > 1e-2


def test_fullgraph_compile_equals_eager():
    for options in ({}, {"use_mu_routing": False}):
        model, ids = tiny_model(**options), random_ids(2, 8)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected, actual = model(ids, labels=ids), compiled(ids, labels=ids)
        close(actual.logits, expected.logits)
        expected.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        actual.loss.backward()
        for gradient, parameter in zip(gradients, model.parameters()):
            close(parameter.grad, gradient)


def test_logits_to_keep():
    model, ids = tiny_model(), random_ids(2, 7)
    full = model(ids).logits
    close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, full[:, [1, 4]])
    rows = torch.tensor([[0, 3], [2, 5]])
    close(model(ids, logits_to_keep=rows).logits, torch.stack([full[i, rows[i]] for i in range(2)]))
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 2] = mask[1, 3] = mask[1, 6] = True
    close(model(ids, logits_to_keep=mask).logits, full[mask])


def test_loss_is_the_shifted_mean_and_honours_num_items_in_batch():
    model, ids = tiny_model(), random_ids(2, 7)
    labels = ids.clone()
    labels[0, :5] = -100
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten())
    close(model(ids, labels=labels).loss, expected)
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    close(model(ids, labels=labels, num_items_in_batch=20).loss, total / 20)


def test_outputs_hidden_states_and_return_dict():
    model, ids = tiny_model(), random_ids(1, 5)
    per_layer = ("hidden_states", "router_logits", "expert_ids", "velocities", "mus")
    outputs = model(ids, **{f"output_{name}": True for name in per_layer})
    assert len(outputs.hidden_states) == 4
    assert torch.equal(outputs.router_logits[1].argmax(-1), outputs.expert_ids[1].flatten())
    assert len(outputs.expert_ids) == len(outputs.velocities) == len(outputs.mus) == 3
    close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    as_tuple = model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], outputs.logits)


def test_straight_through_router_leaves_the_forward_bit_identical_and_trains_the_router():
    # small enough weights that the softmax over experts does not saturate at the base logit of 2
    plain = tiny_model(std=0.1, mu_router_base_logit=2.0)
    learning = tiny_model(std=0.1, mu_router_base_logit=2.0, mu_router_gradient=True)
    ids = random_ids(2, 20)
    learning.load_state_dict(plain.state_dict())
    outputs = learning(ids, labels=ids)
    assert torch.equal(outputs.logits, plain(ids).logits)
    outputs.loss.backward()
    for name, parameter in learning.named_parameters():
        if "mu_router" in name:
            assert parameter.grad.norm() > 0, name


def test_mu_overrides_the_expert_and_ties_go_to_the_lowest():
    model, ids = tiny_model(), random_ids(2, 30)
    chosen = torch.stack(model(ids, output_expert_ids=True).expert_ids)
    assert 0 < (chosen != ids % 4).float().mean() < 1
    router = model.model.layers[0].mlp.mu_router
    tied = torch.zeros_like(router.weight)
    tied[0] = tied[2] = 20.0
    router.weight = tied
    ones = torch.ones(4, 64) / 64
    assert router(ones, torch.tensor([1, 3, 1, 3]))[2].tolist() == [0, 0, 0, 0]


def test_routing_plan_is_made_once_per_forward_without_mu_routing(monkeypatch):
    calls = []

    def counting(*args):
        calls.append(args)
        return routing_plan_reference(*args)

    monkeypatch.setitem(ROUTING_PLANS, "eager", counting)
    model = tiny_model(use_mu_routing=False)
    model.set_experts_implementation("eager")
    model(random_ids(2, 8))
    assert len(calls) == 1


def test_initialisation_gives_what_the_config_says():
    torch.manual_seed(0)
    model = ComplexityDeepForCausalLM(
        tiny_config(
            dynamics_alpha=0.8,
            dynamics_beta=0.3,
            dynamics_gate=0.6,
            scaled_residual_init=True,
            hidden_size=128,
            shared_expert_intermediate_size=96,
        )
    )
    for layer in model.model.layers:
        z = F.silu(layer.dynamics.controller_in(torch.randn(5, 256)))
        alpha, beta, gate = layer.dynamics.controller_out(z).chunk(3, dim=-1)
        torch.testing.assert_close(torch.sigmoid(alpha), torch.full_like(alpha, 0.8))
        torch.testing.assert_close(F.softplus(beta), torch.full_like(beta, 0.3))
        torch.testing.assert_close(torch.sigmoid(gate), torch.full_like(gate, 0.6))
        # Zero but for the last digit of whatever it is added to, see `nearly_zero`.
        assert layer.dynamics.mu_proj.weight.abs().max() < 1e-11 and not layer.mlp.mu_router.weight.any()
        residual = 0.02 / math.sqrt(6)
        expected = {
            layer.self_attn.o_proj.weight: residual,
            layer.mlp.experts.down_proj: residual,
            layer.mlp.shared_expert.down_proj.weight: residual,
            layer.mlp.experts.gate_up_proj: 0.02,
            layer.self_attn.q_proj.weight: 0.02,
        }
        for weight, std in expected.items():
            assert weight.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_copies_of_layers_compute_what_their_originals_do(kernels):
    """A copy of layer 0 has no weights for guidance, and a copy has the value embedding of its original."""
    pytest.importorskip("triton") if kernels == "triton" else None
    model, ids = tiny_model(std=0.1, value_embedding_layers=[0], use_mu_routing=False), random_ids(1, 8)
    model.set_kernels_implementation(kernels)
    body = model.model
    body.layers = torch.nn.ModuleList(copy.deepcopy(body.layers[layer]) for layer in (0, 1, 0, 2))
    model.config.num_hidden_layers = 4
    states, velocity, guidance, highway = body.embed_tokens(ids), torch.zeros(1, 8, 64), None, None
    shared = {"expert_ids": body.token_to_expert[ids], "attention_mask": None, "token_ids": ids}
    shared["position_embeddings"] = body.rotary_emb(states, torch.arange(8)[None])
    for index, layer in enumerate(body.layers):
        guidance = None if index == 2 else guidance
        states, velocity, guidance, highway = layer(states, velocity, guidance, highway, **shared)
    expected = model.lm_head(body.norm(states))
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", (1e-6, 1.0, 1e3))
def test_mu_norm_bounds_a_large_guidance_and_leaves_a_small_one(scale):
    model, seen = tiny_model(std=0.3, num_hidden_layers=2, use_mu_norm=True), {}
    below, above = model.model.layers
    with torch.no_grad():
        below.dynamics.mu_proj.weight.mul_(scale)
        below.dynamics.mu.mul_(scale)
    below.register_forward_hook(lambda module, inputs, outputs: seen.update(below=outputs[2]))
    above.self_attn.mu_to_k.register_forward_hook(lambda module, inputs, outputs: seen.update(above=inputs[0]))
    model(random_ids(2, 9))
    mean_square = seen["below"].square().mean(-1, keepdim=True)
    close(seen["above"], seen["below"] / (1 + mean_square).sqrt())
    assert (mean_square.max() < 1e-6) if scale < 1 else (mean_square.min() > 1)


def test_parameter_counts_of_the_published_shape():
    with torch.device("meta"):
        config = ComplexityDeepConfig.from_pretrained("configs/1.5b.json")
        counts = ComplexityDeepForCausalLM(config).parameter_counts()
    assert counts == {"total": 1_516_217_856, "trained": 1_507_632_640, "active": 893_363_712}


def test_sequence_classification_reads_the_last_token_that_is_not_padding():
    torch.manual_seed(0)
    model = ComplexityDeepForSequenceClassification(tiny_config(num_labels=3)).eval()
    ids = random_ids(1, 6)
    padded = torch.cat((ids, torch.ones(1, 3, dtype=torch.int64)), dim=1)
    expected = model.score(model.model(ids).last_hidden_state)[:, -1]
    close(model(padded).logits, expected)
    assert model(padded, labels=torch.tensor([1])).loss.requires_grad


def test_norms_are_silent_under_autocast_and_round_once():
    """PyTorch warns of a norm whose weight is wider than its input, and computes the same numbers."""
    norm, states = ComplexityDeepRMSNorm(64, 1e-6), random_ids(5, 64).bfloat16()
    with torch.no_grad():
        norm.weight.normal_()
    was_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
            warnings.simplefilter("error")
            found = norm(states)
    finally:
        torch.set_warn_always(was_always)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = F.rms_norm(states, (64,), norm.weight, 1e-6)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_autocast_computes_in_the_autocast_dtype():
    model, ids = tiny_model(std=0.05), random_ids(1, 9)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(ids, labels=ids)
    assert outputs.logits.dtype == torch.bfloat16
    outputs.loss.backward()
    assert (outputs.logits.float() - model(ids).logits).norm() < 0.05 * model(ids).logits.norm()


@pytest.mark.parametrize("dtypes", ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)), ids=str)
def test_autocast_to_the_other_half_precision(dtypes):
    """`from_pretrained` keeps the dtype of the file, and a trainer or a GPU may ask for the other one."""
    model, ids = tiny_model(std=0.05, dtype=dtypes[0]), random_ids(1, 9)
    with torch.autocast("cpu", dtypes[1]):
        outputs = model(ids, labels=ids)
    assert outputs.logits.dtype == dtypes[1]
    outputs.loss.backward()
    expected = tiny_model(std=0.05)(ids).logits
    assert (outputs.logits.float() - expected).norm() < 0.05 * expected.norm()


BAD_CONFIGS = {
    "hidden_size .64. must be divisible by num_attention_heads .5.": {"num_attention_heads": 5},
    "num_attention_heads .4. must be divisible by num_key_value_heads .3.": {"num_key_value_heads": 3},
    "head_dim .* must be even for RoPE, but is 5": {"hidden_size": 20},
    "intermediate_size .177. must be divisible by num_experts .4.": {"intermediate_size": 177},
    "hidden_act must be one of silu, swish, gelu, relu, but is 'tanh'": {"hidden_act": "tanh"},
    "routing must be one of modulo, balanced, random, but is 'hash'": {"routing": "hash"},
    "dynamics_alpha must lie between 0 and 1": {"dynamics_alpha": 1.5},
    "sliding_window must be": {"sliding_window": 0},
    "num_key_value_heads must be at least 1, but is 0": {"num_key_value_heads": 0},
    "shared_expert_intermediate_size must be 0": {"shared_expert_intermediate_size": -1},
}


@pytest.mark.parametrize("message, fields", BAD_CONFIGS.items())
def test_bad_configurations(message, fields):
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 176}
    with pytest.raises(ValueError, match=message):
        ComplexityDeepConfig(**(shape | fields))


@pytest.mark.parametrize("message, fields", {**BAD_CONFIGS, "do you mean num_experts": {"num_expert": 8}}.items())
def test_bad_configurations_that_are_made_after_the_checks(message, fields, tmp_path):
    """By hand, and by an override of `from_pretrained`, which the library sets when the configuration is made."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 176}
    config = tiny_config(**shape)
    config.save_pretrained(tmp_path)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        ComplexityDeepForCausalLM(config)
    if "num_expert" not in fields:  # which the library takes for an argument of the model
        with pytest.raises(ValueError, match=message):
            ComplexityDeepForCausalLM(ComplexityDeepConfig.from_pretrained(tmp_path, **fields))


def test_what_follows_from_fields_follows_those_that_were_set_later():
    config = tiny_config(sliding_window=3)
    config.use_sliding_window, config.use_qk_norm, config.value_embedding_layers = False, False, []
    rule = {"embed_tokens": "embedding_rowwise"}  # as quantizers and some releases of the library add it
    config.base_model_tp_plan = config.base_model_tp_plan | rule
    model = ComplexityDeepForCausalLM(config)
    assert model.config.sliding_window is None and model.config.value_embedding_layers is None
    assert not any("q_norm" in name for name in model.config.base_model_tp_plan)
    assert rule.items() <= model.config.base_model_tp_plan.items()
    config = tiny_config()
    config.rope_theta = 7.0  # as scripts set it that are older than `rope_parameters`
    ids = random_ids(1, 9)
    torch.manual_seed(0)
    found = ComplexityDeepForCausalLM(config).eval()(ids).logits
    torch.manual_seed(0)
    torch.testing.assert_close(found, ComplexityDeepForCausalLM(tiny_config(rope_theta=7.0)).eval()(ids).logits)
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(ValueError, match="rope_parameters must name rope_theta"):
        ComplexityDeepForCausalLM(config)


def test_overrides_of_what_follows_from_other_fields(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for name, value, other in (("head_dim", 16, 32), ("num_experts_per_tok", 1, 2)):
        loaded = ComplexityDeepForCausalLM.from_pretrained(tmp_path, **{name: value})
        assert getattr(loaded.config, name, value) == value
        config = ComplexityDeepConfig.from_pretrained(tmp_path, **{name: value})
        with pytest.raises(ValueError, match=f"{name} is always {value} here"):
            ComplexityDeepForCausalLM.from_pretrained(tmp_path, **{name: other})
        if name == "head_dim":
            config.head_dim = other
            with pytest.raises(ValueError, match="head_dim is always 16 here"):
                ComplexityDeepForCausalLM(config)


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("dtype", (torch.bool, torch.int64))
@torch.no_grad()
def test_a_mask_of_booleans_over_queries_and_keys(attention, dtype):
    """[B, 1, S, L], as for a prefix that sees itself whole; also in the steps with a cache."""
    model, ids = tiny_model(), random_ids(2, 9)
    sees = torch.ones(9, 9, dtype=torch.bool).tril()
    sees[:4, :4] = True
    added = torch.zeros(9, 9).masked_fill(~sees, -torch.inf)
    expected = model(ids, attention_mask=added[None, None]).logits
    assert (expected - model(ids).logits).abs().max() > 0.1
    model.set_attn_implementation(attention)
    sees = sees[None, None].to(dtype)
    torch.testing.assert_close(model(ids, attention_mask=sees).logits, expected, rtol=1e-4, atol=1e-4)
    first = model(ids[:, :6], attention_mask=sees[:, :, :6, :6], use_cache=True)
    rest = model(ids[:, 6:], attention_mask=sees[:, :, 6:], cache=first[CACHE_NAME])
    found = torch.cat((first.logits, rest.logits), dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_bad_inputs():
    model, ids = tiny_model(), random_ids(1, 4)
    with pytest.raises(ValueError, match=r"token id 257, but the vocabulary has ids 0 to 256"):
        model(torch.tensor([[3, 257]]))
    with pytest.raises(ValueError, match=r"token id -1"):
        model(torch.tensor([[3, -1]]))
    with pytest.raises(ValueError, match=r"input_ids must be int64 or int32 token ids, but has dtype torch.float32"):
        model(ids.float())
    with pytest.raises(ValueError, match=r"routing_ids must have .* \(1, 4\), but has \(1, 3\)"):
        model(ids, routing_ids=ids[:, :3])
    with pytest.raises(ValueError, match=r"input_ids must be \[batch, sequence\]"):
        model(ids[0])
    with pytest.raises(ValueError, match="input_ids must be a tensor of token ids, but is a BatchEncoding"):
        model(BatchEncoding({"input_ids": ids}))
    with pytest.raises(ValueError, match=r"routing_ids must be \[batch, prompt\]"):
        model.generate(ids, routing_ids=ids[0], max_new_tokens=1)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="kernels_implementation must be one of"):
        model.set_kernels_implementation("cuda")
    with pytest.raises(ValueError, match="is not supported"):
        model.set_experts_implementation("unknown")


@pytest.mark.parametrize("tokens", (3, 6))
def test_a_mask_that_does_not_fit_is_refused(tokens):
    """A mask of ones alone that is too short went unnoticed."""
    model, ids = tiny_model(), random_ids(2, 4)
    for mask in (torch.ones(2, tokens), torch.ones(2, tokens).triu(1)):
        with pytest.raises(ValueError, match=rf"attention_mask is for {tokens} tokens, but the text has 4"):
            model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask must be .* but has shape \(2, 4, 4\)"):
        model(ids, attention_mask=torch.ones(2, 4, 4))


def test_a_block_mask_of_flex_attention():
    model, ids = tiny_model(attn_implementation="flex_attention"), random_ids(1, 16)

    def of_one_half(batch, head, query, key):
        return (query >= key) & (query // 8 == key // 8)

    mask, positions = create_block_mask(of_one_half, 1, None, 16, 16, device="cpu"), torch.arange(16)[None] % 8
    with torch.no_grad():  # PyTorch has no gradient of it on the CPU
        apart = model(ids.view(2, 8)).logits.view(1, 16, -1)
        close(model(ids, attention_mask=mask, position_ids=positions).logits, apart)


def test_a_foreign_config_is_not_taken_for_ours():
    with pytest.raises(ValueError, match="needs a ComplexityDeepConfig, but got a Qwen2Config"):
        ComplexityDeepForCausalLM(Qwen2Config(hidden_size=64, num_attention_heads=4))


def test_forward_says_that_it_takes_the_options_of_the_library():
    """Tools and the library's common tests read the annotation to learn whether attentions can be had."""
    for model_class in (ComplexityDeepModel, ComplexityDeepForCausalLM):
        annotation = inspect.signature(model_class.forward).parameters["kwargs"].annotation
        assert "output_attentions" in annotation.__args__[0].__annotations__


def test_the_switch_of_the_sliding_window(tmp_path):
    """`use_sliding_window=False` means no window in masks, caches and generation, and stays so in a saved folder."""
    ids = random_ids(1, 9)
    full, window = tiny_model(), tiny_model(sliding_window=3)
    off = tiny_model(sliding_window=3, use_sliding_window=False)
    assert torch.equal(off(ids).logits, full(ids).logits)
    assert not torch.allclose(window(ids).logits, full(ids).logits)
    assert {type(layer) for layer in DynamicCache(config=off.config).layers} == {DynamicLayer}
    assert {type(layer) for layer in DynamicCache(config=window.config).layers} == {DynamicSlidingWindowLayer}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(off.generate(ids, **options), full.generate(ids, **options))
    off.save_pretrained(tmp_path)
    loaded = ComplexityDeepForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, full(ids).logits)
    assert window.config.use_sliding_window and window.config.sliding_window == 3
    config = ComplexityDeepConfig(sliding_window=3, use_sliding_window=False)
    assert config.sliding_window is None
    window.save_pretrained(tmp_path)
    loaded = ComplexityDeepForCausalLM.from_pretrained(tmp_path, use_sliding_window=False)
    assert torch.equal(loaded(ids).logits, full(ids).logits)
