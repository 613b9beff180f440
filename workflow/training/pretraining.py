"""Pretraining's Trainer and its rows."""

import json
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.packed_rows import PackedDocuments, ResumableLoader, held_out_rows
from complexity_deep.workflow.data.text_sources import load_sources
from complexity_deep.workflow.training.architecture_monitors import ArchitectureMonitors
from complexity_deep.workflow.training.pretraining_arguments import PretrainingArguments
from complexity_deep.workflow.training.resumable_trainer import ResumableTrainerMixin
from complexity_deep.workflow.training.tensor_parallel import ShardedModelMixin


class PretrainTrainer(ResumableTrainerMixin, ShardedModelMixin, Trainer):
    """Trainer that keeps its place in the text."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.monitors: ArchitectureMonitors | None = None

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.monitors and self.accelerator.sync_gradients:
            self.monitors.on_gradients()
        return loss

    def get_train_dataloader(self) -> ResumableLoader:
        # Not prepared by accelerate, which would read every row on every process: the dataset knows its share already.
        self.progress.loader = ResumableLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
            device=self.args.device,
            # A loader draws a number when it starts, and a resumed run starts it once more. That must not move
            # the global generator, from which dropout draws.
            generator=torch.Generator(),
        )
        return self.progress.loader

    def _place_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"data_state_{self.args.process_index}.json"

    def save_extra_state(self, checkpoint: Path) -> None:
        checkpoint.mkdir(parents=True, exist_ok=True)  # this process may be here before the one that writes the weights
        state = {"settings": self.settings, "cursors": self.train_dataset.cursors}
        self._place_file(checkpoint).write_text(json.dumps(state))

    def load_extra_state(self, checkpoint: Path) -> None:
        try:
            state = json.loads(self._place_file(checkpoint).read_text())
        except FileNotFoundError:
            raise InputError(f"{checkpoint} was written by fewer processes; resume with as many as before.") from None
        self.check_settings(checkpoint, state["settings"])
        self.train_dataset.cursors = state["cursors"]


def load_rows(
    script_args: PretrainingArguments,
    training_args: TrainingArguments,
    tokenizer,
    row_length: int,
    processes_per_row: int,
):
    """The training rows of this process and the held-out rows of all of them."""
    stream = load_sources(script_args.sources, script_args.source_weights, script_args.text_column, training_args.seed)
    held_out_stream = stream
    held_out_fraction = training_fraction = script_args.held_out_fraction
    if script_args.validation_sources:
        held_out_stream = load_sources(script_args.validation_sources, text_column=script_args.text_column)
        held_out_fraction, training_fraction = 1.0, 0.0
    training_rows = PackedDocuments(
        stream,
        tokenizer,
        row_length,
        shuffle_buffer=script_args.shuffle_buffer,
        seed=training_args.seed,
        held_out_fraction=training_fraction,
        rank=training_args.process_index // processes_per_row,
        world_size=training_args.world_size // processes_per_row,
        workers=max(1, training_args.dataloader_num_workers),
    )
    validation_rows = held_out_rows(
        held_out_stream, tokenizer, row_length, script_args.held_out_rows, held_out_fraction
    )
    return training_rows, validation_rows
