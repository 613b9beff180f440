"""What the Trainers of pretrain.py and sft.py share: whole checkpoints, one bar, and going on where a run stopped."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from atomic_checkpoint import AtomicCheckpointMixin
from text_sources import InputError
from training_report import TrainingProgress
from transformers import PrinterCallback, ProgressCallback


class ResumableTrainerMixin(AtomicCheckpointMixin):
    """Put before Trainer in the bases of a class that has `load_extra_state`, the reverse of `save_extra_state`.

    `settings` make a run what it is: a checkpoint that was written with others is refused.
    """

    def __init__(self, *, settings: dict, progress: TrainingProgress, **kwargs):
        super().__init__(**kwargs)
        self.settings = settings
        self.progress = progress
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            # accelerate's policy would round the loss and each token's to bf16 too, and sum gradients in it.
            policy = replace(plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32)
            plugin.mixed_precision_policy = policy
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(progress)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.state.global_step >= self.state.max_steps:
            return [], None  # Trainer takes one step more when it resumes a run that is already over
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def log(self, logs, start_time=None):
        self.progress.measure(logs, self.state)
        super().log(logs, start_time)

    def check_settings(self, checkpoint: Path, written: dict) -> None:
        """Raise `InputError` where the settings that a checkpoint was written with are not those of now."""
        for name, value in json.loads(json.dumps(self.settings)).items():
            if written.get(name) != value:
                raise InputError(
                    f"{checkpoint} was written with {name} = {written.get(name)}, but it is now {value}, "
                    "which would be another run. Resume with the same value, or name another output_dir."
                )

    def train_and_evaluate(self, checkpoint: Path | None) -> dict[str, float]:
        """Train from the checkpoint, or from the start, to the end; returns the metrics of the held-out rows."""
        if checkpoint:
            print(f"Resuming from {checkpoint}")
            self.load_extra_state(checkpoint)
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            self.progress.close()  # else the bar would be drawn once more below the sentence of an error
        return self.evaluate()
