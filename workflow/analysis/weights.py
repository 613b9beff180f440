"""What the weights say: norms, similarities of experts, and how far a matrix is from random entries."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

# Six standard deviations of the Tracy-Widom law: noise exceeds it with a probability below 1e-6 for a single matrix.
NOISE_LIMIT = 6.0
TRACY_WIDOM_MEAN, TRACY_WIDOM_SD = -1.2065, 1.2680  # of its real (beta = 1) case


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
