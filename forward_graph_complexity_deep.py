"""Forward passes of one shape, repeated without gradient, as a CUDA graph.

A short prompt keeps the GPU busy for a few milliseconds and the host for many. Whoever scores texts or embeds them in
batches of one shape calls the model with that shape again and again. The first calls of a shape run as they are. The
next one is recorded, and from then on the ids are copied and the graph is launched. What it computes is copied before
it is given away, so that a result stays what it was.

Only ids are taken: no cache, mask or positions. Modules, weights and settings are compared before every replay.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .accelerated_complexity_deep import recordings_by_model
from .decode_graph_complexity_deep import GRAPH_DEVICES, free_bytes, is_recordable, modes, record, state_of
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
        try:
            self.recorded[key] = make()
        except RuntimeError as error:
            logger.warning_once(f"Calls with {key[0]} are not recorded as a CUDA graph: {error}")
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


def _has_room(model: nn.Module, tokens: int, device: torch.device) -> bool:
    """Whether the memory that a recording holds is small beside what is free."""
    config = model.config
    needed = tokens * model.dtype.itemsize * (16 * config.hidden_size + 4 * config.intermediate_size)
    return needed < free_bytes(device) / 4


def graphed_forward(plain: Callable, model: nn.Module, input_ids: Tensor | None = None, *args, **kwargs):
    """The forward of the base model: replayed for ids [B, S] alone, without gradient, whose shape was seen before."""
    if isinstance(kwargs.get("cache"), SpeculativeCache):
        return speculative_step(plain, model, input_ids, *args, **kwargs)
    asked = [value for name, value in kwargs.items() if value is not None and not (name == "use_cache" and not value)]
    if args or asked or kwargs.get("use_cache") is None or input_ids is None or not _takes_graph(model, input_ids):
        return plain(model, input_ids, *args, **kwargs)
    ids, device = input_ids, input_ids.device

    def make() -> tuple:
        own = ids.clone()
        return own, *record(lambda: plain(model, own, use_cache=False), device)

    with LOCK:
        found = Recordings.of(model, _GRAPHS, MAX_GRAPHS).find(
            (ids.shape, ids.dtype, device, modes()),
            model,
            lambda: is_recordable(model) and _has_room(model, ids.numel(), device),
            make,
        )
        if found is not None:
            own, replay, outputs = found
            own.copy_(ids)
            replay()
            return type(outputs)(last_hidden_state=outputs.last_hidden_state.clone())
    return plain(model, input_ids, use_cache=False)
