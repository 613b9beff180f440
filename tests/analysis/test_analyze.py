"""scripts/analyze.py: its verdict on models whose history is known, and its numbers against other ways to get them."""

import base64
import html
import json
import re
from argparse import Namespace
from itertools import islice
from pathlib import Path

import pytest
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaConfig

from complexity_deep import ComplexityDeepForCausalLM
from complexity_deep.scripts import analyze
from complexity_deep.workflow.analysis import figures as analysis_figures
from complexity_deep.workflow.analysis import model_analysis
from complexity_deep.workflow.analysis.activations import read_activations
from complexity_deep.workflow.analysis.analysed_text import load_rows, token_class
from complexity_deep.workflow.analysis.interventions import loss_on, random_experts, read_losses
from complexity_deep.workflow.analysis.model_analysis import analyse, load_analysed_model
from complexity_deep.workflow.analysis.weights import NOISE_LIMIT, initial_norms, noise_excess, read_weights
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.packed_rows import tokenize
from complexity_deep.workflow.data.text_sources import embedded_documents
from complexity_deep.workflow.data.tokenizer_training import train_bpe
from complexity_deep.workflow.training.architecture_monitors import read_monitors
from support import tiny_config, tiny_model

ROW = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text, and a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("analyze")
    texts = [text[:800] for text in islice(embedded_documents(), 60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_bpe(iter(texts), vocab_size=300, model_max_length=ROW).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    monkeypatch.setattr(model_analysis, "TSNE_TOKENS", 40)


def train_model(folder: Path, freeze: str | None, **overrides) -> ComplexityDeepForCausalLM:
    """A tiny model after seconds of training, of which the parameters whose name matches `freeze` had no part."""
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": ROW, "scaled_residual_init": True, **overrides}
    model = ComplexityDeepForCausalLM(tiny_config(**shape))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(freeze is None or not re.search(freeze, name))
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    ids = torch.tensor([token for document in tokenize(tokenizer, texts) for token in document])
    rows = ids[: len(ids) // ROW * ROW].view(-1, ROW)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trained:
        optimizer = torch.optim.AdamW(trained, lr=3e-3)
        for _ in range(60):
            batch = rows[torch.randint(len(rows), (8,))]
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
    return model


def settings(folder: Path, analysed: Path, **options) -> Namespace:
    given = {"model": str(analysed), "text": [str(folder / "text.jsonl")], "tokenizer": str(folder / "tokenizer")}
    defaults = {"text_column": "text", "output_dir": None, "max_tokens": 1024, "batch_size": 8, "seed": 0}
    return Namespace(**(defaults | given | {"device": "cpu"} | options))


def analysed(folder: Path, model: Path) -> dict:
    options = vars(settings(folder, model))
    return analyse(options.pop("model"), **{name: value for name, value in options.items() if name != "output_dir"})[0]


def rows_of(folder: Path, config, batch_size: int = 8, device: str = "cpu") -> list[dict]:
    sources, tokenizer = [str(folder / "text.jsonl")], str(folder / "tokenizer")
    options = {"text_column": "text", "max_tokens": 1024, "batch_size": batch_size, "device": device}
    return load_rows(sources, AutoTokenizer.from_pretrained(tokenizer), config, **options)[0]


@pytest.fixture(scope="module")
def trained(folder):
    train_model(folder, freeze=None).save_pretrained(folder / "trained")
    return folder / "trained"


@pytest.fixture
def batches(folder, trained):
    model = load_analysed_model(str(trained), "cpu")
    return model, rows_of(folder, model.config)


def analysis_of(folder: Path, model: ComplexityDeepForCausalLM, name: str) -> dict:
    model.save_pretrained(folder / name)
    return analysed(folder, folder / name)


# -- the verdict


def test_trained_experts_are_found(folder, trained):
    analysis = analysed(folder, trained)
    losses = analysis["checkpoint"]["losses"]
    assert analysis["verdict"]["label"] == "TRAINED"
    assert "the model relies on them" in analysis["verdict"]["text"]
    assert losses["removed"] > losses["intact"] + 0.1 and losses["use_score"] > losses["use_limit"]
    untrained = analysis["untrained"]["losses"]
    assert abs(untrained["removed"] - untrained["intact"]) < 0.02


def test_fresh_model_is_found(folder):
    analysis = analysis_of(folder, train_model(folder, freeze=""), "fresh")
    assert analysis["verdict"]["label"] == "FRESHLY INITIALISED"
    assert "at the norms they started with" in analysis["verdict"]["text"]


def test_frozen_experts_are_found(folder):
    """The gradient flows through the experts, so the model grows around them: the loss alone would mislead."""
    model = train_model(folder, freeze=r"\.experts\.")
    analysis = analysis_of(folder, model, "frozen")
    assert analysis["verdict"]["label"] == "NOT TRAINED"
    assert "at the norms they started with" in analysis["verdict"]["text"]
    assert max(analysis["checkpoint"]["attention_noise_excess"]) > 20  # the rest was trained

    for layer in model.model.layers:  # as weight decay without a gradient leaves them
        for weight in layer.mlp.experts.parameters():
            weight.data *= 0.6
    analysis = analysis_of(folder, model, "decayed")
    assert analysis["verdict"]["label"] == "NOT TRAINED"
    assert "not at the norms of this config" in analysis["verdict"]["text"]


def test_experts_without_a_gradient_path_are_found(folder, monkeypatch):
    """As on the published CUDA path: no gradient reaches the experts, nor passes through them."""
    forward = ComplexityDeepForCausalLM.forward

    def detached(model, *args, **kwargs):
        hooks = [
            layer.mlp.register_forward_hook(lambda module, args, out: (out[0].detach(), out[1]))
            for layer in model.model.layers
        ]
        out = forward(model, *args, **kwargs)
        for hook in hooks:
            hook.remove()
        return out

    with monkeypatch.context() as patch:
        patch.setattr(ComplexityDeepForCausalLM, "forward", detached)
        model = train_model(folder, freeze=r"\.experts\.|post_attention_layernorm")
    analysis = analysis_of(folder, model, "detached")
    losses = analysis["checkpoint"]["losses"]
    assert analysis["verdict"]["label"] == "NOT TRAINED"
    assert losses["intact"] < analysis["untrained"]["losses"]["intact"] - 1.0  # the body did learn
    assert abs(losses["next_expert"] - losses["intact"]) < 0.05 and abs(losses["removed"] - losses["intact"]) < 0.1


def test_partly_trained_experts_are_found(folder):
    analysis = analysis_of(folder, train_model(folder, freeze=r"layers\.[02]\.mlp\.experts\."), "partly")
    assert analysis["verdict"]["label"] == "PARTLY TRAINED"
    assert "in layer 1 only" in analysis["verdict"]["text"]


@pytest.mark.parametrize("shape", [(88, 64), (64, 44), (200, 300)])
def test_noise_follows_its_law(shape):
    generator = torch.Generator().manual_seed(0)
    draws = {
        "normal": lambda: torch.randn(shape, generator=generator),
        "scaled": lambda: 1e-3 * torch.randn(shape, generator=generator),
        "uniform": lambda: torch.rand(shape, generator=generator) - 0.5,
        "bfloat16": lambda: (0.02 * torch.randn(shape, generator=generator)).bfloat16(),
    }
    for name, draw in draws.items():
        found = torch.tensor([noise_excess(draw()) for _ in range(200)])
        assert abs(found.mean()) < 0.5 and 0.7 < found.std() < 1.2, name
        assert found.max() < NOISE_LIMIT, name
    # A direction twice as strong as the weakest that can be seen in noise at all.
    rows, columns = (torch.randn(size, generator=generator) for size in shape)
    spike = 2 * (shape[0] * shape[1]) ** 0.25 * torch.outer(rows / rows.norm(), columns / columns.norm())
    assert noise_excess(draws["normal"]() + spike) > NOISE_LIMIT


@pytest.mark.parametrize("of_experts, of_attention", [(5000.0, 50.0), (50.0, 5000.0)])
def test_figure_of_noise_shows_every_point(of_experts, of_attention):
    untrained = {"expert_noise_excess": [0.1, 0.2], "attention_noise_excess": [0.2, -0.1]}
    checkpoint = {"expert_noise_excess": [of_experts, 40.0], "attention_noise_excess": [of_attention, 40.0]}
    analysis = {"checkpoint": checkpoint, "untrained": untrained, "noise_limit": NOISE_LIMIT}
    figure, _, _ = analysis_figures.noise_excess(analysis, {})
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert all(low < value < high for line in axes.lines for value in line.get_ydata())


@pytest.mark.parametrize("scaled", [False, True])
def test_initial_norms_are_those_of_a_new_model(scaled):
    config = tiny_config(scaled_residual_init=scaled)
    starts = initial_norms(config)
    torch.manual_seed(0)
    weights = read_weights(ComplexityDeepForCausalLM(config))
    for name, start in starts.items():
        scores = (torch.tensor(weights[f"{name}_norm"]) - start["norm"]) / start["sd"]
        assert scores.shape == (3, 4) and scores.abs().max() < 4.5 and 0.4 < scores.std() < 1.7


# -- the numbers


def test_interventions_are_what_they_say(batches):
    model, rows = batches
    with tqdm(disable=True) as progress:
        losses = read_losses(model, rows, 0, progress)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with random_experts(model, 5):
            changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
            assert sorted(changed) == sorted(name for name in before if ".experts." in name)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

        for layer in model.model.layers:  # every expert gets the weights of the next one
            for weight in layer.mlp.experts.parameters():
                weight.data = weight.data.roll(-1, dims=0)
        assert loss_on(model, rows, progress) == pytest.approx(losses["next_expert"], abs=1e-5)
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.data.zero_()
        without = read_losses(model, rows, 0, progress)
        assert without["intact"] == pytest.approx(losses["removed"], abs=1e-5)
        assert without["use_score"] < without["use_limit"]
        assert noise_excess(model.model.layers[0].mlp.experts.down_proj.data[0]) == 0


def test_loss_and_gradients_do_not_depend_on_the_batch_size(folder, trained):
    model = load_analysed_model(str(trained), "cpu")
    found = []
    for batch_size in (16, 5):
        rows = rows_of(folder, model.config, batch_size)
        with tqdm(disable=True) as progress:
            loss = loss_on(model, rows, progress)
            found.append((loss, read_activations(model, rows, torch.arange(9), progress)[0]))
    (loss, measured), (other_loss, other) = found
    assert loss == pytest.approx(other_loss, abs=1e-5)
    for name in measured:
        if name != "mu_contribution":
            torch.testing.assert_close(torch.tensor(measured[name]), torch.tensor(other[name]), rtol=1e-4, atol=1e-5)

    # One batch holds all rows here, so its loss is the mean over all tokens and plain autograd gives the gradients.
    rows = rows_of(folder, model.config, 16)
    model.requires_grad_(True)
    model(**rows[0]).loss.backward()
    gradient = model.model.layers[1].mlp.experts.down_proj.grad.flatten(1)
    torch.testing.assert_close(torch.tensor(measured["down_proj_gradient_norm"][1]), gradient.norm(dim=1))
    expected = [torch.cosine_similarity(gradient[i], gradient[j], dim=0) for i in range(4) for j in range(4) if i < j]
    torch.testing.assert_close(torch.tensor(measured["down_proj_gradient_cosine"][1]), torch.stack(expected))


@pytest.mark.parametrize("routing", [{}, {"routing": "random", "routing_per_layer": True}])
def test_routing_mu_and_velocity_are_those_of_the_training_monitors(folder, routing):
    """On weights so large that mu re-routes tokens and velocities reach their limit."""
    model = tiny_model(std=0.5, vocab_size=300, use_mu_routing=True, **routing)
    for layer in model.model.layers:
        layer.mlp.mu_router.weight.normal_()
    ids = torch.randint(3, 300, (4, ROW))
    batch = {"input_ids": ids, "position_ids": torch.arange(ROW).expand_as(ids), "labels": ids, "use_cache": False}
    sampled = torch.tensor([0, 3, 70, 200])
    with tqdm(disable=True) as progress:
        measured, samples = read_activations(
            model, [{k: v[a:b] if k != "use_cache" else v for k, v in batch.items()} for a, b in ((0, 3), (3, 4))],
            sampled, progress,
        )  # fmt: skip
    monitors = read_monitors(model, {name: batch[name] for name in ("input_ids", "position_ids")})
    tables = model.model.token_to_expert.expand(3, -1) if not routing else model.model.token_to_expert
    expert_ids = model(ids, output_expert_ids=True).expert_ids
    for layer in range(3):
        rerouted = (expert_ids[layer] != tables[layer][ids]).float().mean().item()
        assert measured["rerouted_share"][layer] == pytest.approx(rerouted)
        tokens = [monitors[f"expert_tokens/layer_{layer}/expert_{expert}"] for expert in range(4)]
        assert measured["tokens_per_expert"][layer] == tokens
        assert measured["rerouted_share"][layer] == pytest.approx(monitors[f"mu_rerouted/layer_{layer}"])
        clamped = monitors[f"velocity_clamped/layer_{layer}"]
        assert measured["velocity_clamped_share"][layer] == pytest.approx(clamped, abs=1e-6)
    assert max(measured["rerouted_share"]) > 0.05 and max(measured["velocity_clamped_share"]) > 0.001
    assert measured["mu_contribution"]["q"][0] is None

    outputs, experts = samples[2]
    recorded = []
    hook = model.model.layers[2].mlp.register_forward_hook(lambda module, args, out: recorded.extend(out))
    model(ids)
    hook.remove()
    torch.testing.assert_close(outputs, recorded[0].detach().flatten(0, 1)[sampled], rtol=1e-4, atol=1e-4)
    assert torch.equal(experts, recorded[1].flatten()[sampled])

    model.model.layers[1].self_attn.mu_to_k.weight.data *= 2
    with tqdm(disable=True) as progress:
        doubled = read_activations(model, [batch], sampled, progress)[0]["mu_contribution"]
    assert doubled["k"][1] == pytest.approx(2 * measured["mu_contribution"]["k"][1], rel=1e-4)
    assert doubled["q"][1] == pytest.approx(measured["mu_contribution"]["q"][1], rel=1e-4)


@pytest.mark.gpu
def test_triton_kernels_give_the_same_numbers(folder, trained):
    """The hooks and the changed weights must reach the kernels that a GPU uses."""
    model = load_analysed_model(str(trained), "cuda")
    rows = rows_of(folder, model.config, device="cuda")
    found = []
    for kernels, experts in (("eager", "eager"), ("triton", "cggr")):
        model.set_kernels_implementation(kernels)
        model.set_experts_implementation(experts)
        with tqdm(disable=True) as progress:
            losses = read_losses(model, rows, 0, progress)
            found.append(read_activations(model, rows, torch.arange(9), progress)[0] | {"losses": losses})
    eager, triton = found
    for name in ("intact", "removed", "next_expert", "random"):
        assert triton["losses"][name] == pytest.approx(eager["losses"][name], abs=2e-3)  # TF32 products
    assert triton["tokens_per_expert"] == eager["tokens_per_expert"]
    for name in ("gate_up_proj_gradient_norm", "down_proj_gradient_cosine", "velocity_rms_quantiles"):
        torch.testing.assert_close(torch.tensor(triton[name]), torch.tensor(eager[name]), rtol=0.02, atol=2e-3)
    for letter in "qkv":
        assert triton["mu_contribution"][letter][1:] == pytest.approx(eager["mu_contribution"][letter][1:], rel=0.02)


def test_token_classes(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def classes(text):
        return [token_class(tokenizer, token) for token in tokenizer(text)["input_ids"]]

    assert classes(" 7") == ["whitespace", "digits"] and classes("\n") == ["whitespace"]
    assert classes("(") == ["punctuation"] and classes("é")[0] == "punctuation"  # one byte of two: no letter yet
    start = next(token for token in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]+", token))
    assert token_class(tokenizer, tokenizer.convert_tokens_to_ids(start)) == "word start"
    assert classes("t") == ["continuation"]
    assert token_class(tokenizer, tokenizer.eos_token_id) == "special"
    assert token_class(tokenizer, len(tokenizer) + 3) == "special"  # padding of the vocabulary


# -- the files


def test_page_stands_alone(folder, trained, capsys):
    output = folder / "page"
    analyze.main(settings(folder, trained, output_dir=str(output)))
    printed = capsys.readouterr().out
    analysis = json.loads((output / "analysis.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    figures = list(analysis["figures"])
    assert len(figures) == 10 and not analysis["not_measured"]
    assert sorted(file.name for file in output.iterdir()) == sorted([*figures, "analysis.json", "analysis.html"])
    page = (output / "analysis.html").read_text()
    assert "http:" not in page and "https:" not in page and "<script" not in page and "<link" not in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == len(figures)
    for source, file in zip(sources, figures):
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == (output / file).read_bytes()
        assert analysis["figures"][file]["caption"] in html.unescape(page)
    assert analysis["verdict"]["text"] in printed and printed.count("TRAINED") == 1


@pytest.mark.parametrize(
    ("overrides", "absent"),
    [
        ({"num_experts": 1}, ["expert_use", "noise_excess", "tokens_per_expert", "expert_tsne", "rerouted_tokens"]),
        ({"use_mu_guidance": False, "use_mu_routing": False}, ["mu_contribution", "rerouted_tokens"]),
        ({"use_dynamics": False, "num_hidden_layers": 1}, ["velocity", "mu_contribution"]),
    ],
)
def test_parts_that_a_config_lacks_are_left_out(folder, overrides, absent):
    train_model(folder, freeze="", **overrides).save_pretrained(folder / "ablation")
    (folder / "ablation" / "analysis").mkdir(exist_ok=True)
    for name in absent:  # of an earlier analysis
        (folder / "ablation" / "analysis" / f"{name}.png").write_bytes(b"")
    analyze.main(settings(folder, folder / "ablation"))
    analysis = json.loads((folder / "ablation" / "analysis" / "analysis.json").read_text())
    assert analysis["not_measured"]
    assert not {f"{name}.png" for name in absent} & set(analysis["figures"])
    assert not {f"{name}.png" for name in absent} & {file.name for file in (folder / "ablation" / "analysis").iterdir()}
    assert (analysis["verdict"]["label"] == "NO EXPERTS") == ("num_experts" in overrides)


def test_published_layout_gives_the_same_numbers(folder, trained):
    model = ComplexityDeepForCausalLM.from_pretrained(trained)
    model.save_published_format(folder / "published")
    native = analysed(folder, trained)
    published = analysed(folder, folder / "published")
    assert published["checkpoint"] == native["checkpoint"]


def test_bad_input_is_one_sentence(folder, trained, tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    broken = ComplexityDeepForCausalLM.from_pretrained(trained)
    broken.model.layers[0].self_attn.o_proj.weight.data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    quantized = {"model_type": "complexity-deep", "quantization_config": {"quant_method": "torchao"}}
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(quantized))
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "file").write_text("")
    large = AutoTokenizer.from_pretrained(folder / "tokenizer")
    large.add_tokens([f"<{index}>" for index in range(9)])
    large.save_pretrained(tmp_path / "large")
    for options, message in (
        ({"model": str(tmp_path / "llama")}, "is a 'llama' model"),
        ({"model": str(tmp_path / "nowhere")}, "is no model"),
        ({"model": str(tmp_path / "broken")}, "not finite, the first in model.layers.0.self_attn.o_proj.weight"),
        ({"model": str(tmp_path / "adapter")}, "holds an adapter"),
        ({"model": str(tmp_path / "quantized")}, "holds quantized weights"),
        ({"device": "nonsense"}, "cannot be used"),
        ({"tokenizer": None}, "has no tokenizer"),
        ({"tokenizer": str(tmp_path / "large")}, "name one with --tokenizer"),
        ({"text": [str(tmp_path / "none-*.jsonl")]}, "No file matches"),
        ({"text": [str(tmp_path / "short.txt")]}, "does not fill one row of 64"),
        ({"max_tokens": 63}, "less than one row"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"seed": 2**64}, "--seed must be from 0"),
        ({"output_dir": str(tmp_path / "file")}, "is a file"),
        ({"output_dir": str(tmp_path / "file" / "out")}, "is a file"),
        ({"output_dir": "/proc/out"}, "cannot be written"),
    ):
        with pytest.raises(InputError, match=re.escape(message)) as error:
            analyze.main(settings(folder, trained, **({"output_dir": str(tmp_path / "output")} | options)))
        assert "\n" not in str(error.value).strip(), options
    assert not (tmp_path / "output").exists()
