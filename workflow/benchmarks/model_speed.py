"""Training steps, forward passes and decode steps of this model and its peers."""

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from accelerate.utils import compile_regions
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig, StaticCache
from transformers.distributed import DistributedConfig

from complexity_deep.compatibility_complexity_deep import CACHE_NAME
from complexity_deep.decode_graph_complexity_deep import record
from complexity_deep.workflow.benchmarks.results import measured_row
from complexity_deep.workflow.benchmarks.timing import timed
from complexity_deep.workflow.command import InputError, first_line, is_first_process, one_line, shipped
from complexity_deep.workflow.flops import flops_per_token
from complexity_deep.workflow.training.chunked_loss import use_chunked_loss


def peers(model_config: str, only: str | None) -> dict[str, transformers.PreTrainedConfig]:
    """This model and its peers of the same shape; `InputError` for a config that is not there or not of ours."""
    try:
        if model_config.endswith(".json"):  # a missing file would be asked for on the Hub, with retries
            Path(shipped(model_config)).read_text()
        ours = AutoConfig.from_pretrained(shipped(model_config))
    except Exception as error:  # a strict config raises classes of its own
        raise InputError(f"--model-config '{model_config}' is no config that loads: {one_line(error)}") from error
    if ours.model_type != "complexity-deep":
        raise InputError(f"--model-config '{model_config}' is of '{ours.model_type}'; its peers are built from ours.")
    names = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads max_position_embeddings "
    names += "tie_word_embeddings pad_token_id bos_token_id eos_token_id"
    shape = {name: getattr(ours, name) for name in names.split()}
    experts = {"num_experts": ours.num_experts, "moe_intermediate_size": ours.moe_intermediate_size}
    head_dim = ours.hidden_size // ours.num_attention_heads
    configs = {
        "complexity-deep": ours,
        "qwen3-moe": Qwen3MoeConfig(**shape, **experts, head_dim=head_dim, num_experts_per_tok=1, norm_topk_prob=True),
        "llama": LlamaConfig(**shape, intermediate_size=ours.intermediate_size),
    }
    return configs if only is None else {only: configs[only]}


def zipf_ids(vocab_size: int, *shape: int, device: str) -> torch.Tensor:
    """Token ids with Zipf(1) frequencies, rank = id: what a tokenizer sorted by frequency gives."""
    weights = 1.0 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    count = torch.Size(shape).numel()
    return torch.multinomial(weights, count, replacement=True, generator=generator).view(shape).to(device)


def build(config, device: str, attn_implementation: str, dtype: torch.dtype | None = None):
    """A model with random weights, in bf16 on a GPU and fp32 on the CPU unless `dtype` says otherwise.

    Raises `InputError` for an attention that is not there.
    """
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"--attn-implementation '{attn_implementation}' cannot be used: {first_line(error)}"
        ) from error


def processes() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str) -> str:
    """The device of this process of torchrun. On a GPU, random weights are made in seconds; on a CPU, in minutes."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device.startswith("cuda") else device


def divide(model, device: str):
    """A model on the CPU, divided among the processes of torchrun by its own plan, each part on its device."""
    if device.startswith("cuda"):
        torch.cuda.set_device(own_device(device))
    heads = model.config.num_key_value_heads
    if heads % processes():
        raise InputError(f"{heads} key/value heads cannot be divided among {processes()} processes: start fewer.")
    return type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        distributed_config=DistributedConfig(tp_plan="auto"),
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
    )


def release() -> None:
    """Give back the memory of models that nobody holds any more."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


COMPILERS = {"eager": lambda model: model, "compiled": torch.compile, "compiled by layers": compile_regions}


