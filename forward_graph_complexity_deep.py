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

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .accelerated_complexity_deep import ACCELERATED, is_unhooked
from .decode_graph_complexity_deep import GRAPH_DEVICES, free_bytes, is_recordable, record, state_of
from .kernels.op_registration import is_ordinary
from .speculation_complexity_deep import SpeculativeCache, speculative_step

CALLS_BEFORE = 2  # calls of a shape that run as they are; the second has all kernels compiled
MAX_TOKENS = 8192  # with more, the GPU takes longer than the host
NEVER = -(10**9)  # calls of a shape that cannot be recorded
MAX_GRAPHS = 4  # of a model; the one that was not used for longest makes room
_GRAPHS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> its graphs
_LOCK = threading.Lock()
logger = logging.get_logger(__name__)


class _Graphs:
    """The recordings of one model, and what they depend on. It holds no part of the model, which may be freed."""

    def __init__(self, model: nn.Module):
        self.calls: dict[tuple, int] = {}
        self.recorded: dict[tuple, tuple] = {}
        self.calls_before = CALLS_BEFORE
        self.state = state_of(model)

    def are_of(self, model: nn.Module) -> bool:
        """Whether modules, weights and settings are those that were recorded."""
        return self.state == state_of(model) and is_unhooked(*model.modules())

    def record(self, key: tuple, model: nn.Module, plain: Callable, input_ids: Tensor) -> None:
        """Record a pass; where CUDA refuses, such as for want of memory, the shape is never tried again."""
        while len(self.recorded) >= MAX_GRAPHS:
            oldest = next(iter(self.recorded))
            del self.recorded[oldest], self.calls[oldest]
            # Many shapes take turns. Recording one each time it comes would cost more than it saves.
            self.calls_before *= 2
        ids = input_ids.clone()
        try:
            replay, outputs = record(lambda: plain(model, ids, use_cache=False), ids.device)
        except RuntimeError as error:
            logger.warning_once(f"Forward passes of {tuple(ids.shape)} are not recorded as a CUDA graph: {error}")
            self.calls[key] = NEVER
            return
        self.recorded[key] = ids, replay, outputs


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
        and (input_ids.device.type != "cuda" or _is_default_stream(input_ids.device))
    )


def _is_default_stream(device: torch.device) -> bool:
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
    key = input_ids.shape, input_ids.dtype, input_ids.device, _modes()
    with _LOCK:
        graphs, is_due = _GRAPHS.get(model) or _Graphs(model), False
        if key not in graphs.recorded:
            calls = graphs.calls[key] = graphs.calls.get(key, 0) + 1
            is_due = calls > graphs.calls_before and is_recordable(model)
        if (key in graphs.recorded or is_due) and not graphs.are_of(model):
            graphs, is_due = _Graphs(model), False
        if key not in graphs.recorded and is_due and _has_room(model, input_ids.numel(), input_ids.device):
            graphs.record(key, model, plain, input_ids)
        _GRAPHS[model] = graphs
        if key in graphs.recorded:
            ids, replay, outputs = graphs.recorded[key] = graphs.recorded.pop(key)  # the newest comes last
            ids.copy_(input_ids)
            replay()
            return type(outputs)(last_hidden_state=outputs.last_hidden_state.clone())
    return plain(model, input_ids, use_cache=False)


def _modes() -> tuple:
    """What PyTorch lets a caller choose for all operations."""
    backends = torch.backends.cuda
    return (
        torch.is_inference_mode_enabled(),
        torch.get_float32_matmul_precision(),
        backends.matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(),
        backends.cudnn_sdp_enabled(),
    )


if "triton" in ACCELERATED:
    ACCELERATED["triton"]["model"] = graphed_forward
