"""Continuous batching (`generate_batch` and its manager) on the Triton kernels.

With "sdpa", the library makes a mask of all new tokens x all keys for every step, copies all keys out of the cache, and
records no steps. While its manager holds a model on the kernels, attention has another name (`PAGED_ATTENTION`). The
library takes that for a function that needs no mask, and prepares steps while the GPU computes. Steps in which every
sequence has one new token run on block tables and are CUDA graphs of the library.
"""

import gc
import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .accelerated_complexity_deep import TRITON_DEVICES
from .compatibility_complexity_deep import PAGED_ATTENTION
from .decode_graph_complexity_deep import ROPE_BY_LENGTH, cached_numbers, is_recordable

try:
    import psutil  # the library needs it on a CPU, where it sizes the cache
except ImportError:
    psutil = None
if TRITON_DEVICES:
    from .kernels.paged_attention import paged_attention, paged_decode_attention
if TYPE_CHECKING:  # what the mixin of this file is mixed into
    from transformers import GenerationMixin
    from transformers.generation.continuous_batching.utils import WorkloadHints
else:
    GenerationMixin = object

logger = logging.get_logger(__name__)
STEP_TOKENS = 8192  # new tokens of a step at most, as the library chooses by itself
SAFETY_MARGIN = 0.15  # as the library chooses by itself: with fewer pages free, running requests go before new ones
FROZEN_AT_START = 10_000  # objects at most that Python itself keeps from its collector; 3.12 does with 375


def _free_bytes(device: torch.device) -> float:
    """Memory that the driver has free, as the library counts it, which raises where a cache that is asked for has none.

    What PyTorch holds and does not use may belong to CUDA graphs, such as those of training steps. On a CPU the library
    counts all memory of the machine, of which other processes may hold a part.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type == "cpu" and psutil is not None else math.inf


def _layer_cache(cache, layer_idx: int) -> tuple[Tensor, Tensor, int]:
    """Keys and values of one layer, each [slots, K, D], and how many slots a page has."""
    if hasattr(cache, "layer_to_allocator"):
        keys, values = cache.layer_to_allocator[layer_idx].get_cache_for_block_table(layer_idx)
        return keys.flatten(0, 1), values.flatten(0, 1), keys.shape[1]
    _, index = cache.layer_index_to_group_indices[layer_idx]  # Transformers 5.17
    return cache.key_cache[index], cache.value_cache[index], cache.block_size


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cache=None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention over the library's paged cache, which it writes itself; without such a cache it is "sdpa".

    query [1, A, N, D], key and value [1, K, N, D] of N new tokens. `kwargs` are those of the library's model call; all
    layers have full attention, so that each of its lists and dictionaries has one entry. Returns [1, N, A, D].
    """
    if cache is None:  # the caller uses the model while a manager holds it
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    key_cache, value_cache, page = _layer_cache(cache, module.layer_idx)
    new = [x[0].transpose(0, 1) for x in (query, key, value)]  # [N, heads, D]
    cu_q, cu_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    if isinstance(cu_k, dict):
        (cu_k,) = cu_k.values()
    if kwargs.get("block_table") is not None:
        table = kwargs["block_table"][0]
        return paged_decode_attention(*new, key_cache, value_cache, table, page, cu_k, scaling)[None], None
    (read_index,), (write_index,) = kwargs["read_index"], kwargs["write_index"]
    # The library reads nothing back where all sequences are new.
    index = read_index if read_index.numel() else write_index
    return paged_attention(*new, key_cache, value_cache, index, write_index, cu_q, cu_k, scaling)[None], None


