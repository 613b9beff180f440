"""A saved folder loads in a process that has torch and transformers, but not this package.

The functions under "without the package" run in processes of their own (`run_alone`) and return reports that the tests
assert on. The processes are few, because each of them imports torch and transformers.
"""

import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import hub

from complexity_deep import ComplexityDeepForCausalLM, ComplexityDeepForSequenceClassification
from complexity_deep.configuration_complexity_deep import SHIPPED_FILES
from support import GOLDEN, REPOSITORY, tiny_config, tiny_model

PROMPT = "w5 w17 w42 w99"
CODE_FILES = {Path(name).name for name in SHIPPED_FILES}
MODEL_FOLDERS = ["saved", "trained", "trained/checkpoint-1", "trained/checkpoint-2", "pushed", "saved-and-pushed"]
CONFIG_FOLDERS = ["config", "config-pushed", "config-saved-and-pushed"]
SECOND_FOLDERS = ["again/saved", "again/trained", "again/trained/checkpoint-2", "again/pushed"]
HUB_MODELS = ["saved", "again/trained"]


class FakeHub:
    """Stands for the Hub's API: `create_commit` copies the files into `folder`."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            target = self.folder / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(operation.path_or_fileobj, target)


def train(model, tokenizer, folder):
    """Two training steps with a checkpoint after each, then `save_model`."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": [5, 6, 7, 8 + i], "labels": [5, 6, 7, 8 + i]} for i in range(4)]
    arguments = TrainingArguments(
        str(folder), max_steps=2, save_steps=1, learning_rate=0.01, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


def logits_of(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(3, 27).view(2, 12)).logits


# Without the package ------------------------------------------------------------------------------------------------


def become_a_stranger(*absent):
    """Make the packages named in `absent` impossible to import, and every network connection an error."""
    for name in ("complexity_deep", *absent):
        sys.modules[name] = None
        assert importlib.util.find_spec(name) is None

    def refuse(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo"):
            raise RuntimeError(f"{event} {arguments[1:]}")

    sys.addaudithook(refuse)


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def load_by_every_class(path, expected):
    """Load config, model, base model, classifier, tokenizer and pipeline of `path`; report modules and differences."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        pipeline,
    )

    loaded = {
        auto.__name__: auto.from_pretrained(path, trust_remote_code=True)
        for auto in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)
    }
    _, base, model, classifier = loaded.values()
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    generator = pipeline("text-generation", model=path, trust_remote_code=True)
    generated = generator("w5 w17 w42 w99", max_new_tokens=6, do_sample=False, return_full_text=False)
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        base_logits = model.lm_head(base.eval()(ids).last_hidden_state)
    body = {f"model.{name}": tensor for name, tensor in base.state_dict().items()}
    classifier_state = classifier.state_dict()
    report = {
        "modules": {name: type(value).__module__ for name, value in loaded.items()},
        "pipeline module": type(generator.model).__module__,
        "logits": relative_error(logits_of(model), expected),
        "base model": relative_error(base_logits, expected),
        "classifier body": all(torch.equal(classifier_state[name], tensor) for name, tensor in body.items()),
        "token ids": tokenizer("w5 w17 w42 w99")["input_ids"],
        "continuation": generated[0]["generated_text"],
    }
    return model, tokenizer, report


def remote_first_generation(work, model_folders, config_folders, published):
    """Load what the package wrote, each folder by every class; then write a second generation of folders."""
    become_a_stranger()
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import hub

    work = Path(work)
    expected = load_file(work / "expected.safetensors")
    report, models = {}, {}
    for name in model_folders:
        models[name], tokenizer, report[name] = load_by_every_class(str(work / name), expected[name])
    for name in config_folders:
        config = AutoConfig.from_pretrained(work / name, trust_remote_code=True)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        report[name] = {"module": type(model).__module__, "shape": list(logits_of(model).shape)}
    classifier = AutoModelForSequenceClassification.from_pretrained(work / "classifier", trust_remote_code=True)
    report["classifier"] = {
        "module": type(classifier).__module__,
        "logits": relative_error(logits_of(classifier), expected["classifier"]),
    }

    # Every folder above has its own copy of the code; the first model must not notice the later ones.
    first, last = models[model_folders[0]], models[model_folders[-1]]
    ids, gradients = torch.arange(3, 27).view(2, 12), []
    for model in (first, last):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    report["two checkpoints"] = {
        "modules": [type(first).__module__, type(last).__module__],
        "operators": [
            sys.modules[type(model).__module__.rpartition(".")[0] + ".op_registration"].NAMESPACE
            for model in (first, last)
        ],
        "logits": relative_error(logits_of(first), expected[model_folders[0]]),
        "gradient": max(relative_error(gradients[0][name], grad) for name, grad in gradients[1].items()),
    }

    try:
        AutoModelForCausalLM.from_pretrained(published, trust_remote_code=True)
    except ValueError as error:
        report["published"] = {"error": str(error)}
    by_class, info = type(first).from_pretrained(published, output_loading_info=True)
    golden = load_file(Path(published) / "golden.safetensors")
    report["published"]["module"] = type(by_class).__module__
    report["published"]["missing"] = sorted(info["missing_keys"])
    with torch.no_grad():
        logits = by_class(golden["input_ids"]).logits
    report["published"]["logits"] = (logits - golden["logits_fp64"]).abs().max().item()

    hub._hf_api = FakeHub(work / "again" / "pushed")
    first.push_to_hub("org/again")
    tokenizer.push_to_hub("org/again")
    first.save_pretrained(work / "again" / "saved")
    tokenizer.save_pretrained(work / "again" / "saved")
    first.config.save_pretrained(work / "again" / "config")
    expected = {name: logits_of(first) for name in ("again/saved", "again/pushed")}
    train(first, tokenizer, work / "again" / "trained")
    expected |= {name: logits_of(first) for name in ("again/trained", "again/trained/checkpoint-2")}
    save_file(expected, work / "expected-again.safetensors")
    return report


def remote_second_generation(work, folders, hub_models):
    """Without Triton: load what models that came by remote code have saved, and both generations from a Hub cache."""
    become_a_stranger("triton")
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    work, report = Path(work), {}
    expected = load_file(work / "expected.safetensors") | load_file(work / "expected-again.safetensors")
    for name in folders:
        report[name] = load_by_every_class(str(work / name), expected[name])[2]
    config = AutoConfig.from_pretrained(work / "again" / "config", trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    report["again/config"] = {"module": type(model).__module__, "shape": list(logits_of(model).shape)}
    for name in hub_models:
        repository = "org/" + name.replace("/", "-")
        model, tokenizer, report[repository] = load_by_every_class(repository, expected[name])
        model.save_pretrained(work / "from-hub")
        tokenizer.save_pretrained(work / "from-hub")
    return report


def remote_here(expected_file, name):
    """The working directory is the model folder, and Python turns every warning into an error."""
    become_a_stranger()
    from safetensors.torch import load_file
    from transformers import AutoTokenizer
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model_class = get_class_from_dynamic_module("modeling_complexity_deep.ComplexityDeepForCausalLM", ".")
    model = model_class.from_pretrained(".")
    return {
        "module": type(model).__module__,
        "logits": relative_error(logits_of(model), load_file(expected_file)[name]),
        "token ids": AutoTokenizer.from_pretrained(".", trust_remote_code=True)("w5 w17 w42 w99")["input_ids"],
    }


def remote_derived(folder):
    """Load a class that somebody derived from ours, save and train it, and load what that wrote; save one of ours."""
    become_a_stranger()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, report, ids = Path(folder), {}, torch.arange(3, 27).view(2, 12)
    model = AutoModelForCausalLM.from_pretrained(folder / "derived", trust_remote_code=True).eval()
    for name in ("again", "again/and again"):
        model.save_pretrained(folder / name)
        model = AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True).eval()
        report[name] = [type(model).__name__, float(model(ids).logits.abs().max()), model.temper.item()]
    model.config.save_pretrained(folder / "config")
    config = AutoConfig.from_pretrained(folder / "config", trust_remote_code=True)
    report["config"] = type(AutoModelForCausalLM.from_config(config, trust_remote_code=True)).__name__
    return report


# With the package ---------------------------------------------------------------------------------------------------


def package_without_triton(folder):
    """Import the package as installed from the wheel, and save a new configuration."""
    sys.modules["triton"] = None
    import complexity_deep

    complexity_deep.ComplexityDeepConfig().save_pretrained(folder)
    return {"file": complexity_deep.__file__}


def run_alone(function, *arguments, cwd, flags=(), **environment):
    """Call `function` in a new Python with its own HF_HOME; return (what it returns, what it wrote to stderr)."""
    parts = [FakeHub, train, logits_of, become_a_stranger, relative_error, load_by_every_class, function]
    script = "import importlib.util, json, shutil, sys\nfrom pathlib import Path\nfrom types import SimpleNamespace\n"
    script += "\n\n".join(inspect.getsource(part) for part in parts)
    script += f"\n\nprint('\\n' + json.dumps({function.__name__}(*json.loads(sys.argv[1]))))\n"
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, *flags, "-c", script, json.dumps([str(a) if isinstance(a, Path) else a for a in arguments])],
        cwd=cwd,
        env=inherited | {"HF_HUB_OFFLINE": "1"} | {key: str(value) for key, value in environment.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1]), process.stderr


def lay_out_hub_cache(folder, home, repository):
    """Copy `folder` to where a download of `repository` lies."""
    root, commit = home / "hub" / f"models--{repository.replace('/', '--')}", "0123456789abcdef" * 2 + "01234567"
    shutil.copytree(folder, root / "snapshots" / commit, ignore=shutil.ignore_patterns("checkpoint-*"))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<eos>": 0, "<pad>": 1, "<bos>": 2} | {f"w{i}": i for i in range(3, 257)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w3"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>", unk_token="w3"
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory, tokenizer):
    """Every kind of folder that the package writes, with the logits that a loaded model must give."""
    work = tmp_path_factory.mktemp("remote_code")
    model, patch = tiny_model(std=0.1), pytest.MonkeyPatch()
    names = ["saved", "pushed", "saved-and-pushed", "config-pushed"]
    expected = {name: logits_of(model) for name in names[:3]}

    model.save_pretrained(work / "saved")
    tokenizer.save_pretrained(work / "saved")
    model.config.save_pretrained(work / "config")
    with patch.context() as context:
        context.setattr(hub, "_hf_api", FakeHub(work / "pushed"))
        model.push_to_hub("org/pushed")
        tokenizer.push_to_hub("org/pushed")
        context.setattr(hub, "_hf_api", FakeHub(work / "saved-and-pushed"))
        model.save_pretrained(work / "local-copy", push_to_hub=True, repo_id="org/saved-and-pushed")
        tokenizer.push_to_hub("org/saved-and-pushed")
        context.setattr(hub, "_hf_api", FakeHub(work / "config-pushed"))
        model.config.push_to_hub("org/config-pushed")
        context.setattr(hub, "_hf_api", FakeHub(work / "config-saved-and-pushed"))
        model.config.save_pretrained(work / "local-config", push_to_hub=True, repo_id="org/config-saved-and-pushed")

    torch.manual_seed(0)
    classifier = ComplexityDeepForSequenceClassification(tiny_config(num_labels=3))
    classifier.save_pretrained(work / "classifier")
    expected["classifier"] = logits_of(classifier)

    train(model, tokenizer, work / "trained")
    expected |= {name: logits_of(model) for name in ("trained", "trained/checkpoint-2")}
    first_step = ComplexityDeepForCausalLM.from_pretrained(work / "trained" / "checkpoint-1")
    expected["trained/checkpoint-1"] = logits_of(first_step)
    save_file(expected, work / "expected.safetensors")
    (work / "elsewhere").mkdir()
    return work


@pytest.fixture(scope="module")
def first_generation(work):
    arguments = (work, MODEL_FOLDERS, CONFIG_FOLDERS, GOLDEN / "v0.13-tiny")
    return run_alone(remote_first_generation, *arguments, cwd=work / "elsewhere", HF_HOME=work / "home-1")[0]


@pytest.fixture(scope="module")
def second_generation(work, first_generation):
    for name in HUB_MODELS:
        lay_out_hub_cache(work / name, work / "home-2", "org/" + name.replace("/", "-"))
    arguments = (work, SECOND_FOLDERS, HUB_MODELS)
    return run_alone(remote_second_generation, *arguments, cwd=work / "elsewhere", HF_HOME=work / "home-2")[0]


def continuation(folder, tokenizer):
    """The greedy continuation of `PROMPT` by the model in `folder`, computed with the package."""
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    model = ComplexityDeepForCausalLM.from_pretrained(folder)
    return tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :])


def check_loaded(report, folder, tokenizer):
    assert set(report["modules"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
    }
    for module in [*report["modules"].values(), report["pipeline module"]]:
        assert module.startswith("transformers_modules.")
    assert report["logits"] < 1e-5
    assert report["base model"] < 1e-5
    assert report["classifier body"]
    assert report["token ids"] == [5, 17, 42, 99]
    assert report["continuation"] == continuation(folder, tokenizer)


@pytest.mark.parametrize("name", MODEL_FOLDERS)
def test_what_the_package_writes_loads_without_it(first_generation, work, tokenizer, name):
    check_loaded(first_generation[name], work / name, tokenizer)


def test_the_trained_folders_hold_different_weights(work, first_generation):
    expected = load_file(work / "expected.safetensors")
    assert not torch.allclose(expected["saved"], expected["trained/checkpoint-1"], rtol=1e-3)
    assert not torch.allclose(expected["trained/checkpoint-1"], expected["trained"], rtol=1e-3)


@pytest.mark.parametrize("name", CONFIG_FOLDERS)
def test_a_configuration_alone_builds_a_model_without_the_package(first_generation, work, name):
    assert not list((work / name).glob("*.safetensors"))
    assert first_generation[name]["module"].startswith("transformers_modules.")
    assert first_generation[name]["shape"] == [2, 12, 257]


def test_a_classifier_loads_without_the_package(first_generation):
    assert first_generation["classifier"]["module"].startswith("transformers_modules.")
    assert first_generation["classifier"]["logits"] < 1e-5


@pytest.mark.parametrize("name", [*MODEL_FOLDERS, *CONFIG_FOLDERS, *SECOND_FOLDERS, "again/config", "from-hub"])
def test_every_folder_holds_the_code_and_the_auto_map(second_generation, work, name):
    assert {path.name for path in (work / name).glob("*.py")} == CODE_FILES
    auto_map = json.loads((work / name / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_complexity_deep.ComplexityDeepConfig",
        "AutoModel": "modeling_complexity_deep.ComplexityDeepModel",
        "AutoModelForCausalLM": "modeling_complexity_deep.ComplexityDeepForCausalLM",
        "AutoModelForSequenceClassification": "modeling_complexity_deep.ComplexityDeepForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_complexity_deep.ComplexityDeepForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_complexity_deep.ComplexityDeepForQuestionAnswering",
    }
    leftovers = [path.name for path in (work / name).iterdir() if path.suffix == ".tmp"]
    assert leftovers == []


def test_two_checkpoints_in_one_process_do_not_disturb_each_other(first_generation):
    report = first_generation["two checkpoints"]
    assert len(set(report["modules"])) == 2
    # registered twice under one name, an operator is freed under the model that registered it first
    assert len(set(report["operators"])) == 2 and "complexity_deep" not in report["operators"]
    assert report["logits"] < 1e-5
    assert report["gradient"] < 1e-5


def test_a_published_folder_needs_the_package_or_its_class(first_generation):
    report = first_generation["published"]
    assert "complexity-deep" in report["error"]
    assert report["module"].startswith("transformers_modules.")
    assert report["missing"] == []
    assert report["logits"] < 5e-5


def test_a_published_folder_loads_by_the_auto_classes_once_the_package_is_imported():
    golden = load_file(GOLDEN / "v0.13-tiny" / "golden.safetensors")
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "v0.13-tiny")
    assert type(model) is ComplexityDeepForCausalLM
    assert type(AutoModel.from_pretrained(GOLDEN / "v0.13-tiny")) is type(model.model)
    with torch.no_grad():
        logits = model(golden["input_ids"]).logits
    torch.testing.assert_close(logits, golden["logits_fp64"].float(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", SECOND_FOLDERS)
def test_what_a_remote_model_writes_loads_again_without_triton(second_generation, work, tokenizer, name):
    check_loaded(second_generation[name], work / name, tokenizer)


def test_a_configuration_that_a_remote_model_writes_builds_a_model(second_generation):
    assert second_generation["again/config"]["module"].startswith("transformers_modules.")
    assert second_generation["again/config"]["shape"] == [2, 12, 257]


@pytest.mark.parametrize("name", HUB_MODELS)
def test_both_generations_load_from_a_hub_cache_without_triton(second_generation, work, tokenizer, name):
    repository = "org/" + name.replace("/", "-")
    check_loaded(second_generation[repository], work / name, tokenizer)
    assert all(".org." in module for module in second_generation[repository]["modules"].values())


def test_the_model_folder_as_working_directory_loads_silently(second_generation, work, tokenizer):
    """And a model that came from the Hub and was saved loads, with Triton installed where the machine has it."""
    arguments = (work / "expected-again.safetensors", HUB_MODELS[-1])
    report, stderr = run_alone(
        remote_here, *arguments, cwd=work / "from-hub", flags=["-W", "error"], HF_HOME=work / "home-3"
    )
    assert report["module"].startswith("transformers_modules.")
    assert report["logits"] < 1e-5
    assert report["token ids"] == [5, 17, 42, 99]
    assert stderr == ""


DERIVED = """
import torch
from .modeling_complexity_deep import ComplexityDeepForCausalLM

class Tempered(ComplexityDeepForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.temper = torch.nn.Parameter(torch.ones(1))
        self.post_init()

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = torch.tanh(outputs.logits) * self.temper
        return outputs
"""


def test_a_class_derived_from_ours_stays_with_its_folder(tmp_path):
    """Somebody adds a file to a folder and names its class in the `auto_map`; whoever saves that model keeps both."""
    model, folder = tiny_model(), tmp_path / "derived"
    model.save_pretrained(folder, state_dict=model.state_dict() | {"temper": torch.tensor([3.0])})
    (folder / "tempered.py").write_text(DERIVED)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "tempered.Tempered"
    (folder / "config.json").write_text(json.dumps(config))
    report, _ = run_alone(remote_derived, tmp_path, cwd=tmp_path, HF_HOME=tmp_path / "home")
    for name in ("again", "again/and again"):
        assert report[name] == ["Tempered", pytest.approx(3.0, abs=0.1), 3.0]
    assert report["config"] == "ComplexityDeepForCausalLM"  # that folder does not have the other's code


def test_our_classes_may_be_registered_for_the_auto_classes(work, tmp_path):
    """As guides to custom models say before saving. The library would look for the kernels as it finds flat files."""
    model = tiny_model()
    type(model).register_for_auto_class("AutoModelForCausalLM")
    type(model.config).register_for_auto_class()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == (work / "saved" / "config.json").read_text()
    assert {path.name for path in tmp_path.glob("*.py")} == CODE_FILES


def test_the_wheel_is_complete_and_imports_silently_without_triton(tmp_path):
    pytest.importorskip("setuptools", reason="building the wheel needs setuptools in this environment")
    for name in ("source", "elsewhere"):
        (tmp_path / name).mkdir()
    for name in ("configs", "hub_card", "kernels", "recipes", "scripts", "workflow"):
        # Python writes and renames files in these folders when another process imports a module for the first time.
        shutil.copytree(REPOSITORY / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for pattern in ("*.py", "*.toml", "*.md", "LICENSE"):
        for path in REPOSITORY.glob(pattern):
            shutil.copyfile(path, tmp_path / "source" / path.name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "source", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    for name in SHIPPED_FILES:
        assert (tmp_path / "installed" / "complexity_deep" / name).read_bytes() == (REPOSITORY / name).read_bytes()
    package = tmp_path / "installed" / "complexity_deep"
    for folder in ("kernels", "scripts", "workflow"):  # and what the commands read
        for file in (REPOSITORY / folder).rglob("*.*"):
            assert file.parent.name == "__pycache__" or (package / file.relative_to(REPOSITORY)).is_file(), file
    for name in ("LICENSE", "configs/30m.json", "hub_card/model_card.md", "hub_card/not_supported.yaml"):
        assert (package / name).is_file(), name
    assert (package / "recipes" / "demo.yaml").is_file() and (package / "recipes" / "accelerate" / "ddp.yaml").is_file()
    (entry_points,) = (tmp_path / "installed").glob("*.dist-info/entry_points.txt")
    assert "complexity-deep = complexity_deep.workflow.main:main" in entry_points.read_text()
    path = os.pathsep.join(filter(None, [str(tmp_path / "installed"), os.environ.get("PYTHONPATH")]))
    report, stderr = run_alone(
        package_without_triton,
        tmp_path / "config",
        cwd=tmp_path / "elsewhere",
        flags=["-W", "error"],
        HF_HOME=tmp_path / "home",
        PYTHONPATH=path,
    )
    assert Path(report["file"]).is_relative_to(tmp_path / "installed")
    assert {path.name for path in (tmp_path / "config").glob("*.py")} == CODE_FILES
    assert stderr == ""
