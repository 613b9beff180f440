"""Next-token cross-entropy that never holds the logits of all tokens.

A plain head writes logits [tokens, vocabulary], in fp32 when it is not compiled, and their gradient. Here the tokens go
through the head in chunks: each chunk's logits are turned into the gradients of the hidden states and of the weight at
once and dropped, so memory is that of one chunk and no product is computed twice. Under torch.compile the softmax of a
chunk is fused and only its logits in the compute dtype exist.

PyTorch has the same idea as `linear_cross_entropy(options=...)` from 2.13 on (this repository supports 2.11), and TRL
as `add_fused_lm_head`, which pays for a fourth product by recomputing the logits; in a small model the head is half of
the work. Neither has a z-loss.
"""

import functools
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from complexity_deep.workflow.command import InputError

CHUNK_ELEMENTS = 2**27  # tokens x vocabulary of one chunk: 4,096 tokens at 32k, 256 MiB of logits in bf16
# Config fields of architectures that do more to the logits than a matrix product.
CHANGED_LOGITS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the losses over tokens, and each token's cross-entropy (without a gradient, 0 where the label is -100)."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, z_loss: float, with_gradients: bool):
        """`hidden` [N, H], `weight` [V, H] and `labels` [N]; products run in the dtype of `hidden`."""
        vocabulary = weight.shape[0]
        chunk = max(128, CHUNK_ELEMENTS // vocabulary // 128 * 128)  # whole tiles of a matrix product
        compute_weight = weight.to(hidden.dtype)
        ids = torch.arange(vocabulary, device=hidden.device)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradients else None
        total, token_losses, grad_hidden = [], [], []
        for rows, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):  # (C, H), (C,)
            logits = rows @ compute_weight.T  # (C, V)
            log_sum = logits.float().logsumexp(dim=-1)  # (C,)
            kept = targets != -100
            target_logit = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0].float()
            losses = torch.where(kept, log_sum - target_logit, 0.0)  # (C,)
            token_losses.append(losses)
            total.append((losses + z_loss * log_sum.square() * kept).sum())
            if with_gradients:
                # d(log_sum)/d(logits) is the softmax; the label of an ignored token equals no id.
                slope = (1 + 2 * z_loss * log_sum) * kept
                grad = torch.exp(logits.float() - log_sum[:, None]) * slope[:, None] - (ids == targets[:, None]).float()
                grad = grad.to(hidden.dtype)  # (C, V)
                grad_hidden.append(grad @ compute_weight)
                grad_weight += grad.T @ rows
        token_losses = torch.cat(token_losses)  # (N,)
        ctx.mark_non_differentiable(token_losses)
        if with_gradients:
            ctx.save_for_backward(torch.cat(grad_hidden), grad_weight.to(weight.dtype))
        return torch.stack(total).sum(), token_losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total.to(grad_hidden.dtype), grad_weight * grad_total, None, None, None


@dataclass
class ChunkedLossOutput(ModelOutput):
    """What a model of `use_chunked_loss` returns when it is given labels.

    Args:
        loss: mean over the labelled tokens, or their sum over `num_items_in_batch`; with the z-loss in training only.
        token_losses: [B, S - 1] cross-entropy of each next token in nats, 0 where there is no label.
    """

    loss: Tensor | None = None
    token_losses: Tensor | None = None


def use_chunked_loss(model: PreTrainedModel, z_loss: float = 0.0) -> None:
    """Let `model(..., labels=labels)` compute its loss in chunks; without labels it returns logits as before.

    `z_loss` is the weight of the squared log of the softmax's denominator (PaLM, section 5). Raises `InputError` for an
    architecture whose head is more than a matrix product.
    """
    head = model.get_output_embeddings()
    text_config = model.config.get_text_config()
    changed = [name for name in CHANGED_LOGITS if getattr(text_config, name, None) not in (None, 1.0)]
    if type(head) is not nn.Linear or head.bias is not None or changed:
        reason = f"has {changed[0]}" if changed else "has a head that is not a linear layer without bias"
        raise InputError(
            f"{model.config.model_type} {reason}, which the chunked loss has not: set chunked_loss to false."
        )
    if getattr(text_config, "output_router_logits", False) and getattr(text_config, "router_aux_loss_coef", 0):
        raise InputError(
            f"{model.config.model_type} adds its router's loss to that of its labels (output_router_logits), which the "
            "chunked loss would leave out: set chunked_loss to false."
        )
    plain_model, plain_head = model.forward, head.forward

    def chunked_head(self, hidden: Tensor, labels: Tensor | None = None):
        # Inside the head's own call, because FSDP2 and DeepSpeed gather the head's weight around that.
        if labels is None:
            return plain_head(hidden)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        coefficient = z_loss if model.training else 0.0
        weight = self.weight.full_tensor() if isinstance(self.weight, DTensor) else self.weight
        total, token_losses = ChunkedCrossEntropy.apply(
            hidden.flatten(0, 1), weight, labels.flatten(), coefficient, torch.is_grad_enabled()
        )
        return total, token_losses.view_as(labels)

    @functools.wraps(type(model).forward)  # Trainer reads the signature
    def chunked_model(
        self, *args, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs
    ):
        if labels is None:
            return plain_model(*args, **inputs)
        hidden = self.base_model(*args, **inputs).last_hidden_state  # (B, S, H)
        next_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # (B, S)
        total, token_losses = self.get_output_embeddings()(hidden, labels=next_labels)
        if num_items_in_batch is None:
            num_items_in_batch = (next_labels != -100).sum()
        return ChunkedLossOutput(loss=total / num_items_in_batch, token_losses=token_losses[:, :-1])

    head.forward = MethodType(chunked_head, head)
    model.forward = MethodType(chunked_model, model)
