"""Speculative decoding whose steps are CUDA graphs: assisted decoding, prompt lookup and early exit.

The library gives these ways of `generate` a cache that grows, so that every step waits for the host to launch its
kernels. Here both the model and its draft get static caches that can be cropped. A step of few tokens, which verifies
a draft or continues one, is padded to one of a few lengths, so that few recordings serve all of them. A cache holds
the recordings of the steps that write into it, and waits for the next call. The library's loop stays as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import StaticCache
from transformers.generation import GenerationMode
from transformers.generation.candidate_generator import AssistedCandidateGenerator, EarlyExitCandidateGenerator

from .accelerated_complexity_deep import plain_static_layer, recordings_by_model
from .compatibility_complexity_deep import CACHE_NAME
from .decode_graph_complexity_deep import (
    HAVE_RUN,
    DecodeGraphMixin,
    leaves_cache_open,
    modes,
    record,
    state_of,
    step_variant,
    warning_where_it_fails,
)

# Tokens of a recorded step. With one, the kernels of a decode step run; the others have no kernels of their own.
STEP_LENGTHS = (1, 8, 32)
LENGTH_UNIT = 256  # positions; a cache serves all calls of up to so many more than it was made for
_IDLE = recordings_by_model()  # number of layers -> the cache of an earlier call, which no call uses


class SpeculativeCache(StaticCache):
    """A static cache [1, K, L, D] in each layer that forgets rejected tokens, and the recordings of steps into it.

    It is for one model, the first `layers` layers of it (all for None), and up to `longest` tokens; padded steps need
    room behind them. Recording costs about as much as many steps, so caches are kept for later calls of `generate`.
    """

    def __init__(self, model: nn.Module, longest: int, layers: int | None = None):
        self.longest = -(-longest // LENGTH_UNIT) * LENGTH_UNIT
        super().__init__(config=model.config, max_cache_len=self.longest + STEP_LENGTHS[-1])
        del self.layers[layers or len(self.layers) :]
        self.steps: dict[int, RecordedStep] = {}
        self.state = _state(model)
        self.lent: list[tuple] = []  # a model that drafts in this call, its cache and number of layers

    def serves(self, model: nn.Module, longest: int) -> bool:
        """Whether a call for up to `longest` tokens can have this cache, as nothing that was recorded has changed."""
        return longest <= self.longest and self.state == _state(model)

    def rewind(self) -> None:
        """Forget all tokens."""
        for layer in self.layers:
            layer.cumulative_length.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, whose number the library gives as a negative one. It may be more than there are."""
        self.forget(min(abs(int(tokens_to_remove)), int(self.get_seq_length())))

    def forget(self, tokens: int) -> None:
        """Forget the last `tokens`, without waiting for the device."""
        if tokens:
            torch._foreach_sub_([layer.cumulative_length for layer in self.layers], tokens)


def _state(model: nn.Module) -> list:
    # Of the modes, one is that of inference: tensors that are made in it cannot be changed outside of it.
    return [modes(), *state_of(model)]


class RecordedStep:
    """The pass of a base model over a fixed number of tokens, of which the last ones may be padding.

    It holds neither the model nor the cache: in a circle, all their memory would stay until Python looks for circles.
    """

    def __init__(self, length: int, ids: Tensor, mask: Tensor, positions: Tensor):
        self.ids, self.positions = ids.new_zeros(1, length), positions.new_zeros(1, length)
        self.mask = mask.new_zeros(1, 1, length, mask.shape[3])
        self.replay: Callable | None = None
        self.is_recordable = True
        self.hidden_states: Any = None
        self.output_type: Any = None

    def fill(self, ids: Tensor, mask: Tensor, positions: Tensor) -> None:
        """Write the inputs of a step where the recording reads them."""
        tokens = ids.shape[1]
        self.ids[:, :tokens] = ids
        self.mask[:, :, :tokens] = mask
        self.positions[:, :tokens] = positions
        if tokens < self.ids.shape[1]:  # the last token again, so that padding needs the weights of no other expert
            self.ids[:, tokens:] = ids[:, -1:]
            self.mask[:, :, tokens:] = mask[:, :, -1:]
            self.positions[:, tokens:] = positions[:, -1:]

    def run(self, plain: Callable, model: nn.Module, cache: SpeculativeCache, use_cache: bool | None) -> None:
        """Compute `hidden_states` [1, length, H] of the inputs that are filled in."""

        def step():
            inputs = {"attention_mask": self.mask, "position_ids": self.positions, "cache": cache}
            return plain(model, self.ids, use_cache=use_cache, **inputs)

        if self.replay is not None:
            return self.replay()
        held = [(layer.keys, layer.values) for layer in cache.layers]
        arguments = self.ids.shape, self.ids.dtype, self.mask.dtype, torch.is_inference_mode_enabled()
        variant, have_run = step_variant(model, arguments, held), HAVE_RUN.setdefault(model, [])
        if variant in have_run and self.is_recordable:
            with warning_where_it_fails("Steps of speculation"):
                self.replay, outputs = record(step, self.ids.device)
            self.is_recordable = self.replay is not None
        if self.replay is not None:
            self.replay()
        else:
            outputs = step()  # compiles the kernels: not possible while recording
            if variant not in have_run:
                have_run.append(variant)
        self.hidden_states, self.output_type = outputs.last_hidden_state, type(outputs)