class ContinuousBatchingMixin(GenerationMixin):
    """Continuous batching of a model whose attention is "sdpa" and that runs on the Triton kernels."""

    def _takes_paged_kernels(self) -> bool:
        return (
            self.config._attn_implementation in ("sdpa", "paged|sdpa")
            and self.config._kernels_implementation == "triton"
            and self.config.sliding_window is None
            and self.device.type in TRITON_DEVICES
            and self.dtype != torch.float64
        )

    def _size(self, config: ContinuousBatchingConfig, hints: "WorkloadHints | None") -> None:
        """Have the memory taken that the requests of one `generate_batch` need, where the caller names none."""
        if hints is None or config.num_blocks is not None or config.max_batch_tokens is not None:
            return
        page = getattr(config, "page_size", None) or config.block_size
        needed = self._cache_for(hints, page, config.max_memory_percent, config.safety_margin)
        if needed is not None:
            config.num_blocks, config.max_batch_tokens = needed, STEP_TOKENS

    def _cache_for(self, hints: "WorkloadHints", page: int, share: float, margin: float | None) -> int | None:
        """Pages that the requests of one `generate_batch` fill at most.

        None where that is not known, or more than half of the memory that the library takes by itself, a `share` of
        what is free. The library takes nearly all memory that is free, and the driver needs 0.1 s to hand over 70 GB.
        """
        config = self.config
        length = hints.max_prompt_length + hints.max_generated_length
        margin = SAFETY_MARGIN if margin is None else margin
        if not (hints.num_requests and hints.max_prompt_length and hints.max_generated_length) or margin >= 1:
            return None
        # One page more for each request, since a page is free again a step after its request has ended, and the margin,
        # so that the last requests need not wait for the first to end. Whoever gives hints may add another request, of
        # the trained length.
        pages = math.ceil(hints.num_requests * (-(-length // page) + 1) / (1 - margin))
        pages = max(pages, -(-config.max_position_embeddings // page) + 1)
        cache_bytes = pages * page * cached_numbers(config) * self.dtype.itemsize
        # Logits in fp32 and hidden states of a step's tokens, several times over.
        activations = 4 * STEP_TOKENS * (config.vocab_size + 8 * config.hidden_size)
        if self.device.type == "cpu":  # a mask of a step's tokens x all keys
            activations += STEP_TOKENS * (pages * page + STEP_TOKENS) * self.dtype.itemsize
        is_little = cache_bytes + activations <= share * _free_bytes(self.device) / 2
        return pages if is_little else None

    def init_continuous_batching(self, generation_config=None, continuous_batching_config=None, workload_hints=None):
        """The library's manager, on the kernels where attention is "sdpa"; what the caller configures stays as it is.

        Steps with prompts come in too many sizes for graphs, and are not recorded by default. The others are recorded
        when they first come. The library's warm-up, which records all sizes beforehand and takes longer than most calls
        of `generate_batch`, is left out, also where a caller asks for it.
        """
        kind = self.config.rope_parameters["rope_type"]
        if kind in ROPE_BY_LENGTH:
            logger.warning_once(
                f"Positions of the RoPE type '{kind}' are scaled for the longest sequence of a step, so that the "
                "tokens of a request depend on the requests beside it."
            )
        arguments = generation_config, continuous_batching_config, workload_hints
        if not self._takes_paged_kernels():
            manager = super().init_continuous_batching(*arguments)
            if self.device.type == "cpu":
                self._size(manager.continuous_batching_config, workload_hints)
            return manager
        given = continuous_batching_config
        if given is None:
            given = getattr(generation_config or self.generation_config, "continuous_batching_config", None)
        given = given or ContinuousBatchingConfig()
        attention, is_known = self.config._attn_implementation, is_recordable(self)
        self.config._attn_implementation = PAGED_ATTENTION
        try:
            manager = super().init_continuous_batching(*arguments)
        except BaseException:
            self.config._attn_implementation = attention
            raise
        manager._original_attn_impl = attention  # for the manager to restore when it stops
        config = manager.continuous_batching_config
        if given.use_cuda_graph is None and not (given.q_padding_interval_size or given.kv_padding_interval_size):
            config.use_cuda_graph = (False, is_known and config.cuda_graph_booleans[1])
        # The library believes that only FlashAttention takes block tables.
        config.max_blocks_per_request = given.max_blocks_per_request
        page, longest = getattr(config, "page_size", None) or config.block_size, self.config.max_position_embeddings
        if config.max_blocks_per_request is None:
            if workload_hints is not None:
                longest = max(longest, workload_hints.max_prompt_length + workload_hints.max_generated_length)
            config.max_blocks_per_request = -(-longest // page)
        self._size(config, workload_hints)
        manager.warmed_up = True
        return manager

    @contextmanager
    def continuous_batching_context_manager(self, *args, **kwargs) -> Generator:
        """The library's, while Python's collector passes over the objects that were there before.

        The library collects twice when a call ends, and each time would look through all objects of the process, which
        takes 0.3 s where PyTorch and its compiler are loaded. Garbage is collected once before. It would be kept too,
        and in a loop of calls for ever, since Python begins to count anew towards its next collection at each call.
        """
        hints = kwargs.get("workload_hints")
        if hints is not None and kwargs.get("persistent_manager"):
            # It will get other requests, of any length. `_cache_for` gives no size where no tokens are generated. Block
            # tables take the sum of both lengths.
            length = hints.max_prompt_length + hints.max_generated_length
            kwargs["workload_hints"] = replace(hints, max_prompt_length=length, max_generated_length=0)
        freezes = gc.get_freeze_count() <= FROZEN_AT_START  # else the caller has done so, and it stays
        if freezes:
            gc.collect()
            gc.freeze()
        try:
            with super().continuous_batching_context_manager(*args, **kwargs) as manager:
                yield manager
        finally:
            if freezes:
                gc.unfreeze()


if TRITON_DEVICES:
    ALL_ATTENTION_FUNCTIONS.register(PAGED_ATTENTION, paged_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PAGED_ATTENTION, sdpa_mask)
