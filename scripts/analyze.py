"""What a Complexity-Deep checkpoint has learned, in figures and in one sentence: were its experts ever trained?

    python scripts/analyze.py runs/demo/model --text embedded
    python scripts/analyze.py user/model-on-the-hub --text 'data/edu/validation.parquet' --output-dir runs/analysis
    python scripts/analyze.py path/to/published/folder --tokenizer runs/tokenizer --text 'data/*.jsonl'

Writes analysis.json (every number), one PNG per figure and analysis.html (one file, no network) to MODEL/analysis.
Everything is measured on an untrained model too: the same config, fresh weights by the same initializer, the same text
and routing table. Text that the model was not trained on is best.

The verdict rests on the weights. A matrix of independent random entries has a largest singular value that is known to
within a narrow law (Tracy-Widom) whatever the scale of the entries, so weight decay or another initializer_range do not
disturb it; a gradient adds directions that stand far above it. What the loss does without the experts, with every
token sent to the next expert, and with random experts in their place says whether the model relies on them.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from architecture_monitors import VELOCITY_LIMIT
from command_line import ArgumentParser, InputError, check_output_folder, run_script
from packed_dataset import PackedCollator, pack, tokenize
from text_sources import load_sources, read_documents
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, logging

try:
    from analysis_figures import FIGURES, draw_figures
    from analysis_page import write_page
    from scipy.stats import t as student
    from sklearn.manifold import TSNE
    from sklearn.neighbors import NearestNeighbors

    from complexity_deep import ComplexityDeepForCausalLM
except ImportError as error:
    sys.exit(f"A package is missing ({error}): run `pip install -e .[eval]` in the repository first.")

LONGEST_ROW = 512  # tokens; enough context for every figure, and many rows at the default --max-tokens
# Six standard deviations of the Tracy-Widom law: noise exceeds it with a probability below 1e-6 for a single matrix.
NOISE_LIMIT = 6.0
TRACY_WIDOM_MEAN, TRACY_WIDOM_SD = -1.2065, 1.2680  # of its real (beta = 1) case
RANDOM_EXPERTS = 8  # sets of random experts that the checkpoint's own are compared with
USE_LEVEL = 1e-3  # chance that experts the model does not rely on are said to be used
TSNE_TOKENS = 1500  # t-SNE takes seconds for these, minutes for ten times as many
NEIGHBOURS = 10
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CONFIG_FIELDS = (
    *("num_hidden_layers", "hidden_size", "num_experts", "moe_intermediate_size", "routing", "use_mu_guidance"),
    *("use_mu_routing", "use_dynamics", "initializer_range", "scaled_residual_init"),
)
TOKEN_CLASSES = ("word start", "continuation", "digits", "punctuation", "whitespace", "special")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hub id or folder, also in a published layout")
    parser.add_argument("--text", nargs="+", required=True, help="file patterns, Hub datasets or 'embedded'")
    parser.add_argument("--text-column", default="text", help="column that holds the text")
    parser.add_argument("--tokenizer", help="Hub id or folder of the tokenizer; default: the model's")
    parser.add_argument("--output-dir", help="default: MODEL/analysis, or NAME/analysis for a Hub id")
    parser.add_argument("--max-tokens", type=int, default=16_384, help="tokens of the text to read")
    parser.add_argument("--batch-size", type=int, default=8, help="rows in one forward pass")
    parser.add_argument("--seed", type=int, default=0, help="seed of the untrained model, the random experts and t-SNE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    return parser.parse_args()


def load_model(path: str, device: str) -> PreTrainedModel:
    """The checkpoint in fp32, so that neither its norms nor its gradients are rounded."""
    if Path(path, "adapter_config.json").is_file():
        raise InputError(f"{path} holds an adapter; merge it into its model, save that and analyse it.")
    try:
        model_type = PreTrainedConfig.get_config_dict(path)[0].get("model_type", "complexity-deep")
        if model_type != "complexity-deep":
            raise InputError(
                f"{path} is a '{model_type}' model; this script reads the experts, mu and velocity of "
                "Complexity-Deep models only."
            )
        model = ComplexityDeepForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last is a device that is not there
        raise InputError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise InputError(f"{path} holds numbers that are not finite, the first in {name}: it diverged in training.")
    return model


def load_rows(args: argparse.Namespace, config: PreTrainedConfig) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Batches of packed rows, each tensor [B, S] on the device, and the class of each token id, [V]."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{args.tokenizer or args.model} has no tokenizer that can be loaded; name one with --tokenizer."
        ) from error
    if tokenizer.eos_token_id is None or len(tokenizer) > config.vocab_size:
        raise InputError(
            f"The tokenizer has {len(tokenizer):,} tokens and eos_token_id {tokenizer.eos_token_id}, the model "
            f"{config.vocab_size:,} ids; name the model's own with --tokenizer."
        )
    length = min(LONGEST_ROW, config.max_position_embeddings)
    if args.max_tokens < length:
        raise InputError(f"--max-tokens {args.max_tokens} is less than one row of {length} tokens.")
    texts = read_documents(load_sources(args.text, text_column=args.text_column))
    rows = pack((({}, tokenize(tokenizer, [text])[0]) for text in texts), length)
    rows = [
        {name: row[name] for name in ("input_ids", "position_ids")} for row in islice(rows, args.max_tokens // length)
    ]
    if not rows:
        raise InputError(f"The text does not fill one row of {length} tokens: give more of it.")
    collate = PackedCollator(mask_across_documents=True)
    batches = [collate(rows[first : first + args.batch_size]) for first in range(0, len(rows), args.batch_size)]
    for batch in batches:
        batch.update((name, batch[name].to(args.device)) for name in ("input_ids", "position_ids", "labels"))
    return batches, [token_class(tokenizer, token) for token in range(config.vocab_size)]


def token_class(tokenizer, token_id: int) -> str:
    """One of TOKEN_CLASSES; a word that begins a document has no space before it and counts as continuation."""
    if token_id >= len(tokenizer) or token_id in tokenizer.all_special_ids:
        return "special"
    text, raw = tokenizer.decode([token_id]), tokenizer.convert_ids_to_tokens(token_id)
    if not text.strip():
        return "whitespace"
    if any(character.isalpha() for character in text):
        return "word start" if raw.startswith(("Ġ", "▁", " ")) else "continuation"
    return "digits" if any(character.isdigit() for character in text) else "punctuation"


def untrained_model(config: PreTrainedConfig, routing_table: Tensor | None, seed: int) -> PreTrainedModel:
    """A fresh model of the same config that routes by the same table, [V]."""
    torch.manual_seed(seed)
    model = ComplexityDeepForCausalLM(config).eval()
    if routing_table is not None:
        model.model.token_to_expert.copy_(routing_table)
    return model


# -- what the weights say


def noise_excess(matrix: Tensor) -> float:
    """Largest singular value of [m, n] against that of independent entries of the same rms, in standard deviations.

    Centre and scale are Johnstone's (Annals of Statistics 2001) with Ma's second-order shift of the dimensions by 1/2
    (Bernoulli 2012); the squared value then follows the Tracy-Widom law.
    """
    matrix = matrix.float()
    if not matrix.any():
        return 0.0
    rows, columns = (math.sqrt(size - 0.5) for size in matrix.shape)
    gram = matrix @ matrix.T if rows < columns else matrix.T @ matrix
    largest = (torch.linalg.eigvalsh(gram)[-1] / matrix.square().mean()).item()
    centre, scale = (rows + columns) ** 2, (rows + columns) * (1 / rows + 1 / columns) ** (1 / 3)
    return ((largest - centre) / scale - TRACY_WIDOM_MEAN) / TRACY_WIDOM_SD


def pairwise_cosines(weights: Tensor) -> list[float]:
    """Cosine similarity of every pair of experts, weights [E, ...]; experts of norm 0 are left out."""
    flat = weights.flatten(1).float()
    flat = flat[flat.norm(dim=1) > 0]
    flat = F.normalize(flat, dim=1)
    return (flat @ flat.T)[torch.ones(len(flat), len(flat)).triu(1).bool()].tolist()


@torch.no_grad()
def read_weights(model: PreTrainedModel) -> dict[str, list]:
    """Norms, similarities and noise excess, one entry a layer; those of one expert are lists over experts."""
    measured = {"attention_noise_excess": []}
    for layer in model.base_model.layers:
        attention = layer.self_attn
        matrices = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        excess = [noise_excess(module.weight) for module in matrices]
        # The mean of k independent draws varies sqrt(k) times less than one.
        measured["attention_noise_excess"].append(sum(excess) / math.sqrt(len(excess)))
        if model.config.is_routed:
            excess = [noise_excess(matrix) for weight in layer.mlp.experts.parameters() for matrix in weight]
            measured.setdefault("expert_noise_excess", []).append(sum(excess) / math.sqrt(len(excess)))
            for name, weight in layer.mlp.experts.named_parameters():
                measured.setdefault(f"{name}_norm", []).append(weight.flatten(1).norm(dim=1).tolist())
                measured.setdefault(f"{name}_cosine", []).append(pairwise_cosines(weight))
    return measured


def initial_norms(config: PreTrainedConfig) -> dict[str, dict[str, float]]:
    """Norm of one expert's matrices before training: std * sqrt(numel), with relative deviation 1 / sqrt(2 numel)."""
    std, layers = config.initializer_range, config.num_hidden_layers
    expert = config.hidden_size * config.moe_intermediate_size
    down_std = std / math.sqrt(2 * layers) if config.scaled_residual_init else std
    sizes = {"gate_up_proj": (std, 2 * expert), "down_proj": (down_std, expert)}
    return {name: {"norm": s * math.sqrt(n), "sd": s * math.sqrt(0.5), "numel": n} for name, (s, n) in sizes.items()}


