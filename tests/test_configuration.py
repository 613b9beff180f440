"""A configuration takes what it knows, and says what it does not."""

import logging

import pytest

from complexity_deep import ComplexityDeepConfig


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


@pytest.mark.parametrize(("name", "right", "wrong"), (("head_dim", 64, 128), ("num_experts_per_tok", 1, 2)))
def test_what_follows_from_other_fields_is_taken_or_refused(name, right, wrong):
    assert name not in ComplexityDeepConfig(**{name: right}).to_dict()
    with pytest.raises(ValueError, match=f"{name} is always {right} here"):
        ComplexityDeepConfig(**{name: wrong})


def test_published_extras_are_taken_silently(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    ComplexityDeepConfig(architecture="DeepForCausalLM", version="0.13.0", innovations=["x"], safety_enabled=True)
    assert not caplog.text
