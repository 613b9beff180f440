"""What vLLM's Transformers backend asks of the model. `make test-vllm` runs vLLM itself, see vllm_generation.py.

The rules are those of vLLM 0.32, in `vllm/model_executor/models/transformers/`.
"""

import ast
import inspect
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface, AutoModel
from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from complexity_deep import ComplexityDeepConfig, ComplexityDeepModel
from complexity_deep.compatibility_complexity_deep import split_like_values
from complexity_deep.modeling_complexity_deep import ComplexityDeepAttention, eager_attention_forward
from support import random_ids, tiny_config, tiny_model


@pytest.fixture
def make_as_vllm(monkeypatch):
    """The base model of a configuration as vLLM makes it: the attention is vLLM's, and no file is loaded."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "vllm", eager_attention_forward)

    def make(config):
        config._attn_implementation = "vllm"
        return AutoModel.from_config(config)

    yield make
    register_checkpoint_conversion_mapping("complexity-deep", [], overwrite=True)


def test_attention_looks_its_function_up_once_and_calls_it_once():
    """vLLM reads the source of the forward, to put its own attention and its scale in the place of this call."""
    source = inspect.getsource(inspect.unwrap(ComplexityDeepAttention.forward))
    (forward,) = ast.parse(textwrap.dedent(source)).body
    assignments = [node for node in ast.walk(forward) if isinstance(node, (ast.Assign, ast.AnnAssign))]
    look_ups = [
        node
        for node in assignments
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "ALL_ATTENTION_FUNCTIONS.get_interface"
    ]
    assert len(look_ups) == 1
    target = look_ups[0].target if isinstance(look_ups[0], ast.AnnAssign) else look_ups[0].targets[0]
    uses = [node for node in ast.walk(forward) if isinstance(node, ast.Name) and node.id == target.id]
    (call,) = (node for node in ast.walk(forward) if isinstance(node, ast.Call) and ast.unparse(node.func) == target.id)
    assert len(uses) == 2  # it is given to nothing else
    (scaling,) = (ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "scaling")
    attention = tiny_model(num_hidden_layers=1).model.layers[0].self_attn
    owner, name = scaling.split(".")
    assert owner == "self" and isinstance(getattr(attention, name), float)
    assert isinstance(attention.layer_idx, int) and attention.config._attn_implementation


@pytest.mark.parametrize("options", ({}, {"use_dynamics": False, "tie_word_embeddings": False}))
def test_the_registry_has_the_names_of_the_files_tensors(options, make_as_vllm, tmp_path):
    tiny_model(**options).save_pretrained(tmp_path)
    config = ComplexityDeepConfig.from_pretrained(tmp_path)
    model, names = make_as_vllm(config), set()
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    for name in load_file(tmp_path / "model.safetensors"):
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        names.add(name)
    assert names - {"lm_head.weight"} == {f"model.{name}" for name in model.state_dict()}
    assert any("frozen" in name for name in names)


def test_no_kernel_of_ours_and_no_plan_for_them_is_used(make_as_vllm):
    model = make_as_vllm(tiny_config(use_mu_routing=False))
    assert model.config._kernels_implementation == "eager"
    assert model.routing_plans([random_ids(1, 4)] * 3) == [None] * 3


def test_a_model_that_is_not_for_vllm_leaves_the_registry_alone():
    model = AutoModel.from_config(tiny_config())
    assert not any("frozen" in str(rule.target_patterns) for rule in get_model_conversion_mapping(model))


def test_experts_that_vllm_would_compute_otherwise_are_refused(make_as_vllm):
    with pytest.raises(ValueError, match="vLLM computes SiLU in every expert, but this model has hidden_act='gelu'"):
        make_as_vllm(tiny_config(hidden_act="gelu"))
    make_as_vllm(tiny_config(hidden_act="swish"))
    make_as_vllm(tiny_config(hidden_act="gelu", use_token_routed_mlp=False))  # vLLM takes experts only as its own


def test_value_embeddings_that_are_not_split_as_the_values_are_refused():
    embedded, value = torch.ones(1, 3, 4, 8, dtype=torch.float64), torch.ones(1, 3, 4, 8)
    assert split_like_values(embedded, value).dtype == value.dtype
    with pytest.raises(ValueError, match=r"1 heads of the values and 4 of the value embeddings: .* without tensor"):
        split_like_values(embedded, value[:, :, :1])


def test_the_forward_names_its_local_variables_in_its_own_signature():
    """PyTorch binds the arguments of vLLM's call to them when it compiles ahead of time."""
    forward = ComplexityDeepModel.forward
    parameters = inspect.signature(forward, follow_wrapped=False).parameters
    assert set(parameters) <= set(forward.__code__.co_varnames)
