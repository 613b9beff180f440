"""Training steps, forward passes and decode steps of this model and its peers."""

import gc
import statistics
import sys
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig, StaticCache

from complexity_deep.compatibility_complexity_deep import CACHE_NAME
from complexity_deep.decode_graph_complexity_deep import record
from complexity_deep.workflow.benchmarks.results import measured_row
from complexity_deep.workflow.benchmarks.timing import timed
from complexity_deep.workflow.command import InputError, one_line
from complexity_deep.workflow.flops import flops_per_token


def peers(model_config: str, only: str | None) -> dict[str, transformers.PreTrainedConfig]:
    """This model and its peers of the same shape."""
    try:
        ours = AutoConfig.from_pretrained(model_config)
    except (OSError, ValueError) as error:
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
    """A model with random weights, in bf16 on a GPU and fp32 on the CPU unless `dtype` says otherwise."""
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)


def benchmark_train(args) -> list[dict]:
    rows = []
    for name, config in tqdm(peers(args.model_config, args.only).items(), desc="train", file=sys.stderr):
        torch.manual_seed(0)
        dtype = torch.float32 if args.mixed_precision else None
        model = build(config, args.device, args.attn_implementation, dtype).train()
        if args.chunked_loss:
            from complexity_deep.workflow.training.chunked_loss import use_chunked_loss

            use_chunked_loss(model)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        step_model = torch.compile(model) if args.compile else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=args.device.startswith("cuda"))
        ids = zipf_ids(config.vocab_size, args.batch_size, args.sequence_length, device=args.device)
        inputs = {"input_ids": ids, "labels": ids}
        if args.document_length:
            positions = torch.arange(args.sequence_length, device=args.device) % args.document_length
            inputs["position_ids"] = positions.expand_as(ids)
        if args.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()

        def step(step_model=step_model, optimizer=optimizer, inputs=inputs):
            with torch.autocast(args.device.partition(":")[0], torch.bfloat16, enabled=args.mixed_precision):
                loss = step_model(**inputs, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        times = timed(step, args.repeats, args.device, warmup=3)
        if not torch.isfinite(step()):
            raise InputError(f"{name} trains to a loss that is not finite: no figure is reported.")
        case = f"{Path(args.model_config).stem} {args.batch_size}x{args.sequence_length} step"
        case += f", documents of {args.document_length}" if args.document_length else ""
        options = ("mixed_precision", "chunked_loss", "gradient_checkpointing")
        chosen = [option.replace("_", " ") for option in options if getattr(args, option)]
        variant = ", ".join([name, args.attn_implementation, "compiled" if args.compile else "eager", *chosen])
        more = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if args.device.startswith("cuda") else {}
        flops = flops_per_token(model, args.sequence_length) * ids.numel()
        rows.append(measured_row("train", case, variant, times, ids.numel(), flops, **more))
        del model, step_model, optimizer, step
        gc.collect()
        torch.compiler.reset()
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    return rows


@torch.no_grad()
def benchmark_generate(args) -> list[dict]:
    rows = []
    shape = Path(args.model_config).stem
    for name, config in tqdm(peers(args.model_config, args.only).items(), desc="generate", file=sys.stderr):
        torch.manual_seed(0)
        model = build(config, args.device, args.attn_implementation).eval()
        ids = zipf_ids(config.vocab_size, args.batch_size, args.sequence_length, device=args.device)
        times = timed(lambda model=model, ids=ids: model(ids, use_cache=False), args.repeats, args.device)
        case = f"{shape} {args.batch_size}x{args.sequence_length} forward"
        flops = flops_per_token(model, args.sequence_length) / 3 * ids.numel()
        rows.append(measured_row("generate", case, name, times, ids.numel(), flops))

        model.generation_config.eos_token_id = None  # decode all the tokens
        options = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
        options |= {"cache_implementation": "static"} if args.compile else {}

        def decode(count: int, model=model, ids=ids, options=options):
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, pad_token_id=1, **options)

        whole = timed(lambda: decode(args.new_tokens), args.repeats, args.device)
        prefill = statistics.median(timed(lambda: decode(1), args.repeats, args.device))
        steps = [(time - prefill) / (args.new_tokens - 1) for time in whole]
        case = f"{shape} batch {args.batch_size} decode step"
        variant = name + (", static cache" if args.compile else ", default cache")
        rows.append(measured_row("generate", case, variant, steps, args.batch_size))
        if args.compile and args.device.startswith("cuda"):
            case = f"{shape} batch {args.batch_size} decode step, graph replay"
            rows.append(measured_row("generate", case, name, graph_replays(model, ids, args), args.batch_size))
        del model
        torch.compiler.reset()
        gc.collect()
    return sorted(rows, key=lambda entry: entry["case"], reverse=True)  # stable: this model first in each case


def graph_replays(model, ids: torch.Tensor, args) -> list[float]:
    """Milliseconds of one decode step as a CUDA graph, without the library's loop; reading the weights bounds it."""
    length = args.sequence_length + args.new_tokens
    cache = StaticCache(config=model.config, max_cache_len=length)
    model(ids, **{CACHE_NAME: cache})
    seen = torch.arange(length, device=args.device) <= args.sequence_length
    inputs = {"input_ids": ids[:, -1:].clone(), CACHE_NAME: cache}
    inputs |= {"attention_mask": seen.expand(len(ids), 1, 1, length).contiguous()}
    inputs |= {"position_ids": torch.full_like(ids[:, -1:], args.sequence_length)}
    # this model's steps are recorded as they are, see decode_graph_complexity_deep.py
    compiled = model if model.config.model_type == "complexity-deep" else torch.compile(model)

    def rewind():
        for layer in cache.layers:
            layer.cumulative_length.fill_(args.sequence_length)

    for _ in range(3):
        rewind()
        compiled(**inputs)
    rewind()
    replay, _ = record(lambda: compiled(**inputs), ids.device)
    times = []
    for _ in range(10 * args.repeats):
        rewind()
        times += timed(replay, 1, args.device, warmup=0)
    return times
