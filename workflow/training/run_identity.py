"""What makes a training run this run: compared with a checkpoint before training goes on from it.

A checkpoint stores these settings beside its weights. What an older checkpoint does not store is taken from the other
files in it, and left out of the comparison where it is in none of them.
"""

import json
import math
import os
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.data.sources import matching_files

# Fields of a config that change nothing of what is computed, or that the tokenizer and Trainer set.
NOT_COMPUTATION = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "use_cache", "return_dict"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "output_attentions", "output_hidden_states"),
    *("output_router_logits", "id2label", "label2id", "problem_type"),
}
# Training arguments that change what a step does to the weights, or which rows it takes.
COMPARED_ARGUMENTS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16", "seed", "data_seed"),
    *("train_sampling_strategy", "dataloader_drop_last"),
    *("loss_type", "router_aux_loss_coef", "shuffle_dataset"),  # of TRL
)
# Schedules whose learning rate at a step does not depend on how many steps there are in all.
ENDLESS_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")


def computation(config: PreTrainedConfig) -> dict:
    """The fields of a model config that change what the model computes, as JSON has them."""
    values = json.loads(json.dumps(config.to_dict(), default=str))
    return {name: value for name, value in values.items() if name not in NOT_COMPUTATION}


def model_settings(model: PreTrainedModel) -> dict:
    return {"model config": computation(model.config), "dtype of the weights": str(model.dtype)}


def argument_settings(args: TrainingArguments) -> dict:
    """What a checkpoint stores of the training arguments.

    The number of steps is among them where the schedule spans it; a run with another schedule may be made longer.
    """
    values = json.loads(json.dumps(args.to_dict(), default=str))
    settings = {name: values[name] for name in COMPARED_ARGUMENTS if name in values}
    warmup_is_share = 0 < args.warmup_steps < 1 and args.lr_scheduler_type != "constant"
    if args.lr_scheduler_type not in ENDLESS_SCHEDULES or warmup_is_share:
        length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
        settings[length] = values[length]
    return settings


def files_of(sources: list[str]) -> str:
    """How many local files the sources match, and how large they are together."""
    files = {file for source in sources for file in matching_files(source)}
    return f"{len(files):,} files of {sum(map(os.path.getsize, files)):,} bytes"


def refuse(checkpoint: Path, name: str, old, new) -> None:
    why = "which would be another run"
    if name in ("max_steps", "num_train_epochs"):
        why = "and the learning-rate schedule spans all steps, so that it would be another run"
    raise InputError(
        f"{checkpoint} was written with {name} = {old}, but it is now {new}, {why}. Resume with the same value, or "
        "name another output_dir."
    )


def compare(checkpoint: Path, written: dict, now: dict) -> None:
    """Raise `InputError` for the first setting that both have and that differs; a model config by its fields."""
    for name, value in now.items():
        if name not in written:
            continue
        if name == "model config":
            compare(checkpoint, written[name], value)
        elif written[name] != value:
            refuse(checkpoint, name, written[name], value)


def check_model(checkpoint: Path, config: PreTrainedConfig) -> None:
    """Raise `InputError` where the config of a checkpoint, if it has one, is that of another model."""
    if not (checkpoint / "config.json").is_file():  # of an adapter, or of weights that FSDP left sharded
        return
    written = PreTrainedConfig.get_config_dict(checkpoint)[0]
    if written.get("model_type") != config.model_type:
        refuse(checkpoint, "model_type", written.get("model_type"), config.model_type)
    compare(checkpoint, computation(type(config).from_pretrained(checkpoint)), computation(config))


def check_optimizer(checkpoint: Path) -> None:
    """Raise `InputError` where optimizer and schedule would start anew."""
    is_deepspeed = any(checkpoint.glob("global_step*"))
    has_optimizer = any(checkpoint.glob("optimizer*")) and any(checkpoint.glob("scheduler*"))
    if not is_deepspeed and not has_optimizer:
        raise InputError(
            f"{checkpoint} holds no state of the optimizer (save_only_model), so the run cannot go on from it: name "
            "another output_dir."
        )


def of_an_older_checkpoint(state: TrainerState, args: TrainingArguments) -> dict:
    """What Trainer itself has always stored, for checkpoints whose settings lack it, and that there was no Muon."""
    older = {"max_steps": state.max_steps, "per_device_train_batch_size": state.train_batch_size, "optimizer": None}
    # Trainer stores whole epochs only.
    same_epochs = math.ceil(args.num_train_epochs) == state.num_train_epochs
    return {**older, "num_train_epochs": args.num_train_epochs if same_epochs else state.num_train_epochs}


def check_same_run(checkpoint: Path, written: dict, now: dict, args: TrainingArguments) -> None:
    """Raise `InputError` where a checkpoint, with the settings `written`, is not of the run with the settings `now`."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    now = json.loads(json.dumps(now, default=str))
    if "rows per step" not in written:
        now["per_device_train_batch_size"] = args.train_batch_size
    compare(checkpoint, {**of_an_older_checkpoint(state, args), **written}, now)
    if 0 < args.max_steps < state.global_step:
        raise InputError(
            f"{checkpoint} is at step {state.global_step} already, and max_steps is {args.max_steps}: name another "
            "output_dir for a shorter run."
        )
    check_optimizer(checkpoint)
