"""How this model calls the library: what differs between its releases, and what the library would do less well.

Transformers 5.24 renamed the argument and the output field `past_key_values` to `cache`, in every forward, mask
function and in `generate`. This model calls it `cache` inside, takes both names from callers, and passes the library
the name that the installed release uses.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers.cache_utils import Cache, StaticCache
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    packed_sequence_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .kernels.op_registration import NAMESPACE

# The library's name of the key/value cache: "cache" from 5.24 on, "past_key_values" before.
CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
# Masks that a tokenizer gives beside its ids. They tell what tokens are, and not which of them a token sees.
TOKENIZER_MASKS = ("special_tokens_mask", "assistant_masks")
# Attention by paged_attention.py while continuous batching runs. By "flash" in the name, the library knows that a paged
# cache needs no mask. Its first releases mark every name that takes a paged cache, and put the mark before others.
PAGED_ATTENTION = ("paged|" if "paged|sdpa" in ALL_ATTENTION_FUNCTIONS else "") + f"{NAMESPACE}_flash"


def accepts_both_cache_names(forward: Callable) -> Callable:
    """Let `forward`, whose parameter is named `cache`, take `past_key_values` as well.

    The signature that others inspect has the installed release's name: `generate` refuses arguments that it does not
    find there. Where the library deprecates the old name, a caller of this model gets the same `FutureWarning` as one
    of a native model. Raises `ValueError` where both names carry a cache.
    """

    @functools.wraps(forward)
    def forward_with_either_name(*args, **kwargs):
        given = kwargs.pop("past_key_values", None)
        if given is not None:
            if kwargs.get("cache") is not None:
                raise ValueError("cache and past_key_values are two names of one argument: pass only one of them.")
            kwargs["cache"] = given
            if CACHE_NAME == "cache" and not torch.compiler.is_compiling():  # Dynamo cannot trace a warning
                warnings.warn("`past_key_values` is deprecated. Use `cache` instead.", FutureWarning, stacklevel=2)
        return forward(*args, **kwargs)

    # With code of its own, for torch.compile counts by code how often it compiled, and soon gives up.
    function: Any = forward_with_either_name  # a type checker knows no code of a wrapped function
    function.__code__ = function.__code__.replace()
    signature = inspect.signature(forward)
    parameters = [
        parameter.replace(name=CACHE_NAME) if parameter.name == "cache" else parameter
        for parameter in signature.parameters.values()
    ]
    # `inspect` finds it by way of `__wrapped__`. On the wrapper itself, PyTorch's ahead-of-time compilation, which vLLM
    # uses, would take it for the names of the wrapper's local variables. A type checker does not know the attribute.
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward_with_either_name


def update_cache(cache, key, value, attention: nn.Module, attention_kwargs: dict):
    """Write key and value [B, K, S, D] of a layer into `cache`; returns those of all positions so far [B, K, L, D].

    The paged cache of continuous batching takes what it needs from `attention_kwargs` and changes them for the
    attention function. Before Transformers 5.23, and on our kernels, that function updates the paged cache itself.
    """
    if isinstance(cache, Cache):
        return cache.update(key, value, attention.layer_idx)
    is_ours = attention.config._attn_implementation == PAGED_ATTENTION
    if not is_ours and "kwargs" in inspect.signature(cache.update).parameters:
        return cache.update(key, value, attention.layer_idx, kwargs=attention_kwargs)
    attention_kwargs["cache"] = cache
    return key, value


def split_like_values(embedded: Tensor, value: Tensor) -> Tensor:
    """`embedded`, what value embeddings add to `value` [B, S, K, D], in its dtype.

    Raises `ValueError` where an engine has split the heads of the values over processes and the embedding not, as vLLM
    does. The sum of both would have all heads again, and be wrong.
    """
    if embedded.shape != value.shape:
        raise ValueError(
            f"This engine gives a process {value.shape[2]} heads of the values and {embedded.shape[2]} of the value "
            "embeddings: serve a model with value_embedding_layers without tensor parallelism."
        )
    return embedded.to(value.dtype)


def check_unknown_arguments(kwargs: dict) -> None:
    """Raise `ValueError` for an argument that the model does not know and that would change its result.

    The library passes a model many arguments that it may ignore. A cache, a mask or positions are none of those: to
    drop them in silence gives wrong logits.
    """
    for name, value in kwargs.items():
        if name in TOKENIZER_MASKS:
            continue
        carries = isinstance(value, Cache) or any(part in name for part in ("mask", "position", "past_key_value"))
        if value is not None and carries:
            raise ValueError(
                f"This model does not know the argument {name}, and its result would be wrong without it: use "
                f"attention_mask [batch, sequence], position_ids and {CACHE_NAME}."
            )


def check_room(config, tokens: int, attention_mask: Tensor | None, cache) -> None:
    """Raise `ValueError` where a static cache has no room for a text, as far as the host knows its length.

    The text has at least `tokens` tokens. An attention_mask [B, positions so far] says how many it has. A full cache
    takes no further token: on the CPU the library's write raises `IndexError`, on a GPU it ends the process, and the
    kernels of a decode step give NaN.
    """
    is_static = isinstance(cache, StaticCache) and config.sliding_window is None
    if is_static and not torch.compiler.is_compiling():  # which would make a condition of it
        room, _ = cache.get_mask_sizes(tokens, 0)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            tokens = max(tokens, attention_mask.shape[1])
        if tokens > room:
            raise ValueError(
                f"The cache has room for {room} tokens, but the text has {tokens}: make the cache longer, or leave it "
                "to `generate`."
            )


def check_mask(attention_mask: Any, tokens: int, cache) -> None:
    """Raise `ValueError` for a mask that has no such shape as `causal_mask` takes.

    Without a cache a mask [B, S] is as long as the text of `tokens`. The library would fail in attention, or see that
    no column hides anything and pass the others over. Masks that are no tensors belong to an attention implementation.
    """
    if not isinstance(attention_mask, Tensor):
        return
    if attention_mask.ndim not in (2, 4):
        raise ValueError(
            "attention_mask must be [batch, tokens] or [batch, 1, queries, keys], but has shape "
            f"{tuple(attention_mask.shape)}."
        )
    if attention_mask.ndim == 2 and cache is None and attention_mask.shape[1] != tokens:
        raise ValueError(
            f"attention_mask is for {attention_mask.shape[1]} tokens, but the text has {tokens}, and there is no cache."
        )


def causal_mask(config, inputs_embeds: Tensor, attention_mask: Tensor | None, cache, position_ids: Tensor | None):
    """The library's mask for the attention implementation, or None where that needs none.

    inputs_embeds: [B, S, H]. attention_mask: [B, S], [B, 1, S, L], or a `BlockMask` of flex attention. cache and
    position_ids are those that the caller of the model gave. With a cache, the library takes a packed row for one
    document. With positions, it looks for packed rows, and waits for the device to answer.
    """
    if isinstance(cache, PagedAttentionCache):  # continuous batching brings the mask, if one is needed
        return attention_mask
    check_mask(attention_mask, inputs_embeds.shape[1], cache)
    check_room(config, inputs_embeds.shape[1], attention_mask, cache)
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4 and not attention_mask.is_floating_point():
        return _whole_mask(attention_mask.bool(), config, inputs_embeds)
    is_first = attention_mask is None and cache is None
    # Plain causal rows need no mask with SDPA. Under compile the library would make one and lose the fast kernel.
    is_plain = is_first and position_ids is None and config.sliding_window is None
    if is_plain and config._attn_implementation == "sdpa":
        return None
    make_mask = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
    documents = {"position_ids": position_ids}
    if is_first and config._attn_implementation == "flex_attention":
        documents = _document_mask(position_ids, inputs_embeds)
    return make_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        **{CACHE_NAME: cache},
        **documents,
    )


def _whole_mask(mask: Tensor, config, inputs_embeds: Tensor) -> Tensor:
    """A caller's `mask` [B or 1, 1 or A, S, L] of booleans, True where a query sees a key, as the attention takes it.

    All but "sdpa" add masks to scores. The library hands masks of booleans and of whole numbers on to them as they are.
    """
    if config._attn_implementation == "sdpa":
        return mask
    hides = ~mask.expand(len(inputs_embeds), -1, -1, -1)
    least = torch.finfo(inputs_embeds.dtype).min
    return torch.zeros(hides.shape, dtype=inputs_embeds.dtype, device=mask.device).masked_fill(hides, least)


def _document_mask(position_ids: Tensor | None, inputs_embeds: Tensor) -> dict:
    """Arguments that separate packed documents. The library would wait for the device to say whether there are any."""
    if position_ids is None:
        return {}
    document = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)  # (B or 1, S)
    return {"and_mask_function": packed_sequence_mask_function(document.expand(len(inputs_embeds), -1))}


def select_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Positions of `hidden_states` [B, S, H] whose logits are wanted; the library does this only from 5.23 on.

    logits_to_keep: how many of the last positions (0 means all), 1D positions, 2D positions of each row, or a mask
    [B, S] of booleans, which gives [positions, H].
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim == 2:
        if logits_to_keep.dtype == torch.bool:
            return hidden_states[logits_to_keep]
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]


class ComplexityDeepEmbeddingByHeads(TensorParallelLayer):
    """Tensor parallelism of a value embedding: every rank looks up its own heads' part of each vector.

    Of the library's styles, "colwise" did this before 5.24 and is for linear layers since; "embedding_colwise" gathers.
    """

    def shard_param(self, module, param, mesh):
        whole = module._parameters[param]
        shard = distribute_tensor(whole, mesh, [Shard(1)], src_data_rank=None)
        module._parameters[param] = nn.Parameter(shard, requires_grad=whole.requires_grad)

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
        return (DTensor.from_local(args[0], mesh, [Replicate()], run_check=False), *args[1:]), kwargs

    def transform_output_post_forward(self, module, output, mesh):
        return output.to_local()


ALL_PARALLEL_STYLES.register("embedding_by_heads", ComplexityDeepEmbeddingByHeads())
