"""What the activations and gradients say, from one pass over the text."""

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from complexity_deep.kernels.kernel_reference import VELOCITY_LIMIT
from complexity_deep.workflow.analysis.weights import pairwise_cosines

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Measurement:
    """Sums over batches of what the layers' modules put out, taken by forward hooks."""

    def __init__(self, model: PreTrainedModel, sampled: Tensor):
        """`sampled` [n]: places in the text, counted over all batches, whose expert outputs are kept for t-SNE."""
        self.model, self.sampled, self.seen = model, sampled, 0
        self.squares = {}  # (layer, projection) -> sum of squares; those that are divided have as many terms
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
                own = model.base_model.expert_ids_by_layer(batch["input_ids"])
                by_id.append(torch.stack(own).flatten(1).cpu())  # [L, B * S]
            if config.use_dynamics:
                velocities = torch.stack(outputs.velocities).detach().flatten(1, 2)  # [L, B * S, H]
                velocity_rms.append(velocities.square().mean(-1).sqrt().cpu())
                clamped.append((velocities.abs() >= VELOCITY_LIMIT).float().mean((1, 2)) * velocities.shape[1])
            measurement.seen += batch["input_ids"].numel()
            progress.update()
    measured, samples = {}, {}
    if config.is_routed:
        expert_ids, by_id = torch.cat(expert_ids, 1), torch.cat(by_id, 1)
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
