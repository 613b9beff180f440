"""Training steps of one shape, repeated, as CUDA graphs: forward and backward of the decoder.

A small model, or a few rows of a large one, keeps the GPU busy for less time than the host needs to launch what is to
be done. Whoever trains calls the model with the same shape again and again. The first calls of a shape run as they are.
The next one is recorded, and its replay compared with the pass itself. From then on the ids are copied and two graphs
are launched, one in the forward and one in the backward pass. Loss and optimizer stay outside.

To autograd a replay is one function of all weights. A backward pass that a replay cannot give, a second one or one that
is to be differentiated, computes the decoder anew as it is. A forward pass whose predecessor still waits for its
backward pass runs as it is, because both would share their memory.
"""

import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .accelerated_complexity_deep import ACCELERATED, recordings_by_model
from .decode_graph_complexity_deep import GRAPH_DEVICES, free_bytes, is_recordable, modes, record
from .forward_graph_complexity_deep import (
    LOCK,
    Recordings,
    asked_for,
    graphed_forward,
    hides_nothing,
    is_default_stream,
    run_plain,
)
from .kernels.op_registration import is_ordinary, is_transformed

# Multiplications of a layer's weights in one pass. From about so many on, the GPU takes longer for them than the host
# for its launches.
MAX_PRODUCTS = 2.5e11
MAX_GRAPHS = 2  # of a model, for each keeps the activations of a pass
OUTPUT_TOLERANCE = 1e-2  # relative to the norm: bf16 sums may differ in their order
NORM_TOLERANCE = 3e-2  # of each gradient; those of embeddings are summed by atomic operations
_GRAPHS = recordings_by_model()
_COMPILERS: list[tuple] = []  # backends of torch.compile that were met, each with its `dynamic`


class _Awaited:
    """Held by an autograd graph for as long as its backward pass through a recording may come."""


class TrainingStep:
    """Forward and backward pass of one shape. It holds no module, so that the model may be freed."""

    def __init__(self, plain: Callable, model: nn.Module, inputs: dict[str, Tensor]):
        self.inputs = {name: x.clone() for name, x in inputs.items()}
        self.autocast = autocast_of(inputs["input_ids"].device)
        self.awaited: weakref.ref | None = None
        device = inputs["input_ids"].device
        self.weights = [weakref.ref(x) for x in model.parameters() if x.requires_grad]
        tensors = _named_tensors(model)
        self.tensors = {name: weakref.ref(x) for name, x in tensors.items()}
        # Autograd has one node for the gradient of a weight, which belongs to the stream where it was first needed. A
        # graph of the caller's that is still alive keeps it, and a recording may not wait for that stream. So the
        # recorded pass has weights of its own, in the same memory.
        twins = {x: nn.Parameter(x.detach()) for x in model.parameters() if x.requires_grad}
        own = {name: twins[x] for name, x in tensors.items() if x in twins}
        weights = list(twins.values())

        def forward() -> Tensor:
            outputs = _call_with(own, plain, model, self.inputs)
            self.output_type = type(outputs)
            return outputs.last_hidden_state

        before = _allocated(device)
        output = forward()  # as it is, which compiles what is not compiled yet
        needed = _allocated(device) - before + sum(x.numel() * x.element_size() for x in weights)
        if needed > free_bytes(device) / 2:
            raise torch.OutOfMemoryError(f"it would hold {needed / 2**30:.1f} GiB")
        generator = torch.Generator(device).manual_seed(0)
        self.output_gradient = torch.randn(output.shape, generator=generator, device=device).to(output.dtype)

        def gradients_of(output: Tensor) -> tuple[Tensor | None, ...]:
            with torch.autocast(device.type, enabled=False):  # as backward passes are called
                return torch.autograd.grad(output, weights, self.output_gradient, allow_unused=True)

        gradients = gradients_of(output)
        expected, norms = output.detach(), _norms(gradients)
        del output, gradients
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # both graphs hold the activations
        # Autocast keeps its casts of the weights while its context lasts. Some may be from before, and those that are
        # made while recording have no values, which matters most where the recording fails and the caller goes on.
        torch.clear_autocast_cache()
        try:
            self.forward, self.output = record(forward, device, pool)
        finally:
            torch.clear_autocast_cache()
        self.backward, self.gradients = record(lambda: gradients_of(self.output), device, pool)
        self.output = self.output.detach()  # lets go of the activations' tensors; their memory is the graphs'
        self.forward()
        self.backward()
        _compare(self.output, expected, _norms(self.gradients), norms)

    def is_free(self) -> bool:
        """Whether no backward pass is to come through the activations that are held, and the weights are still there.

        A new weight may have the id and the address of one that was deleted.
        """
        is_awaited = self.awaited is not None and self.awaited() is not None
        return not is_awaited and all(x() is not None for x in self.weights)

    def __call__(self, plain: Callable, model: nn.Module, inputs: dict[str, Tensor]):
        """The model's output for `inputs`, which have the shapes of those that were recorded."""
        for name, x in self.inputs.items():
            x.copy_(inputs[name])
        own = {name: x.clone() for name, x in inputs.items()}
        found = {name: x() for name, x in self.tensors.items()}
        tensors = {name: x for name, x in found.items() if x is not None}

        def anew() -> Tensor:
            dtype, kind = self.autocast, own["input_ids"].device.type
            with torch.enable_grad(), torch.autocast(kind, dtype, enabled=dtype is not None):
                # With the tensors of the forward pass: those of a caller's `functional_call` are the model's no longer.
                return _call_with(tensors, plain, model, own).last_hidden_state

        states = _Replay.apply(self, anew, tensors, *(x() for x in self.weights))
        return self.output_type(last_hidden_state=states)


