"""The options of fine-tuning beside TRL's ModelConfig and SFTConfig."""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel
from trl import ModelConfig, SFTConfig

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.training.training_arguments import check_counts, check_shares, check_training


@dataclass
class FineTuningArguments:
    """Data; the model and LoRA are in TRL's ModelConfig, everything about optimisation in its SFTConfig."""

    sources: list[str] = field(
        metadata={"help": "Conversations: file patterns, or owner/name:configuration:split on the Hub."}
    )
    source_weights: list[float] | None = field(
        default=None, metadata={"help": "Share of conversations from each source; without it, each conversation once."}
    )
    validation_sources: list[str] | None = field(
        default=None,
        metadata={"help": "Sources to validate on; without them, conversations of `sources` are held out."},
    )
    held_out_fraction: float = field(
        default=0.02, metadata={"help": "Share of conversations held out for validation, by the hash of their text."}
    )
    held_out_rows: int = field(default=512, metadata={"help": "Validate on at most this many conversations."})
    drop_long_conversations: bool = field(
        default=False,
        metadata={"help": "Leave out conversations longer than max_length, which are an error otherwise."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer folder or Hub id; by default the model's own."}
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "After LoRA, also write the model with the adapter merged, into merged/."}
    )


def check_fine_tuning(script_args: FineTuningArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Raise `InputError` for options that cannot be meant, before any work begins."""
    if model_args.model_name_or_path is None:
        raise InputError("There is no model: name a folder or Hub id with --model-name-or-path.")
    if script_args.merge_adapter and not model_args.use_peft:
        raise InputError("--merge-adapter is for LoRA (--use-peft), and this run trains every weight.")
    if training_args.activation_offloading and training_args.device.type == "cpu":
        raise InputError("activation_offloading moves activations from a GPU to the CPU, and this run has no GPU.")
    if training_args.packing and training_args.packing_strategy == "wrapped":
        raise InputError("packing_strategy 'wrapped' cuts conversations, and lets them see each other: use 'bfd'.")
    if training_args.eval_packing and not training_args.packing:  # TRL collates them as conversations of their own
        raise InputError("eval_packing lets held-out conversations see each other: leave it out, or set packing too.")
    if training_args.padding_free and not training_args.packing:
        raise InputError(
            "padding_free without packing is not taken: leave it out, or set packing, which wastes little too."
        )
    if Path(model_args.model_name_or_path).resolve() == Path(training_args.output_dir).resolve():
        raise InputError("output_dir is the folder of the model: name another, so that the model stays what it was.")
    if not script_args.sources:
        raise InputError("No source of conversations is given: name at least one with --sources.")
    check_counts(held_out_rows=script_args.held_out_rows, max_length=training_args.max_length)
    check_shares(held_out_fraction=script_args.held_out_fraction)
    check_training(training_args)


def set_router_loss(training_args: SFTConfig, model: PreTrainedModel) -> None:
    """Write the coefficient of a router's loss into the model's config, as TRL does later.

    A checkpoint has it there, and the config of a run that resumes is compared with the checkpoint's before TRL writes.
    TRL's auxiliary loss is taken off a token-routed model, or `InputError` raised where somebody asked for it: its
    experts are looked up, so that the loss would be a constant which trains nothing.
    """
    config = model.config.get_text_config()
    if model.config.model_type == "complexity-deep":
        if training_args.router_aux_loss_coef:
            raise InputError(
                f"router_aux_loss_coef {training_args.router_aux_loss_coef} weighs the loss of a learned router, and a "
                "token-routed model has none: leave it out."
            )
        training_args.router_aux_loss_coef = 0.0
    elif training_args.router_aux_loss_coef is not None and hasattr(config, "router_aux_loss_coef"):
        config.router_aux_loss_coef = training_args.router_aux_loss_coef
