"""Make a Hub repository of a run: weights, code, tokenizer and a model card from the run's own measurements.

    python scripts/export_to_hub.py runs/30m --repo-id user/model --license apache-2.0 --language en
    python scripts/export_to_hub.py runs/30m --push user/model --license apache-2.0 --language en
    python scripts/export_to_hub.py path/to/published --tokenizer runs/tokenizer --repo-id user/model --language en

MODEL is a folder that pretrain.py or sft.py wrote, with what evaluate.py and analyze.py left in it, or a folder in the
layout of the published package, which is converted. The new folder is tried in a process without this package: it has
to load, and every Python snippet of its card has to run. Only then does it get its name. --push uploads it, to a
private repository unless --public is given, and tags the revision that the card pins.
"""

import argparse
import shutil
from pathlib import Path

from huggingface_hub import HfApi
from transformers import logging

from complexity_deep.workflow.command import ArgumentParser, InputError, needs, run_script, say, whole_folder
from complexity_deep.workflow.provenance import REPOSITORY
from complexity_deep.workflow.saved_model import NAME_ONE, load_model, load_tokenizer_of

with needs("train"):
    from complexity_deep.workflow.publishing.exported_folder import check_folder, probe
    from complexity_deep.workflow.publishing.hub_repository import check_target, push_folder
    from complexity_deep.workflow.publishing.model_card import write_card
    from complexity_deep.workflow.publishing.run_folder import (
        PUBLISHED_LICENSE,
        choose_license,
        is_published,
        weights_folder,
    )
    from complexity_deep.workflow.publishing.run_reports import Run


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


def main(args: argparse.Namespace) -> None:
    run = Path(args.model)
    output = Path(args.output_dir or run.resolve().with_name(f"{run.resolve().name}-hub"))
    repo_id, api = args.push or args.repo_id, HfApi()
    check_target(
        api,
        repo_id,
        args.revision,
        output,
        languages=args.language,
        license=args.license,
        base_model=args.base_model,
        datasets=args.datasets,
        push=bool(args.push),
        public=args.public,
    )
    weights = weights_folder(run)
    facts = Run(run, weights, args.base_model, args.datasets)
    published = is_published(weights)
    license = choose_license(args.license, published)
    logging.disable_progress_bar()
    say(f"loading {weights}")
    model = load_model(weights, dtype="auto")
    tokenizer = load_tokenizer_of(model, args.tokenizer or weights, NAME_ONE)

    with whole_folder(output) as folder:
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
    print(f"{output}: loads, and the snippets of its card run, without this package")
    if args.push:
        say(f"uploading to {args.push}")
        push_folder(api, output, args.push, args.revision, public=args.public)
        print(f"https://huggingface.co/{args.push}, {'public' if args.public else 'private'}, tag {args.revision}")


if __name__ == "__main__":
    run_script(main, parse_args())
