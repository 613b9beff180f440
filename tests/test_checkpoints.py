"""Published layouts in and out, native round trips, Trainer's resume, and files that must be refused."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import GenerationConfig, Trainer, TrainingArguments

from complexity_deep import ComplexityDeepConfig, ComplexityDeepForCausalLM, ComplexityDeepModel
from complexity_deep.routing_complexity_deep import modulo_routing
from support import GOLDEN, random_ids, tiny_config, tiny_model

load = ComplexityDeepForCausalLM.from_pretrained


def rewrite(folder, change=None, **config):
    """Change the tensors and config fields of a checkpoint folder in place; a field of None is removed."""
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        tensors = change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text()) | config
    fields = {key: value for key, value in fields.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))


def golden_logits():
    tensors = load_file(GOLDEN / "v0.13-tiny" / "golden.safetensors")
    return tensors["input_ids"], tensors["logits"]


def to_0_11(tensors):
    """Names of 0.10 to 0.11: gate and up apart, controller.0 and controller.2."""
    out = {}
    for name, tensor in tensors.items():
        name = name.replace("controller_in", "controller.0").replace("controller_out", "controller.2")
        if name.endswith("mlp.gate_up_proj"):
            out[name.replace("gate_up", "gate")], out[name.replace("gate_up", "up")] = tensor.chunk(2, dim=-1)
        else:
            out[name] = tensor
    return out


def without(*parts):
    return lambda tensors: {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


def test_layouts_0_10_to_0_11_load_exactly(published_folder):
    rewrite(published_folder, to_0_11, version="0.11.2")
    ids, logits = golden_logits()
    assert (load(published_folder)(ids).logits - logits).abs().max() < 5e-5


@pytest.mark.parametrize("version, absent", [("0.8.0", ()), ("0.7.1", ("mu_proj",))])
def test_versions_without_guidance_load_as_zeros(published_folder, version, absent):
    rewrite(published_folder, lambda t: without("mu_to_", "mu_router", *absent)(to_0_11(t)), version=version)
    model, ids = load(published_folder), golden_logits()[0]
    zeroed = load(GOLDEN / "v0.13-tiny")
    with torch.no_grad():
        for name, tensor in [*zeroed.named_parameters(), *zeroed.named_buffers()]:
            if any(part in name for part in ("mu_to_", "mu_router", *absent)):
                tensor.zero_()
    torch.testing.assert_close(model(ids).logits, zeroed(ids).logits)


@pytest.mark.parametrize(
    "version, change, message",
    [
        ("0.9.0", lambda t: without("mu_to_v", "mu_router")(to_0_11(t)), "version 0.9.0"),
        (
            "0.6.0",
            lambda t: without("mu_to_", "mu_router", "mu_proj")(to_0_11(t)),
            "version 0.6.0, which had no clamps",
        ),
        (None, lambda t: without("mu_to_", "mu_router", "mu_proj")(to_0_11(t)), "from 0.5.0 to 0.7.1"),
    ],
)
def test_versions_that_cannot_be_computed_are_refused(published_folder, version, change, message):
    rewrite(published_folder, change, version=version)
    with pytest.raises(ValueError, match=message):
        load(published_folder)


def test_the_module_list_layout_of_0_4_is_refused(published_folder):
    def to_0_4(tensors):
        out = without("mu_to_", "mu_router", "mu_proj", "gate_up_proj", "down_proj")(to_0_11(tensors))
        for name, tensor in tensors.items():
            if name.endswith("mlp.down_proj"):
                for expert in range(4):
                    out[name.replace("down_proj", f"experts.{expert}.down_proj.weight")] = tensor[expert].T
        return out

    rewrite(published_folder, to_0_4)
    with pytest.raises(ValueError, match=r"version 0\.4\.0"):
        load(published_folder)


def test_routing_tables_come_from_the_file_and_may_not_differ(published_folder):
    table = torch.arange(257).flip(0) % 4

    def set_tables(tensors):
        return {n: table.clone() if n.endswith("token_to_expert") else t for n, t in tensors.items()}

    rewrite(published_folder, set_tables)
    assert torch.equal(load(published_folder).model.token_to_expert, table)

    def change_one(tensors):
        tensors["model.layers.1.mlp.token_to_expert"] = modulo_routing(257, 4)
        return tensors

    rewrite(published_folder, change_one)
    with pytest.raises(ValueError, match="routing tables that differ between layers"):
        load(published_folder)


def test_square_experts_are_not_confused(tmp_path):
    for width, name in ((32, "2I = H"), (64, "I = H")):  # hidden size 64
        model = tiny_model(intermediate_size=4 * width)
        model.save_published_format(tmp_path / name / "published")
        model.save_pretrained(tmp_path / name / "native")
        for kind in ("published", "native"):
            for key, tensor in load(tmp_path / name / kind).state_dict().items():
                assert torch.equal(tensor, model.state_dict()[key]), (name, kind, key)


@pytest.mark.parametrize("folder", ("v0.13-tiny", "v0.13-dense", "v0.13-tiny-bf16"))
def test_the_published_format_writes_the_published_tensors_back(folder, tmp_path):
    model = load(GOLDEN / folder)
    model.save_published_format(tmp_path)
    published, written = load_file(GOLDEN / folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert written.keys() == published.keys()
    for name, tensor in published.items():
        if not name.endswith("inv_freq"):  # bf16 files hold rounded frequencies
            assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name
    fields, original = (json.loads((path / "config.json").read_text()) for path in (tmp_path, GOLDEN / folder))
    for key in original.keys() - {"torch_dtype", "architecture", "version"}:
        assert fields[key] == original[key], key
    ids = golden_logits()[0] % model.config.vocab_size
    torch.testing.assert_close(load(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("folder", ("v0.13-tiny", "v0.13-tiny-bf16"))
def test_zeros_of_a_published_file_come_back_as_zeros(folder, tmp_path):
    """A file of a new model has them, and loading puts a number that is nearly zero in their place."""
    shutil.copytree(GOLDEN / folder, tmp_path / "published")
    tensors = load_file(GOLDEN / folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("mu_proj.weight"):
            tensor.zero_()
        elif name.endswith("controller_out.weight"):
            tensor[:8].zero_()
    save_file(tensors, tmp_path / "published" / "model.safetensors", {"format": "pt"})
    load(tmp_path / "published").save_pretrained(tmp_path / "native")
    load(tmp_path / "native").save_published_format(tmp_path / "again")
    written = load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in tensors.items():
        assert name.endswith("inv_freq") or torch.equal(written[name], tensor), name


def test_the_published_format_refuses_what_the_published_package_cannot_compute(tmp_path):
    with pytest.raises(ValueError, match="cannot hold this model's shared_expert_intermediate_size"):
        tiny_model(shared_expert_intermediate_size=8).save_published_format(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_kernels_in_use_are_not_saved_with_the_model(tmp_path):
    tiny_model().save_pretrained(tmp_path)  # a GPU's choice of Triton must not follow the model to a machine without
    assert "kernels_implementation" not in (tmp_path / "config.json").read_text()
    rewrite(tmp_path, _kernels_implementation="unknown")
    assert load(tmp_path).config._kernels_implementation in ("eager", "triton")


def test_files_that_would_load_silently_wrong_are_refused(published_folder, tmp_path):
    with pytest.raises(ValueError, match="holds a causal language model, but this is a ComplexityDeepModel"):
        ComplexityDeepModel(tiny_config()).save_published_format(tmp_path / "base")
    rewrite(published_folder, without("token_to_expert"))
    with pytest.raises(ValueError, match=r"lacks 1 weights of this model, e\.g\. model\.token_to_expert"):
        load(published_folder)
    rewrite(published_folder, lambda t: {n: x.to(torch.int8) if x.ndim == 2 else x for n, x in t.items()})
    with pytest.raises(ValueError, match="INT8 export"):
        load(published_folder)


@pytest.mark.parametrize("content", ([torch.zeros(2)], {"model": {"a": 1}}))
def test_a_model_pt_without_weights_is_refused(published_folder, content):
    (published_folder / "model.safetensors").unlink()
    torch.save(content, published_folder / "model.pt")
    with pytest.raises(ValueError, match="holds no state dict of tensors"):
        load(published_folder)


def test_config_overrides_reach_a_model_pt(published_folder):
    torch.save(load_file(published_folder / "model.safetensors"), published_folder / "model.pt")
    (published_folder / "model.safetensors").unlink()
    assert load(published_folder, sliding_window=4).config.sliding_window == 4


@pytest.mark.parametrize("wrap", (None, "model_state_dict", "model"))
def test_a_published_model_pt_loads(published_folder, wrap):
    tensors = load_file(published_folder / "model.safetensors")
    (published_folder / "model.safetensors").unlink()
    torch.save(tensors if wrap is None else {wrap: tensors, "epoch": 3}, published_folder / "model.pt")
    ids, logits = golden_logits()
    assert (load(published_folder)(ids).logits - logits).abs().max() < 5e-5


def test_the_base_model_loads_every_layout():
    for folder in ("v0.13-tiny", "v0.13-tiny-converted"):
        tensors = load_file(GOLDEN / folder / "golden.safetensors")
        model = ComplexityDeepModel.from_pretrained(GOLDEN / folder, dtype=torch.float32)
        hidden = model(tensors["input_ids"]).last_hidden_state
        whole = load(GOLDEN / folder, dtype=torch.float32)
        torch.testing.assert_close(whole.lm_head(hidden), whole(tensors["input_ids"]).logits)


def test_the_dtype_is_that_of_the_file(published_folder, tmp_path):
    def to_bf16(tensors):
        return {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}

    rewrite(published_folder, to_bf16, torch_dtype="float16")  # as the published converter writes it
    assert load(published_folder).dtype == torch.bfloat16
    assert load(published_folder, dtype=torch.float32).dtype == torch.float32
    tiny_model(dtype=torch.float64).save_pretrained(tmp_path / "native")
    assert load(tmp_path / "native").dtype == torch.float64


def test_sharded_native_round_trip(tmp_path):
    model, ids = tiny_model(), random_ids(1, 8)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    torch.testing.assert_close(load(tmp_path)(ids).logits, model(ids).logits)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(OSError, match=r"lacks model-00002-.*which its index lists"):
        load(tmp_path)


def test_trainer_resume_is_bitwise(tmp_path):
    dataset = [{"input_ids": row, "labels": row} for row in random_ids(24, 12).tolist()]

    def train(folder, steps, resume=None):
        torch.manual_seed(0)
        model = ComplexityDeepForCausalLM(tiny_config())
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
        if steps < 6:
            trainer.add_callback(StopAt(steps))
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    from transformers import TrainerCallback

    class StopAt(TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= self.step

    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 3)
    resumed = train(tmp_path / "parts", 6, resume=str(tmp_path / "parts" / "checkpoint-3"))
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_damaged_and_foreign_files_are_refused(published_folder, tmp_path):
    file = published_folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) // 2, 5):
        file.write_bytes(whole[:size])
        with pytest.raises(OSError, match="truncated or not a safetensors file"):
            load(published_folder)
    save_file({"bert.encoder.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"not a Complexity-Deep checkpoint: it has no embed_tokens\.weight"):
        load(published_folder)
    file.write_bytes(whole)
    rewrite(published_folder, without("layers.2.self_attn.k_proj"))
    with pytest.raises(ValueError, match=r"incomplete: it lacks 1 weights.*layers\.2\.self_attn\.k_proj"):
        load(published_folder)


class Payload:
    def __reduce__(self):
        return print, ("unpickled",)


def test_no_pickle_is_executed(published_folder, capsys):
    (published_folder / "model.safetensors").unlink()
    torch.save({"model": Payload()}, published_folder / "model.pt")
    with pytest.raises(ValueError, match="pickled objects are never loaded"):
        load(published_folder)
    assert "unpickled" not in capsys.readouterr().out


def test_a_published_folder_samples_unless_told_not_to(published_folder, tmp_path):
    """As its card says: `generate(ids, temperature=0.8)` samples there, without `do_sample=True`."""
    model, ids = load(published_folder), random_ids(1, 6)
    draws = {tuple(model.generate(ids, max_new_tokens=8, temperature=3.0)[0].tolist()) for _ in range(4)}
    assert len(draws) > 1
    model.save_pretrained(tmp_path / "native")
    assert load(tmp_path / "native").generation_config.do_sample
    rewrite(published_folder)
    (published_folder / "generation_config.json").write_text('{"do_sample": false}')
    assert not load(published_folder).generation_config.do_sample


@pytest.mark.parametrize("argument", ({}, {"save_original_format": True}, {"save_original_format": False}))
def test_the_librarys_save_original_format_leaves_the_native_layout(published_folder, tmp_path, argument):
    for name, model in (("published", load(published_folder)), ("new", tiny_model(shared_expert_intermediate_size=8))):
        model.save_pretrained(tmp_path / name, **argument)
        written = load_file(tmp_path / name / "model.safetensors")
        assert "model.layers.0.mlp.experts.gate_up_proj" in written and "model.layers.0.mlp.gate_up_proj" not in written


@pytest.mark.parametrize(
    "made, override",
    (
        ({}, {"use_dynamics": False}),
        ({}, {"use_dynamics": False, "use_mu_guidance": False}),
        ({"use_dynamics": False}, {"mu_router_gradient": True}),
        ({"use_dynamics": False}, {"num_hidden_layers": 2}),
    ),
    ids=str,
)
def test_overrides_that_decide_what_is_trained_load_the_weights_of_the_file(made, override, tmp_path):
    """A matrix that no gradient reaches has a name of its own in the model."""
    model, ids = tiny_model(**made), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    expected = ComplexityDeepForCausalLM(tiny_config(**(made | override))).eval()
    names = expected.state_dict().keys()
    body = {name.replace(".frozen.mu_proj", ".mu_proj.weight"): x for name, x in model.state_dict().items()}
    state = {name: body.get(name.replace(".frozen.mu_proj", ".mu_proj.weight")) for name in names}
    assert all(x is not None for x in state.values())
    expected.load_state_dict(state)
    loaded = ComplexityDeepForCausalLM.from_pretrained(tmp_path, **override)
    torch.testing.assert_close(loaded(ids).logits, expected(ids).logits)


def test_a_file_that_keeps_the_head_s_name_of_a_tied_weight(tmp_path):
    """As safetensors' `save_model` writes it."""
    model, ids = tiny_model(), random_ids(1, 9)
    model.config.save_pretrained(tmp_path)
    save_model(model, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = ComplexityDeepForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"it lacks 1 weights of this model, e\.g\. embed_tokens"):
        ComplexityDeepModel.from_pretrained(tmp_path)


