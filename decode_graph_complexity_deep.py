"""Decode steps of `generate` with a static cache as one CUDA graph, on the Triton kernels.

The library would compile the forward for these steps. That takes a minute before the second token, and then guards and
bookkeeping before each of the others, while the fused kernels leave little to compile. Here, a model's first step of a
kind (`_variant`) runs as it is, so that Triton compiles its kernels. The next step is recorded. A later `generate` with
steps of that kind records its first one. All other steps are replayed: the token is copied and the graph launched. Mask
and position were copied while the step before was running.
"""

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.cache_utils import Cache, StaticCache
from transformers.generation import GenerationMode
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import logging

from .accelerated_complexity_deep import COMPILED_MODULES, activation_of, is_unhooked, plain_static_layer
from .compatibility_complexity_deep import CACHE_NAME, check_room
from .kernels.op_registration import PLAIN_TENSORS

if TYPE_CHECKING:  # what the mixin of this file is mixed into
    from transformers import GenerationMixin
else:
    GenerationMixin = object

GRAPH_DEVICES = ("cuda",)
SHORTEST_RECORDED = 8  # new tokens; recording a step takes as long as running a few as they are
_CAPTURE = threading.Lock()  # one capture at a time in a process
_IDLE_STREAMS: dict[torch.device, list] = {}  # where graphs were captured that are gone
_NUMBERS = frozenset((int, float, bool, str))
_TENSORS = frozenset(PLAIN_TENSORS)
_LOOP = threading.local()  # of the call of `generate` in this thread: whether a function of the caller is its loop
HAVE_RUN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> what its steps so far were compiled for
logger = logging.get_logger(__name__)
ROPE_BY_LENGTH = ("dynamic", "longrope")  # kinds of RoPE whose tables depend on the largest position so far


class DecodeGraph:
    """`model.__call__` for one new token per row and a static cache; whatever else goes to `otherwise`.

    One object for each call of `generate`, between whose steps weights, modules and settings stay as they are; cache
    and arguments are compared before every step. The logits it returns are overwritten by its next step.
    """

    def __init__(self, model: nn.Module, otherwise: Callable):
        self.model, self.otherwise = model, otherwise
        self.cache: Cache | None = None
        self.held: list[tuple[Tensor, Tensor, Tensor]] = []
        self.arguments, self.fits = (), False
        self.filled: dict | None = None
        self.replay: Callable | None = None
        self.outputs: Any = None

    def __call__(self, **inputs):
        if not self._is_as_before(inputs):
            self._look_at(inputs)
        if not self.fits:
            return self.otherwise(**inputs)
        if self.replay is None:
            self.inputs = {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)}
            variant, have_run = self._variant(inputs), HAVE_RUN.setdefault(self.model, [])
            if variant not in have_run:
                outputs = self.model(**(inputs | self.inputs))  # compiles the kernels: not possible while recording
                have_run.append(variant)
                return outputs
            device = inputs["input_ids"].device
            with warning_where_it_fails("Decode steps"):
                self.replay, self.outputs = record(lambda: self.model(**(inputs | self.inputs)), device)
            if self.replay is None:
                self.fits, self.otherwise = False, self.model
                return self.model(**inputs)
        for name, x in self.inputs.items():
            if inputs[name] is not x:
                x.copy_(inputs[name])
        self.replay()
        outputs = type(self.outputs)(logits=self.outputs.logits, **{CACHE_NAME: inputs[CACHE_NAME]})
        outputs.decode_graph = self
        return outputs

    def fill(self, inputs: dict) -> dict:
        """`inputs` of the next step with tensors, all but the token, that lie where the recording reads them."""
        for name, x in self.inputs.items():
            given = inputs.get(name)
            if name != "input_ids" and isinstance(given, Tensor) and (given.shape, given.dtype) == (x.shape, x.dtype):
                inputs[name] = x.copy_(given)
        self.filled = inputs
        return inputs

    def _is_as_before(self, inputs: dict) -> bool:
        """Whether the step differs from the last one in values only. Few things are compared, as the GPU waits."""
        return (
            inputs.get(CACHE_NAME) is self.cache
            and _arguments(inputs) == self.arguments
            and all(
                layer.keys is keys and layer.values is values and layer.cumulative_length is length
                for layer, (keys, values, length) in zip(getattr(self.cache, "layers", ()), self.held, strict=False)
            )
        )

    def _look_at(self, inputs: dict) -> None:
        self.cache, self.arguments, self.replay = inputs.get(CACHE_NAME), _arguments(inputs), None
        found = [plain_static_layer(self.cache, index) for index in range(len(getattr(self.cache, "layers", ())))]
        layers = [layer for layer in found if layer is not None]
        self.fits = bool(layers) and len(layers) == len(found) and self._fits(inputs)
        # Held, so that no other tensor comes to lie where a recording reads them.
        self.held = [(x.keys, x.values, x.cumulative_length) for x in layers] if self.fits else []

    def _variant(self, inputs: dict) -> tuple:
        mask = inputs["attention_mask"]
        arguments = _arguments(inputs | {"attention_mask": (mask.shape[:3], mask.dtype)})
        return step_variant(self.model, arguments, [(keys, values) for keys, values, _ in self.held])

    def _fits(self, inputs: dict) -> bool:
        """Whether a step can be recorded: every operation is known, and none waits for data on the host."""
        mask: Any = inputs.get("attention_mask")
        # If the model itself made positions and mask, the recording would hold those of the recorded step.
        given = (inputs.get("input_ids"), mask, inputs.get("position_ids"))
        if not all(isinstance(x, Tensor) for x in given) or inputs["input_ids"].shape[1] != 1 or mask.ndim != 4:
            return False
        # Autocast frees its casts of the weights when its context ends, and a recording would go on reading them.
        if torch.is_grad_enabled() or torch.is_autocast_enabled(mask.device.type):
            return False
        return is_recordable(self.model)


