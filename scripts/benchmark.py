"""Measure this model beside its peers, all in one run, and print what was measured.

    python scripts/benchmark.py generate --model-config configs/30m.json             forward and decode, CPU or GPU
    python scripts/benchmark.py train --model-config configs/1.5b.json --batch-size 8 --sequence-length 2048
    python scripts/benchmark.py kernels                                               needs a CUDA device
    python scripts/benchmark.py users --model-config configs/1.5b.json                what comes without being asked for
    python scripts/benchmark.py generate --speculate --model runs/150m --assistant-model runs/30m --prompts a.parquet
    torchrun --nproc-per-node 2 scripts/benchmark.py generate --tensor-parallel --model-config configs/150m.json

The peers are Qwen3-MoE and Llama of the same shape (Llama as wide as all experts together), from transformers. Prints a
markdown table for people and one JSON line last; adds rows to benchmarks/results.csv with device, versions and commit,
and draws the charts beside it. On a CUDA device the kernel tests run first, and nothing is measured if one fails.

--tensor-parallel divides each model among the GPUs of torchrun, whose number must divide the key/value heads.

--speculate compares ways of speculative decoding with greedy decoding of one saved model, by "vs first" in the table.
A draft is worth what weights and text make it, so it takes trained models, and documents whose beginnings are prompts.
"""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

from complexity_deep.workflow.command import ArgumentParser, InputError, at_least, is_first_process, needs, run_script
from complexity_deep.workflow.provenance import REPOSITORY

with needs("train"):
    from complexity_deep.workflow.benchmarks.kernel_speed import benchmark_kernels
    from complexity_deep.workflow.benchmarks.model_speed import benchmark_generate, benchmark_train, peers, processes
    from complexity_deep.workflow.benchmarks.results import check_results, report
    from complexity_deep.workflow.benchmarks.speculation import benchmark_speculation, check_speculation
    from complexity_deep.workflow.benchmarks.timing import ceilings
    from complexity_deep.workflow.benchmarks.user_paths import PARTS, benchmark_users
    from complexity_deep.workflow.saved_model import check_device


def default_output() -> str:
    """benchmarks/ of this clone, or of the working directory where pip installed the package."""
    return str(REPOSITORY / "benchmarks") if (REPOSITORY / "benchmarks").is_dir() else "benchmarks"


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", choices=("kernels", "train", "generate", "users"), help="what to measure")
    parser.add_argument("--model-config", default=str(REPOSITORY / "configs/30m.json"), help="shape of every model")
    parser.add_argument("--batch-size", type=at_least(1), default=1, help="rows per step")
    parser.add_argument("--sequence-length", type=at_least(1), default=512, help="tokens per row")
    parser.add_argument(
        "--document-length", type=at_least(1), help="tokens of a document; they do not see each other (train)"
    )
    parser.add_argument("--mixed-precision", action="store_true", help="fp32 weights with bf16 autocast (train)")
    parser.add_argument("--chunked-loss", action="store_true", help="the loss of pretrain.py (train)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations (train)")
    parser.add_argument("--attn-implementation", default="sdpa", help="attention backend of every model")
    parser.add_argument("--new-tokens", type=at_least(2), default=64, help="tokens to decode (generate)")
    parser.add_argument("--repeats", type=at_least(1), default=7, help="timed repeats, after two warm-ups")
    parser.add_argument("--compile", action="store_true", help="compile the models (train), static cache (generate)")
    parser.add_argument(
        "--tensor-parallel", action="store_true", help="divide models among torchrun's processes (generate)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--output-dir", default=default_output(), help="where results.csv and charts go")
    parser.add_argument("--only", choices=("complexity-deep", "qwen3-moe", "llama"), help="measure one model")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which to measure (users)")
    parser.add_argument("--speculate", action="store_true", help="measure speculative decoding (generate)")
    parser.add_argument("--model", help="folder or Hub id of the trained model (--speculate)")
    parser.add_argument("--assistant-model", help="folder or Hub id of a smaller model that drafts (--speculate)")
    parser.add_argument("--prompts", nargs="+", help="sources of text, as pretrain.py takes them (--speculate)")
    parser.add_argument("--draft-tokens", type=at_least(1), default=5, help="tokens of a draft (--speculate)")
    parser.add_argument("--early-exit", type=int, help="layers that draft; default: half of them (--speculate)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU (--speculate)")
    parser.add_argument("--skip-tests", action="store_true", help="do not run the kernel tests first")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> list[dict]:
    """The rows of the benchmark that was asked for."""
    if args.benchmark == "kernels":
        return benchmark_kernels(args.device)
    if args.benchmark == "users":
        return benchmark_users(args.model_config, parts=args.parts, repeats=args.repeats, only=args.only)
    if args.speculate:
        names = ("sequence_length", "new_tokens", "draft_tokens", "early_exit", "repeats", "device")
        dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32"))
        folders = args.model, args.assistant_model, args.prompts
        return benchmark_speculation(*folders, dtype=dtype, **{name: getattr(args, name) for name in names})
    names = ("batch_size", "sequence_length", "repeats", "device", "attn_implementation", "only")
    shared = {name: getattr(args, name) for name in names}
    if args.benchmark == "generate":
        return benchmark_generate(
            args.model_config,
            new_tokens=args.new_tokens,
            static_cache=args.compile,
            tensor_parallel=args.tensor_parallel,
            **shared,
        )
    return benchmark_train(
        args.model_config,
        compiled=args.compile,
        document_length=args.document_length,
        mixed_precision=args.mixed_precision,
        chunked_loss=args.chunked_loss,
        gradient_checkpointing=args.gradient_checkpointing,
        **shared,
    )


def main(args: argparse.Namespace) -> None:
    check_results(Path(args.output_dir))
    if args.speculate:
        check_speculation(args)
    elif args.benchmark != "kernels":
        peers(args.model_config, args.only)
    check_device(args.device)
    if args.tensor_parallel and (args.benchmark != "generate" or processes() == 1):
        raise InputError("--tensor-parallel divides the models of generate among processes: start it by torchrun.")
    if args.device.startswith("cuda") and not args.skip_tests and is_first_process():
        names = ("token_routed_gemm", "fused_dynamics", "mu_guided_qkv", "decode_attention", "decode_layer")
        tests = [str(REPOSITORY / f"tests/test_{name}.py") for name in names]
        if not Path(tests[0]).is_file():
            raise InputError("The kernel tests are in a clone only: run there, or give --skip-tests.")
        if importlib.util.find_spec("pytest") is None:
            raise InputError("The kernel tests need pytest: run `pip install pytest`, or give --skip-tests.")
        if subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *tests], cwd=REPOSITORY).returncode:
            raise InputError("The kernel tests fail: no figure is reported.")
    matmul, copy = ceilings(args.device)
    rows = measure(args)
    if is_first_process():
        report(rows, Path(args.output_dir), matmul, copy)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_script(main, parse_args())
