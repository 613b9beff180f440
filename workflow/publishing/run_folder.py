"""The folder that is exported: where its weights are, which layout they have, and their licence."""

from pathlib import Path

from complexity_deep.checkpoint_complexity_deep import Checkpoint
from complexity_deep.workflow.command import InputError, first_line

PUBLISHED_LICENSE = "cc-by-nc-4.0"


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
        raise InputError(f"The weights in '{weights}' cannot be read: {first_line(error)}") from error
    if checkpoint is None:
        raise InputError(f"'{weights}' is no model: it has a config.json, but no weights.")
    return checkpoint.is_published


def choose_license(license: str | None, published: bool) -> str:
    if published and license not in (None, PUBLISHED_LICENSE):
        raise InputError(
            f"Weights in the published layout are taken for published ones, which stay under {PUBLISHED_LICENSE}; if "
            "you trained these, load and save them with from_pretrained and save_pretrained first."
        )
    if license is None and not published:
        raise InputError("The licence of the weights is not in any file: give it with --license, e.g. apache-2.0.")
    return license or PUBLISHED_LICENSE
