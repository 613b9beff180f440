"""A model split over devices, CPU and disk: by `device_map="auto"` and by the maps that people write by hand."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from complexity_deep import ComplexityDeepForCausalLM, ComplexityDeepForSequenceClassification, ComplexityDeepModel
from support import GOLDEN, random_ids, tiny_config, tiny_model

HEADS = {
    "base": ComplexityDeepModel,
    "causal": ComplexityDeepForCausalLM,
    "classification": ComplexityDeepForSequenceClassification,
}
SPLITS = {
    "auto, nothing fits": {"device_map": "auto", "max_memory": {"cpu": "200KB"}},
    "auto, 700 KB": {"device_map": "auto", "max_memory": {"cpu": "700KB"}},
    "by hand": {"device_map": {"embed_tokens": "cpu", "layers.0": "disk", "layers.1": "cpu", "layers.2": "disk"}},
    "embedding on disk": {"device_map": {"embed_tokens": "disk", "layers": "cpu"}},
}


def hand_map(given: dict, head: str, rest="cpu") -> dict:
    """`given` for the body, completed as people complete it: final norm and head."""
    prefix = "" if head == "base" else "model."
    heads = {"base": {}, "causal": {"lm_head": given["embed_tokens"]}, "classification": {"score": rest}}[head]
    return {prefix + name: device for name, device in (given | {"norm": rest}).items()} | heads


def split_arguments(split: str, head: str, folder) -> dict:
    arguments = SPLITS[split] | {"offload_folder": folder}
    if isinstance(arguments["device_map"], dict):
        arguments["device_map"] = hand_map(arguments["device_map"], head)
    return arguments


def output_of(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs.last_hidden_state if isinstance(model, ComplexityDeepModel) else outputs.logits


def new_model(head: str, **overrides):
    """A tiny model with a head, weights large enough for every path to show, and a table that is not the default."""
    source = tiny_model(std=0.2, **overrides)
    if head == "causal":
        model = source
    else:
        torch.manual_seed(0)
        model = HEADS[head](tiny_config(num_labels=3, **overrides)).eval()
        body = model if head == "base" else model.model
        body.load_state_dict(source.model.state_dict())
    if model.config.is_routed:
        model.base_model.token_to_expert = model.base_model.token_to_expert.flip(0)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One folder for each head, with its model."""
    models = {head: new_model(head) for head in HEADS}
    folders = {head: tmp_path_factory.mktemp(head) for head in HEADS}
    for head, model in models.items():
        model.save_pretrained(folders[head])
    return {head: (folders[head], models[head]) for head in HEADS}


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("head", HEADS)
def test_a_split_model_computes_what_the_whole_one_does(saved, tmp_path, head, split, offload_buffers):
    folder, whole = saved[head]
    arguments = split_arguments(split, head, tmp_path)
    model = HEADS[head].from_pretrained(folder, offload_buffers=offload_buffers, **arguments)
    assert "disk" in model.hf_device_map.values()
    ids = random_ids(2, 12)
    torch.testing.assert_close(output_of(model, input_ids=ids), output_of(whole, input_ids=ids))
    # Embeddings without ids are routed by their nearest rows, which may lie on disk.
    embeds = whole.get_input_embeddings()(ids).detach()
    if head != "classification":  # this head asks for ids to find the padding
        torch.testing.assert_close(output_of(model, inputs_embeds=embeds), output_of(whole, inputs_embeds=embeds))


@pytest.mark.parametrize("cache", [None, "static"])  # the library offloads caches of CUDA devices only
def test_a_split_model_generates_what_the_whole_one_does(saved, tmp_path, cache):
    folder, whole = saved["causal"]
    ids = random_ids(2, 5)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "cache_implementation": cache}
    expected = whole.generate(ids, **arguments | {"cache_implementation": None})
    for split in ("auto, 700 KB", "by hand"):
        model = ComplexityDeepForCausalLM.from_pretrained(folder, **split_arguments(split, "causal", tmp_path))
        assert torch.equal(model.generate(ids, **arguments), expected)


def test_a_split_model_and_a_published_folder(tmp_path):
    golden = load_file(GOLDEN / "v0.13-tiny" / "golden.safetensors")
    for split in ("auto, 700 KB", "by hand"):
        arguments = split_arguments(split, "causal", tmp_path)
        model = ComplexityDeepForCausalLM.from_pretrained(GOLDEN / "v0.13-tiny", **arguments)
        logits = output_of(model, input_ids=golden["input_ids"])
        torch.testing.assert_close(logits, golden["logits_fp64"].float(), rtol=0, atol=5e-5)


def test_a_split_model_is_saved_whole(saved, tmp_path):
    folder, _ = saved["causal"]
    arguments = split_arguments("auto, 700 KB", "causal", tmp_path / "offloaded")
    ComplexityDeepForCausalLM.from_pretrained(folder, **arguments).save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("head", HEADS)
