"""Trainer checkpoints that are either complete or absent.

A checkpoint is written under `.unfinished/`, closed with a manifest of the size and checksum of every file, flushed to
the disk and only then renamed to `checkpoint-N`. A process killed at any instant leaves the earlier checkpoints as they
were. On resume the manifest is compared with the files, and a damaged checkpoint is set aside for the one before it.
"""

import json
import os
import re
import shutil
import zlib
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from complexity_deep.workflow.command import InputError, first_line

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"


def _checksum(path: Path) -> int:
    """CRC-32: it is there to find damage, not forgery, and reads as fast as the disk."""
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def write_manifest(folder: Path) -> None:
    """Record every file of the folder and flush all of it to the disk, the manifest last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {str(path.relative_to(folder)): [path.stat().st_size, _checksum(path)] for path in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(entries, indent=1))
    for path in [*files, manifest, folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"it has no readable {MANIFEST}"
    for name, (size, checksum) in entries.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        if _checksum(path) != checksum:
            return f"{name} does not have the bytes that were written"
    return None


def last_good_checkpoint(output_dir: str, set_aside: bool = True) -> Path | None:
    """The newest intact checkpoint; newer damaged ones are reported, and renamed so that nothing else takes them."""
    found = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d+)", path.name):
            found[int(match[1])] = path
    for step in sorted(found, reverse=True):
        problem = damage(found[step])
        if problem is None:
            return found[step]
        if set_aside:
            aside = found[step].with_name(f"_damaged-{found[step].name}")
            shutil.rmtree(aside, ignore_errors=True)
            found[step].rename(aside)
            print(f"{found[step]} is damaged: {problem}. It is now {aside.name}, and the one before it is used.")
    return None


class AtomicCheckpointMixin:
    """Put before Trainer in the bases of a class, so that its `_save_checkpoint` becomes atomic."""

    _checkpoint_root = None  # where Trainer writes checkpoints just now, if not into output_dir

    def _get_output_dir(self, trial):
        return self._checkpoint_root or super()._get_output_dir(trial)

    def save_extra_state(self, checkpoint: Path) -> None:
        """Write what Trainer does not know of into the checkpoint; called on every process."""

    def _save(self, output_dir=None, state_dict=None):
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self._checkpoint_root is None or not isinstance(model, PreTrainedModel):
            return super()._save(output_dir, state_dict)
        # Trainer loads a checkpoint by the names of the model's parameters, and leaves as they are those that it does
        # not find. The library writes some models by other names, such as stacked experts as single ones.
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            return super()._save(output_dir, state_dict)
        finally:
            del model.save_pretrained

    def _save_checkpoint(self, model, trial):
        root = Path(self._get_output_dir(trial))
        unfinished = root / UNFINISHED
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()

        limit, push = self.args.save_total_limit, self.args.push_to_hub
        # Old checkpoints may go, and an upload may start, only when the new one has its name.
        self.args.save_total_limit, self.args.push_to_hub = None, False
        self._checkpoint_root = str(unfinished)
        try:
            super()._save_checkpoint(model, trial)
            self.save_extra_state(unfinished / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._publish(unfinished / name, root / name)
        # each file format reports a full disk its own way
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            last = last_good_checkpoint(root, set_aside=False)
            raise InputError(
                f"{name} could not be written to {root} ({first_line(error)}); "
                f"{f'{last.name} is intact' if last else 'there is no earlier one'}. "
                "Make room and give the same command again."
            ) from error
        except KeyboardInterrupt:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit, self.args.push_to_hub = limit, push
            self._checkpoint_root = None
        self.accelerator.wait_for_everyone()
        if push:
            self._push_from_checkpoint(str(root / name))
        if self.args.should_save:
            rotate_checkpoints(str(root), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _publish(self, written: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        write_manifest(written)
        shutil.rmtree(final, ignore_errors=True)
        written.rename(final)
        written.parent.rmdir()
