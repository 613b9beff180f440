"""Continue a prompt with a Complexity-Deep model, streaming to the terminal.

    python scripts/generate.py runs/demo/model "Once upon a time" --max-new-tokens 64
    python scripts/generate.py user/model-on-the-hub --interactive --temperature 0.7

Works on a Hub id, a local folder, and a folder in the layout of the published package (give --tokenizer where it has
none of its own). In --interactive, each line is the next turn of a chat, which is kept as long as it fits the model's
context; where the tokenizer has no chat template, each line is a text of its own to continue. An empty line ends.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator

import torch
from transformers import TextStreamer

from complexity_deep.workflow.command import ArgumentParser, InputError, at_least, positive, run_script, share
from complexity_deep.workflow.flops import total_parameters
from complexity_deep.workflow.saved_model import NAME_ONE, load_model, load_tokenizer_of


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hub id or folder")
    parser.add_argument("prompt", nargs="?", help="text to continue; left out with --interactive")
    parser.add_argument("--tokenizer", help="Hub id or folder of the tokenizer; default: the model's")
    # The second spelling is that of the published package's script.
    parser.add_argument(
        "--max-new-tokens", "--max_tokens", type=at_least(1), default=128, help="longest continuation, in tokens"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-k", type=at_least(0), default=50, help="sample from the k likeliest tokens; 0 is all")
    parser.add_argument("--top-p", type=share, default=0.95, help="sample from the likeliest tokens of this mass")
    parser.add_argument("--repetition-penalty", type=positive, default=1.0, help="above 1 discourages repeats")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--interactive", action="store_true", help="prompt for lines until an empty one")
    args = parser.parse_args()
    if (args.prompt is None) != args.interactive:
        parser.error("give either a prompt or --interactive")
    if not args.temperature >= 0:  # or not a number
        parser.error(f"--temperature must be 0 or more, but is {args.temperature}")
    if not 0 <= args.seed < 2**64:
        parser.error(f"--seed must be from 0 to 2**64 - 1, but is {args.seed}")
    return args


def prompts() -> Iterator[str]:
    """Lines from the terminal until an empty one or the end of the input."""
    with contextlib.suppress(EOFError):
        while line := input("> ").strip():
            yield line


def load(args: argparse.Namespace):
    """Model and tokenizer."""
    model = load_model(args.model, args.device)
    print(f"{args.model}: {total_parameters(model):,} parameters, code from {type(model).__module__}", file=sys.stderr)
    return model, load_tokenizer_of(model, args.tokenizer or args.model, NAME_ONE)


def chat_inputs(tokenizer, messages: list[dict], longest: int):
    """The conversation as inputs of at most `longest` tokens, for which its oldest turns are taken from `messages`."""
    while True:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        if inputs["input_ids"].shape[1] <= longest or len(messages) < 3:
            return inputs
        del messages[:2]  # a question and its answer
        print("(the oldest turn no longer fits the context)", file=sys.stderr)


def main(args: argparse.Namespace) -> None:
    model, tokenizer = load(args)
    torch.manual_seed(args.seed)
    sampling = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}

    def continue_text(inputs, skip_prompt: bool) -> torch.Tensor:
        streamer = TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        return model.generate(
            **inputs.to(model.device),
            max_new_tokens=args.max_new_tokens,
            repetition_penalty=args.repetition_penalty,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )

    if not args.interactive:
        inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
        if inputs["input_ids"].shape[1] == 0:
            raise InputError("The prompt is empty; give some text to continue.")
        continue_text(inputs, skip_prompt=False)
        return
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    messages = []
    for line in prompts():
        if tokenizer.chat_template is None:
            continue_text(tokenizer(line, return_tensors="pt", return_token_type_ids=False), skip_prompt=True)
            continue
        messages.append({"role": "user", "content": line})
        inputs = chat_inputs(tokenizer, messages, positions - args.max_new_tokens)
        reply = continue_text(inputs, skip_prompt=True)[0, inputs["input_ids"].shape[1] :]
        messages.append({"role": "assistant", "content": tokenizer.decode(reply, skip_special_tokens=True)})


if __name__ == "__main__":
    run_script(main, parse_args())
