"""Make a Hub repository of a run: weights, code, tokenizer and a model card from the run's own measurements.

    python scripts/export_to_hub.py runs/30m --repo-id user/model --license apache-2.0 --language en
    python scripts/export_to_hub.py runs/30m --push user/model --license apache-2.0 --language en
    python scripts/export_to_hub.py path/to/published --tokenizer runs/tokenizer --repo-id user/model --language en

MODEL is a folder that pretrain.py or sft.py wrote, with what evaluate.py and analyze.py left in it, or a folder in the
layout of the published package, which is converted. The new folder gets its name only after it loaded, and every Python
snippet of its card ran, in processes that cannot see this package, from a copy of the Hub's cache. --push then uploads
it, to a private repository unless --public is given, and tags the revision that the card pins.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import torch
from command_line import ArgumentParser, InputError, check_output_folder, run_script
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from model_card import PACKAGE, REPOSITORY, Run, write_card
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, logging

try:
    from complexity_deep.checkpoint_complexity_deep import Checkpoint

    importlib.metadata.version(PACKAGE)  # the card says which version wrote it
except ImportError as error:
    sys.exit(f"The package is not installed ({error}): run `pip install -e .[train]` in the repository first.")

PUBLISHED_LICENSE = "cc-by-nc-4.0"
PROBE_TOKENS = 16  # enough for every part of the architecture to show in the logits
LOGITS_TOLERANCE = 1e-4  # relative; another process may choose another kernel
# Runs a file that cannot import this package, whatever the environment has installed.
STRANGER = "import runpy, sys; sys.modules['complexity_deep'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
LOAD_CHECK = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

hub = {{"revision": {revision!r}, "trust_remote_code": True}}
AutoTokenizer.from_pretrained({repo_id!r}, **hub)
model = AutoModelForCausalLM.from_pretrained({repo_id!r}, **hub).eval()
expected = torch.load({expected!r})
with torch.no_grad():
    found = model(expected["input_ids"]).logits
error = (found - expected["logits"]).abs().max() / expected["logits"].abs().max()
if not error < {tolerance}:
    raise SystemExit(f"its logits differ from those of the original by {{error:.1e}} of their scale")
"""


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a run, or in the published layout")
    name = parser.add_mutually_exclusive_group(required=True)
    name.add_argument("--repo-id", metavar="OWNER/NAME", help="write the folder only; its card will say this name")
    name.add_argument("--push", metavar="OWNER/NAME", help="write the folder and upload it to this repository")
    parser.add_argument("--public", action="store_true", help="with --push: make the repository public")
    parser.add_argument("--revision", default="v1", help="tag that the card pins (default: %(default)s)")
    parser.add_argument("--output-dir", help="folder to write; default: MODEL-hub")
    parser.add_argument("--tokenizer", help="folder or Hub id of the tokenizer; default: the model's")
    parser.add_argument(
        "--license", help=f"of the weights, as the Hub spells it; {PUBLISHED_LICENSE} for published ones"
    )
    parser.add_argument("--language", nargs="+", required=True, help="of the training text, as ISO codes: en")
    parser.add_argument("--base-model", help="Hub id of the model that was fine-tuned, if it was a local folder")
    parser.add_argument("--datasets", nargs="+", default=[], help="Hub ids of training data that was in local files")
    return parser.parse_args()


def one_line(error: BaseException) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")


def say(what: str) -> None:
    """Progress for a person, beside the result."""
    print(f"{what} ...", file=sys.stderr, flush=True)


