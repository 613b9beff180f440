"""What the loss says when the experts are exchanged, removed or replaced by random ones."""

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from scipy.stats import t as student
from tqdm.auto import tqdm
from transformers import PreTrainedModel

RANDOM_EXPERTS = 8  # sets of random experts that the checkpoint's own are compared with
USE_LEVEL = 1e-3  # probability that a model which does not rely on its experts is said to


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