# -- what the activations and gradients say


class Measurement:
    """Sums over batches of what the layers' modules put out, taken by forward hooks."""

    def __init__(self, model: PreTrainedModel, sampled: Tensor):
        """`sampled` [n]: places in the text, counted over all batches, whose expert outputs are kept for t-SNE."""
        self.model, self.sampled, self.seen = model, sampled, 0
        self.squares = {}  # (layer, projection) -> sum of squares; the numbers of terms are equal where it matters
        layers = model.config.num_hidden_layers
        self.activations = {layer: [] for layer in sorted({0, layers // 2, layers - 1})}
        self.handles = []

    def __enter__(self):
        for index, layer in enumerate(self.model.base_model.layers):
            for name, module in layer.self_attn.named_children():
                if name in ("q_proj", "k_proj", "v_proj", "mu_to_q", "mu_to_k", "mu_to_v"):
                    self._add(module, lambda out, key=(index, name): self._square(key, out))
            if self.model.config.is_routed and index in self.activations:
                self._add(layer.mlp.experts, lambda out, index=index: self._sample(index, out))
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def _add(self, module, record):
        self.handles.append(module.register_forward_hook(lambda module, args, out: record(out.detach())))

    def _square(self, key, out):
        self.squares[key] = self.squares.get(key, 0.0) + out.double().square().sum()

    def _sample(self, layer, out):
        here = self.sampled[(self.sampled >= self.seen) & (self.sampled < self.seen + len(out))] - self.seen
        self.activations[layer].append(out[here.to(out.device)].cpu())

    def mu_shares(self) -> dict[str, list[float | None]]:
        """rms(mu W_mu) / rms(x W) for queries, keys and values; None for layer 0, which has no layer below."""
        shares = {}
        for letter in "qkv":
            pairs = [
                (self.squares.get((layer, f"mu_to_{letter}")), self.squares[layer, f"{letter}_proj"])
                for layer in range(self.model.config.num_hidden_layers)
            ]
            shares[letter] = [None if mu is None else (mu / own).sqrt().item() for mu, own in pairs]
        return shares


def read_activations(model: PreTrainedModel, batches: list[dict], sampled: Tensor, progress: tqdm) -> tuple[dict, dict]:
    """One pass forward and backward over the text.

    Returns the numbers, one entry a layer, and what t-SNE needs: per layer, expert outputs [n, H] and expert ids [n].
    """
    config = model.config
    model.requires_grad_(False)
    if config.is_routed:
        for layer in model.base_model.layers:
            layer.mlp.experts.requires_grad_(True)
    targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    expert_ids, by_id, velocity_rms, clamped = [], [], [], []
    recorded = {"output_expert_ids": config.is_routed, "output_velocities": config.use_dynamics}
    with Measurement(model, sampled) as measurement:
        for batch in batches:
            outputs = model(**batch, **recorded, num_items_in_batch=targets)
            if config.is_routed:
                outputs.loss.backward()
                expert_ids.append(torch.stack(outputs.expert_ids).flatten(1).cpu())  # [L, B * S]
                by_id.append(model.base_model.token_to_expert[batch["input_ids"]].flatten().cpu())
            if config.use_dynamics:
                velocities = torch.stack(outputs.velocities).detach().flatten(1, 2)  # [L, B * S, H]
                velocity_rms.append(velocities.square().mean(-1).sqrt().cpu())
                clamped.append((velocities.abs() >= VELOCITY_LIMIT).float().mean((1, 2)) * velocities.shape[1])
            measurement.seen += batch["input_ids"].numel()
            progress.update()
    measured, samples = {}, {}
    if config.is_routed:
        expert_ids, by_id = torch.cat(expert_ids, 1), torch.cat(by_id)
        measured["tokens_per_expert"] = [ids.bincount(minlength=config.num_experts).tolist() for ids in expert_ids]
        if config.use_mu_routing:
            measured["rerouted_share"] = (expert_ids != by_id).float().mean(1).tolist()
        for layer in model.base_model.layers:
            for weight, parameter in layer.mlp.experts.named_parameters():
                measured.setdefault(f"{weight}_gradient_cosine", []).append(pairwise_cosines(parameter.grad))
                norms = parameter.grad.flatten(1).norm(dim=1).tolist()
                measured.setdefault(f"{weight}_gradient_norm", []).append(norms)
        model.zero_grad()
        samples = {
            layer: (torch.cat(outputs), expert_ids[layer, sampled])
            for layer, outputs in measurement.activations.items()
        }
    if config.use_mu_guidance:
        measured["mu_contribution"] = measurement.mu_shares()
    if config.use_dynamics:
        rms = torch.cat(velocity_rms, 1)  # [L, N]
        measured["velocity_rms_quantiles"] = [torch.quantile(row, torch.tensor(QUANTILES)).tolist() for row in rms]
        measured["velocity_rms_tokens"] = rms[:, sampled[:: max(1, len(sampled) // 12)]].T.tolist()
        measured["velocity_clamped_share"] = (torch.stack(clamped).sum(0) / rms.shape[1]).tolist()
    return measured, samples


# -- what the loss says


@contextmanager
def next_expert(model: PreTrainedModel) -> Iterator[None]:
    """Every token goes to the expert after its own."""

    def shift(experts, args, kwargs):
        hidden_states, expert_ids, weights = args
        # Without the plan of the true routing, which the layer then makes anew.
        return (hidden_states, (expert_ids + 1) % experts.num_experts, weights), {}

    handles = [
        layer.mlp.experts.register_forward_pre_hook(shift, with_kwargs=True) for layer in model.base_model.layers
    ]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def no_experts(model: PreTrainedModel) -> Iterator[None]:
    """The experts put out zeros."""
    handles = [
        layer.mlp.experts.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        for layer in model.base_model.layers
    ]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def random_experts(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Independent normal entries, at each expert's own rms, in the place of its weights."""
    generator = torch.Generator(model.device).manual_seed(seed)
    own = {}
    for layer in model.base_model.layers:
        for weight in layer.mlp.experts.parameters():
            own[weight] = weight.data
            noise = torch.randn(weight.shape, generator=generator, device=model.device)
            weight.data = noise * weight.data.square().mean((1, 2), keepdim=True).sqrt()
    yield
    for weight, data in own.items():
        weight.data = data


@torch.no_grad()
def loss_on(model: PreTrainedModel, batches: list[dict], progress: tqdm) -> float:
    """Mean loss in nats per token."""
    total = tokens = 0
    for batch in batches:
        targets = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch).loss.item() * targets
        tokens += targets
        progress.update()
    return total / tokens


def read_losses(model: PreTrainedModel, batches: list[dict], seed: int, progress: tqdm) -> dict:
    """Loss as it is, and where experts are routed with their output shifted, removed and randomised."""
    losses = {"intact": loss_on(model, batches, progress)}
    if not model.config.is_routed:
        return losses
    with next_expert(model):
        losses["next_expert"] = loss_on(model, batches, progress)
    with no_experts(model):
        losses["removed"] = loss_on(model, batches, progress)
    losses["random"] = []
    for draw in range(RANDOM_EXPERTS):
        with random_experts(model, seed + 1 + draw):
            losses["random"].append(loss_on(model, batches, progress))
    # If the experts were random, their loss would be one more draw: Student's prediction interval for it.
    spread = statistics.stdev(losses["random"]) * math.sqrt(1 + 1 / RANDOM_EXPERTS)
    gain = statistics.mean(losses["random"]) - losses["intact"]
    losses["use_score"] = gain / max(spread, 1e-12)  # experts of zeros have no spread
    losses["use_limit"] = float(student.isf(USE_LEVEL, RANDOM_EXPERTS - 1))
    return losses


# -- what it all says


def give_verdict(analysis: dict) -> dict[str, str]:
    """`label`, one of TRAINED, PARTLY TRAINED, NOT TRAINED, FRESHLY INITIALISED and NO EXPERTS, and `text`."""
    checkpoint = analysis["checkpoint"]
    if "expert_noise_excess" not in checkpoint:
        text = "This is a dense configuration, without token-routed experts to ask about."
        return {"label": "NO EXPERTS", "text": text}

    losses = checkpoint["losses"]
    change = {name: losses[name] - losses["intact"] for name in ("next_expert", "removed")}
    numbers = (
        f"loss {losses['intact']:.3f}; {change['next_expert']:+.3f} with every token sent to the next expert, "
        f"{change['removed']:+.3f} without the experts, {statistics.mean(losses['random']) - losses['intact']:+.3f} "
        "with random ones in their place"
    )
    relies = losses["use_score"] > losses["use_limit"]
    excess = checkpoint["expert_noise_excess"]
    learned = [layer for layer, value in enumerate(excess) if value > NOISE_LIMIT]
    if learned:
        where = "every layer" if len(learned) == len(excess) else f"layer {', '.join(map(str, learned))} only"
        use = "the model relies on them" if relies else "on this text the model does as well with random ones"
        return {
            "label": "TRAINED" if len(learned) == len(excess) else "PARTLY TRAINED",
            "text": f"The experts carry learned structure in {where} (largest singular value at least "
            f"{min(excess[layer] for layer in learned):,.0f} standard deviations above noise, which stays below "
            f"{NOISE_LIMIT:g}), and {use} ({numbers}).",
        }

    furthest = max(
        abs(norm - start["norm"]) / start["sd"]
        for name, start in analysis["initial_norms"].items()
        for layer in checkpoint[f"{name}_norm"]
        for norm in layer
    )
    scale = "at the norms they started with" if furthest < NOISE_LIMIT else "though not at the norms of this config"
    noise = f"The experts are random noise in every layer, {scale}"
    if max(checkpoint["attention_noise_excess"]) <= NOISE_LIMIT:
        text = f"{noise}, and so is the attention: nothing in this model was ever trained ({numbers})."
        return {"label": "FRESHLY INITIALISED", "text": text}
    use = "leans on the particular noise it grew around" if relies else "does not notice which noise it is"
    return {"label": "NOT TRAINED", "text": f"{noise}. The rest of the model was trained, and {use} ({numbers})."}


def embed(samples: dict, classes: list[str], seed: int) -> dict[int, dict]:
    """t-SNE of each sampled layer: points [n, 2], experts [n], and how often near neighbours share expert or class."""
    embedded = {}
    for layer, (outputs, experts) in samples.items():
        neighbours = min(NEIGHBOURS, len(outputs) - 1)
        near = NearestNeighbors(n_neighbors=neighbours).fit(outputs).kneighbors(return_distance=False)
        shares = {}
        for what, labels in (("expert", experts), ("class", torch.tensor([TOKEN_CLASSES.index(c) for c in classes]))):
            frequencies = labels.bincount().double() / len(labels)
            shares[f"same_{what}"] = (labels[torch.from_numpy(near)] == labels[:, None]).double().mean().item()
            shares[f"same_{what}_by_chance"] = frequencies.square().sum().item()
        perplexity = min(30, max(1, (len(outputs) - 1) // 3))
        points = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(outputs.numpy())
        embedded[layer] = {"points": points, "experts": experts.numpy(), "neighbours": shares}
    return embedded


def analyse(args: argparse.Namespace) -> tuple[dict, dict]:
    """All numbers of analysis.json, and the t-SNE points, which are only drawn."""
    start = time.perf_counter()
    model = load_model(args.model, args.device)
    config = model.config
    batches, classes = load_rows(args, config)
    ids = torch.cat([batch["input_ids"].flatten().cpu() for batch in batches])
    # One place per distinct token: copies of one token are routed alike and would be each other's neighbours.
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(ids), generator=generator)
    _, first = np.unique(ids[order].numpy(), return_index=True)
    places = order[first]
    sampled = places[torch.randperm(len(places), generator=generator)[:TSNE_TOKENS]].sort().values
    sampled_classes = [classes[token] for token in ids[sampled].tolist()]

    analysis = {
        "model": args.model,
        "parameters": model.parameter_counts(),
        "text": args.text,
        "tokens": len(ids),
        "row_length": batches[0]["input_ids"].shape[1],
        "seed": args.seed,
        "config": {name: getattr(config, name) for name in CONFIG_FIELDS},
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "noise_limit": NOISE_LIMIT,
    }
    drawn = {"classes": sampled_classes}
    table = None
    if config.is_routed:
        table = model.base_model.token_to_expert.clone()
        analysis["initial_norms"] = initial_norms(config)
    passes = 2 * (4 + RANDOM_EXPERTS if config.is_routed else 2)
    with tqdm(total=passes * len(batches), desc="reading", unit="batch", leave=False) as progress:
        for name in ("checkpoint", "untrained"):
            if name == "untrained":
                del model  # two large ones may not fit
                model = untrained_model(config, table, args.seed).to(args.device)
            progress.set_description(f"{name}, losses")
            losses = read_losses(model, batches, args.seed, progress)
            progress.set_description(f"{name}, weights")
            weights = read_weights(model)
            progress.set_description(f"{name}, activations")
            measured, samples = read_activations(model, batches, sampled, progress)
            analysis[name] = {"losses": losses, **weights, **measured}
            if samples:
                progress.set_description(f"{name}, t-SNE")
                drawn[name] = embed(samples, sampled_classes, args.seed)
                analysis[name]["neighbours"] = {layer: entry["neighbours"] for layer, entry in drawn[name].items()}
    analysis["not_measured"] = not_measured(config)
    analysis["verdict"] = give_verdict(analysis)
    analysis["seconds"] = round(time.perf_counter() - start, 1)
    return analysis, drawn


def not_measured(config: PreTrainedConfig) -> list[str]:
    """What this configuration does not have, a sentence each."""
    absent = {
        "This configuration has no token-routed experts, so there is no figure of experts.": config.is_routed,
        "mu does not take part in routing here, so no token is re-routed.": not config.is_routed
        or config.use_mu_routing,
        "Attention is not guided by mu in this configuration.": config.use_mu_guidance,
        "This configuration has no dynamics, so there is no velocity.": config.use_dynamics,
    }
    return [sentence for sentence, is_there in absent.items() if not is_there]


def main(args: argparse.Namespace) -> None:
    logging.disable_progress_bar()
    for name in ("max_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, but is {getattr(args, name)}.")
    is_folder = Path(args.model).is_dir()
    output_dir = Path(args.output_dir or Path(args.model if is_folder else Path(args.model).name, "analysis"))
    check_output_folder(output_dir)
    analysis, drawn = analyse(args)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".writing-") as folder:
        analysis["figures"] = draw_figures(analysis, drawn, Path(folder))
        Path(folder, "analysis.json").write_text(json.dumps(analysis, indent=1))
        write_page(analysis, Path(folder))
        for file in Path(folder).iterdir():
            os.replace(file, output_dir / file.name)
    for file in {f"{draw.__name__}.png" for draw in FIGURES} - set(analysis["figures"]):
        (output_dir / file).unlink(missing_ok=True)  # of an earlier analysis
    for sentence in analysis["not_measured"]:
        print(sentence)
    print(f"{output_dir / 'analysis.html'}: {len(analysis['figures'])} figures in {analysis['seconds']:.0f} s")
    print(f"{analysis['verdict']['label']}. {analysis['verdict']['text']}")


if __name__ == "__main__":
    run_script(main, parse_args())
