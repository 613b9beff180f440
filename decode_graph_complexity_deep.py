"""Decode steps of `generate` with a static cache as one CUDA graph, on the Triton kernels.

The library compiles the forward for these steps: a minute before the second token, then guards and bookkeeping before
each of the others. With the fused kernels there is little left to compile. The first step of a cache runs as it is,
the second is recorded, all others are replayed: copy the token, its mask and its position, launch the graph.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticCache, StaticLayer

from .implementations_complexity_deep import ComplexityDeepFrozenLinear, is_unhooked


class DecodeGraph:
    """`model.__call__` for one new token per row and a static cache; whatever else goes to `otherwise`.

    A recording holds the addresses of weights and cache: it is made again when one of them, or an argument, is another.
    """

    def __init__(self, model: nn.Module):
        self.model = weakref.proxy(model)
        self.key = self.replay = None

    def prepare(self, otherwise: Callable) -> "DecodeGraph":
        """Called once by every `generate`: between its steps the modules and their weights stay as they are."""
        self.otherwise, self.checked = otherwise, ()
        config = self.model.config
        names = ("_attn_implementation", "_experts_implementation", "_kernels_implementation", "num_hidden_layers")
        weights = tuple(tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers()))
        self.settings = weights, self.model.training, *(getattr(config, name) for name in names)
        return self

    def __call__(self, **inputs):
        key = self._key(inputs)
        if key != self.checked:
            self.checked, self.fits = key, self._fits(inputs)
        if not self.fits:
            return self.otherwise(**inputs)
        if key != self.key:
            self.key, self.replay = key, None
            return self.model(**inputs)  # also compiles the kernels, which cannot be done while recording
        if self.replay is None:
            self.inputs = {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)}
            with torch.cuda.device_of(inputs["input_ids"]):
                self.replay, self.outputs = record(lambda: self.model(**(inputs | self.inputs)))
            self.outputs.past_key_values = None  # the recording must not keep a cache alive
        for name, x in self.inputs.items():
            x.copy_(inputs[name])
        self.replay()
        return type(self.outputs)(logits=self.outputs.logits, past_key_values=inputs["past_key_values"])

    def _key(self, inputs: dict) -> tuple | None:
        """What a recording depends on; compared before every step, so it is little."""
        cache = inputs.get("past_key_values")
        if type(cache) is not StaticCache or not all(layer.is_initialized for layer in cache.layers):
            return None
        held = tuple(
            x.data_ptr() for layer in cache.layers for x in (layer.keys, layer.values, layer.cumulative_length)
        )
        arguments = tuple(
            (name, (x.shape, x.dtype) if isinstance(x, Tensor) else x)
            for name, x in inputs.items()
            if name != "past_key_values"
        )
        return self.settings, held, arguments, torch.is_inference_mode_enabled()

    def _fits(self, inputs: dict) -> bool:
        """Whether a step can be recorded: every operation is known, and none waits for data on the host."""
        cache, mask, config = inputs.get("past_key_values"), inputs.get("attention_mask"), self.model.config
        # Made by the model instead of `generate`, positions and mask would stay those of the recorded step.
        given = (inputs.get("input_ids"), mask, inputs.get("position_ids"))
        if not all(isinstance(x, Tensor) for x in given) or given[0].shape[1] != 1 or mask.ndim != 4:
            return False
        if type(cache) is not StaticCache or cache.offloading or torch.is_grad_enabled():
            return False
        if any(type(layer) is not StaticLayer or not layer.is_initialized for layer in cache.layers):
            return False
        names = (config._attn_implementation, config._kernels_implementation, config._experts_implementation)
        # The tables of these two kinds of RoPE depend on the largest position so far.
        if names != ("sdpa", "triton", "cggr") or config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
            return False
        ours = (type(self.model.model).__module__, ComplexityDeepFrozenLinear.__module__)
        known = (*ours, "torch.nn.modules", "transformers.activations")
        return all(
            type(module).__module__.startswith(known) and is_unhooked(module) for module in self.model.modules()
        ) and all(type(parameter) is nn.Parameter for parameter in self.model.parameters())


def record(step: Callable) -> tuple[Callable, object]:
    """Record `step` without running it: what replays it, and its outputs, whose tensors every replay writes again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = step()
    return graph.replay, outputs


_GRAPHS: "weakref.WeakKeyDictionary[nn.Module, DecodeGraph]" = weakref.WeakKeyDictionary()


def decode_graph(model: nn.Module, otherwise: Callable) -> DecodeGraph:
    """The model's one `DecodeGraph`, kept outside the model, which can be copied and saved as before."""
    return _GRAPHS.setdefault(model, DecodeGraph(model)).prepare(otherwise)
