"""One model code for every supported Transformers release: the cache under both names, nothing dropped in silence."""

import inspect
import json
import os
import subprocess
import sys
import warnings

import datasets
import pytest
import torch
from transformers import DynamicCache, Trainer, TrainingArguments

from complexity_deep import ComplexityDeepForCausalLM, ComplexityDeepModel
from complexity_deep.compatibility_complexity_deep import CACHE_NAME
from complexity_deep.configuration_complexity_deep import check_library_version
from complexity_deep.registration_complexity_deep import LISTED_CLASSES
from support import random_ids, tiny_model, tiny_tokenizer

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


@pytest.mark.skipif(CACHE_NAME != "cache", reason="before Transformers 5.24 past_key_values is the current name")
@pytest.mark.parametrize("use_base_model", (False, True))
def test_the_old_name_of_the_cache_is_deprecated_as_in_native_models(use_base_model):
    model = tiny_model()
    model, ids = model.model if use_base_model else model, random_ids(1, 4)
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated") as caught:
        model(ids, past_key_values=DynamicCache(config=model.config))
    # The heads hand the cache on under its new name. What Python's collector finds here may warn of something else.
    assert sum(warning.category is FutureWarning for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, cache=DynamicCache(config=model.config))
        model(ids, past_key_values=None)


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


def test_what_a_tokenizer_gives_beside_the_ids_is_taken():
    """As `model(**tokenizer(text, return_special_tokens_mask=True, ...))` of a native model."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    tokenizer.chat_template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    asked = {"return_tensors": "pt", "return_dict": True}
    told = dict(tokenizer("w5 w6 w7", return_special_tokens_mask=True, return_tensors="pt"))
    told |= tokenizer.apply_chat_template(
        [{"role": "assistant", "content": "w5 w6 w7"}], return_assistant_tokens_mask=True, **asked
    )
    assert {"special_tokens_mask", "assistant_masks"} <= set(told)
    assert torch.equal(model(**told).logits, model(told["input_ids"]).logits)


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


def as_a_stranger(folder, ids):
    """Runs in a process that cannot import the package; prints a report of what the saved folder does there."""
    import json
    import sys
    import warnings

    sys.modules["complexity_deep"] = None
    import peft
    import torch
    import torch.nn.functional as F
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForQuestionAnswering,
        AutoModelForTokenClassification,
        Trainer,
        TrainingArguments,
    )
    from transformers.models.auto import modeling_auto

    ids = torch.tensor(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        report = {"text": model.generate(ids, max_new_tokens=5, do_sample=False).tolist()}

    trainer = Trainer(model, TrainingArguments(folder + "-run", label_smoothing_factor=0.1, use_cpu=True, report_to=[]))
    smoothed = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    expected = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], label_smoothing=0.1)
    report["smoothed loss"] = (smoothed - expected).abs().item()

    report["lists"] = [
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get("complexity-deep"),
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get("complexity-deep"),
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.get("complexity-deep"),
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.get("complexity-deep"),
    ]
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    report["adapted"] = sorted({name.split(".")[-2] for name, _ in adapted.named_modules() if name.endswith(".lora_A")})

    tagger = AutoModelForTokenClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
    report["tags"] = list(tagger(ids, labels=ids % 3).logits.shape)
    reader = AutoModelForQuestionAnswering.from_pretrained(folder, trust_remote_code=True)
    answer = reader(ids, start_positions=torch.tensor([1]), end_positions=torch.tensor([2]))
    report["answer"] = [list(answer.start_logits.shape), answer.loss.item() > 0]
    print(json.dumps(report))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """The report of `as_a_stranger`, what it wrote to stderr, and the text that it should have generated."""
    folder, ids = tmp_path_factory.mktemp("stranger") / "model", random_ids(1, 6)
    model = tiny_model()
    model.save_pretrained(folder)
    text = ids
    for _ in range(5):
        text = torch.cat((text, model(text, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    code = f"{inspect.getsource(as_a_stranger)}\nas_a_stranger({str(folder)!r}, {ids.tolist()})"
    environment = os.environ | {"HF_HOME": str(folder.parent / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr, text.tolist()


def test_a_stranger_gets_the_right_text_and_no_warning_of_a_renamed_argument(stranger):
    report, stderr, text = stranger
    assert report["text"] == text
    assert "past_key_values" not in stderr and "has no field" not in stderr


def test_label_smoothing_predicts_the_next_token(stranger):
    assert stranger[0]["smoothed loss"] < 1e-4  # against the same token instead, the difference is above 1


def test_the_libraries_lists_know_the_classes(stranger):
    assert stranger[0]["lists"] == list(LISTED_CLASSES.values())
    assert stranger[0]["adapted"] == ["q_proj", "v_proj"]


def test_heads_for_tokens_and_answers(stranger):
    assert stranger[0]["tags"] == [1, 6, 3]
    assert stranger[0]["answer"] == [[1, 6], True]


def test_a_balance_loss_is_refused_because_there_is_none(tmp_path):
    """TRL would add a constant that trains nothing; it refuses a config that does not offer router logits."""
    from trl import SFTConfig, SFTTrainer

    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]]})
    arguments = SFTConfig(str(tmp_path), router_aux_loss_coef=0.1, use_cpu=True, bf16=False, report_to=[])
    model = tiny_model(output_router_logits=True)  # as folders saved before may ask
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        SFTTrainer(model, arguments, train_dataset=rows, processing_class=tiny_tokenizer())