def speculative_step(plain: Callable, model: nn.Module, input_ids: Tensor | None = None, *args, **kwargs):
    """The forward of the base model with a `SpeculativeCache`: few tokens [1, S] are replayed, the rest runs plainly.

    The hidden states that it returns are overwritten by the next step of about as many tokens.
    """
    cache: SpeculativeCache = kwargs["cache"]
    inputs: Any = (input_ids, kwargs.get("attention_mask"), kwargs.get("position_ids"))
    ids, mask, positions = inputs
    known = ("cache", "attention_mask", "position_ids", "use_cache")
    asked = [value for name, value in kwargs.items() if name not in known and value is not None]
    if args or asked or torch.is_grad_enabled() or not _is_step(cache, ids, mask, positions):
        return plain(model, input_ids, *args, **kwargs)
    tokens = ids.shape[1]
    length = next(length for length in STEP_LENGTHS if length >= tokens)
    if length not in cache.steps:
        cache.steps[length] = RecordedStep(length, ids, mask, positions)
    step = cache.steps[length]
    step.fill(ids, mask, positions)
    step.run(plain, model, cache, kwargs.get("use_cache"))
    cache.forget(length - tokens)
    return step.output_type(last_hidden_state=step.hidden_states[:, :tokens], **{CACHE_NAME: cache})


def _is_step(cache: SpeculativeCache, ids: Any, mask: Any, positions: Any) -> bool:
    """Whether a pass has few tokens in one row, and nothing is made in it that depends on the host."""
    if not all(isinstance(x, Tensor) for x in (ids, mask, positions)) or mask.dtype != torch.bool:
        return False
    if ids.ndim != 2 or len(ids) != 1 or not 1 <= ids.shape[1] <= STEP_LENGTHS[-1] or positions.shape != ids.shape:
        return False
    layers = [plain_static_layer(cache, index) for index in range(len(cache.layers))]
    return None not in layers and mask.shape == (1, 1, ids.shape[1], cache.layers[0].max_cache_len)


class SpeculationMixin(DecodeGraphMixin):
    """`generate` whose speculative ways take recorded steps, where those can be and nothing asks otherwise."""

    def speculative_cache(self, longest: int, layers: int | None = None) -> SpeculativeCache | None:
        """A cache for `longest` tokens in the first `layers` layers (all for None), or None where none can be had."""
        idle = _IDLE.get(self, {}).pop(layers, None)  # no other call may find it meanwhile
        if not self._has_room_for_cache(1, longest + LENGTH_UNIT + STEP_LENGTHS[-1]):
            return None
        if idle is None or not idle.serves(self, longest):
            return SpeculativeCache(self, longest, layers)
        idle.rewind()
        return idle

    def keep_speculative_cache(self, cache: SpeculativeCache, layers: int | None = None) -> None:
        """Keep for later calls what `speculative_cache` gave for `layers`."""
        _IDLE.setdefault(self, {})[layers] = cache

    def _assisted_decoding(self, *args, **kwargs):
        found = super()._assisted_decoding(*args, **kwargs)
        cache = kwargs.get(CACHE_NAME)
        if isinstance(cache, SpeculativeCache):
            self.keep_speculative_cache(cache)
            while cache.lent:
                model, *lent = cache.lent.pop()
                model.keep_speculative_cache(*lent)
        return found

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs: dict, generation_mode, batch_size: int, max_cache_length: int
    ):
        cache, is_assisted = None, generation_mode == GenerationMode.ASSISTED_GENERATION
        if is_assisted and batch_size == 1 and leaves_cache_open(generation_config, model_kwargs, max_cache_length):
            cache = self.speculative_cache(max_cache_length)
        if cache is None:
            arguments = generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            super()._prepare_cache_for_generation(*arguments)
        else:
            model_kwargs[CACHE_NAME] = cache

    def _get_candidate_generator(self, generation_config, *args, model_kwargs: dict, **kwargs):
        """The library's, whose draft gets a static cache of its own if this model has one."""
        generator = super()._get_candidate_generator(generation_config, *args, model_kwargs=model_kwargs, **kwargs)
        drafts_same_tokens = type(generator) in (AssistedCandidateGenerator, EarlyExitCandidateGenerator)
        if drafts_same_tokens and isinstance(model_kwargs.get(CACHE_NAME), SpeculativeCache):
            # The draft's class may come from another folder's copy of this file.
            draft, layers = generator.assistant_model, generation_config.assistant_early_exit
            make = getattr(draft, "speculative_cache", lambda *_: None)
            cache = make(generation_config.max_length, layers)
            if cache is not None:
                generator.assistant_kwargs[CACHE_NAME] = cache
                model_kwargs[CACHE_NAME].lent.append((draft, cache, layers))
        return generator

    def _valid_auto_compile_criteria(self, model_kwargs: dict, generation_config) -> bool:
        if isinstance(model_kwargs.get(CACHE_NAME), SpeculativeCache):
            return False
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs
    ) -> Tensor | None:
        """The mask [1, 1, S, L] of booleans of few tokens over L positions, in fewer operations than the library's.

        attention_mask: [1, positions so far], or None. The library has a mask of its own for a whole prompt.
        """
        cache, tokens = kwargs.get(CACHE_NAME), inputs_embeds.shape[1]
        if not isinstance(cache, SpeculativeCache) or not 1 < tokens <= STEP_LENGTHS[-1]:
            return DecodeGraphMixin.create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs)
        length, device = cache.layers[0].max_cache_len, inputs_embeds.device
        past = torch.as_tensor(cache.get_seq_length(), device=device)
        seen = torch.arange(length, device=device) <= (torch.arange(tokens, device=device) + past)[:, None]
        if attention_mask is None:
            return seen[None, None]
        is_token = F.pad(attention_mask.bool(), (0, length - attention_mask.shape[1]))
        return seen & is_token.to(device)[:, None, None]
