"""Routing tables and value embeddings, and the vocabulary that both follow."""

import copy

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from complexity_deep import (
    ComplexityDeepConfig,
    ComplexityDeepForCausalLM,
)
from complexity_deep.routing_complexity_deep import balanced_routing, random_routing
from support import close, random_ids, tiny_config, tiny_model


def test_routing_tables():
    modulo = ComplexityDeepForCausalLM(tiny_config())
    assert torch.equal(modulo.model.token_to_expert, torch.arange(257) % 4)
    table = ComplexityDeepForCausalLM(tiny_config(routing="random")).model.token_to_expert
    assert table.bincount().tolist() == [65, 64, 64, 64] and not torch.equal(table, torch.arange(257) % 4)
    counts = (1e6 / (torch.arange(257) + 1.0)).long()
    counts[200:] = 0
    modulo.balance_routing(counts)
    loads = torch.zeros(4).index_add_(0, modulo.model.token_to_expert, counts.float())
    assert loads.max() / loads.mean() < 1.2 and modulo.config.routing == "balanced"  # the top id alone is 0.65 means
    assert modulo.model.token_to_expert.bincount().max() - modulo.model.token_to_expert.bincount().min() <= 40
    assert torch.equal(balanced_routing(torch.zeros(8), 4).bincount(), torch.full((4,), 2))
    with pytest.raises(ValueError, match="one count for each of its 257"):
        modulo.balance_routing(counts[:5])


PER_LAYER = {"routing": "random", "routing_per_layer": True, "num_experts": 4}


def test_routing_per_layer_is_one_table_for_each_layer(tmp_path):
    model, ids = tiny_model(use_mu_routing=False, **PER_LAYER), random_ids(2, 9)
    table = model.model.token_to_expert
    assert table.shape == (3, 257) and not torch.equal(table[0], table[1])
    assert torch.equal(table[0], ComplexityDeepForCausalLM(tiny_config(routing="random")).model.token_to_expert)
    outputs = model(ids, output_expert_ids=True)
    for layer in range(3):
        assert torch.equal(outputs.expert_ids[layer], table[layer][ids])
    # Without plans each layer sorts for itself.
    model.set_experts_implementation("grouped_mm")
    close(model(ids).logits, outputs.logits)
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path)
    reloaded = ComplexityDeepForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded.model.token_to_expert, table)
    close(reloaded(ids).logits, outputs.logits)
    model.resize_token_embeddings(300)
    assert torch.equal(model.model.token_to_expert[:, :257], table)
    assert not torch.equal(*model.model.token_to_expert[:2, 257:])
    close(model(ids).logits[..., :257], outputs.logits)


def test_mu_routing_overrides_each_layer_s_own_table():
    model, ids = tiny_model(use_mu_routing=True, **PER_LAYER), random_ids(2, 9)
    outputs = model(ids, output_expert_ids=True, output_router_logits=True)
    for layer in range(3):
        assert torch.equal(outputs.expert_ids[layer], outputs.router_logits[layer].argmax(-1).view(2, 9))
        assert not torch.equal(outputs.expert_ids[layer], model.model.token_to_expert[layer][ids])


@pytest.mark.parametrize("device", ["meta", "cuda" if torch.cuda.is_available() else "cpu"])
def test_routing_tables_do_not_depend_on_the_default_device(device):
    counts = torch.arange(24) % 7
    random, balanced = random_routing(24, 4, seed=1), balanced_routing(counts, 4, seed=1)
    with torch.device(device):
        tables = random_routing(24, 4, seed=1), balanced_routing(counts, 4, seed=1)
        model = ComplexityDeepForCausalLM(tiny_config(routing="random", routing_per_layer=True))
    assert torch.equal(tables[1], balanced) and model.model.token_to_expert.device.type == device
    if device != "meta":
        assert torch.equal(tables[0].cpu(), random)


def test_balanced_routing_per_layer_is_balanced_and_differs():
    model = ComplexityDeepForCausalLM(tiny_config(**{**PER_LAYER, "routing": "balanced"}))
    counts = (1e6 / (torch.arange(257) + 10.0)).long()
    model.balance_routing(counts)
    first, second, _ = model.model.token_to_expert
    assert not torch.equal(first, second)
    for table in (first, second):
        loads = torch.zeros(4).index_add_(0, table, counts.float())
        assert loads.max() / loads.mean() < 1.01
    with pytest.raises(ValueError, match="one count for each of its 257"):
        model.balance_routing(counts[:5])