def step_variant(model: nn.Module, arguments: tuple, held: list[tuple[Tensor, Tensor]]) -> tuple:
    """All that decides which kernels a step of `model` runs and what Triton compiles them for.

    `held` are keys and values of each layer [B, K, L, D], and `arguments` what the step depends on besides them.
    """
    from .kernels.decode_attention import decode_attention_variant  # where there is Triton, as for every step here

    weights = (*model.parameters(), *model.buffers())
    return (
        arguments,
        dict(vars(model.config)),
        tuple(module.training for module in model.modules()),
        [decode_attention_variant(keys, values) for keys, values in held],
        hash(tuple((x.dtype, x.device, x.shape, x.stride(), x.data_ptr() % 16) for x in weights)),
    )


def is_recordable(model: nn.Module, training: bool = False) -> bool:
    """Whether `model` may have CUDA graphs and each of its operations is known; in training, also if compiled."""
    config, attentions = model.config, ("sdpa", "flex_attention") if training else ("sdpa",)
    names = (config._kernels_implementation, config._experts_implementation)
    if config._attn_implementation not in attentions or names != ("triton", "cggr") or not model.takes_cuda_graphs:
        return False
    if config.rope_parameters["rope_type"] in ROPE_BY_LENGTH:
        return False
    known = [type(model.base_model).__module__, "transformers.activations"]
    known += [COMPILED_MODULES] if training else []
    # The class of the whole model may be the caller's, with further methods, but not with a forward of its own.
    modules = list(model.modules())
    origins = (type(x).forward.__module__ if x is model else type(x).__module__ for x in modules)
    if not all(origin in known or origin.startswith("torch.nn.modules.") for origin in origins):
        return False
    # With dropout, the call that records would draw random numbers twice.
    if not is_unhooked(*modules) or any(_has_dropout(module) for module in modules):
        return False  # such a model, or one with adapters, is asked in every call: its weights need not be looked at
    weights = list(model.parameters())
    kinds = {type(value) for module in modules for value in module.__dict__.values()}
    return (
        # A weight that is no parameter, such as one that another network computes, may be a new tensor in every call.
        _TENSORS.isdisjoint(kinds)
        # `state_of` does not see what NumPy's numbers are.
        and all(kind.__module__ != "numpy" for kind in kinds)
        # With another activation, experts run as plain PyTorch, which reads on the host where each one's tokens end.
        and all(activation_of(module) is not None for module in modules if hasattr(module, "gate_up_proj"))
        # fp64 goes to the plain PyTorch methods, which read on the host where each expert's tokens end.
        and all(type(x) is nn.Parameter and x.dtype != torch.float64 for x in weights)
        # PyTorch would call a hook of a weight twice: where the recording takes its gradient, and where it is added up.
        and not (training and any(x._backward_hooks for x in weights))
    )


