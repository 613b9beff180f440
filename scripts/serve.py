"""Serve a model over OpenAI's API: chat and text completions, whole or streamed, many at once.

    python scripts/serve.py runs/demo/model
    python scripts/serve.py runs/demo/model --page

It listens on this machine only, unless --host names another address. The model's name in the API is that of its folder.
The requests are computed together by the library's continuous batching. --page adds a page to talk to the model at /,
which shows the expert of every token. SIGTERM and Ctrl-C end the server within seconds, and running requests are told.
"""

import argparse
from pathlib import Path

import torch

from complexity_deep.workflow.command import ArgumentParser, at_least, needs, run_script
from complexity_deep.workflow.flops import total_parameters
from complexity_deep.workflow.saved_model import NAME_ONE, load_model, load_tokenizer_of

with needs("serve"):
    from transformers.utils import logging as transformers_logging

    from complexity_deep.workflow.publishing.run_folder import weights_folder
    from complexity_deep.workflow.serving.app import Service
    from complexity_deep.workflow.serving.engine import Engine
    from complexity_deep.workflow.serving.server import listen, log, read_key, serve, start_log


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of the model, or Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every one of the machine")
    parser.add_argument("--port", type=at_least(0), default=8000, help="0 is any that is free")
    parser.add_argument("--api-key-file", help="file with the key that requests must bring, in its first line")
    parser.add_argument("--page", action="store_true", help="serve a page to talk to the model at /")
    parser.add_argument("--tokenizer", help="Hub id or folder of the tokenizer; default: the model's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--max-running", type=at_least(1), default=64, help="requests that are computed together")
    parser.add_argument("--max-waiting", type=at_least(0), default=64, help="requests that wait; further ones get 429")
    parser.add_argument(
        "--cache-tokens",
        type=at_least(1),
        default=2**15,
        help="tokens of all prompts and answers kept at once",
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    start_log()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    key = read_key(args.api_key_file)
    listener = listen(args.host, args.port)  # before the model is loaded, which takes long
    folder = Path(args.model)
    weights = weights_folder(folder) if folder.is_dir() else args.model
    model = load_model(weights, args.device, dtype="auto")
    tokenizer = load_tokenizer_of(model, args.tokenizer or weights, NAME_ONE)
    name = folder.resolve().name if folder.is_dir() else args.model
    engine = Engine(model, args.max_running, args.max_waiting, args.cache_tokens)
    log.info(
        "'%s': %s parameters on %s, a context of %s tokens, a cache of %s.",
        name,
        f"{total_parameters(model):,}",
        args.device,
        f"{engine.context:,}",
        f"{engine.cache_tokens:,}",
    )
    serve(Service(name, engine, tokenizer, model.generation_config), listener, key, args.page, args.host)


if __name__ == "__main__":
    run_script(main, parse_args())