def test_layers_without_the_table_of_their_own_are_refused():
    model, ids = tiny_model(routing_per_layer=True, routing="random"), random_ids(1, 8)
    body = model.base_model
    for kept in ([1, 2], [0, 1, 1, 2]):  # removed, and copied as PEFT's `layer_replication` does
        changed = copy.deepcopy(model)
        changed.model.layers = torch.nn.ModuleList(copy.deepcopy(body.layers[layer]) for layer in kept)
        changed.config.num_hidden_layers = len(kept)
        with pytest.raises(ValueError, match=f"has {len(kept)} layers, but routing tables for 3"):
            changed(ids)
        changed.model.token_to_expert = body.token_to_expert[kept]
        assert changed(ids, use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize(
    "table", (torch.arange(257), -torch.ones(257).long(), torch.zeros(257), torch.zeros(3, 257).long(), torch.arange(3))
)
def test_what_is_no_routing_table_is_refused(table):
    """An expert that is not there would give zeros for its tokens."""
    model = tiny_model()
    with pytest.raises(ValueError, match=r"token_to_expert must be \[vocabulary\] with an expert from 0 to 3 for"):
        model.model.token_to_expert = table


def test_routing_per_layer_refuses_modulo():
    with pytest.raises(ValueError, match='routing_per_layer needs routing "random" or "balanced"'):
        ComplexityDeepConfig(routing_per_layer=True)


VALUES = [{"value_embedding_layers": [0, 1]}, {"value_embedding_layers": [1], **PER_LAYER}]


DENSE = {"use_token_routed_mlp": False, "use_mu_guidance": False, "use_dynamics": False}


@pytest.mark.parametrize("options", [*VALUES, {"value_embedding_layers": [1], **DENSE}])
def test_value_embeddings_are_added_to_the_values(options):
    model, ids = tiny_model(**options), random_ids(2, 9)
    plain = tiny_model(**{**options, "value_embedding_layers": []})
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".value_" not in name})
    recorded = {}
    for module, name in ((model.model.layers[1].self_attn, "with"), (plain.model.layers[1].self_attn, "without")):

        def record(*args, name=name, heads=module.heads):
            query, key, value = heads(*args)
            recorded[name] = value.transpose(1, 2)  # [B, S, K, D]
            return query, key, value

        module.heads = record
    for other in (model, plain):
        other.model.layers[0].self_attn.value_embedding = None  # so that layer 1 sees the same input in both
    given = []
    model.model.layers[1].self_attn.register_forward_pre_hook(lambda module, inputs: given.extend(inputs))
    model(ids), plain(ids)
    attention = model.model.layers[1].self_attn
    normed, guidance = given
    gate = 2 * torch.sigmoid((normed if guidance is None else guidance) @ attention.value_gate.weight.T)  # [B, S, K]
    assert (guidance is None) == ("use_mu_guidance" in options)
    added = attention.value_embedding.weight[ids].view(2, 9, 2, -1) * gate[..., None]
    close(recorded["with"] - recorded["without"], added)


def test_new_value_gates_are_one():
    torch.manual_seed(0)
    model = ComplexityDeepForCausalLM(tiny_config(value_embedding_layers=[1]))
    attention = model.model.layers[1].self_attn
    gate = torch.sigmoid(attention.value_gate(100 * torch.randn(9, 64)))
    assert torch.equal(2 * gate, torch.ones(9, 2))
    assert attention.value_embedding.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.05)
    model(random_ids(1, 9), labels=random_ids(1, 9)).loss.backward()
    assert attention.value_embedding.weight.grad.abs().max() > 0


@pytest.mark.parametrize("options", VALUES)
def test_value_embeddings_in_generation_embeddings_checkpointing_and_files(options, tmp_path):
    model, ids = tiny_model(std=0.1, **options), random_ids(2, 9)
    logits = model(ids).logits
    close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits)
    assert not torch.allclose(model(ids, routing_ids=random_ids(2, 9, seed=5)).logits, logits, atol=1e-3)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    close(model(ids[:, 5:], past_key_values=cache, use_cache=True).logits, logits[:, 5:])
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    close(model(tokens).logits[:, -2].argmax(-1), tokens[:, -1])
    model.save_pretrained(tmp_path)
    close(ComplexityDeepForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)
    model.train()
    model(ids, labels=ids).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, gradients[name])
    model.eval().resize_token_embeddings(300)
    close(model(ids).logits[..., :257], logits)
    model(torch.tensor([[299, 4]]))


def test_value_embedding_layers_must_exist():
    for layers in ([3], [-1], [1, 1]):
        with pytest.raises(ValueError, match="value_embedding_layers must name layers from 0 to 2, each once"):
            ComplexityDeepConfig(num_hidden_layers=3, value_embedding_layers=layers)


def test_parameter_counts_of_value_embeddings():
    plain = ComplexityDeepForCausalLM(tiny_config()).parameter_counts()
    model = ComplexityDeepForCausalLM(tiny_config(value_embedding_layers=[1]))
    attention, counts = model.model.layers[1].self_attn, model.parameter_counts()
    width, gate = attention.value_embedding.embedding_dim, attention.value_gate.weight.numel()
    assert counts["total"] - plain["total"] == 257 * width + gate
    assert counts["active"] - plain["active"] == width + gate


