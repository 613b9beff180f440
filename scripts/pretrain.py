"""Pretrain a causal language model on text, from scratch, with Trainer.

    python scripts/pretrain.py --config recipes/demo.yaml
    python scripts/pretrain.py --config recipes/demo.yaml --max-steps 20 --output-dir /tmp/try
    python scripts/pretrain.py --config recipes/30m.yaml --sources 'data/edu/train-*.parquet' --routing balanced
    accelerate launch --config_file recipes/accelerate/ddp.yaml scripts/pretrain.py --config recipes/150m.yaml
    accelerate launch --config_file recipes/accelerate/tp.yaml scripts/pretrain.py --config recipes/1.5b.yaml

A recipe holds ScriptArguments and any of transformers' TrainingArguments; the command line overrides it. The model's
shape comes from a config file (any architecture that AutoConfig knows), its vocabulary from the tokenizer. Giving the
same command again resumes from the newest intact checkpoint, with no document repeated or skipped.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from architecture_monitors import ArchitectureMonitors
from atomic_checkpoint import last_good_checkpoint
from chunked_loss import use_chunked_loss
from command_line import InputError, run_script, uninterrupted
from model_flops import flops_per_token
from new_model import load_tokenizer, new_model
from packed_dataset import PackedCollator, PackedDocuments, ResumableLoader, held_out_rows
from perplexity_metric import perplexity_metrics, shown_perplexity, token_nll
from resumable_trainer import ResumableTrainerMixin
from routing_balance import compare_routing, count_once
from run_identity import check_model, files_of
from tensor_parallel import ShardedModelMixin, requested_parallelism, shard
from text_sources import load_sources
from training_arguments import RecipeParser, check_counts, check_shares, check_training
from training_report import TrainingProgress, write_report
from transformers import Trainer, TrainingArguments, logging, set_seed

try:
    import complexity_deep  # noqa: F401  (importing it makes AutoConfig know "complexity-deep")
except ImportError as error:
    sys.exit(f"The package is not installed ({error}): run `pip install -e .[train]` in the repository first.")


@dataclass
class ScriptArguments:
    """Model and data; everything about optimisation is in TrainingArguments."""

    model_config: str = field(metadata={"help": "JSON file with the model's shape, for example configs/demo.json."})
    tokenizer: str = field(metadata={"help": "Tokenizer folder written by train_tokenizer.py, or a Hub id."})
    sources: list[str] = field(
        default_factory=lambda: ["HuggingFaceFW/fineweb-edu:sample-10BT"],
        metadata={"help": "Text sources: 'embedded', a file pattern, or owner/name:configuration on the Hub."},
    )
    source_weights: list[float] | None = field(
        default=None, metadata={"help": "Share of documents from each source; without it they follow each other."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    validation_sources: list[str] | None = field(
        default=None, metadata={"help": "Sources to validate on; without them, documents are held out of `sources`."}
    )
    held_out_fraction: float = field(
        default=0.01, metadata={"help": "Share of documents held out for validation, chosen by the hash of their text."}
    )
    held_out_rows: int = field(default=256, metadata={"help": "Validate on at most this many rows."})
    row_length: int | None = field(
        default=None, metadata={"help": "Tokens per training row; by default the model's max_position_embeddings."}
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Documents shuffled together; as many are read again when a run resumes."}
    )
    mask_across_documents: bool = field(
        default=True, metadata={"help": "Let no token attend to another document of its row."}
    )
    max_tokens: float | None = field(
        default=None, metadata={"help": "Train on at least this many tokens, instead of for max_steps steps."}
    )
    routing: str | None = field(
        default=None, metadata={"help": "Routing table of a new model: modulo, random or balanced (else the config's)."}
    )
    scaled_residual_init: bool | None = field(
        default=None,
        metadata={"help": "Start the projections that write to the residual stream smaller, by sqrt(2 x layers)."},
    )
    routing_sample_tokens: float = field(
        default=20e6, metadata={"help": "Balance the routing table over this many tokens from the start of the text."}
    )
    expert_parallel_size: int = field(
        default=1,
        metadata={"help": "Divide whole experts among so many processes (with recipes/accelerate/tp.yaml)."},
    )
    monitor_steps: int = field(
        default=100, metadata={"help": "Log the architecture's monitors every so many steps; 0 for never."}
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "Attention backend: eager, sdpa, flash_attention_2, ..."}
    )
    chunked_loss: bool = field(
        default=True, metadata={"help": "Compute the loss without ever holding the logits of all tokens."}
    )
    z_loss: float = field(
        default=0.0, metadata={"help": "Weight of the squared log of the softmax's denominator (1e-4 is usual)."}
    )


class PretrainTrainer(ResumableTrainerMixin, ShardedModelMixin, Trainer):
    """Trainer that keeps its place in the text, and decays matrices only."""

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
            # Its own, because a starting loader draws from it, and a resumed run starts its loader once more.
            generator=torch.Generator(),
        )
        return self.progress.loader

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

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


def load_data(
    script_args: ScriptArguments, training_args: TrainingArguments, tokenizer, row_length: int, processes_per_row: int
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


def check_options(script_args: ScriptArguments, training_args: TrainingArguments) -> None:
    """Raise `InputError` for options that cannot be meant, before any work begins."""
    if (training_args.max_steps > 0) == ((script_args.max_tokens or 0) > 0):
        raise InputError(
            "Either max_tokens or max_steps is needed, and only one (0 takes back that of a recipe): text is a stream, "
            "and the number of its rows is not known beforehand."
        )
    if training_args.n_gpu > 1:
        raise InputError(
            f"One process sees {training_args.n_gpu} GPUs: start one for each with `accelerate launch --config_file "
            "recipes/accelerate/ddp.yaml`, or choose one with CUDA_VISIBLE_DEVICES."
        )
    if script_args.z_loss and not script_args.chunked_loss:
        raise InputError("z_loss is a part of the chunked loss: set chunked_loss to true, or z_loss to 0.")
    if script_args.z_loss and training_args.label_smoothing_factor:
        raise InputError("z_loss and label_smoothing_factor do not go together: set one of them to 0.")
    counts = ("row_length", "shuffle_buffer", "held_out_rows", "routing_sample_tokens", "expert_parallel_size")
    check_counts(**{name: getattr(script_args, name) for name in counts})
    check_shares(held_out_fraction=script_args.held_out_fraction)
    check_training(training_args)


def main(script_args: ScriptArguments, training_args: TrainingArguments) -> None:
    check_options(script_args, training_args)
    set_seed(training_args.seed)
    logging.disable_progress_bar()  # the one for writing weights would break into the training bar at every checkpoint
    with training_args.main_process_first(local=False, desc="looking for a checkpoint"):
        checkpoint = last_good_checkpoint(training_args.output_dir)
    training_args.logging_nan_inf_filter = False  # it would show a run that diverged as one at loss 0
    training_args.ignore_data_skip = True  # the stream goes to its place by itself, without reading what was used
    training_args.remove_unused_columns = False  # there are none, and a compiled model under FSDP2 hides what it uses
    training_args.eval_on_start = checkpoint is None

    tokenizer = load_tokenizer(script_args.tokenizer)
    model = new_model(
        script_args.model_config,
        tokenizer,
        script_args.attn_implementation,
        script_args.routing,
        script_args.scaled_residual_init,
    )
    if checkpoint:
        check_model(checkpoint, model.config)
    parallelism = requested_parallelism(training_args.world_size, script_args.expert_parallel_size)
    if parallelism:
        model = shard(model, parallelism, checkpoint)
    processes_per_row = parallelism.tp_size if parallelism else 1
    if script_args.chunked_loss:
        use_chunked_loss(model, script_args.z_loss)
    row_length = script_args.row_length or model.config.max_position_embeddings
    if row_length > model.config.max_position_embeddings:
        raise InputError(
            f"row_length {row_length} is more than the model's {model.config.max_position_embeddings} positions."
        )
    tokenizer.model_max_length = row_length
    training_rows, validation_rows = load_data(script_args, training_args, tokenizer, row_length, processes_per_row)

    rows_per_step = (
        training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    ) // processes_per_row
    if training_args.max_steps <= 0:
        training_args.max_steps = math.ceil(script_args.max_tokens / (rows_per_step * row_length))
    routing = model.config.routing if getattr(model.config, "is_routed", False) else None
    if routing == "balanced" and not checkpoint:  # a checkpoint holds its table
        what = (training_rows.stream, tokenizer, model.config.vocab_size, script_args.routing_sample_tokens)
        model.balance_routing(count_once(training_args, *what, training_rows.held_out_fraction))
    trainer = PretrainTrainer(
        model=model,
        args=training_args,
        train_dataset=training_rows,
        eval_dataset=validation_rows,
        data_collator=PackedCollator(script_args.mask_across_documents),
        compute_metrics=perplexity_metrics,
        preprocess_logits_for_metrics=token_nll,
        processing_class=tokenizer,
        settings={
            "sources": script_args.sources,
            "source_weights": script_args.source_weights,
            "files of the sources": files_of(script_args.sources),
            "text_column": script_args.text_column,
            "mask_across_documents": script_args.mask_across_documents,
            "z_loss": script_args.z_loss,
            "routing": routing,
            # The optimizer of a model divided this way is stored in another form.
            "tensor x expert parallelism": [parallelism.tp_size, parallelism.ep_size] if parallelism else [1, 1],
            **training_rows.settings,
            "rows per step": rows_per_step,
        },
        progress=TrainingProgress(
            rows_per_step * row_length, flops_per_token(model, row_length), training_args.world_size
        ),
    )
    if model.config.model_type == "complexity-deep" and script_args.monitor_steps > 0:
        trainer.monitors = ArchitectureMonitors(trainer, script_args.monitor_steps)
        trainer.add_callback(trainer.monitors)
    metrics = trainer.train_and_evaluate(checkpoint)

    with uninterrupted():
        trainer.save_state()  # first, for it marks the folder as a run's
        trainer.save_model(training_args.output_dir)
        if trainer.is_world_process_zero():
            facts = {
                "text": script_args.sources,
                "tokens": trainer.state.global_step * rows_per_step * row_length,
                "steps": trainer.state.global_step,
                "rows_per_step": rows_per_step,
                "row_length": row_length,
                "documents_read_by_process_0": sum(cursor["documents_read"] for cursor in training_rows.cursors),
                "passes_over_the_text": 1 + min(cursor["epoch"] for cursor in training_rows.cursors),
                "processes": training_args.world_size,
            }
            if routing:
                ids = torch.tensor(validation_rows["input_ids"])
                facts.update(compare_routing(model, ids, training_args.per_device_train_batch_size))
            options = {**asdict(script_args), **training_args.to_dict()}
            write_report(training_args.output_dir, model, trainer.state.log_history, facts, options)
            print(f"{training_args.output_dir}: held-out perplexity {shown_perplexity(metrics)}")
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    run_script(main, *RecipeParser((ScriptArguments, TrainingArguments), description=__doc__).parse())
