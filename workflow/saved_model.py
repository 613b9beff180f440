"""A saved model and its tokenizer, and a sentence for each way in which they do not load."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from complexity_deep.workflow.command import InputError, check_output_folder, first_line

NAME_ONE = ": name one with --tokenizer"  # what to do, where the command has that option


def why_not(path: str | Path, error: Exception) -> str:
    """Why nothing was loaded from `path`: the first line of the error, or that there is no such folder.

    Of a mistyped folder the library's error speaks of the Hub alone: of the form of its ids, or that it is not reached.
    """
    reason = first_line(error)
    try:
        validate_repo_id(str(path))
    except HFValidationError:
        if not Path(path).is_dir():
            return "there is no such folder"
        return reason
    return reason if Path(path).exists() else f"no folder has this name, and from the Hub it does not load: {reason}"


@contextlib.contextmanager
def usable(device: str) -> Iterator[None]:
    """Within it, what is put on a device that is not there raises `InputError`."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"The device '{device}' cannot be used: {first_line(error)}") from error


def check_device(device: str) -> None:
    """Raise `InputError` for a device that is not there."""
    with usable(device):
        torch.empty(0, device=device)


def load_model(
    path: str | Path, device: str = "cpu", model_class: type = AutoModelForCausalLM, **options
) -> PreTrainedModel:
    """The causal language model of a folder or of the Hub, in eval mode on the device. It may bring code of its own.

    `options` go to `from_pretrained`. Raises `InputError` for a model that does not load and for a device that is not
    there.
    """
    check_device(device)  # before weights are read, which takes long
    try:
        model = model_class.from_pretrained(path, trust_remote_code=True, **options).eval()
    except Exception as error:  # a wrong shape, a strict config and code of the folder's own raise classes of their own
        raise InputError(f"'{path}' is not a causal language model that loads: {why_not(path, error)}") from error
    with usable(device):
        return model.to(device)


def ids_of(tokenizer) -> int:
    """How many rows an embedding needs for the ids of a tokenizer, which may leave numbers out."""
    return max(tokenizer.get_vocab().values()) + 1


def load_tokenizer_of(model: PreTrainedModel, path: str | Path, advice: str = "", **options):
    """The tokenizer at `path`, for `model`; `advice` ends the sentences of the `InputError` about it.

    `options` go to `from_pretrained`. A tokenizer that has more tokens than the model embeds is an error too.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True, **options)
    except Exception as error:  # a broken tokenizer.json raises a class of its own
        raise InputError(f"'{path}' has no tokenizer that loads ({why_not(path, error)}){advice}.") from error
    check_vocabulary(model, tokenizer, advice)
    return tokenizer


def check_vocabulary(model: PreTrainedModel, tokenizer, advice: str = "") -> None:
    """Raise `InputError` where a tokenizer has more tokens than the model embeds; `advice` ends its sentence."""
    vocabulary = model.get_input_embeddings().num_embeddings
    if ids_of(tokenizer) > vocabulary:
        raise InputError(
            f"The tokenizer '{tokenizer.name_or_path}' has {ids_of(tokenizer):,} tokens, but the model only "
            f"{vocabulary:,}{advice}."
        )


def output_folder(model: str, name: str, given: str | Path | None = None) -> Path:
    """`given`, or the folder `name` inside that of the model; for one of the Hub, inside a folder of the model's name.

    Raises `InputError` where no file could be written into it.
    """
    folder = Path(given or Path(model if Path(model).is_dir() else Path(model).name, name))
    check_output_folder(folder)
    return folder