def _has_dropout(module: nn.Module) -> bool:
    """Whether dropout is at work in this very module."""
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    return module.training and (module.p if is_dropout else getattr(module, "attention_dropout", 0)) > 0


def state_of(model: nn.Module) -> list:
    """What decides about a forward pass: the configuration, every module, its hooks, numbers, where its weights lie."""
    state: list = [dict(vars(model.config)), _has_any_global_hook()]
    _add_state(model, state)
    return state


def _add_state(module: nn.Module, state: list) -> None:
    """This runs for every module of every call, so it walks through them only once."""
    held = module.__dict__
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    state += (id(module), module.__class__, "forward" in held, any([held[name] for name in hooks]))
    # Such as the step size of the dynamics.
    state += [value for value in held.values() if value.__class__ in _NUMBERS]
    for tensors in (held["_parameters"], held["_buffers"]):
        for x in tensors.values():
            if x is not None:
                state += (id(x), x.data_ptr(), x.dtype, x.shape, x.stride(), x.requires_grad, bool(x._backward_hooks))
    for child in held["_modules"].values():
        if child is not None:
            _add_state(child, state)


def modes() -> tuple:
    """What PyTorch lets a caller choose for all operations."""
    backends = torch.backends.cuda
    return (
        torch.is_inference_mode_enabled(),
        # `torch.get_float32_matmul_precision` raises where this one was set.
        backends.matmul.fp32_precision,
        backends.matmul.allow_bf16_reduced_precision_reduction,
        backends.matmul.allow_fp16_reduced_precision_reduction,
        backends.matmul.allow_fp16_accumulation,
        torch.are_deterministic_algorithms_enabled(),
        backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(),
        backends.cudnn_sdp_enabled(),
    )


def free_bytes(device: torch.device) -> float:
    """Memory of the device that a new tensor can have, what PyTorch holds and does not use included."""
    if device.type != "cuda":
        return float("inf")
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def cached_numbers(config) -> int:
    """Numbers that a cache holds for one position: keys and values of every layer."""
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim


def _arguments(inputs: dict) -> tuple:
    """What a recording depends on besides the cache."""
    arguments = tuple(
        (name, (x.shape, x.dtype) if isinstance(x, Tensor) else x) for name, x in inputs.items() if name != CACHE_NAME
    )
    return arguments, torch.is_inference_mode_enabled()


def _end_failed_capture(device: torch.device, pool, options: dict) -> None:
    """Let PyTorch know that a capture is over, which it does not notice where the capture failed.

    Its random numbers on the GPU would raise from then on, and freed memory would never be given back.
    """
    with contextlib.suppress(RuntimeError):  # where the capture had not begun
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    with contextlib.suppress(RuntimeError):  # such as for want of memory; what made the capture fail says more
        with torch.cuda.stream(options["stream"]):
            something = torch.zeros(1, device=device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), **{**options, "pool": None}):
            something.zero_()


