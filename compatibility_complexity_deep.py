"""What differs between the Transformers releases that this model runs on, decided once, when it is imported.

Transformers 5.24 renamed the argument and the output field `past_key_values` to `cache`, in every forward, mask
function and in `generate`. This model calls it `cache` inside, takes both names from callers, and passes the library
the name that the installed release uses.
"""

import functools
import inspect
from collections.abc import Callable

from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

# The library's name of the key/value cache: "cache" from 5.24 on, "past_key_values" before.
CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def accepts_both_cache_names(forward: Callable) -> Callable:
    """Let `forward`, whose parameter is named `cache`, take `past_key_values` as well.

    The signature that others inspect has the installed release's name: `generate` refuses arguments that it does not
    find there. Raises `ValueError` where both names carry a cache.
    """

    @functools.wraps(forward)
    def forward_with_either_name(*args, **kwargs):
        given = kwargs.pop("past_key_values", None)
        if given is not None:
            if kwargs.get("cache") is not None:
                raise ValueError("cache and past_key_values are two names of one argument: pass only one of them.")
            kwargs["cache"] = given
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    parameters = [
        parameter.replace(name=CACHE_NAME) if parameter.name == "cache" else parameter
        for parameter in signature.parameters.values()
    ]
    # A type checker does not know that `inspect` reads this attribute.
    forward_with_either_name.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward_with_either_name


def update_cache(cache, key, value, layer_idx: int, attention_kwargs: dict):
    """Write key and value [B, K, S, D] of a layer into `cache`; returns those of all positions so far [B, K, L, D].

    The paged cache of continuous batching takes what it needs from `attention_kwargs` and changes them for the
    attention function. Before Transformers 5.23 that function updates the paged cache itself.
    """
    if isinstance(cache, Cache):
        return cache.update(key, value, layer_idx)
    if "kwargs" in inspect.signature(cache.update).parameters:
        return cache.update(key, value, layer_idx, kwargs=attention_kwargs)
    attention_kwargs["cache"] = cache
    return key, value


def check_unknown_arguments(kwargs: dict) -> None:
    """Raise `ValueError` for an argument that the model does not know and that would change its result.

    The library passes a model many arguments that it may ignore. A cache, a mask or positions are none of those: to
    drop them in silence gives wrong logits.
    """
    for name, value in kwargs.items():
        carries = isinstance(value, Cache) or any(part in name for part in ("mask", "position", "past_key_value"))
        if value is not None and carries:
            raise ValueError(
                f"This model does not know the argument {name}, and its result would be wrong without it: use "
                f"attention_mask [batch, sequence], position_ids and {CACHE_NAME}."
            )
