"""Kernels run on the GPU where there is one, else in Triton's interpreter on the CPU."""

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch


def function_with_room():
    """A function that calls another one, and has a frame of 160 KB.

    Python keeps its frames in chunks of 16 KB. A loop whose calls go over the end of a chunk has the next one mapped
    and unmapped every time. In the interpreter that was a third of the time of a kernel. Behind a large frame there is
    room for many.
    """
    names, scope = " = ".join(f"unused_{index}" for index in range(20_000)), {}
    exec(f"def call(function, *a, **k):\n    return function(*a, **k)\n    {names} = None", scope)
    return scope["call"]


def interpret_kernels() -> None:
    """Let Triton's interpreter run the kernels, in less than half the time that it takes by itself.

    Whenever a kernel calls a function of its own, the interpreter exchanges the operations of the language again,
    though the kernel's start has exchanged them. It also looks for overflow in every operation on integers, which
    compiled kernels do not do either, and which no test asks about.
    """
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel file is imported
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:  # the kernel tests are skipped
        return
    exchange, with_room = interpreter._patch_lang, function_with_room()

    def exchange_once(function):
        modules = [m for m in function.__globals__.values() if m is language or m is language.core]
        if any(language.core.is_builtin(module.load) for module in modules):
            return exchange(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = exchange_once
    run = interpreter.GridExecutor.__call__
    interpreter.GridExecutor.__call__ = lambda *arguments, **options: with_room(run, *arguments, **options)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


if not torch.cuda.is_available():
    interpret_kernels()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for the processes that tests start
# A shell has what it starts in the background ignore Ctrl-C. Tests press it, and processes they start inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)


# With two processes that take a file at a time (`make test`), a long file at the end would have one of them wait.
LONGEST_FILES = (
    "test_kernels_in_model",
    "test_pretrain_distributed",
    "test_docs",
    "test_evaluate",
    "test_export_to_hub",
)


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def same_precision():
    """`TrainingArguments` with `torch_compile` lets matrices of fp32 be multiplied in TF32, for the whole process."""
    places = torch.backends, torch.backends.cuda.matmul
    before = [place.fp32_precision for place in places]
    yield
    for place, precision in zip(places, before, strict=True):
        place.fp32_precision = precision


@pytest.fixture
def published_folder(tmp_path):
    """A writable copy of the published tiny checkpoint."""
    folder = tmp_path / "published"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(Path(__file__).parent / "golden" / "v0.13-tiny" / name, folder / name)
    return folder


@pytest.fixture
def nan_filled_memory(monkeypatch):
    """Fill fresh memory with NaN, and indices with one far outside, so that an element no kernel wrote fails."""

    def nan(x):
        if x.is_floating_point():
            x.detach().fill_(float("nan"))
        elif x.dtype in (torch.int32, torch.int64):
            x.fill_(-(2**30))
        return x

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, make=make, **k: nan(make(*a, **k)))


@pytest.fixture(scope="module")
def dataset_cache(tmp_path_factory):
    """What `datasets` keeps of the files of these tests goes where the files are."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", cache)
        yield