def test_resizing_extends_the_routing_table(tmp_path):
    model, ids = tiny_model(), random_ids(1, 8)
    model.model.token_to_expert.copy_(torch.arange(257).flip(0) % 4)
    before, table = model(ids).logits, model.model.token_to_expert.clone()
    model.resize_token_embeddings(300)
    assert torch.equal(model.model.token_to_expert, torch.cat((table, torch.arange(257, 300) % 4)))
    close(model(ids).logits[..., :257], before)
    model(torch.tensor([[299, 4]]))
    model.save_pretrained(tmp_path)
    reloaded = ComplexityDeepForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded.model.token_to_expert, model.model.token_to_expert)
    reloaded.resize_token_embeddings(100)
    assert torch.equal(reloaded.model.token_to_expert, table[:100])


@pytest.mark.parametrize("options", [{}, VALUES[0], {"use_token_routed_mlp": False}])
def test_a_new_embedding_takes_routing_table_and_value_embeddings_with_it(options):
    model, ids, table = tiny_model(**options), random_ids(1, 8), torch.arange(257).flip(0) % 4
    if model.config.is_routed:
        model.model.token_to_expert[..., :] = table
    before, larger = model(ids).logits, torch.nn.Embedding(300, 64)
    with torch.no_grad():
        larger.weight[:257] = model.get_input_embeddings().weight
    model.set_input_embeddings(larger)
    model.tie_weights()
    close(model(ids).logits[..., :257], before)
    assert model(torch.tensor([[299, 4]]), labels=torch.tensor([[299, 4]])).loss.isfinite()
    if model.config.is_routed:
        assert (model.model.token_to_expert[..., :257] == table).all()


@pytest.mark.parametrize("options", [{}, {"routing": "random", "routing_per_layer": True}])
def test_a_vocabulary_with_other_numbers(options):
    """As docs/training.md says."""
    model, ids, kept = tiny_model(**options), random_ids(2, 9, vocab_size=100), torch.arange(150).flip(0)
    table, before, embedding = model.base_model.token_to_expert, model(ids).logits, torch.nn.Embedding(150, 64)
    embedding.weight.data = model.get_input_embeddings().weight.data[kept]
    model.set_input_embeddings(embedding)
    model.tie_weights()
    model.base_model.token_to_expert = table[..., kept]
    close(model(149 - ids).logits, before[..., kept])


def test_a_model_that_holds_ours_may_resize_the_vocabulary(tmp_path):
    """As everybody does who adds the token of an image."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**vision, image_size=8, patch_size=4)
    config = LlavaConfig(vision_config=vision, text_config=tiny_config(), image_token_index=260)
    model = LlavaForConditionalGeneration(config).eval()
    model.resize_token_embeddings(264)
    inputs = {"input_ids": torch.tensor([[260] * 4 + [5, 262]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    logits = model(**inputs).logits
    assert logits.shape == (1, 6, 264)
    model.save_pretrained(tmp_path)
    close(LlavaForConditionalGeneration.from_pretrained(tmp_path)(**inputs).logits, logits)


def test_an_embedding_that_grew_without_the_routing_table_is_refused():
    model, ids = tiny_model(), random_ids(1, 8)
    twin, before = ComplexityDeepForCausalLM(model.config).eval(), model(ids).logits
    twin.load_state_dict(model.state_dict())
    model.resize_token_embeddings(300)
    close(twin(ids).logits, before)  # of the same configuration, which has 300 ids now
    twin.model.embed_tokens = torch.nn.Embedding(300, 64)
    with pytest.raises(ValueError, match=r"has 300 rows, but the routing table 257: .*resize_token_embeddings"):
        twin(torch.tensor([[299, 4]]))


def test_inputs_embeds_route_as_their_own_or_nearest_token():
    model, ids = tiny_model(use_mu_routing=False), random_ids(2, 9)
    model.resize_token_embeddings(700)  # mean resizing: rows that lie very close together
    ids[0, :3] = torch.tensor([400, 401, 699])
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.model.nearest_token_ids(embeds), ids)
    close(model(inputs_embeds=embeds).logits, model(ids).logits)
    soft = embeds + 1e-4 * torch.randn(embeds.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(model.model.nearest_token_ids(soft)[1], ids[1])
    other = random_ids(2, 9, seed=5)
    routed = model(inputs_embeds=embeds, routing_ids=other, output_expert_ids=True)
    assert not torch.allclose(routed.logits, model(ids).logits, atol=1e-3)
    close(routed.logits, model(ids, routing_ids=other).logits)


class Steered(torch.nn.Module):
    """A layer inside a class of somebody else, as tools for steering vectors and for skipping layers have it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


@pytest.mark.parametrize("options", [{}, VALUES[0]])
def test_layers_inside_classes_of_others(options):
    model, twin, ids = tiny_model(**options), tiny_model(**options), random_ids(1, 8)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = Steered(layer)
    assert model.parameter_counts() == twin.parameter_counts()
    for each in (model, twin):
        torch.manual_seed(0)
        each.resize_token_embeddings(300)
    close(model(ids + 40).logits, twin(ids + 40).logits)
