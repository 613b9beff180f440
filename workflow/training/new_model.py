"""The tokenizer of a run and a model with fresh weights for it, with every mix-up said in one sentence."""

import json
import math
import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from complexity_deep.workflow.command import InputError, shipped
from complexity_deep.workflow.saved_model import ids_of

# A vocabulary is often padded to a multiple of at most this, for the sake of the matmul; more than that is a mix-up.
LARGEST_VOCABULARY_PADDING = 128
# What writes to the residual stream in models built like Llama, experts included.
RESIDUAL_PROJECTION = re.compile(r"\.(o_proj|down_proj)(\.weight)?$")


def load_tokenizer(path: str):
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a broken tokenizer.json raises a class of its own
        raise InputError(
            f"There is no tokenizer at '{path}': write one with scripts/train_tokenizer.py --output-dir {path}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer '{path}' has no eos_token to end documents with.")
    return tokenizer


def new_model(
    path: str,
    tokenizer,
    attn_implementation: str,
    routing: str | None = None,
    scaled_residual_init: bool | None = None,
) -> PreTrainedModel:
    """A model with fresh weights in fp32; a vocab_size of null in the file means the tokenizer's.

    `routing` and `scaled_residual_init` replace the file's. A "balanced" table is that of modulo until its tokens are
    counted.
    """
    try:
        shape = dict(json.loads(Path(shipped(path)).read_text()))
    except FileNotFoundError as error:
        raise InputError(f"There is no model config '{path}': name a file such as configs/demo.json.") from error
    except (OSError, ValueError, TypeError) as error:  # the last of JSON that is no object
        raise InputError(f"'{path}' is not a readable JSON model config ({error!r}).") from error
    options = {"routing": routing, "scaled_residual_init": scaled_residual_init}
    shape.update({name: value for name, value in options.items() if value is not None})
    return model_of_shape(shape, path, tokenizer, attn_implementation=attn_implementation)


def model_of_shape(shape: dict, path: str, tokenizer, **implementations) -> PreTrainedModel:
    """`new_model` from the fields of a config; `path` is where they come from, for messages."""
    shape = dict(shape)
    model_type = shape.pop("model_type", None)
    if model_type is None:
        raise InputError(f"'{path}' is no model config, for it has no model_type.")
    vocabulary = ids_of(tokenizer)
    shape["vocab_size"] = shape.get("vocab_size") or vocabulary
    if not vocabulary <= shape["vocab_size"] <= vocabulary + LARGEST_VOCABULARY_PADDING:
        raise InputError(
            f"The vocabulary of '{path}' is {shape['vocab_size']:,} and the tokenizer has {vocabulary:,} tokens: set "
            "vocab_size to null to take the tokenizer's, or train a tokenizer of that size."
        )
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        shape[name] = getattr(tokenizer, name)
    try:
        config = AutoConfig.for_model(model_type, **shape)
    except Exception as error:  # a strict config raises classes of its own
        raise InputError(f"'{path}' is not a model that can be built: {error}") from error
    if shape.get("routing") and not getattr(config, "is_routed", False):
        raise InputError(f"routing is for token-routed models, and '{path}' is none.")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **implementations)
    if shape.get("scaled_residual_init") and model_type != "complexity-deep":  # which does it by itself
        scale_residual_projections(model)
    return model


@torch.no_grad()
def scale_residual_projections(model: PreTrainedModel) -> None:
    """Divide the fresh weights that write to the residual stream by sqrt(2 x layers) (GPT-2, section 2.3)."""
    scaled = [parameter for name, parameter in model.named_parameters() if RESIDUAL_PROJECTION.search(name)]
    if not scaled:
        raise InputError(
            f"{model.config.model_type} has no projection named like Llama's o_proj and down_proj: "
            "set scaled_residual_init to false."
        )
    for parameter in scaled:
        parameter /= math.sqrt(2 * model.config.num_hidden_layers)
