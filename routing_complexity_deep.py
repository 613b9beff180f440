"""Routing tables: which expert a token id selects. Each is [V] int64, built for a new model and saved with it."""

import heapq

import torch
from torch import Tensor


def modulo_routing(vocab_size: int, num_experts: int) -> Tensor:
    """The published table: expert = token id mod E. Returns [V] int64."""
    return torch.arange(vocab_size) % num_experts


def random_routing(vocab_size: int, num_experts: int) -> Tensor:
    """A fixed random table with equal numbers of ids per expert. Returns [V] int64."""
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))
    return modulo_routing(vocab_size, num_experts)[order]


def balanced_routing(token_counts: Tensor, num_experts: int) -> Tensor:
    """Table that balances corpus tokens: greedy longest-processing-time bin packing of `token_counts` [V].

    Ids are given, most frequent first, to the expert with the fewest tokens; ids that never occur go to the expert with
    the fewest ids. Returns [V] int64.
    """
    table = torch.empty(len(token_counts), dtype=torch.int64)
    counts, order = torch.sort(token_counts.cpu(), descending=True, stable=True)
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
