"""Forward passes of one shape, repeated without gradient, as a CUDA graph.

A short prompt keeps the GPU busy for a few milliseconds and the host for many. Whoever scores texts or embeds them in
batches of one shape calls the model with that shape again and again. The first calls of a shape run as they are. The
next one is recorded, and from then on the ids are copied and the graph is launched. What it computes is copied before
it is given away, so that a result stays what it was.

Ids are taken, alone or with a mask that hides nothing, as tokenizers give it for one text. A cache may be asked for, as
configurations do by default. Modules, weights and settings are compared before every replay.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import logging

from .accelerated_complexity_deep import has_recordings, recordings_by_model
from .compatibility_complexity_deep import CACHE_NAME
from .decode_graph_complexity_deep import (
    GRAPH_DEVICES,
    cached_numbers,
    free_bytes,
    is_recordable,
    modes,
    record,
    state_of,
    warning_where_it_fails,
)
from .kernels.op_registration import is_ordinary
from .speculation_complexity_deep import SpeculativeCache, speculative_step

CALLS_BEFORE = 2  # calls of a shape that run as they are; the second has all kernels compiled
MAX_TOKENS = 8192  # with more, the GPU takes longer than the host
NEVER = -(10**9)  # calls of a shape that cannot be recorded
PAID_BACK = 32  # replays after which recordings have surely saved what they cost
MAX_GRAPHS = 4  # of a model; the one that was not used for longest makes room
_GRAPHS = recordings_by_model()
LOCK = threading.Lock()
logger = logging.get_logger(__name__)


class Recordings:
    """What was recorded of one model, by kind of call, and what it depends on.

    It holds no part of the model, which may be freed.
    """

    def __init__(self, model: nn.Module, most: int):
        self.most, self.calls_before = most, CALLS_BEFORE
        self._begin(model)

    def _begin(self, model: nn.Module) -> None:
        self.replays = 0
        self.calls: dict[tuple, int] = {}
        self.recorded: dict[tuple, Any] = {}
        self.state = state_of(model)

    @classmethod
    def of(cls, model: nn.Module, store: weakref.WeakKeyDictionary, most: int) -> "Recordings":
        """Those of `model` in `store`. At most `most` are kept: the one that was not used for longest makes room."""
        found = store.get(model)
        if found is None:
            found = store[model] = cls(model, most)
        return found

    def find(self, key: tuple, model: nn.Module, is_possible: Callable[[], bool], make: Callable[[], Any]) -> Any:
        """The recording of `key`, or None where a call of it runs as it is.

        The first calls do. So does every one where `make` raises `RuntimeError`, such as for want of memory. Where
        modules, weights or settings are others than before, all begins anew; if they change often, later than before.
        """
        is_due = False
        if key not in self.recorded:
            calls = self.calls[key] = self.calls.get(key, 0) + 1
            is_due = calls > self.calls_before and is_possible()
        if (key in self.recorded or is_due) and self.state != state_of(model):
            if self.recorded:
                self.calls_before = CALLS_BEFORE if self.replays >= PAID_BACK else 2 * self.calls_before
            self._begin(model)
            return None
        if key not in self.recorded and is_due:
            self._make(key, make)
        if key in self.recorded:
            self.replays += 1
            self.recorded[key] = self.recorded.pop(key)  # the newest comes last
        return self.recorded.get(key)

    def _make(self, key: tuple, make: Callable[[], Any]) -> None:
        while len(self.recorded) >= self.most:
            oldest = next(iter(self.recorded))
            del self.recorded[oldest], self.calls[oldest]
            # Many shapes take turns. Recording one each time it comes would cost more than it saves.
            self.calls_before *= 2
        with warning_where_it_fails(f"Calls with {key[0]}"):
            self.recorded[key] = make()
        if key not in self.recorded:
            self.calls[key] = NEVER


def _takes_graph(model: nn.Module, input_ids: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and input_ids.device.type in GRAPH_DEVICES
        and input_ids.ndim == 2
        and input_ids.numel() <= MAX_TOKENS
        and not model.training
        and model.config.sliding_window is None  # the library would make a mask
        and not torch.is_autocast_enabled(input_ids.device.type)
        and is_ordinary((input_ids, model.embed_tokens.weight))
        and (input_ids.device.type != "cuda" or is_default_stream(input_ids.device))
    )


def is_default_stream(device: torch.device) -> bool:
    """Whether work is queued where every other thread queues it, and is not being captured."""
    return torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


def _has_room(model: nn.Module, tokens: int, device: torch.device, makes_cache: bool) -> bool:
    """Whether the memory that a recording holds is small beside what is free."""
    config = model.config
    numbers = 16 * config.hidden_size + 4 * config.intermediate_size
    if makes_cache:
        numbers += cached_numbers(config)
    return tokens * model.dtype.itemsize * numbers < free_bytes(device) / 4


def graphed_forward(plain: Callable, model: nn.Module, input_ids: Tensor | None = None, *args, **kwargs):
    """The forward of the base model without gradient, replayed for ids [B, S] of a shape that was seen before."""
    if isinstance(kwargs.get("cache"), SpeculativeCache):
        return speculative_step(plain, model, input_ids, *args, **kwargs)
    given = asked_for(kwargs)
    makes_cache, mask = given.pop("use_cache", False), given.pop("attention_mask", None)
    if args or given or kwargs.get("use_cache") is None or input_ids is None:
        return plain(model, input_ids, *args, **kwargs)
    if not _takes_graph(model, input_ids) or not hides_nothing(mask, input_ids):
        return run_plain(plain, model, input_ids=input_ids, **kwargs)
    ids, device = input_ids, input_ids.device

    def make() -> tuple:
        # A compiled decoder tells tensors of inference mode from others.
        with torch.inference_mode(torch.is_inference_mode_enabled() and ids.is_inference()):
            own = ids.clone()
        step = lambda: plain(model, own, use_cache=makes_cache)  # noqa: E731
        step()  # as it is, which compiles what is not compiled yet, such as for `own` where the ids are a view
        return own, *record(step, device)

    with LOCK:
        found = Recordings.of(model, _GRAPHS, MAX_GRAPHS).find(
            (ids.shape, ids.dtype, device, modes(), plain, makes_cache),
            model,
            lambda: is_recordable(model) and _has_room(model, ids.numel(), device, makes_cache),
            make,
        )
        if found is not None:
            own, replay, outputs = found
            own.copy_(ids)
            replay()
            cache = _copy_of(outputs[CACHE_NAME], model) if makes_cache else None
            return type(outputs)(last_hidden_state=outputs.last_hidden_state.clone(), **{CACHE_NAME: cache})
    return run_plain(plain, model, input_ids=input_ids, use_cache=makes_cache)


def run_plain(plain: Callable, model: nn.Module, **inputs):
    """The pass as it is, without a cache from before. If memory runs out beside recordings, they make room for it."""
    if torch.compiler.is_compiling():
        return plain(model, **inputs)
    try:
        return plain(model, **inputs)
    except torch.OutOfMemoryError:
        if not has_recordings(model):
            raise
    # Only here, where the tensors of the pass that failed are gone with its exception.
    logger.warning_once(
        "Memory ran out beside the CUDA graphs of passes of other shapes. They are freed, and passes of this model are "
        "not recorded any more. `model.set_cuda_graphs(True)` allows new graphs."
    )
    model.set_cuda_graphs(False)
    return plain(model, **inputs)


def asked_for(kwargs: dict) -> dict:
    """The arguments of a call, without those that are None and without outputs that it says it does not want."""
    return {
        name: value
        for name, value in kwargs.items()
        if value is not None and not (value is False and name.startswith("output_"))
    }


def hides_nothing(mask: Any, ids: Tensor) -> bool:
    """Whether there is no mask, or one [B, S] that is 1 everywhere, as data collators make it for rows of one length.

    The host waits for the answer, as it would in the library's own look at the mask.
    """
    if mask is None:
        return True
    return isinstance(mask, Tensor) and is_ordinary((mask,)) and mask.shape == ids.shape and bool(mask.all())


def _copy_of(cache: Cache, model: nn.Module) -> DynamicCache:
    """A cache of its own with the same keys and values, which the caller may go on with."""
    copy = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        copy.update(layer.keys, layer.values, index)  # puts them behind none, in new tensors
    return copy