def check_target(args: argparse.Namespace, api: HfApi) -> None:
    """Raise where the result could not be written or uploaded, before any work is done."""
    repo_id = args.push or args.repo_id
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"'{repo_id}' is not a repository name: {one_line(error)}") from error
    if repo_id.count("/") != 1:
        raise InputError(f"'{repo_id}' is not a repository name: write it owner/name.")
    if not re.fullmatch(r"\w[\w.-]*", args.revision):
        raise InputError(f"--revision '{args.revision}' is not a tag: use letters, digits, dots, dashes.")
    for language in args.language:
        if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", language):
            raise InputError(f"--language '{language}' is not an ISO code: write it as the Hub does, e.g. en.")
    if args.public and not args.push:
        raise InputError("--public is about --push, which is not given.")
    if Path(args.output_dir).exists():
        raise InputError(f"'{args.output_dir}' exists already: remove it, or name another --output-dir.")
    check_output_folder(Path(args.output_dir).absolute().parent, "The folder of --output-dir,")
    if not args.push:
        return
    if get_token() is None:
        raise InputError("--push needs a token: run `hf auth login`, or set HF_TOKEN, and give the command again.")
    try:
        api.whoami()
        try:
            is_private = api.repo_info(repo_id).private
            tags = [ref.name for ref in api.list_repo_refs(repo_id).tags]
        except RepositoryNotFoundError:
            return
    except Exception as error:  # the library under the Hub's client, and so its errors, depend on the version
        raise InputError(f"The Hub does not let us push to '{repo_id}': {one_line(error)}") from error
    if args.revision in tags:
        raise InputError(
            f"'{repo_id}' has a tag '{args.revision}', which others may have pinned: give a new --revision."
        )
    if is_private == args.public:
        state = "private: leave out --public" if is_private else "public: add --public"
        raise InputError(f"'{repo_id}' exists and is {state}, or change that on the Hub first.")


def weights_folder(run: Path) -> Path:
    """The folder with the weights of a run: itself, or merged/ for a run of LoRA."""
    if not run.is_dir():
        raise InputError(f"There is no folder '{run}'.")
    if (run / "adapter_config.json").exists():
        if not (run / "merged" / "config.json").exists():
            raise InputError(f"'{run}' is a LoRA adapter: give sft.py --merge-adapter, and export it again.")
        return run / "merged"
    if not (run / "config.json").exists():
        raise InputError(f"'{run}' is no model: it has no config.json.")
    return run


def is_published(weights: Path) -> bool:
    """Whether the weights have the layout of the published package."""
    try:
        checkpoint = Checkpoint.find(str(weights))
    except (OSError, ValueError) as error:
        raise InputError(f"The weights in '{weights}' cannot be read: {one_line(error)}") from error
    if checkpoint is None:
        raise InputError(f"'{weights}' is no model: it has a config.json, but no weights.")
    return checkpoint.is_published


