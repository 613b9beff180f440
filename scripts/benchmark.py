"""Measure this model beside its peers, all in one run, and print what was measured.

    python scripts/benchmark.py generate --model-config configs/30m.json             forward and decode, CPU or GPU
    python scripts/benchmark.py train --model-config configs/1.5b.json --batch-size 8 --sequence-length 2048
    python scripts/benchmark.py kernels                                               needs a CUDA device

The peers are Qwen3-MoE and Llama of the same shape (Llama as wide as all experts together), from transformers. Prints a
markdown table for people and one JSON line last; adds rows to benchmarks/results.csv with device, versions and commit,
and draws the charts beside it (benchmark_charts.py). The kernel tests run first on a CUDA device: no figure is reported
on red.
"""

import argparse
import csv
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from benchmark_charts import draw
from command_line import ArgumentParser, InputError, check_output_folder, one_line, run_script
from model_flops import flops_per_token
from provenance import REPOSITORY, provenance
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig, StaticCache

import complexity_deep  # noqa: F401 (registers the architecture)
from complexity_deep.compatibility_complexity_deep import CACHE_NAME
from complexity_deep.decode_graph_complexity_deep import record

FIELDS = (
    "benchmark", "case", "variant", "median_ms", "p20_ms", "p80_ms", "tokens_per_s", "tflops", "percent_of_matmul",
    "gb_per_s", "percent_of_copy", "peak_gib", "device", "torch", "transformers", "triton", "commit", "date",
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", choices=("kernels", "train", "generate"), help="what to measure")
    parser.add_argument("--model-config", default=str(REPOSITORY / "configs/30m.json"), help="shape of every model")
    parser.add_argument("--batch-size", type=int, default=1, help="rows per step")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens per row")
    parser.add_argument("--document-length", type=int, help="tokens of a document; they do not see each other (train)")
    parser.add_argument("--mixed-precision", action="store_true", help="fp32 weights with bf16 autocast (train)")
    parser.add_argument("--chunked-loss", action="store_true", help="the loss of pretrain.py (train)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations (train)")
    parser.add_argument("--attn-implementation", default="sdpa", help="attention backend of every model")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to decode (generate)")
    parser.add_argument("--repeats", type=int, default=7, help="timed repeats, after two warm-ups")
    parser.add_argument("--compile", action="store_true", help="compile the models (train), static cache (generate)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--output-dir", default=str(REPOSITORY / "benchmarks"), help="where results.csv and charts go")
    parser.add_argument("--only", choices=("complexity-deep", "qwen3-moe", "llama"), help="measure one model")
    parser.add_argument("--skip-tests", action="store_true", help="do not run the kernel tests first")
    return parser.parse_args()


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


def timed(step, repeats: int, device: str, warmup: int = 2) -> list[float]:
    """Milliseconds of each of `repeats` calls, by CUDA events on a GPU."""
    for _ in range(warmup):
        step()
    times = []
    for _ in range(repeats):
        if device.startswith("cuda"):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            step()
            times.append((time.perf_counter() - begin) * 1e3)
    return times


def ceilings(device: str) -> tuple[float, float]:
    """Measured matmul rate in TFLOP/s (bf16 on a GPU, sustained over half a second) and copy rate in GB/s."""
    cuda = device.startswith("cuda")
    n, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    matmul = statistics.median(timed(lambda: a @ b, 300 if cuda else 10, device)[-50:])
    source = torch.empty(2**30 if cuda else 2**26, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = statistics.median(timed(lambda: target.copy_(source), 20, device))
    return 2 * n**3 / matmul / 1e9, 2 * source.numel() / copy / 1e6


def row(benchmark: str, case: str, variant: str, times: list[float], tokens: int, flops: float = 0.0, **more) -> dict:
    low, high = (statistics.quantiles(times, n=5, method="inclusive")[i] if times[1:] else times[0] for i in (0, 3))
    median = statistics.median(times)
    result = {"benchmark": benchmark, "case": case, "variant": variant}
    result |= {"median_ms": median, "p20_ms": low, "p80_ms": high, "tokens_per_s": tokens / median * 1e3}
    return result | ({"tflops": flops / median / 1e9} if flops else {}) | more


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
            from chunked_loss import use_chunked_loss

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
            sys.exit(f"{name} trains to a loss that is not finite: no figure is reported.")
        case = f"{Path(args.model_config).stem} {args.batch_size}x{args.sequence_length} step"
        case += f", documents of {args.document_length}" if args.document_length else ""
        options = ("mixed_precision", "chunked_loss", "gradient_checkpointing")
        chosen = [option.replace("_", " ") for option in options if getattr(args, option)]
        variant = ", ".join([name, args.attn_implementation, "compiled" if args.compile else "eager", *chosen])
        more = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if args.device.startswith("cuda") else {}
        flops = flops_per_token(model, args.sequence_length) * ids.numel()
        rows.append(row("train", case, variant, times, ids.numel(), flops, **more))
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
        rows.append(row("generate", case, name, times, ids.numel(), flops))

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
        rows.append(row("generate", case, variant, steps, args.batch_size))
        if args.compile and args.device.startswith("cuda"):
            case = f"{shape} batch {args.batch_size} decode step, graph replay"
            rows.append(row("generate", case, name, graph_replays(model, ids, args), args.batch_size))
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


def benchmark_kernels(args) -> list[dict]:
    if not args.device.startswith("cuda"):
        raise InputError("The kernels need a CUDA device.")
    from kernel_cases_decode import decode_attention_rows, decode_layer_rows
    from kernel_cases_dynamics import dynamics_decode_rows, dynamics_rows, qkv_decode_rows, qkv_rows
    from kernel_cases_experts import cggr_rows

    torch.manual_seed(0)
    sizes = (1, 32, 512, 4096, 16384, 65536)
    cases = [functools.partial(cggr_rows, tokens) for tokens in sizes]
    cases += [functools.partial(cggr_rows, 65536, experts, only=["cggr"]) for experts in (64, 256)]
    cases += [dynamics_rows, qkv_rows]
    cases += [functools.partial(rows, tokens) for rows in (dynamics_decode_rows, qkv_decode_rows) for tokens in (1, 32)]
    cases += [functools.partial(decode_attention_rows, *shape) for shape in ((1, 512), (32, 512), (32, 4096))]
    cases += [functools.partial(decode_layer_rows, batch) for batch in (1, 2, 4)]
    measured = [entry for case in tqdm(cases, desc="kernels", file=sys.stderr) for entry in case()]
    return [
        row(
            "kernels",
            f"{entry['op']}, {entry['tokens']} tokens, {entry['pass']}",
            entry["variant"],
            [entry["low"], entry["ms"], entry["high"]],
            entry["tokens"],
            entry.get("flops", 0),
            **({"peak_gib": entry["bytes"] / 2**30} if entry.get("bytes") else {}),
            **({"gb_per_s": entry["gb_per_s"]} if "gb_per_s" in entry else {}),
        )
        for entry in measured
    ]


def report(rows: list[dict], args, matmul: float, copy: float) -> None:
    """Print the table and the JSON line, append to results.csv, draw the charts."""
    source = provenance()
    for entry in rows:
        if entry.get("tflops"):
            entry["percent_of_matmul"] = 100 * entry["tflops"] / matmul
        if entry.get("gb_per_s"):
            entry["percent_of_copy"] = 100 * entry["gb_per_s"] / copy
        entry |= source
    print(f"\n{source['device']}, torch {source['torch']}, transformers {source['transformers']}, {source['commit']}")
    print(f"matmul ceiling {matmul:.4g} TFLOP/s, copy ceiling {copy:.4g} GB/s\n")
    shown = [field for field in FIELDS[1:12] if any(entry.get(field) is not None for entry in rows)]
    print("| " + " | ".join(shown) + " | vs first |\n" + "|---" * (len(shown) + 1) + "|")
    first = {}
    for entry in rows:
        first.setdefault(entry["case"], entry["median_ms"])
        cells = [f"{v:.4g}" if isinstance(v := entry.get(field, ""), float) else str(v) for field in shown]
        print("| " + " | ".join(cells) + f" | {first[entry['case']] / entry['median_ms']:.3g}x |")

    directory = Path(args.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "results.csv"
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        writer.writerows({key: f"{v:.5g}" if isinstance(v, float) else v for key, v in entry.items()} for entry in rows)
    draw(directory)
    print(json.dumps({"matmul_tflops": matmul, "copy_gb_per_s": copy, "rows": rows}))


def check_results(directory: Path) -> None:
    """Raise `InputError` where results could not be added to those of `directory`."""
    check_output_folder(directory)
    path = directory / "results.csv"
    if path.exists():
        try:
            header = path.open(encoding="utf-8").readline().strip()
        except (OSError, ValueError) as error:
            raise InputError(f"'{path}' cannot be read ({error}): name another --output-dir.") from error
        if header != ",".join(FIELDS):
            raise InputError(f"'{path}' is no table of this script's results: name another --output-dir.")


def main(args: argparse.Namespace) -> None:
    check_results(Path(args.output_dir))
    for name in ("batch_size", "sequence_length", "new_tokens", "repeats"):
        if getattr(args, name) < 1 + (name == "new_tokens"):
            raise InputError(f"--{name.replace('_', '-')} is too small: {getattr(args, name)}.")
    if args.device.startswith("cuda") and not args.skip_tests:
        names = ("token_routed_gemm", "fused_dynamics", "mu_guided_qkv", "decode_attention", "decode_layer")
        tests = [str(REPOSITORY / f"tests/test_{name}.py") for name in names]
        if subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *tests], cwd=REPOSITORY).returncode:
            sys.exit("The kernel tests fail: no figure is reported.")
    measure = {"kernels": benchmark_kernels, "train": benchmark_train, "generate": benchmark_generate}[args.benchmark]
    matmul, copy = ceilings(args.device)
    report(measure(args), args, matmul, copy)


if __name__ == "__main__":
    run_script(main, parse_args())
