"""A configuration takes what it knows, and says what it does not."""

import logging
import math
import re

import pytest

from complexity_deep import ComplexityDeepConfig, ComplexityDeepForCausalLM
from support import random_ids, tiny_config


@pytest.mark.parametrize(
    ("given", "meant"),
    (("num_expert", "num_experts"), ("dynamics_apha", "dynamics_alpha"), ("use_mu_guidence", "use_mu_guidance")),
)
def test_a_misspelt_field_is_refused(given, meant):
    with pytest.raises(ValueError, match=f"has no field {given}: do you mean {meant}"):
        ComplexityDeepConfig(**{given: 8})


def test_an_unknown_field_is_kept_and_said_to_have_no_effect(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config = ComplexityDeepConfig(ffn_multiplier=4)
    assert config.ffn_multiplier == 4
    assert "no field ffn_multiplier" in caplog.text


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    (
        ("head_dim", 64, 128),
        ("num_experts_per_tok", 1, 2),
        ("layer_types", ["full_attention"] * 12, ["full_attention"] * 11 + ["sliding_attention"]),
        ("attention_chunk_size", None, 8),
    ),
)
def test_what_follows_from_other_fields_is_taken_or_refused(name, right, wrong):
    assert name not in ComplexityDeepConfig(**{name: right}).to_dict()
    with pytest.raises(ValueError, match=re.escape(f"{name} is always {right} here")):
        ComplexityDeepConfig(**{name: wrong})


def test_layer_types_of_one_window_decode():
    """As configurations of Qwen have them. Where they stayed in ours, the library made a mask for each type."""
    config, ids = tiny_config(sliding_window=4), random_ids(1, 6)
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    model = ComplexityDeepForCausalLM(config).eval()
    static = {"cache_implementation": "static", "disable_compile": True}
    assert model.generate(ids, max_new_tokens=3, do_sample=False, **static).shape[1] > ids.shape[1]


@pytest.mark.parametrize(
    ("name", "values", "limits"),
    (
        ("attention_dropout", (-0.1, 1.5), "at least 0 and less than 1"),
        ("rms_norm_eps", (-1e-6,), "at least 0 and less than inf"),
        ("initializer_range", (-0.02, math.nan), "at least 0 and less than inf"),
        ("dynamics_dt", (-0.1, math.nan, math.inf), "at least 0 and less than inf"),
        ("mu_router_base_logit", (math.nan, math.inf), "a finite number"),
        ("rope_theta", (0.0, -1.0, math.inf, "10000"), "a number above 0"),
    ),
)
def test_numbers_with_which_no_model_computes_are_refused(name, values, limits):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} must be {limits}, but is .?{value}"):
            ComplexityDeepConfig(**{name: value})


def test_published_extras_are_taken_silently(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    ComplexityDeepConfig(architecture="DeepForCausalLM", version="0.13.0", innovations=["x"], safety_enabled=True)
    assert not caplog.text
