"""The options of pretraining beside transformers' TrainingArguments."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.training.muon import check_muon
from complexity_deep.workflow.training.training_arguments import check_counts, check_shares, check_training


@dataclass
class PretrainingArguments:
    """Model and data, and of optimisation what TrainingArguments do not have."""

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
    optimizer: str | None = field(
        default=None,
        metadata={"help": "muon: Muon for matrices and AdamW for embeddings and vectors, instead of `optim`."},
    )
    z_loss: float = field(
        default=0.0, metadata={"help": "Weight of the squared log of the softmax's denominator (1e-4 is usual)."}
    )


def check_pretraining(script_args: PretrainingArguments, training_args: TrainingArguments) -> None:
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
    if script_args.optimizer == "muon":
        check_muon(training_args, script_args.expert_parallel_size)
    elif script_args.optimizer is not None:
        raise InputError(f"optimizer can be muon, but is '{script_args.optimizer}': others are named by optim.")
    counts = ("row_length", "shuffle_buffer", "held_out_rows", "routing_sample_tokens", "expert_parallel_size")
    check_counts(**{name: getattr(script_args, name) for name in counts})
    check_shares(held_out_fraction=script_args.held_out_fraction)
    check_training(training_args)