def record(step: Callable, device: torch.device, pool=None) -> tuple[Callable, Any]:
    """Record `step` without running it: what replays it, and its outputs, whose tensors every replay writes again.

    Graphs of one memory `pool` are replayed in the order in which they were recorded.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    with _CAPTURE:
        # A stream of the model's device: torch's default one for captures lies on the device that was the first to
        # record. PyTorch keeps a workspace of cuBLAS for every stream, 32 MiB on Hopper, so that a new stream for each
        # recording would cost memory for good. Some releases free the workspace with the first of two graphs that were
        # captured on one stream, though the other still uses it, so that graphs that live have streams of their own.
        idle = _IDLE_STREAMS.setdefault(device, [])
        own = idle.pop() if idle else torch.cuda.Stream(device)
        options = {"stream": own, "pool": pool, "capture_error_mode": "thread_local"}
        collects = gc.isenabled()
        gc.disable()  # a graph that nobody holds any more would spoil this one if it were freed now
        try:
            with torch.cuda.graph(graph, **options):
                outputs = step()
        except BaseException:
            _end_failed_capture(device, pool, options)
            raise
        finally:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own in place
            if collects:
                gc.enable()
        weakref.finalize(graph, idle.append, own)
    return graph.replay, outputs


@contextlib.contextmanager
def warning_where_it_fails(what: str) -> Iterator[None]:
    """Within it, a recording that fails, such as for want of memory, is a warning about `what`."""
    try:
        yield
    except RuntimeError as error:
        logger.warning_once(f"{what} are not recorded as a CUDA graph: {error}")


def leaves_cache_open(generation_config, model_kwargs: dict, length: int) -> bool:
    """Whether a call of `generate` lets the model choose a cache of `length` positions, and is worth a recording."""
    asks_otherwise = (
        getattr(_LOOP, "is_callers", False)  # which may crop the cache, or write beyond `length`
        or model_kwargs.get(CACHE_NAME) is not None
        or generation_config.cache_implementation is not None
        or generation_config.use_cache is False
        or generation_config.return_dict_in_generate  # the cache is a part of that output
        or generation_config.prefill_chunk_size is not None
        or generation_config.disable_compile
        or generation_config.compile_config is not None
        or getattr(generation_config, "is_assistant", False)
    )
    found = [model_kwargs.get(name) for name in ("attention_mask", "position_ids")]
    given = [x for x in found if x is not None]
    if asks_otherwise or not given or any(not isinstance(x, Tensor) or x.ndim != 2 for x in given):
        return False
    return length + 1 - given[0].shape[1] >= SHORTEST_RECORDED


def _routing_ids_of_step(routing_ids: Tensor, inputs: dict) -> Tensor:
    """The part of `routing_ids` [B, prompt] for the step with `inputs`, continued by the ids of generated tokens."""
    if routing_ids.ndim != 2:
        raise ValueError(f"routing_ids must be [batch, prompt], but has shape {tuple(routing_ids.shape)}.")
    cache = inputs.get(CACHE_NAME)
    start = int(cache.get_seq_length()) if cache is not None else 0
    step_ids, step_embeds = inputs["input_ids"], inputs.get("inputs_embeds")
    length = (step_ids if step_embeds is None else step_embeds).shape[1]
    given = routing_ids[:, start : start + length]
    return given if given.shape[1] == length else torch.cat((given, step_ids[:, given.shape[1] :]), dim=1)


class DecodeGraphMixin(GenerationMixin):
    """`generate` of a model that is routed by token ids, and whose decode steps with a static cache are recorded.

    After every step, the library reads on the host whether all rows have ended, and the GPU waits from there to the
    next launch. So the next step is prepared before, while the GPU computes, and only its token is added after.

    A call that names no cache gets a static one where nothing asks for a cache that grows or is given back.
    """

    def _takes_static_cache(self, generation_config, model_kwargs: dict, mode, batch_size: int, length: int) -> bool:
        """Whether `generate` gives the same tokens with a static cache of `length` positions, and sooner."""
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return False
        rows = batch_size * (generation_config.num_return_sequences or 1)
        return leaves_cache_open(generation_config, model_kwargs, length) and self._has_room_for_cache(rows, length)

    def _has_room_for_cache(self, rows: int, length: int) -> bool:
        """Whether steps of this model can be recorded, and a static cache is small beside what memory is free."""
        if self.device.type not in GRAPH_DEVICES:
            return False
        config = self.config
        cache_bytes = rows * length * cached_numbers(config) * self.dtype.itemsize
        return (
            config.sliding_window is None
            and not torch.is_grad_enabled()  # a static cache is written in place
            and not torch.is_autocast_enabled(self.device.type)
            and is_recordable(self)
            and cache_bytes < free_bytes(self.device) / 2
        )

    def _extract_generation_mode_kwargs(self, custom_generate, *args, **kwargs):
        _LOOP.is_callers = callable(custom_generate)
        return super()._extract_generation_mode_kwargs(custom_generate, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs: dict, generation_mode, batch_size: int, max_cache_length: int
    ):
        arguments = generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        if self._takes_static_cache(*arguments):
            # Made here, because the library would make each cache as long as the longest one before.
            model_kwargs[CACHE_NAME] = StaticCache(config=self.config, max_cache_len=max_cache_length)
        else:
            super()._prepare_cache_for_generation(*arguments)

    def get_compiled_call(self, compile_config) -> Callable:
        """What `generate` calls for a decode step with a static cache: on the Triton kernels, a CUDA graph."""
        if compile_config is not None or self.config._kernels_implementation != "triton" or self.device.type != "cuda":
            return super().get_compiled_call(compile_config)
        library = super().get_compiled_call
        return DecodeGraph(self, otherwise=lambda **inputs: library(None)(**inputs))

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict, *args, **kwargs) -> dict:
        model_kwargs.pop("prepared", None)
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        graph = getattr(outputs, "decode_graph", None)
        if graph is not None and model_kwargs.get("routing_ids") is None:  # those are cut to the step
            last_token = graph.inputs["input_ids"]
            inputs = super().prepare_inputs_for_generation(last_token, next_sequence_length=1, **model_kwargs)
            model_kwargs["prepared"] = dict(model_kwargs), graph.fill(inputs), graph
        return model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        routing_ids: Tensor | None = None,
        **kwargs,
    ) -> dict:
        """The library's inputs of a step, with `routing_ids` [B, prompt]; generated tokens are routed by their own ids.

        `kwargs` may hold `prepared`: all inputs of this step but its token, what they were made from, and the graph.
        Raises `ValueError` for `routing_ids` of another rank, and where a static cache is full.
        """
        check_room(self.config, input_ids.shape[1], kwargs.get("attention_mask"), kwargs.get(CACHE_NAME))
        prepared = kwargs.pop("prepared", None)
        if next_sequence_length == 1 and prepared is not None:
            given, inputs, graph = prepared
            asked = kwargs | {"inputs_embeds": inputs_embeds, "routing_ids": routing_ids}
            if graph.filled is inputs and all(given.get(name) is asked.get(name) for name in given | asked):
                return inputs | {"input_ids": input_ids[:, -1:]}
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )
        if routing_ids is not None:
            inputs["routing_ids"] = _routing_ids_of_step(routing_ids, inputs)
        return inputs

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs
    ) -> Tensor | None:
        """The library's mask for a static cache of L positions; that of one new token is the padding mask alone.

        attention_mask: [B, positions so far], or None. Returns bool [B or 1, 1, 1, L] for one token, made in two
        operations instead of the library's ten or so.
        """
        is_plain = config.sliding_window is None and config._attn_implementation == "sdpa"
        if not is_plain or inputs_embeds.shape[1] != 1:
            return create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs)
        cache = kwargs[CACHE_NAME]
        length, _ = cache.get_mask_sizes(1, 0)
        if attention_mask is None:
            # The library takes ids that still lie on the host, and moves them after the mask.
            position = torch.as_tensor(cache.get_seq_length(), device=inputs_embeds.device)
            return (torch.arange(length, device=inputs_embeds.device) <= position)[None, None, None]
        return F.pad(attention_mask.bool(), (0, length - attention_mask.shape[1]))[:, None, None]
