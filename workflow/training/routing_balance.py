"""Token counts of a text for a frequency-balanced routing table, and how evenly a table loads its experts."""

import torch
from accelerate.utils import broadcast
from datasets import IterableDataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainingArguments

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.packed_rows import TOKENIZED_TOGETHER, PackedDocuments, tokenize
from complexity_deep.workflow.data.text_sources import is_held_out, read_blocks


def count_tokens(
    stream: IterableDataset, tokenizer, vocab_size: int, sample_tokens: float, held_out_fraction: float
) -> Tensor:
    """How often each id [V] occurs in the first `sample_tokens` tokens of the documents to train on."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    with tqdm(total=int(sample_tokens), desc="counting tokens", unit_scale=True, leave=False) as progress:
        for texts in read_blocks(stream, TOKENIZED_TOGETHER):
            texts = [text for text in texts if not is_held_out(text, held_out_fraction)]
            if texts:
                ids = torch.tensor([token for document in tokenize(tokenizer, texts) for token in document])
                counts += torch.bincount(ids, minlength=vocab_size)
                progress.update(len(ids))
            if progress.n >= sample_tokens:
                break
    if not counts.any():
        raise InputError("There is no document to count tokens of for the balanced routing.")
    return counts


def count_once(
    training_args: TrainingArguments, rows: PackedDocuments, vocab_size: int, sample_tokens: float
) -> Tensor:
    """`count_tokens` of the training rows on the main process, for all: reading on each would only load the Hub."""
    if training_args.process_index == 0:
        counts = count_tokens(rows.stream, rows.tokenizer, vocab_size, sample_tokens, rows.held_out_fraction)
    else:
        counts = torch.zeros(vocab_size, dtype=torch.int64)
    if training_args.world_size > 1:
        counts = broadcast(counts.to(training_args.device)).cpu()
    return counts


def imbalance(table: Tensor, num_experts: int, ids: Tensor, rows_per_batch: int) -> tuple[float, float, float]:
    """Max over mean tokens per expert for rows [N, T]: in total, and the mean and the worst over batches of rows.

    `table` is [V], or [L, V] with one for each layer; the mean is over layers too, and so is the total's.
    """
    batches, tables = ids.split(rows_per_batch), table.reshape(-1, table.shape[-1])
    loads = [[torch.bincount(own[batch].flatten(), minlength=num_experts) for batch in batches] for own in tables]
    loads = torch.stack([torch.stack(own) for own in loads]).double()  # [L, batches, E]
    per_batch = loads.amax(dim=2) / loads.mean(dim=2)
    total = loads.sum(dim=1)
    return (total.amax(1) / total.mean(1)).mean().item(), per_batch.mean().item(), per_batch.max().item()


def compare_routing(model, ids: Tensor, rows_per_batch: int) -> dict[str, dict[str, float]]:
    """Max over mean tokens per expert on the same rows [N, T], by the published table and by the model's own."""
    base, experts = model.base_model, model.config.num_experts
    tables = {
        "modulo": torch.arange(model.config.vocab_size) % experts,
        model.config.routing: base.token_to_expert.cpu(),
    }
    measured = {}
    for name, table in tables.items():
        total, mean, worst = imbalance(table, experts, ids, rows_per_batch)
        measured[f"expert_imbalance_{name}"] = {"total": total, "batch_mean": mean, "worst_batch": worst}
    return measured