def to_bin(folder, shards=1):
    """Pickled tensors in the place of `model.safetensors`, in one file or in several with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        return torch.save(tensors, folder / "pytorch_model.bin")
    files = {name: f"pytorch_model-{place % shards}.bin" for place, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", (1, 3))
def test_pickled_tensors_are_checked_and_converted(shards, published_folder, tmp_path):
    to_bin(published_folder, shards)
    ids, logits = golden_logits()
    assert (load(published_folder)(ids).logits - logits).abs().max() < 5e-5
    model = tiny_model()
    model.save_pretrained(tmp_path / "native")
    shutil.copytree(tmp_path / "native", tmp_path / "incomplete")
    to_bin(tmp_path / "native", shards)
    torch.testing.assert_close(load(tmp_path / "native")(ids).logits, model(ids).logits)
    rewrite(tmp_path / "incomplete", without("layers.1.mlp"))
    to_bin(tmp_path / "incomplete", shards)
    with pytest.raises(ValueError, match=r"it lacks \d+ weights of this model, e\.g\. model\.layers\.1\.mlp"):
        load(tmp_path / "incomplete")


def test_pickled_tensors_that_cannot_be_read_are_left_to_the_library(tmp_path, capsys):
    tiny_config().save_pretrained(tmp_path)
    torch.save({"a": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights[_ ]only"):
        load(tmp_path)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("layout", ("average", "model.pt"))
def test_the_folder_of_tensors_that_are_read_here_is_known_to_the_model(layout, published_folder):
    """Its generation config, and the name by which trainers load a reference and adapters name their base."""
    if layout == "average":
        rewrite(published_folder, lambda tensors: {name: tensor.float() for name, tensor in tensors.items()})
    else:
        torch.save(load_file(published_folder / "model.safetensors"), published_folder / "model.pt")
        (published_folder / "model.safetensors").unlink()
    (published_folder / "generation_config.json").write_text('{"max_new_tokens": 7, "do_sample": false}')
    model = load(published_folder)
    assert model.generation_config.max_new_tokens == 7
    assert model.name_or_path == model.config.name_or_path == str(published_folder)
    given = load(published_folder, generation_config=GenerationConfig(max_new_tokens=3))
    assert given.generation_config.max_new_tokens == 3
    ComplexityDeepModel.from_pretrained(published_folder)  # generates nothing, and so has no such config


@pytest.mark.parametrize("way", ("state dict", "library", "file", "pickled file", "published file"))
def test_an_average_of_models_has_their_routing_table(way, tmp_path):
    """0.1 * 3 + 0.9 * 3 is less than 3 in fp32, and would be cut to 2."""
    model, ids = tiny_model(routing="random"), random_ids(2, 20)

    def average(tensors, others=None):
        others = others or tensors
        return {name: 0.1 * tensor + 0.9 * others[name] for name, tensor in tensors.items()}

    def loaded(change):
        if way == "state dict":
            found = tiny_model(seed=1)
            found.load_state_dict(change(model.state_dict()))
            return found
        if way == "library":
            return load(None, config=model.config, state_dict=change(model.state_dict()))
        save = model.save_published_format if way == "published file" else model.save_pretrained
        save(tmp_path)
        rewrite(tmp_path, change)
        if way == "pickled file":
            to_bin(tmp_path)
        return load(tmp_path)

    found = loaded(average)
    assert torch.equal(found.model.token_to_expert, model.model.token_to_expert)
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="only models with the same routing table can be averaged"):
        loaded(lambda tensors: average(tensors, {n: x.flip(0) if "to_expert" in n else x for n, x in tensors.items()}))


class DerivedConfig(ComplexityDeepConfig):
    model_type = "derived-deep"


class DerivedForCausalLM(ComplexityDeepForCausalLM):
    config_class = DerivedConfig


@pytest.mark.parametrize("options", ({}, {"use_mu_guidance": False, "num_experts": 1}))
def test_a_configuration_derived_from_ours_loads_what_it_saved(options, tmp_path):
    """The library looks by the type of the model for how tensors of files are called in it."""
    model, ids = tiny_model(**options), random_ids(2, 9)
    fields = {name: value for name, value in model.config.to_dict().items() if name != "model_type"}
    derived = DerivedForCausalLM(DerivedConfig(**fields)).eval()
    derived.load_state_dict(model.state_dict())
    derived.save_pretrained(tmp_path)
    loaded = DerivedForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.model_type == "derived-deep"
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_fewer_experts_than_the_table_names_are_refused(tmp_path):
    """The tokens of those that are not there would get zeros. The library lets the experts differ if told to."""
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="routes tokens to expert 3, but its config has only 2 experts"):
        load(tmp_path, num_experts=2, intermediate_size=88, ignore_mismatched_sizes=True)
    assert not load(tmp_path, num_experts=1, ignore_mismatched_sizes=True, output_loading_info=True)[0].config.is_routed


def test_models_that_threads_load_at_once_do_not_disturb_each_other(tmp_path):
    """The names of their tensors in files differ, and the library has one list of them."""
    ids, folders = random_ids(1, 9, vocab_size=100), {}
    for name, options in (("routed", {}), ("dense", {"num_experts": 1}), ("without dynamics", {"use_dynamics": False})):
        model = tiny_model(**options)
        model.save_pretrained(tmp_path / name)
        folders[tmp_path / name] = model(ids).logits
    folders[GOLDEN / "v0.13-tiny"] = ComplexityDeepForCausalLM.from_pretrained(GOLDEN / "v0.13-tiny")(ids).logits
    names = list(folders) * 3
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(ComplexityDeepForCausalLM.from_pretrained, names))
    for name, model in zip(names, models):
        torch.testing.assert_close(model(ids).logits, folders[name])