def load(weights: Path, tokenizer: str | None):
    try:
        model = AutoModelForCausalLM.from_pretrained(weights, dtype="auto", trust_remote_code=True).eval()
    except Exception as error:  # a wrong shape, a strict config and code of the folder's own raise classes of their own
        raise InputError(f"'{weights}' is not a causal language model that loads: {one_line(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer or weights, trust_remote_code=True)
    except Exception as error:
        raise InputError(f"'{tokenizer or weights}' has no tokenizer that loads: name one with --tokenizer.") from error
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise InputError(f"The tokenizer has {len(tokenizer):,} tokens, but the model only {vocabulary:,}.")
    return model, tokenizer


def choose_license(license: str | None, published: bool) -> str:
    if published and license not in (None, PUBLISHED_LICENSE):
        raise InputError(
            f"Weights in the published layout are taken for published ones, which stay under {PUBLISHED_LICENSE}; if "
            "you trained these, load and save them with from_pretrained and save_pretrained first."
        )
    if license is None and not published:
        raise InputError("The licence of the weights is not in any file: give it with --license, e.g. apache-2.0.")
    return license or PUBLISHED_LICENSE


def python_snippets(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)


def check_folder(folder: Path, repo_id: str, revision: str, expected: dict[str, torch.Tensor]) -> None:
    """Load the folder, and run the snippets of its card as they stand, each in a process without this package.

    The folder is put where the Hub's client would have downloaded it, so that repo_id and revision mean it.
    """
    with tempfile.TemporaryDirectory(prefix="export-") as scratch:
        scratch = Path(scratch).resolve()
        commit = "0" * 40
        cache = scratch / "hub" / f"models--{repo_id.replace('/', '--')}"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / revision).write_text(commit)
        (cache / "snapshots").mkdir()
        (cache / "snapshots" / commit).symlink_to(folder.resolve())
        torch.save(expected, scratch / "expected.pt")
        checks = {
            "The exported folder": LOAD_CHECK.format(
                repo_id=repo_id,
                revision=revision,
                expected=str(scratch / "expected.pt"),
                tolerance=LOGITS_TOLERANCE if expected["logits"].dtype == torch.float32 else 1e-2,
            )
        }
        for index, snippet in enumerate(python_snippets((folder / "README.md").read_text(encoding="utf-8")), start=1):
            checks[f"Snippet {index} of the card"] = snippet
        caches = {"HF_HOME": "", "HF_HUB_CACHE": "hub", "HF_MODULES_CACHE": "modules"}
        environment = {**os.environ, **{name: str(scratch / place) for name, place in caches.items()}}
        environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        for name, code in checks.items():
            say(f"{name} is tried in a process without this package")
            (scratch / "check.py").write_text(code, encoding="utf-8")
            command = [sys.executable, "-P", "-c", STRANGER, str(scratch / "check.py")]
            result = subprocess.run(
                command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            if result.returncode:
                lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
                raise InputError(f"{name} does not work for somebody else, so nothing was written: {lines[-1]}")


def push(folder: Path, args: argparse.Namespace, api: HfApi) -> None:
    try:
        api.create_repo(args.push, private=not args.public, exist_ok=True)
        api.upload_folder(repo_id=args.push, folder_path=folder, commit_message=f"Export {args.revision}")
        api.create_tag(args.push, tag=args.revision)
    except Exception as error:  # the library under the Hub's client, and so its errors, depend on the version
        raise InputError(
            f"The upload to '{args.push}' failed ({one_line(error)}), but '{folder}' is complete: when the cause is "
            f"gone, give `hf upload {args.push} {folder}` and `hf repos tag create {args.push} {args.revision}`."
        ) from error


def main(args: argparse.Namespace) -> None:
    run = Path(args.model)
    args.output_dir = args.output_dir or run.resolve().with_name(f"{run.resolve().name}-hub")
    output, repo_id, api = Path(args.output_dir), args.push or args.repo_id, HfApi()
    check_target(args, api)
    weights = weights_folder(run)
    facts = Run(run, weights, args.base_model, args.datasets)
    published = is_published(weights)
    license = choose_license(args.license, published)
    logging.disable_progress_bar()
    say(f"loading {weights}")
    model, tokenizer = load(weights, args.tokenizer)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch, "new")
        expected = probe(model)
        say("writing weights, code, tokenizer and card")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if model.config.model_type == "complexity-deep":
            shutil.copyfile(REPOSITORY / "LICENSE", folder / "LICENSE_CODE")
        try:
            write_card(
                folder,
                facts,
                model,
                tokenizer,
                repo_id=repo_id,
                revision=args.revision,
                license=license,
                languages=args.language,
                is_published=published,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"A report file of '{run}' is not as our scripts write it ({error!r}).") from error
        del model  # the checks load it again
        check_folder(folder, repo_id, args.revision, expected)
        folder.rename(output)
    print(f"{output}: loads, and the snippets of its card run, without this package")
    if args.push:
        say(f"uploading to {args.push}")
        push(output, args, api)
        print(f"https://huggingface.co/{args.push}, {'public' if args.public else 'private'}, tag {args.revision}")


@torch.no_grad()
def probe(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Logits of some ids, to be had again from the exported folder."""
    input_ids = torch.randint(model.config.vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": input_ids, "logits": model(input_ids).logits}


if __name__ == "__main__":
    run_script(main, parse_args())
