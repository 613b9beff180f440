"""One model code for every supported Transformers release: the cache under both names, nothing dropped in silence."""

import inspect
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import DynamicCache, Trainer, TrainingArguments

from complexity_deep import ComplexityDeepForCausalLM, ComplexityDeepModel
from complexity_deep.compatibility_complexity_deep import CACHE_NAME
from complexity_deep.configuration_complexity_deep import check_library_version
from support import random_ids, tiny_model

NAMES = ("cache", "past_key_values")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use_base_model", (False, True))
def test_the_cache_is_taken_under_both_names(name, use_base_model):
    model = tiny_model()
    model = model.model if use_base_model else model
    ids, cache = random_ids(2, 9), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], **{name: cache})
        step, whole = model(ids[:, 5:], **{name: cache}), model(ids, use_cache=False)
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(step[0], whole[0][:, 5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted({CACHE_NAME, "past_key_values"}))
def test_generate_goes_on_from_a_cache_under_both_names(name):
    model, ids = tiny_model(), random_ids(1, 8)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], cache=cache)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the library's own, where a user writes the old name
        continued = model.generate(ids, max_new_tokens=4, do_sample=False, **{name: cache})
    assert torch.equal(expected, continued)


def test_the_output_has_the_library_name_of_the_cache():
    model = tiny_model()
    for part in (model, model.model):
        assert isinstance(part(random_ids(1, 4), use_cache=True)[CACHE_NAME], DynamicCache)


def test_two_caches_are_refused():
    model, cache = tiny_model(), DynamicCache()
    with pytest.raises(ValueError, match="two names of one argument"):
        model(random_ids(1, 4), cache=cache, past_key_values=DynamicCache())


@pytest.mark.parametrize("model_class", (ComplexityDeepForCausalLM, ComplexityDeepModel))
def test_the_signature_has_the_name_that_the_library_looks_for(model_class):
    assert CACHE_NAME in inspect.signature(model_class.forward).parameters


@pytest.mark.parametrize(
    "unknown",
    (
        {"past_key_value": DynamicCache()},
        {"any_name": DynamicCache()},
        {"head_mask": torch.ones(4)},
        {"cache_position": torch.arange(4)},
    ),
    ids=lambda unknown: next(iter(unknown)),
)
def test_an_unknown_argument_that_matters_is_refused(unknown):
    with pytest.raises(ValueError, match=f"does not know the argument {next(iter(unknown))}"):
        tiny_model()(random_ids(1, 4), **unknown)


def test_an_argument_that_changes_nothing_is_taken():
    model, ids = tiny_model(), random_ids(1, 4)
    assert torch.equal(model(ids, num_logits=3, head_mask=None).logits, model(ids).logits)


def test_no_call_of_ours_warns(tmp_path):
    """Loading, training, checkpointing layers, generating and saving, with every FutureWarning an error."""
    model, ids = tiny_model(), random_ids(2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model.generate(ids, max_new_tokens=3, do_sample=False)
        model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="static")
        arguments = TrainingArguments(tmp_path / "run", max_steps=2, report_to="none", use_cpu=True)
        Trainer(model, arguments, train_dataset=[{"input_ids": ids[0], "labels": ids[0]}] * 8).train()
        model.save_pretrained(tmp_path / "model")
        ComplexityDeepForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("version", ("4.57.6", "5.16.1"))
def test_a_release_that_is_too_old_is_refused_in_one_sentence(version):
    with pytest.raises(ImportError, match=f"needs transformers 5.17 or newer, but {version} is installed"):
        check_library_version(version)


def test_newer_releases_are_taken():
    for version in ("5.17.0", "5.24.0", "5.25.0.dev0", "6.0.0"):
        check_library_version(version)


def test_a_stranger_gets_silence_and_the_right_text(tmp_path):
    """A process without the package: greedy decoding with a cache equals the uncached forward, and nothing warns."""
    model, ids = tiny_model(), random_ids(1, 6)
    model.save_pretrained(tmp_path / "model")
    expected = ids
    for _ in range(5):
        expected = torch.cat((expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    code = f"""
import sys, warnings
sys.modules["complexity_deep"] = None
warnings.simplefilter("error", FutureWarning)
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
print(model.generate(torch.tensor({ids.tolist()}), max_new_tokens=5, do_sample=False).tolist())
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected.tolist()
    assert "past_key_values" not in done.stderr and "Warning" not in done.stderr
