"""The options of pretrain.py and sft.py: how they are read, and what is checked of them before any work begins."""

import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import fields
from pathlib import Path

from huggingface_hub import HfApi
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from trl import TrlParser

from complexity_deep.workflow.command import InputError, OneSentence, check_output_folder, one_line, shipped

# Transformers 5.24 renamed gradient_checkpointing, and warns where the old name is given.
RENAMED = "activation_checkpointing" in {field.name for field in fields(TrainingArguments)}
# What says that a folder belongs to a run, and what would be lost where it does not.
OF_A_RUN = ("checkpoint-*", "_damaged-checkpoint-*", ".unfinished", "trainer_state.json", "training_summary.json")
OF_A_MODEL = ("config.json", "*.safetensors", "*.bin", "tokenizer.json", "adapter_config.json")
AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    pass


class RecipeParser(OneSentence, TrlParser):
    """TRL's parser of a recipe and the command line, with errors of one sentence and lists that may be empty."""

    def __init__(self, dataclass_types, description: str):
        super().__init__(dataclass_types, description=description, formatter_class=_Help)
        # TRL's default is to recompute activations, which costs a fifth of the speed; models here fit without.
        self.set_defaults_with_config(gradient_checkpointing=None if RENAMED else False)

    def add_argument(self, *names, **options):
        if options.get("nargs") == "+":
            options["nargs"] = "*"
        return super().add_argument(*names, **options)

    def recipe(self, named: list[str]) -> str:
        """The file that follows --config, which may be one of this package."""
        path = shipped(named[0]) if named else ""
        if not Path(path).is_file():
            self.error(f"--config '{path}' is no file: name a recipe, such as recipes/demo.yaml.")
        return path

    def parse(self) -> tuple:
        """The dataclasses; a list is empty where nothing follows its option, or [] as in a recipe."""
        arguments = []
        for argument in sys.argv[1:]:
            # TRL looks for "--config" alone, and would take --config=FILE for an option that it does not know.
            arguments += argument.split("=", 1) if argument.startswith("--config=") else [argument]
        arguments = [argument for argument in arguments if argument != "[]"]
        if "--config" in arguments:
            place = arguments.index("--config") + 1
            arguments[place : place + 1] = [self.recipe(arguments[place : place + 1])]
        try:
            *parsed, in_recipe, in_line = self.parse_args_and_config(
                arguments, return_remaining_strings=True, separate_remaining_strings=True
            )
        except Exception as error:  # a wrong file, type or device; each dataclass raises classes of its own
            self.error(one_line(error))
        if in_line:
            self.error(f"unrecognized arguments: {' '.join(in_line)}")
        for option in in_recipe[::2]:  # each is followed by its value
            self.error(f"the recipe has an unknown option '{option.removeprefix('--')}'{self.meant(option)}")
        return tuple(parsed)


def check_counts(**counts: int | float | None) -> None:
    """Raise `InputError` for the first of the named options that is given and less than 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, but is {value}.")


def check_shares(**shares: float) -> None:
    """Raise `InputError` for the first of the named options that is not from 0 to 1."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise InputError(f"{name} is a share and must be from 0 to 1, but is {value}.")


def check_run_folder(folder: str) -> None:
    """Raise `InputError` where a run cannot write, or would write over a model that no run of ours has left."""
    check_output_folder(folder)
    is_run = any(any(Path(folder).glob(pattern)) for pattern in OF_A_RUN)
    found = next((path for pattern in OF_A_MODEL for path in Path(folder).glob(pattern)), None)
    if found and not is_run:
        raise InputError(
            f"--output-dir '{folder}' holds '{found.name}', which no run of this script wrote, and which would be "
            "overwritten: name another."
        )


def check_reports(names: list[str]) -> None:
    """Raise `InputError` where a logger of `report_to` is unknown or not installed."""
    for name in filter(None, names):
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except Exception as error:  # each integration says in its own way that its package is missing
            raise InputError(
                f"--report-to {name} cannot be used ({one_line(error)}): install it, or give --report-to none."
            ) from error


def check_push(training_args: TrainingArguments) -> None:
    """Raise `InputError` where the Hub is out of reach or does not know us."""
    if not training_args.push_to_hub:
        return
    try:
        HfApi().whoami(token=training_args.hub_token)
    except Exception as error:  # the library under the Hub's client, and so its errors, depend on the version
        raise InputError(
            f"--push-to-hub does not reach the Hub ({one_line(error)}): run `hf auth login` on a machine that is "
            "online, or leave it out and upload with export_to_hub.py."
        ) from error


def check_training(training_args: TrainingArguments) -> None:
    """Raise `InputError` for what would stop the run at its end or in its middle."""
    check_run_folder(training_args.output_dir)
    check_counts(**{name: getattr(training_args, name) for name in AT_LEAST_ONE})
    if training_args.auto_find_batch_size:
        raise InputError(
            "auto_find_batch_size would change the rows of a step, for which steps and learning rate are chosen: "
            "lower per_device_train_batch_size and raise gradient_accumulation_steps."
        )
    if training_args.resume_from_checkpoint:
        raise InputError(
            "resume_from_checkpoint is not taken: the same command goes on from the newest intact checkpoint in "
            "output_dir by itself, and another output_dir starts anew."
        )
    if training_args.bf16_full_eval or training_args.fp16_full_eval:
        raise InputError(
            "bf16_full_eval and fp16_full_eval round the weights themselves at the evaluation after training, and so "
            "the model that is saved: leave them out; bf16 and fp16 evaluate in that precision too."
        )
    check_reports(training_args.report_to)
    check_push(training_args)
    if training_args.save_only_model and training_args.process_index == 0:
        print("save_only_model: checkpoints hold no state of the optimizer, so this run cannot be resumed.")