class _Plain(nn.Module):
    """A forward as it was written, for `functional_call`, which calls modules."""

    def __init__(self, plain: Callable, model: nn.Module):
        super().__init__()
        self.plain, self.model = plain, model

    def forward(self, **inputs):
        return self.plain(self.model, **inputs)


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the name that `_Plain` gives to the place where they are.

    A tensor that several modules share has several places. A module that has several names is one place.
    """
    modules = model.named_modules(prefix="model")
    places = [(prefix, tensors) for prefix, x in modules for tensors in (x._parameters, x._buffers)]
    return {f"{prefix}.{name}": x for prefix, tensors in places for name, x in tensors.items() if x is not None}


def _call_with(tensors: dict[str, Tensor], plain: Callable, model: nn.Module, inputs: dict[str, Tensor]):
    """The output of `plain` with the `tensors`, which have the names of `_named_tensors`, in their places."""
    # By itself it would give a place with two names two tensors, and put back the wrong one.
    return functional_call(_Plain(plain, model), tensors, (), {**inputs, "use_cache": False}, tie_weights=False)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step: TrainingStep, anew: Callable, tensors: dict[str, Tensor], *weights: Tensor) -> Tensor:
        step.forward()
        # Saved so that autograd refuses what it would refuse: a weight that changed in between, a freed graph.
        frozen = [x for x in tensors.values() if isinstance(x, nn.Parameter) and not x.requires_grad]
        ctx.save_for_backward(*weights, *frozen)
        # The recorded backward pass reads all tensors of the model where they lie now, also if one is replaced before.
        ctx.storages = [x.untyped_storage() for x in tensors.values()]
        ctx.step, ctx.anew, ctx.awaited = step, anew, _Awaited()
        step.awaited = weakref.ref(ctx.awaited)
        return step.output.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        step, saved = ctx.step, ctx.saved_tensors
        weights = saved[: len(step.weights)]
        if ctx.awaited is None or torch.is_grad_enabled() or not is_ordinary((gradient,)):
            options = {"create_graph": torch.is_grad_enabled(), "allow_unused": True}
            return None, None, None, *torch.autograd.grad(ctx.anew(), weights, gradient, **options)
        # The replay overwrites the activations, so that it cannot be repeated. Other threads wait until all is copied.
        awaited, ctx.awaited = ctx.awaited, None
        step.output_gradient.copy_(gradient)
        step.backward()
        # Copies, because the next replay writes the recorded ones again.
        recorded = [x for x in step.gradients if x is not None]
        copies = [torch.empty_like(x) for x in recorded]
        torch._foreach_copy_(copies, recorded)
        del awaited
        copies.reverse()
        return None, None, None, *(None if x is None else copies.pop() for x in step.gradients)


def _norms(gradients) -> Tensor:
    return torch.stack(torch._foreach_norm([x for x in gradients if x is not None])).float()


def _compare(output: Tensor, expected: Tensor, norms: Tensor, expected_norms: Tensor) -> None:
    """Raise `RuntimeError` where a replay gives another output or other norms of gradients than the pass itself."""
    error = (output - expected).float().norm() / expected.float().norm()
    # A gradient that is next to nothing beside the others is rounding.
    allowed = NORM_TOLERANCE * expected_norms + 1e-3 * expected_norms.norm()
    is_equal = (error <= OUTPUT_TOLERANCE) & ((norms - expected_norms).abs() <= allowed).all()
    if not is_equal:
        raise RuntimeError("its replay does not give what the pass itself gives")


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def autocast_of(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _products_of_layer(model: nn.Module, tokens: int) -> float:
    """Multiplications of `tokens` with the weights of a layer that a token meets, embeddings of values left out."""
    config = model.config
    width = config.moe_intermediate_size if config.is_routed else config.intermediate_size
    width += config.shared_expert_intermediate_size or 0
    return float(tokens) * config.hidden_size * (4 * config.hidden_size + 3 * width)


def _is_alone() -> bool:
    """Whether gradients stay in this process, and nothing looks at what is saved for the backward pass."""
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_world_size() > 1:
        return False
    # Hooks such as those of activation checkpointing or offloading.
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None and not torch.is_anomaly_enabled()


def _computes_each_step_alike(model: nn.Module) -> bool:
    """Whether a step has no mask that the library makes, no random numbers and no layers that are computed twice."""
    return (
        model.config.sliding_window is None
        and not (model.training and model.config.attention_dropout > 0)
        and not any(getattr(layer, "gradient_checkpointing", False) for layer in model.layers)
    )


def _takes_graph(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    ids = inputs["input_ids"]
    return (
        not torch.compiler.is_compiling()
        and ids.device.type in GRAPH_DEVICES
        and ids.ndim == 2
        and all(x.device == ids.device for x in inputs.values())
        and _products_of_layer(model, ids.numel()) <= MAX_PRODUCTS
        and _computes_each_step_alike(model)
        and is_ordinary((*inputs.values(), model.embed_tokens.weight))
        and _is_alone()
        and (ids.device.type != "cuda" or is_default_stream(ids.device))
    )


def graphed_model(plain: Callable, model: nn.Module, input_ids: Tensor | None = None, *args, **kwargs):
    """The forward of the base model, replayed for shapes that come again and again.

    With gradients: ids [B, S], alone, with positions, or with an attention mask that hides nothing.
    """
    if torch.compiler.is_dynamo_compiling():
        number = _compiler_at_work() if _is_known(model, input_ids, args, kwargs) else None
        if number is not None:
            return _between_compiled_graphs(number, plain, model, input_ids, *args, **kwargs)
    if not torch.is_grad_enabled():
        return graphed_forward(plain, model, input_ids, *args, **kwargs)
    given = asked_for(kwargs)
    given.pop("num_items_in_batch", None)  # the loss divides by it
    inputs = {"input_ids": input_ids, "position_ids": given.pop("position_ids", None)}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    mask = given.pop("attention_mask", None)
    makes_cache = given.pop("use_cache", None)
    if args or given or makes_cache is not False or input_ids is None:
        return plain(model, input_ids, *args, **kwargs)
    has_both = mask is not None and "position_ids" in inputs
    if has_both or not _takes_graph(model, inputs) or not hides_nothing(mask, input_ids):
        return run_plain(plain, model, input_ids=input_ids, **kwargs)
    shapes = tuple((name, x.shape, x.dtype) for name, x in inputs.items())
    with LOCK:
        step = Recordings.of(model, _GRAPHS, MAX_GRAPHS).find(
            (shapes, input_ids.device, autocast_of(input_ids.device), modes(), plain),
            model,
            lambda: is_recordable(model, training=True) and any(x.requires_grad for x in model.parameters()),
            lambda: TrainingStep(plain, model, inputs),
        )
        if step is not None and step.is_free():
            return step(plain, model, inputs)
    # Called as the recorded pass is called, so that a compiler meets one kind of call.
    return run_plain(plain, model, **inputs, use_cache=False)


def _is_known(model: nn.Module, input_ids: Tensor | None, args: tuple, kwargs: dict) -> bool:
    """Whether a call that is being traced may be one that is replayed, as far as can be told without its values."""
    names = ("attention_mask", "position_ids", "use_cache", "num_items_in_batch")
    return (
        input_ids is not None
        and input_ids.device.type in GRAPH_DEVICES
        and model.takes_cuda_graphs
        and _computes_each_step_alike(model)
        and kwargs.get("use_cache") is not None
        and not args
        and all(name in names for name in asked_for(kwargs))
    )


@torch.compiler.assume_constant_result
def _compiler_at_work() -> int | None:
    """Number of the compiler that a call is being traced for, or None where the traced graph must stay in one piece.

    It must where the caller asks for that, and in functions that are traced for `torch.cond`, for checkpointing or for
    `torch.func`. Nothing could be replayed where dimensions are to stay variable, where the compiler itself makes CUDA
    graphs, or where other processes train along. Nothing public tells most of this, so that Dynamo's own records are
    read. Dynamo calls this once, while it traces.
    """
    try:
        from torch._dynamo import config
        from torch._dynamo.eval_frame import innermost_backend
        from torch._dynamo.symbolic_convert import InstructionTranslator
        from torch._inductor.config import triton

        tracer = InstructionTranslator.current_tx()
        is_whole = tracer.one_graph or tracer.error_on_graph_break or tracer.export
        is_whole = is_whole or tracer.output.current_tracer.parent is not None or is_transformed()
        backend = innermost_backend(tracer.output.compiler_fn)
        options = getattr(backend, "config", {})  # those of a mode, such as "reduce-overhead"
        makes_graphs = options.get("triton.cudagraphs", triton.cudagraphs)
        makes_graphs = makes_graphs or getattr(backend, "compiler_name", None) == "cudagraphs"
        dynamic = not config.assume_static_by_default
        compiler = backend, None if config.automatic_dynamic_shapes else False
    except (ImportError, AttributeError):  # another release of PyTorch
        return None
    if is_whole or makes_graphs or dynamic or not _is_alone():
        return None
    if compiler not in _COMPILERS:
        _COMPILERS.append(compiler)
    return _COMPILERS.index(compiler)


@functools.cache
def _compiled(number: int, plain: Callable) -> Callable:
    backend, dynamic = _COMPILERS[number]
    return torch.compile(plain, backend=backend, dynamic=dynamic)


@functools.partial(torch.compiler.disable, reason="repeated passes are replayed as CUDA graphs")
def _between_compiled_graphs(number: int, plain: Callable, model: nn.Module, *args, **kwargs):
    """`graphed_model` for a decoder that is a part of what torch.compile compiles.

    A replay cannot be a part of a compiled graph. So that graph ends here, the decoder is compiled by itself, and what
    follows it, such as a loss, is a graph of its own.
    """
    return graphed_model(_compiled(number, plain), model, *args, **kwargs)


def without_cache_in_training(forward: Callable) -> Callable:
    """Let the base model's `forward` make no cache in a training step unless it is asked for one by name.

    It would keep every layer's keys and values, and repeated steps could not be replayed.
    """

    @functools.wraps(forward)
    def forward_without_cache(self, *args, **kwargs):
        is_training = self.training and torch.is_grad_enabled()
        # By position, a cache comes after three other arguments.
        if is_training and len(args) <= 3 and kwargs.get("use_cache") is None and kwargs.get("cache") is None:
            kwargs["use_cache"] = False
        return forward(self, *args, **kwargs)

    return forward_without_cache


def is_replayed(model: nn.Module) -> bool:
    """Whether training steps of this base model are being replayed."""
    return model in _GRAPHS and bool(_GRAPHS[model].recorded)


if "triton" in ACCELERATED:
    ACCELERATED["triton"]["model"] = graphed_model
