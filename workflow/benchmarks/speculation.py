"""Speculative decoding beside plain greedy decoding of one saved model, on the text of a person's choice."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

from complexity_deep import ComplexityDeepForCausalLM
from complexity_deep.workflow.benchmarks.results import measured_row
from complexity_deep.workflow.benchmarks.timing import timed
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.text_sources import load_sources, read_documents
from complexity_deep.workflow.saved_model import load_model, load_tokenizer_of, why_not

PROMPTS = 16  # documents; what is accepted differs much between texts


@dataclass
class Drafts:
    """What candidate generators proposed: in how many verifying steps, and how many tokens in all of them."""

    steps: int = 0
    tokens: int = 0


@contextlib.contextmanager
def counted_drafts(model) -> Iterator[Drafts]:
    """Within it, calls of `model.generate` add to the counts. The library asks for candidates once in every step."""
    counts, make = Drafts(), model._get_candidate_generator

    def make_counting(*args, **kwargs):
        generator = make(*args, **kwargs)
        propose = generator.get_candidates

        def get_candidates(input_ids: Tensor, **more):
            candidates, logits = propose(input_ids, **more)
            counts.steps += 1
            counts.tokens += candidates.shape[1] - input_ids.shape[1]
            return candidates, logits

        generator.get_candidates = get_candidates
        return generator

    model._get_candidate_generator = make_counting
    try:
        yield counts
    finally:
        del model._get_candidate_generator


def check_speculation(args: argparse.Namespace) -> None:
    """Raise `InputError` for options that do not go together."""
    if args.benchmark != "generate":
        raise InputError(f"--speculate goes with `generate`, not with `{args.benchmark}`.")
    if not args.model or not args.prompts:
        raise InputError(
            "--speculate needs --model and --prompts: what is accepted with random weights or tokens says nothing."
        )
    if args.batch_size != 1:
        raise InputError(f"--batch-size is {args.batch_size}, but the library speculates for one row only.")


def load_prompts(sources: list[str], tokenizer, length: int, device: str) -> list[Tensor]:
    """The first `length` tokens [1, length] of the first documents that are longer."""
    texts = read_documents(load_sources(sources))
    options = {"truncation": True, "max_length": length + 1, "return_tensors": "pt"}
    ids = (tokenizer(text, **options)["input_ids"] for text in texts)
    prompts = list(islice((x[:, :length].to(device) for x in ids if x.shape[1] > length), PROMPTS))
    if not prompts:
        raise InputError(f"No document of --prompts is longer than {length} tokens: give a lower --sequence-length.")
    return prompts


def load_ours(path: str, device: str, dtype: torch.dtype) -> tuple:
    """Model and tokenizer of a folder, run by this package's code and not by what the folder brings along."""
    try:
        model_type = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
    except Exception as error:  # a strict config raises classes of its own
        raise InputError(f"'{path}' is no model that loads: {why_not(path, error)}") from error
    if model_type != ComplexityDeepForCausalLM.config_class.model_type:
        raise InputError(f"'{path}' is of '{model_type}', and --speculate measures this package's models.")
    model = load_model(path, device, ComplexityDeepForCausalLM, dtype=dtype)
    return model, load_tokenizer_of(model, path)


def load_pair(model: str, assistant_model: str | None, device: str, dtype: torch.dtype) -> tuple:
    """Model, tokenizer, and the model that drafts for it, which must have the same vocabulary, or None."""
    target, tokenizer = load_ours(model, device, dtype)
    if assistant_model is None:
        return target, tokenizer, None
    draft, its_tokenizer = load_ours(assistant_model, device, dtype)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"'{assistant_model}' has another vocabulary than '{model}': train it with --tokenizer '{model}'."
        )
    return target, tokenizer, draft


def first_difference(found: Tensor, expected: Tensor) -> int | None:
    """The first position at which two rows [1, L] and [1, M] differ, or None for equal ones."""
    if torch.equal(found, expected):
        return None
    shorter = min(found.shape[1], expected.shape[1])
    differs = (found[0, :shorter] != expected[0, :shorter]).nonzero()
    return int(differs[0]) if len(differs) else shorter


