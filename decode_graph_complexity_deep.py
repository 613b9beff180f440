"""Decode steps of `generate` with a static cache as one CUDA graph, on the Triton kernels.

The library compiles the forward for these steps: a minute before the second token, then guards and bookkeeping before
each of the others. With the fused kernels there is little left to compile. The first step of a cache runs as it is,
the second is recorded, all others are replayed: copy the token, its mask and its position, launch the graph.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .implementations_complexity_deep import ComplexityDeepFrozenLinear, is_unhooked, plain_static_layer

_CAPTURE = threading.Lock()  # one capture at a time in a process


class DecodeGraph:
    """`model.__call__` for one new token per row and a static cache; whatever else goes to `otherwise`.

    One object for each call of `generate`, between whose steps weights, modules and settings stay as they are; cache
    and arguments are compared before every step. The logits it returns are overwritten by its next step.
    """

    def __init__(self, model: nn.Module, otherwise: Callable):
        self.model, self.otherwise = model, otherwise
        self.checked, self.key, self.replay = (), None, None

    def __call__(self, **inputs):
        key = self._key(inputs)
        if key != self.checked:
            self.checked, self.fits = key, key is not None and self._fits(inputs)
        if not self.fits:
            return self.otherwise(**inputs)
        if key != self.key:
            self.key, self.replay = key, None
            return self.model(**inputs)  # also compiles the kernels, which cannot be done while recording
        if self.replay is None:
            self.inputs = {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)}
            device = inputs["input_ids"].device
            self.replay, self.outputs = record(lambda: self.model(**(inputs | self.inputs)), device)
        for name, x in self.inputs.items():
            x.copy_(inputs[name])
        self.replay()
        return type(self.outputs)(logits=self.outputs.logits, past_key_values=inputs["past_key_values"])

    def _key(self, inputs: dict) -> tuple | None:
        """What a recording depends on, compared before every step, so it is little; None without a static cache."""
        cache = inputs.get("past_key_values")
        layers = [plain_static_layer(cache, index) for index in range(len(getattr(cache, "layers", ())))]
        if not layers or None in layers:
            return None
        held = tuple(x.data_ptr() for layer in layers for x in (layer.keys, layer.values, layer.cumulative_length))
        arguments = tuple(
            (name, (x.shape, x.dtype) if isinstance(x, Tensor) else x)
            for name, x in inputs.items()
            if name != "past_key_values"
        )
        return held, arguments, torch.is_inference_mode_enabled()

    def _fits(self, inputs: dict) -> bool:
        """Whether a step can be recorded: every operation is known, and none waits for data on the host."""
        mask, config = inputs.get("attention_mask"), self.model.config
        # Made by the model instead of `generate`, positions and mask would stay those of the recorded step.
        given = (inputs.get("input_ids"), mask, inputs.get("position_ids"))
        if not all(isinstance(x, Tensor) for x in given) or given[0].shape[1] != 1 or mask.ndim != 4:
            return False
        # Autocast frees its casts of the weights when its context ends: a recording would read what is no longer there.
        if torch.is_grad_enabled() or torch.is_autocast_enabled(given[0].device.type):
            return False
        names = (config._attn_implementation, config._kernels_implementation, config._experts_implementation)
        # The tables of these two kinds of RoPE depend on the largest position so far.
        if names != ("sdpa", "triton", "cggr") or config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
            return False
        ours = (type(self.model.model).__module__, ComplexityDeepFrozenLinear.__module__)
        known = (type(self.model).__module__, *ours, "transformers.activations")
        origins = (type(module).__module__ for module in self.model.modules())
        return (
            all(origin in known or origin.startswith("torch.nn.modules.") for origin in origins)
            and is_unhooked(*self.model.modules())
            and all(type(parameter) is nn.Parameter for parameter in self.model.parameters())
        )


def record(step: Callable, device: torch.device) -> tuple[Callable, object]:
    """Record `step` without running it: what replays it, and its outputs, whose tensors every replay writes again."""
    graph = torch.cuda.CUDAGraph()
    # A stream of the model's device: torch's default one for captures lies on the device that was the first to record.
    with _CAPTURE, torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
        outputs = step()
    return graph.replay, outputs