def training_step(model, device: str, compiler: str, mixed_precision: bool = False) -> Callable[..., torch.Tensor]:
    """A step on the inputs that it is called with, forward, backward and AdamW; it returns the loss.

    `compiler` is one of COMPILERS: eager, the whole model, or each layer as pretrain.py does it.
    """
    called = COMPILERS[compiler](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.startswith("cuda"))

    def step(**inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=mixed_precision):
            loss = called(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


class StepClock(transformers.LogitsProcessor):
    """Times at which `generate` has the logits of its first and of its last token; scores pass through as they are.

    What lies between them is decoding alone, so that no second call has to be taken off, whose noise could be more than
    a few short steps.
    """

    def __init__(self, device: str):
        self.is_cuda, self.first, self.last = device.startswith("cuda"), None, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.is_cuda:
            self.last = torch.cuda.Event(enable_timing=True)
            self.last.record()
        else:
            self.last = time.perf_counter()
        self.first = self.first or self.last
        return scores

    def milliseconds(self) -> float:
        if not self.is_cuda:
            return (self.last - self.first) * 1e3
        self.last.synchronize()
        return self.first.elapsed_time(self.last)


def decode_steps(
    model, ids: torch.Tensor, new_tokens: int, repeats: int, device: str, static_cache: bool
) -> list[float]:
    """Milliseconds of a decode step of `generate`, without its prefill, in each of `repeats` calls.

    `new_tokens` is 2 or more: the first comes from the prompt.
    """
    model.generation_config.eos_token_id = None  # decode all the tokens
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 1}
    options |= {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    options |= {"cache_implementation": "static"} if static_cache else {}
    clocks = [StepClock(device) for _ in range(2 + repeats)]  # two calls to warm up
    for clock in clocks:
        model.generate(ids, logits_processor=transformers.LogitsProcessorList([clock]), **options)
    return [clock.milliseconds() / (new_tokens - 1) for clock in clocks[2:]]


def benchmark_train(
    model_config: str,
    *,
    batch_size: int,
    sequence_length: int,
    repeats: int,
    device: str,
    attn_implementation: str = "sdpa",
    only: str | None = None,
    compiled: bool = False,
    document_length: int | None = None,
    mixed_precision: bool = False,
    chunked_loss: bool = False,
    gradient_checkpointing: bool = False,
) -> list[dict]:
    """Rows of results for a training step of every model, or of the one named `only`.

    A row of the batch holds documents of `document_length` tokens that do not see each other, or is one document.
    `mixed_precision` is fp32 weights under bf16 autocast. Raises `InputError` for a config that does not load and for a
    loss that is not finite.
    """
    rows = []
    for name, config in tqdm(peers(model_config, only).items(), desc="train", file=sys.stderr):
        torch.manual_seed(0)
        dtype = torch.float32 if mixed_precision else None
        model = build(config, device, attn_implementation, dtype).train()
        if chunked_loss:
            use_chunked_loss(model)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()
        train = training_step(model, device, "compiled" if compiled else "eager", mixed_precision)
        ids = zipf_ids(config.vocab_size, batch_size, sequence_length, device=device)
        inputs = {"input_ids": ids, "labels": ids}
        if document_length:
            positions = torch.arange(sequence_length, device=device) % document_length
            inputs["position_ids"] = positions.expand_as(ids)
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()

        times = timed(lambda train=train, inputs=inputs: train(**inputs), repeats, device, warmup=3)
        if not torch.isfinite(train(**inputs)):
            raise InputError(f"{name} trains to a loss that is not finite: no figure is reported.")
        case = f"{Path(model_config).stem} {batch_size}x{sequence_length} step"
        case += f", documents of {document_length}" if document_length else ""
        options = {
            "mixed precision": mixed_precision,
            "chunked loss": chunked_loss,
            "gradient checkpointing": gradient_checkpointing,
        }
        chosen = [option for option, is_on in options.items() if is_on]
        variant = ", ".join([name, attn_implementation, "compiled" if compiled else "eager", *chosen])
        more = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device.startswith("cuda") else {}
        flops = flops_per_token(model, sequence_length) * ids.numel()
        rows.append(measured_row("train", case, variant, times, ids.numel(), flops, **more))
        del model, train
        release()
    return rows


@torch.no_grad()
def benchmark_generate(
    model_config: str,
    *,
    batch_size: int,
    sequence_length: int,
    new_tokens: int,
    repeats: int,
    device: str,
    attn_implementation: str = "sdpa",
    only: str | None = None,
    static_cache: bool = False,
    tensor_parallel: bool = False,
) -> list[dict]:
    """Rows of results for a forward pass and a decode step of every model, or of the one named `only`.

    `static_cache` lets `generate` compile the step. On a GPU a row is added for the step as a CUDA graph alone, unless
    `tensor_parallel` divides every model among the processes of torchrun; FLOPs are then those of one process. Raises
    `InputError` for a config that does not load, and for one that cannot be divided.
    """
    rows, parts = [], processes() if tensor_parallel else 1
    shape, divided = Path(model_config).stem, f", tensor parallel {parts}" if tensor_parallel else ""
    models = peers(model_config, only).items()
    for name, config in tqdm(models, desc="generate", file=sys.stderr, disable=not is_first_process()):
        torch.manual_seed(0)
        if tensor_parallel:  # the same weights in every process
            model = divide(build(config, own_device(device), attn_implementation).cpu(), device).eval()
        else:
            model = build(config, device, attn_implementation).eval()
        ids = zipf_ids(config.vocab_size, batch_size, sequence_length, device=device)
        times = timed(lambda model=model, ids=ids: model(ids, use_cache=False), repeats, device)
        case = f"{shape} {batch_size}x{sequence_length} forward"
        flops = flops_per_token(model, sequence_length) / 3 * ids.numel() / parts
        rows.append(measured_row("generate", case, name + divided, times, ids.numel(), flops))

        steps = decode_steps(model, ids, new_tokens, repeats, device, static_cache)
        case = f"{shape} batch {batch_size} decode step"
        variant = name + divided + (", static cache" if static_cache else ", default cache")
        rows.append(measured_row("generate", case, variant, steps, batch_size))
        if static_cache and device.startswith("cuda") and not tensor_parallel:
            case = f"{shape} batch {batch_size} decode step, graph replay"
            rows.append(
                measured_row("generate", case, name, graph_replays(model, ids, new_tokens, repeats), batch_size)
            )
        del model
        release()
    return sorted(rows, key=lambda entry: entry["case"], reverse=True)  # stable: this model first in each case


def graph_replays(model, ids: torch.Tensor, new_tokens: int, repeats: int) -> list[float]:
    """Milliseconds of one decode step as a CUDA graph, without the library's loop around it."""
    prompt = ids.shape[1]
    length = prompt + new_tokens
    cache = StaticCache(config=model.config, max_cache_len=length)
    model(ids, **{CACHE_NAME: cache})
    seen = torch.arange(length, device=ids.device) <= prompt
    inputs = {"input_ids": ids[:, -1:].clone(), CACHE_NAME: cache}
    inputs |= {"attention_mask": seen.expand(len(ids), 1, 1, length).contiguous()}
    inputs |= {"position_ids": torch.full_like(ids[:, -1:], prompt)}
    # this model's steps are recorded as they are, see decode_graph_complexity_deep.py
    compiled = model if model.config.model_type == "complexity-deep" else torch.compile(model)

    def rewind():
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt)

    for _ in range(3):
        rewind()
        compiled(**inputs)
    rewind()
    replay, _ = record(lambda: compiled(**inputs), ids.device)
    times = []
    for _ in range(10 * repeats):
        rewind()
        times += timed(replay, 1, ids.device.type, warmup=0)
    return times
