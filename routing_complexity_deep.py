"""Routing tables: which expert a token id selects. Each is [V] int64, built for a new model and saved with it.

A model with `routing_per_layer` has one for each layer, [L, V].
"""

import heapq

import torch
from torch import Tensor


def modulo_routing(vocab_size: int, num_experts: int) -> Tensor:
    """The published table: expert = token id mod E. Returns [V] int64."""
    return torch.arange(vocab_size) % num_experts


def random_routing(vocab_size: int, num_experts: int, seed: int = 0) -> Tensor:
    """A fixed random table with equal numbers of ids per expert. Returns [V] int64."""
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))
    return modulo_routing(vocab_size, num_experts)[order]


def new_routing_table(config, extends: bool = False) -> Tensor:
    """Table [V], or [L, V] with `routing_per_layer`, of a new model, or of ids that a resized vocabulary `extends` by.

    A "balanced" table starts as that of modulo, or of random with `routing_per_layer`, until its tokens are counted.
    """
    size = config.vocab_size, config.num_experts
    if config.routing_per_layer:
        return torch.stack([random_routing(*size, seed=layer) for layer in range(config.num_hidden_layers)])
    return random_routing(*size) if config.routing == "random" and not extends else modulo_routing(*size)


def balanced_routing(token_counts: Tensor, num_experts: int, seed: int = 0) -> Tensor:
    """Table that balances corpus tokens: greedy longest-processing-time bin packing of `token_counts` [V].

    Ids are given, most frequent first, to the expert with the fewest tokens; ids that never occur go to the expert with
    the fewest ids. Another `seed` gives another table as balanced, because it disturbs the order in which ids are given
    out: each count weighs up to twice as much. Returns [V] int64.
    """
    table = torch.empty(len(token_counts), dtype=torch.int64)
    counts = token_counts.cpu()
    weight = torch.ones(len(counts), dtype=torch.float64)
    if seed:
        weight += torch.rand(len(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = torch.argsort(counts * weight, descending=True, stable=True)
    counts = counts[order]
    seen = int((counts > 0).sum())
    heap = [(0, 0, expert) for expert in range(num_experts)]  # (tokens, ids, expert)
    for count, token in zip(counts[:seen].tolist(), order[:seen].tolist()):
        tokens, ids, expert = heapq.heappop(heap)
        table[token] = expert
        heapq.heappush(heap, (tokens + count, ids + 1, expert))
    heap = [(ids, tokens, expert) for tokens, ids, expert in heap]
    heapq.heapify(heap)
    for token in order[seen:].tolist():
        ids, tokens, expert = heapq.heappop(heap)
        table[token] = expert
        heapq.heappush(heap, (ids + 1, tokens, expert))
    return table
