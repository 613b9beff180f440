"""All measurements of a checkpoint, each beside that of an untrained model."""

import time
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from complexity_deep import ComplexityDeepForCausalLM
from complexity_deep.workflow.analysis.activations import read_activations
from complexity_deep.workflow.analysis.analysed_text import load_rows
from complexity_deep.workflow.analysis.interventions import RANDOM_EXPERTS, read_losses
from complexity_deep.workflow.analysis.neighbours import embed
from complexity_deep.workflow.analysis.verdict import give_verdict
from complexity_deep.workflow.analysis.weights import NOISE_LIMIT, initial_norms, read_weights
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.saved_model import NAME_ONE, load_model, load_tokenizer_of, why_not

TSNE_TOKENS = 1500  # t-SNE takes seconds for these, minutes for ten times as many
CONFIG_FIELDS = (
    *("num_hidden_layers", "hidden_size", "num_experts", "moe_intermediate_size", "routing", "use_mu_guidance"),
    *("use_mu_routing", "use_dynamics", "initializer_range", "scaled_residual_init"),
)


def load_analysed_model(path: str, device: str) -> PreTrainedModel:
    """The checkpoint in fp32, so that neither its norms nor its gradients are rounded."""
    if Path(path, "adapter_config.json").is_file():
        raise InputError(f"{path} holds an adapter; merge it into its model, save that and analyse it.")
    try:
        fields = PreTrainedConfig.get_config_dict(path)[0]
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' is no model: {why_not(path, error)}") from error
    model_type = fields.get("model_type", "complexity-deep")
    if model_type != "complexity-deep":
        raise InputError(
            f"{path} is a '{model_type}' model; this script reads the experts, mu and velocity of Complexity-Deep "
            "models only."
        )
    if "quantization_config" in fields:
        raise InputError(f"{path} holds quantized weights; analyse the model that they were made from.")
    model = load_model(path, device, ComplexityDeepForCausalLM, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise InputError(f"{path} holds numbers that are not finite, the first in {name}: it diverged in training.")
    return model


def untrained_model(config: PreTrainedConfig, routing_table: Tensor | None, seed: int) -> PreTrainedModel:
    """A fresh model of the same config that routes by the same table, [V] or [L, V]."""
    torch.manual_seed(seed)
    model = ComplexityDeepForCausalLM(config).eval()
    if routing_table is not None:
        model.model.token_to_expert.copy_(routing_table)
    return model


def analyse(
    path: str,
    text: list[str],
    *,
    text_column: str = "text",
    tokenizer: str | None = None,
    max_tokens: int = 16_384,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[dict, dict]:
    """All numbers of analysis.json, and the t-SNE points, which are only drawn.

    `path` is a folder or a model of the Hub, and `text` lists sources of text. Raises `InputError` for what cannot be
    read.
    """
    start = time.perf_counter()
    model = load_analysed_model(path, device)
    config = model.config
    batches, classes = load_rows(
        text,
        load_tokenizer_of(model, tokenizer or path, NAME_ONE),
        config,
        text_column=text_column,
        max_tokens=max_tokens,
        batch_size=batch_size,
        device=device,
    )
    ids = torch.cat([batch["input_ids"].flatten().cpu() for batch in batches])
    # One place per distinct token: copies of one token are routed alike and would be each other's neighbours.
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(ids), generator=generator)
    _, first = np.unique(ids[order].numpy(), return_index=True)
    places = order[first]
    sampled = places[torch.randperm(len(places), generator=generator)[:TSNE_TOKENS]].sort().values
    sampled_classes = [classes[token] for token in ids[sampled].tolist()]

    analysis = {
        "model": path,
        "parameters": model.parameter_counts(),
        "text": text,
        "tokens": len(ids),
        "row_length": batches[0]["input_ids"].shape[1],
        "seed": seed,
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
                model = untrained_model(config, table, seed).to(device)
            progress.set_description(f"{name}, losses")
            losses = read_losses(model, batches, seed, progress)
            progress.set_description(f"{name}, weights")
            weights = read_weights(model)
            progress.set_description(f"{name}, activations")
            measured, samples = read_activations(model, batches, sampled, progress)
            analysis[name] = {"losses": losses, **weights, **measured}
            if samples:
                progress.set_description(f"{name}, t-SNE")
                drawn[name] = embed(samples, sampled_classes, seed)
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
