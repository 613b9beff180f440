"""FLOPs that a model needs for one token: the one count behind every MFU and every share of the matmul rate."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# Dense bf16 FLOP/s of the SXM boards, from NVIDIA's data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
FLOPS_PER_PARAMETER = 6  # of a product, for a token, forward and backward (PaLM, appendix B)
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def first_of(config: PreTrainedConfig, names: tuple[str, ...]) -> int:
    """The first of the named fields that is a number above 0, or 1."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 1)


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """`total`, and where the model knows them `trained` (a gradient reaches them) and `active` (for one token)."""
    return model.parameter_counts() if hasattr(model, "parameter_counts") else {"total": model.num_parameters()}


def total_parameters(model: PreTrainedModel) -> int:
    """Parameters of the file, also those that the architecture never trains."""
    return parameter_counts(model)["total"]


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that one token passes through: of experts, only as many as a token is sent to."""
    if "active" in (known := parameter_counts(model)):
        return known["active"]
    config = model.config.get_text_config()
    experts, chosen = first_of(config, EXPERT_COUNTS), first_of(config, EXPERTS_PER_TOKEN)
    in_experts = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        # Granite keeps its experts in 3D weights of modules with names of their own.
        if ".experts." in name or (parameter.ndim == 3 and parameter.shape[0] == experts > 1)
    )
    return model.num_parameters() - in_experts + in_experts * min(chosen, experts) // experts


def looked_up_parameters(model: PreTrainedModel) -> int:
    """Parameters of embeddings that are no product's weight: a tied head is one, and counts as that.

    Value embeddings are left out, for of those the model's own count of active parameters has a single row.
    """
    head = model.get_output_embeddings()
    tied = None if head is None else head.weight
    tables = {
        id(module.weight): module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not name.endswith(".value_embedding")
    }
    return sum(weight.numel() for weight in tables.values() if weight is not tied)


def keys_per_query(config: PreTrainedConfig, sequence_length: int) -> float:
    """Keys that causal attention gives a query, averaged over the sequence and summed over layers."""
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    total = 0.0
    for kind in kinds:
        window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
        window = min(window or sequence_length, sequence_length)
        total += window * (1 - window / (2 * sequence_length))  # half of the square, less what the window leaves out
    return total


def flops_per_token(model: PreTrainedModel, sequence_length: int) -> float:
    """FLOPs of one token, forward and backward, in rows of `sequence_length`; a third of it is the forward.

    `FLOPS_PER_PARAMETER` for each parameter in a product that the token passes through, and 12 per key and channel of
    attention, which is causal: half of the square.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    products = active_parameters(model) - looked_up_parameters(model)
    return FLOPS_PER_PARAMETER * products + 12 * keys_per_query(config, sequence_length) * width


def peak_flops() -> float | None:
    """Peak of the current GPU where it is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for board, peak in PEAK_FLOPS.items() if board in name), None)