def describe_difference(model, found: Tensor, expected: Tensor, position: int, prompt: int) -> str:
    """Where two continuations part, and how far apart the logits of their two tokens lie there."""
    where = f"at new token {position - prompt + 1}"
    if position >= min(found.shape[1], expected.shape[1]):
        return f"{where}, where one of them ends"
    logits = model(expected[:, :position], use_cache=False, logits_to_keep=1).logits[0, -1].float()
    apart = (logits[expected[0, position]] - logits[found[0, position]]).abs()
    return f"{where}, whose logits lie {apart:.2g} apart"


@torch.no_grad()
def benchmark_speculation(
    model: str,
    assistant_model: str | None,
    prompts: list[str],
    *,
    sequence_length: int,
    new_tokens: int,
    draft_tokens: int,
    early_exit: int | None,
    repeats: int,
    device: str,
    dtype: torch.dtype,
) -> list[dict]:
    """Rows of results for greedy decoding, prompt lookup, early exit and, with `assistant_model`, assisted decoding.

    Times are of whole calls of `generate`, the prompt's pass included, for each new token. A draft has
    `draft_tokens` tokens; early exit drafts with the first `early_exit` layers, by default half of them. Raises
    `InputError` for folders and texts that do not fit, and where in float32 tokens differ from greedy decoding's.
    """
    target, tokenizer, draft = load_pair(model, assistant_model, device, dtype)
    positions, layers = target.config.max_position_embeddings, target.config.num_hidden_layers
    if sequence_length + new_tokens > positions:
        raise InputError(f"--sequence-length and --new-tokens are more than the model's {positions} positions.")
    if not 0 < (early_exit := early_exit or layers // 2) < layers:
        raise InputError(f"--early-exit {early_exit} must be from 1 to {layers - 1}, as the model has {layers} layers.")
    rows = load_prompts(prompts, tokenizer, sequence_length, device)
    for drafting in (target, draft) if draft is not None else (target,):
        settings = drafting.generation_config
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = draft_tokens, "constant"
        settings.assistant_confidence_threshold = 0.0  # else the library ends drafts at the first unsure token
    ways = {
        "greedy": {},
        f"prompt lookup of {draft_tokens}": {"prompt_lookup_num_tokens": draft_tokens},
        f"early exit after layer {early_exit}": {"assistant_early_exit": early_exit},
    }
    if draft is not None:
        ways[f"assisted by {Path(str(assistant_model)).name}"] = {"assistant_model": draft}

    def decode(options: dict) -> list[Tensor]:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": pad, **options}
        return [target.generate(ids, attention_mask=torch.ones_like(ids), **options) for ids in rows]

    expected = decode({})
    tokens = sum(ids.shape[1] - sequence_length for ids in expected)
    case = f"{Path(model).name}, {len(rows)} prompts of {sequence_length}, up to {new_tokens} new tokens, "
    case += str(dtype).removeprefix("torch.")
    measured = []
    for name, options in tqdm(ways.items(), desc="speculate", file=sys.stderr):
        with counted_drafts(target) as drafts:
            found = decode(options)
        variant = name
        if options:
            gained = sum(ids.shape[1] - sequence_length for ids in found)
            share = (gained - drafts.steps) / max(drafts.tokens, 1)
            variant += f": {gained / drafts.steps:.3g} tokens a step, {share:.1%} of drafts taken"
        variant += _comparison(target, name, found, expected, sequence_length, dtype)
        times = timed(lambda options=options: decode(options), repeats, device)
        measured.append(measured_row("speculate", case, variant, [time / tokens for time in times], 1))
    return measured


def _comparison(model, name: str, found: list[Tensor], expected: list[Tensor], prompt: int, dtype) -> str:
    """What to say of texts that differ from greedy's: nothing where none does, and in float32 an error."""
    places = [first_difference(a, b) for a, b in zip(found, expected, strict=True)]
    different = [index for index, place in enumerate(places) if place is not None]
    if not different:
        return ""
    first = different[0]
    what = describe_difference(model, found[first], expected[first], int(places[first] or 0), prompt)
    sentence = f"{name}: {len(different)} of {len(found)} texts are not greedy's; prompt {first + 1} parts {what}"
    if dtype == torch.float32:
        raise InputError(f"{sentence}. In float32 they must be equal, so no figure is reported.")
    print(sentence, file=sys.stderr)
    return f", {len(different)} texts differ"