def test_a_folder_loads_without_values(head, saved):
    """On "meta" people look at names and sizes."""
    folder, model = saved[head]
    shape = HEADS[head].from_pretrained(folder, device_map="meta")
    assert all(tensor.is_meta for tensor in shape.state_dict().values())
    assert {n: t.shape for n, t in shape.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_files_name_the_table_and_the_unused_guidance_as_before(tmp_path):
    """Folders, Trainer's checkpoints and other programs know these names; modules of the model have others."""
    model, ids = new_model("causal", use_dynamics=False), random_ids(2, 12)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    guidance = {f"model.layers.0.self_attn.mu_to_{letter}.weight" for letter in "qkv"}
    assert {"model.token_to_expert", "model.layers.2.dynamics.mu_proj.weight"} | guidance <= tensors.keys()
    assert not any("frozen" in name or "routing_table" in name for name in tensors)
    tensors["model.layers.0.self_attn.mu_to_q.weight"].normal_()
    tensors["model.layers.2.dynamics.mu_proj.weight"].normal_()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    resumed = new_model("causal", use_dynamics=False, seed=1)
    assert resumed.load_state_dict(tensors, strict=False).missing_keys == ["lm_head.weight"]  # tied
    base = ComplexityDeepModel(model.config)
    base.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    loaded = ComplexityDeepForCausalLM.from_pretrained(tmp_path)
    for other in (resumed.model, base, loaded.model, ComplexityDeepModel.from_pretrained(tmp_path)):
        assert torch.equal(other.token_to_expert, model.model.token_to_expert)
        assert torch.equal(other.layers[0].self_attn.frozen.mu_to_q, tensors["model.layers.0.self_attn.mu_to_q.weight"])
        assert torch.equal(other.layers[2].dynamics.frozen.mu_proj, tensors["model.layers.2.dynamics.mu_proj.weight"])
    torch.testing.assert_close(output_of(loaded, input_ids=ids), output_of(resumed, input_ids=ids))


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def saved_for_gpus(tmp_path_factory):
    folders = {}
    for head in HEADS:
        folders[head] = tmp_path_factory.mktemp(head)
        new_model(head).save_pretrained(folders[head])
    return folders


def gpu_maps(head: str) -> dict:
    layers = {"embed_tokens": 0, "layers.0": 0, "layers.1": 1, "layers.2": 1}
    crossed = {"embed_tokens": 1, "layers.0": 0, "layers.1": 1, "layers.2": 0}
    offloaded = {"embed_tokens": 0, "layers.0": 1, "layers.1": "cpu", "layers.2": 0}
    maps = {
        name: hand_map(given, head, rest=1)
        for name, given in {"two halves": layers, "crossed": crossed, "one layer on the CPU": offloaded}.items()
    }
    return maps | {"balanced": "balanced", "auto": "auto"}


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("kernels", ["eager", "triton"])
@pytest.mark.parametrize("split", ["two halves", "crossed", "one layer on the CPU", "balanced", "auto"])
@pytest.mark.parametrize("head", HEADS)
def test_two_gpus_compute_what_one_does(saved_for_gpus, head, split, kernels):
    experts = {"eager": "eager", "triton": "cggr"}[kernels]
    options = {"kernels_implementation": kernels, "experts_implementation": experts}
    whole = HEADS[head].from_pretrained(saved_for_gpus[head], device_map={"": 0}, **options)
    memory = {0: "500KB", 1: "10GB"} if split == "auto" else None
    model = HEADS[head].from_pretrained(
        saved_for_gpus[head], device_map=gpu_maps(head)[split], max_memory=memory, **options
    )
    assert {0, 1} <= set(model.hf_device_map.values())
    ids = random_ids(2, 12).to(0)
    torch.testing.assert_close(
        output_of(model, input_ids=ids).to(0), output_of(whole, input_ids=ids), rtol=1e-3, atol=1e-3
    )


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("kernels", ["eager", "triton"])
@pytest.mark.parametrize("split", ["two halves", "crossed", "one layer on the CPU"])
def test_two_gpus_generate_what_one_does(saved_for_gpus, split, kernels):
    experts = {"eager": "eager", "triton": "cggr"}[kernels]
    options = {"kernels_implementation": kernels, "experts_implementation": experts, "dtype": torch.float32}
    whole = ComplexityDeepForCausalLM.from_pretrained(saved_for_gpus["causal"], device_map={"": 0}, **options)
    model = ComplexityDeepForCausalLM.from_pretrained(
        saved_for_gpus["causal"], device_map=gpu_maps("causal")[split], **options
    )
    ids = random_ids(2, 6).to(0)
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    expected = whole.generate(ids, **arguments)
    for cache in (None, "static", "offloaded"):  # static: the decode graph steps back from hooked modules
        assert torch.equal(model.generate(ids, cache_implementation=cache, **arguments), expected), cache


@pytest.mark.gpu
@needs_two_gpus
def test_two_gpus_train(saved_for_gpus):
    """Gradients cross the devices."""
    whole = ComplexityDeepForCausalLM.from_pretrained(saved_for_gpus["causal"], device_map={"": 0})
    model = ComplexityDeepForCausalLM.from_pretrained(
        saved_for_gpus["causal"], device_map=gpu_maps("causal")["two halves"]
    )
    ids = random_ids(2, 12).to(0)
    for each in (whole, model):
        each(input_ids=ids, labels=ids).loss.backward()
    for (name, expected), (_, parameter) in zip(whole.named_parameters(), model.named_parameters()):
        torch.testing.assert_close(parameter.grad.to(0), expected.grad, rtol=1e-2, atol=1e-3, msg=name)


def test_a_model_without_values_gets_them_by_to_empty_and_its_state_dict():
    """As FSDP2's users make a model. The frequencies of RoPE are in no state dict."""
    whole, ids = tiny_model(), random_ids(2, 9)
    with torch.device("meta"):
        model = ComplexityDeepForCausalLM(whole.config)
    model.to_empty(device="cpu").load_state_dict(whole.state_dict())
    torch.testing.assert_close(model.eval()(ids).logits, whole(ids).logits)
