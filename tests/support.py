"""What tests share: small models, commands run in this process, and how near a kernel must come to the truth."""

import contextlib
import io
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from complexity_deep import ComplexityDeepConfig, ComplexityDeepForCausalLM

GOLDEN = Path(__file__).parent / "golden"
REPOSITORY = Path(__file__).resolve().parents[1]


def tiny_config(**overrides) -> ComplexityDeepConfig:
    """configs/tiny.json with `overrides`."""
    return ComplexityDeepConfig.from_pretrained(REPOSITORY / "configs" / "tiny.json", **overrides)


def tiny_model(std: float = 0.3, seed: int = 0, dtype=torch.float32, **overrides) -> ComplexityDeepForCausalLM:
    """A tiny model in eval mode whose weights are large enough (N(0, std)) for every path to show in the logits."""
    torch.manual_seed(seed)
    model = ComplexityDeepForCausalLM(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.ndim > 1:
                tensor.normal_(0.0, std)
            elif isinstance(tensor, torch.nn.Parameter):
                tensor.add_(torch.randn_like(tensor) * std)
    return model.to(dtype)


WIDTH = 32  # of the hidden states of `triton_model`


def triton_model(**options) -> ComplexityDeepForCausalLM:
    """A model of one layer on the Triton kernels, on the GPU or in the interpreter, which has few programs to run."""
    small = {"hidden_size": WIDTH, "intermediate_size": 48, "num_experts": 2, "dynamics_controller_hidden": 8}
    small |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_model(std=0.1, **{**small, **options})
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.set_kernels_implementation("triton")
    model.set_experts_implementation("cggr")
    return model


def tiny_tokenizer(vocab_size: int = 257) -> PreTrainedTokenizerFast:
    """Words "w0", "w1" and so on, each its own id; unknown words are "w3"."""
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(vocab_size)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w3", eos_token="w0", pad_token="w1")


def random_ids(*shape: int, vocab_size: int = 257, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def run_command(name: str, *options: object) -> None:
    """A command of scripts/ in this process, which has done the imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        runpy.run_path(str(REPOSITORY / "scripts" / f"{name}.py"), run_name="__main__")


def outcome_of(name: str, *options: object) -> tuple[int, str, str]:
    """`run_command` as a shell sees it: exit status, what was printed on stdout, and on stderr."""
    status = 0
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            run_command(name, *options)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
            errors.write(f"{stop.code}\n" if isinstance(stop.code, str) else "")
    return status, output.getvalue(), errors.getvalue()


@contextlib.contextmanager
def meeting_place() -> Iterator[dict[str, str]]:
    """The environment by which processes meet at a store of this process, as those of torchrun do.

    A free port that is only named to them may be taken by somebody else before the first of them listens there.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def close(actual, expected, tolerance=None):
    """Largest difference, relative to the largest expected value: 1e-5, or 1e-11 in fp64."""
    tolerance = tolerance or (1e-11 if expected.dtype == torch.float64 else 1e-5)
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0)


def relative_rms(found: torch.Tensor, truth: torch.Tensor) -> float:
    """RMS of the difference over the RMS of the fp64 `truth`. Where `truth` is zero, the norm of the difference."""
    difference, scale = (found.double() - truth).norm(), truth.norm()
    return float(difference / scale) if scale > 0 else float(difference)


def assert_near_truth(found: torch.Tensor, truth: torch.Tensor, twin: torch.Tensor, what: object = "") -> None:
    """Hold a kernel's result to the fp64 `truth`: within 1e-5 in fp32, else within twice the error of `twin`.

    `twin` is what PyTorch computes from the same inputs in the dtype that `found` must have.
    """
    assert found.dtype == twin.dtype and found.shape == truth.shape, (what, found.dtype, found.shape)
    error = relative_rms(found, truth)
    limit = 1e-5 if twin.dtype == torch.float32 else 2 * relative_rms(twin, truth)
    assert error <= limit, (what, error, limit)
