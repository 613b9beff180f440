"""Fine-tune a causal language model on conversations, with TRL's SFTTrainer: every weight, or LoRA through PEFT.

    python scripts/sft.py --config recipes/sft_chat.yaml --model-name-or-path runs/30m
    python scripts/sft.py --config recipes/sft_chat.yaml --sources 'data/sft/*.parquet' --use-peft --merge-adapter
    accelerate launch --config_file recipes/accelerate/ddp.yaml scripts/sft.py --config recipes/sft_academic.yaml

A recipe holds ScriptArguments, TRL's ModelConfig and TRL's SFTConfig; the command line overrides it. The loss is on
what the assistant says, which the generation marks of the chat template tell. Giving the same command again resumes
from the newest intact checkpoint. chat_data.py says what a source may be; the sources are recorded in sft_data.json.

A source has the columns of one of these formats:

    messages                                           chat: role and content, and what else the template renders, such
                                                       as tool_calls; beside it `tools`, JSON schemas
    prompt, completion                                 texts, or messages of which the completion's are learned
    instruction, output (and input)                    as Alpaca has them
    instruction, response (and context)                as Dolly has them
    question, choices, answer (or answerKey)           multiple choice, as MMLU and ARC have it
    question, correct_answer, distractor1 to 3         SciQ
    ctx, endings, label                                HellaSwag
    sentence, option1, option2, answer                 WinoGrande
"""

import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from atomic_checkpoint import last_good_checkpoint
from chat_data import ChatEncoder, load_conversations, mix, split_held_out
from command_line import InputError, one_line, run_script, uninterrupted
from model_flops import flops_per_token
from perplexity_metric import shown_perplexity, summed_metrics
from resumable_trainer import ResumableTrainerMixin
from run_identity import check_model
from training_arguments import RecipeParser, check_counts, check_shares, check_training
from training_report import TrainingProgress, write_report
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    logging,
    set_seed,
)
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

try:
    import complexity_deep  # noqa: F401  (importing it makes AutoConfig know "complexity-deep")
except ImportError as error:
    sys.exit(f"The package is not installed ({error}): run `pip install -e .[train]` in the repository first.")

ADAPTER_CONFIG = "adapter_config.json"
LORA_SETTINGS = ["lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"]
RECORDS = ["sft_data.json", "trainer_state.json", "training_summary.json", "training_summary.md", "loss_curve.png"]


@dataclass
class ScriptArguments:
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


class ChatTrainer(ResumableTrainerMixin, SFTTrainer):
    """SFTTrainer with whole checkpoints, which another run cannot take for its own."""

    def create_model_card(self, *args, **kwargs):
        """Nothing: export_to_hub.py writes the card, from measured files."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss, and for each conversation [1, N] its plain cross-entropy, in nats, and its number of tokens.

        TRL would run the model a second time for logits.
        """
        inputs, seen = self._prepare_inputs(inputs), {}

        def recorded(**arguments):
            seen["outputs"] = model(**arguments)
            return seen["outputs"]

        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(recorded, inputs)
        nll, counted = -seen["outputs"].log_probs.float(), seen["outputs"].label_mask  # [B, S - 1], of the next token
        conversations = torch.arange(len(nll), device=nll.device)[:, None].expand_as(nll)
        if len(nll) == 1 and "position_ids" in inputs:  # packed: a conversation begins where positions do
            conversations = (inputs["position_ids"] == 0).cumsum(dim=1)[:, -nll.shape[1] :] - 1
        sums = [
            torch.zeros(int(conversations.max()) + 1, dtype=torch.float64, device=nll.device).index_add_(
                0, conversations[counted], values[counted].double()
            )
            for values in (nll, counted)
        ]
        return loss, sums[0][None], sums[1][None]

    def save_extra_state(self, checkpoint: Path) -> None:
        if self.is_world_process_zero():
            state = {"settings": self.settings, "tokens": self._total_train_tokens}
            (checkpoint / "sft_state.json").write_text(json.dumps(state))

    def load_extra_state(self, checkpoint: Path) -> None:
        try:
            state = json.loads((checkpoint / "sft_state.json").read_text())
        except FileNotFoundError:
            raise InputError(f"{checkpoint} is not of a fine-tuning run: name another output_dir.") from None
        self.check_settings(checkpoint, state["settings"])
        self._total_train_tokens = state["tokens"]


def load_tokenizer(model_args: ModelConfig, script_args: ScriptArguments, training_args: SFTConfig):
    path = script_args.tokenizer or model_args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=training_args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"There is no tokenizer at '{path}': correct --model-name-or-path, or name a tokenizer with --tokenizer."
        ) from error
    if training_args.chat_template_path:
        try:
            tokenizer.chat_template = Path(training_args.chat_template_path).read_text()
        except OSError as error:
            raise InputError(f"'{training_args.chat_template_path}' is not a template file: {error}.") from error
    return tokenizer


def load_model(model_args: ModelConfig, training_args: SFTConfig) -> PreTrainedModel:
    path = model_args.model_name_or_path
    if Path(path, ADAPTER_CONFIG).exists():
        raise InputError(f"'{path}' is a LoRA adapter: merge it with --merge-adapter and fine-tune the merged model.")
    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            quantization_config=get_quantization_config(model_args),
        )
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def lora_config(model_args: ModelConfig, model: PreTrainedModel):
    """PEFT's configuration with every target found in the model, or None without LoRA."""
    config = get_peft_config(model_args)
    if config is None:
        return None
    if config.target_parameters and (config.lora_dropout or config.use_dora):
        raise InputError(
            "LoRA on 3D weights (lora_target_parameters) takes --lora-dropout 0 and no DoRA: PEFT has none."
        )
    if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        config.target_modules = {config.target_modules}  # TRL makes a string of a list of one, PEFT a pattern of that
    modules = set() if config.target_modules in (None, "all-linear") else config.target_modules
    names = [name for name, _ in [*model.named_modules(), *model.named_parameters()]]
    for target in [*modules, *(config.target_parameters or ())]:
        # Of one that is missing among others, PEFT only warns.
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise InputError(f"The model has no '{target}' for LoRA: correct it in the recipe ([] is none).")
    return config


def load_data(script_args: ScriptArguments, training_args: SFTConfig, encoder: ChatEncoder):
    """Conversations to train on and to validate on, and the record of the former for sft_data.json."""

    def load(source):
        return load_conversations(
            source,
            encoder,
            training_args.max_length,
            script_args.drop_long_conversations,
            training_args.dataset_num_proc,
        )

    weights = script_args.source_weights
    if weights and len(weights) != len(script_args.sources):
        raise InputError(f"{len(script_args.sources)} sources need as many weights, but the weights are {weights}.")
    fraction = 0.0 if script_args.validation_sources else script_args.held_out_fraction
    training, held_out, records = [], [], []
    for index, source in enumerate(script_args.sources):
        rows, record = load(source)
        kept, out = split_held_out(rows, fraction)
        if len(kept) == 0:
            raise InputError(
                f"No conversation of '{source}' is left to train on: lower held_out_fraction ({fraction})."
            )
        training.append(kept)
        held_out.append(out)
        records.append({**record, "weight": weights[index] if weights else None, "rows": len(kept)})
        if record["too_long"] and training_args.process_index == 0:
            print(
                f"Left out of '{source}': {record['too_long']:,} conversations, longer than {training_args.max_length}."
            )
    if script_args.validation_sources:
        held_out = [load(source)[0] for source in script_args.validation_sources]
    validation = mix(held_out, None, training_args.seed)
    if len(validation) == 0:
        raise InputError(
            f"No conversation is held out to validate on: raise held_out_fraction (now {fraction}) or give "
            "validation_sources."
        )
    validation = validation.select(range(min(script_args.held_out_rows, len(validation))))
    return mix(training, weights, training_args.seed), validation, records


def save_merged(trainer: ChatTrainer, tokenizer, output: Path) -> None:
    """Write the model with its adapter merged, and the record of the run, into merged/: beside it and then renamed."""
    with tempfile.TemporaryDirectory(dir=output, prefix=".merged-") as folder:
        new, old = Path(folder, "new"), Path(folder, "old")
        trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(new)
        tokenizer.save_pretrained(new)
        for name in RECORDS:
            shutil.copy(output / name, new)
        if (output / "merged").exists():
            (output / "merged").rename(old)
        new.rename(output / "merged")


def check_options(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Raise `InputError` for options that cannot be meant, before any work begins."""
    if model_args.model_name_or_path is None:
        raise InputError("There is no model: name a folder or Hub id with --model-name-or-path.")
    if script_args.merge_adapter and not model_args.use_peft:
        raise InputError("--merge-adapter is for LoRA (--use-peft), and this run trains every weight.")
    if training_args.packing and training_args.packing_strategy == "wrapped":
        raise InputError("packing_strategy 'wrapped' cuts conversations, and lets them see each other: use 'bfd'.")
    if Path(model_args.model_name_or_path).resolve() == Path(training_args.output_dir).resolve():
        raise InputError("output_dir is the folder of the model: name another, so that the model stays what it was.")
    if not script_args.sources:
        raise InputError("No source of conversations is given: name at least one with --sources.")
    check_counts(held_out_rows=script_args.held_out_rows, max_length=training_args.max_length)
    check_shares(held_out_fraction=script_args.held_out_fraction)
    check_training(training_args)


def without_router_loss(training_args: SFTConfig, model: PreTrainedModel) -> None:
    """Take TRL's auxiliary loss off a token-routed model, or raise `InputError` where somebody asked for it.

    Its experts are looked up, so that the loss would be a constant which trains nothing.
    """
    if model.config.model_type == "complexity-deep":
        if training_args.router_aux_loss_coef:
            raise InputError(
                f"router_aux_loss_coef {training_args.router_aux_loss_coef} weighs the loss of a learned router, and a "
                "token-routed model has none: leave it out."
            )
        training_args.router_aux_loss_coef = 0.0


def main(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    check_options(script_args, training_args, model_args)
    set_seed(training_args.seed)
    training_args.logging_nan_inf_filter = False  # it would show a run that diverged as one at loss 0
    logging.disable_progress_bar()  # the one for writing weights would break into the training bar at every checkpoint
    with training_args.main_process_first(local=False, desc="looking for a checkpoint"):
        checkpoint = last_good_checkpoint(training_args.output_dir)
    training_args.assistant_only_loss = True
    training_args.eval_on_start = checkpoint is None
    training_args.logging_first_step = True  # else a run shorter than logging_steps would have nothing to report

    tokenizer = load_tokenizer(model_args, script_args, training_args)
    encoder = ChatEncoder(tokenizer)
    model = load_model(model_args, training_args)
    without_router_loss(training_args, model)
    if checkpoint:
        check_model(checkpoint, model.config)
    peft_config = lora_config(model_args, model)
    positions = getattr(model.config, "max_position_embeddings", training_args.max_length)
    training_args.max_length = training_args.max_length or positions
    if training_args.max_length > positions:
        raise InputError(f"max_length {training_args.max_length} is more than the model's {positions} positions.")
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise InputError(f"The tokenizer has {len(tokenizer):,} tokens, but the model only {vocabulary:,}.")
    with training_args.main_process_first(desc="reading conversations"):
        training, validation, records = load_data(script_args, training_args, encoder)

    # Stop where the assistant ends its turn; also where a text ends, which the model has learned in pretraining.
    stop_ids = [encoder.end_of_turn_id, tokenizer.eos_token_id]
    model.generation_config.eos_token_id = list(dict.fromkeys(token for token in stop_ids if token is not None))
    rows_per_step = (
        training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    )
    tokens = sum(training["length"])
    flops = flops_per_token(model, tokens // len(training))
    if peft_config:
        flops *= 2 / 3  # frozen weights get no gradients
    progress = TrainingProgress(0, flops, training_args.world_size)
    try:
        trainer = ChatTrainer(
            model=model,
            args=training_args,
            train_dataset=training,
            eval_dataset=validation,
            processing_class=tokenizer,
            peft_config=peft_config,
            compute_metrics=summed_metrics,
            settings={
                "model": model_args.model_name_or_path,
                "lora": peft_config and [getattr(model_args, name) for name in LORA_SETTINGS],
                "data": records,
                "tokens": tokens,
                "max_length": training_args.max_length,
                "packing": training_args.packing,
                "rows per step": rows_per_step,
                "seed": training_args.seed,
            },
            progress=progress,
        )
    except ValueError as error:
        raise InputError(one_line(error)) from error
    progress.tokens_per_step = rows_per_step * tokens / len(trainer.train_dataset)  # on average
    metrics = trainer.train_and_evaluate(checkpoint)

    output = Path(training_args.output_dir)
    with uninterrupted():
        trainer.save_state()  # first, for it marks the folder as a run's
        trainer.save_model(output)
        if trainer.is_world_process_zero():
            facts = {
                "fine_tuned_from": model_args.model_name_or_path,
                "trained_parameters": trainer.get_num_trainable_parameters(),
                "conversations": [f"{record['name']} ({record['rows']:,})" for record in records],
                "tokens_per_conversation": tokens / len(training),
                "held_out_conversations": len(validation),
                "steps": trainer.state.global_step,
                "rows_per_step": rows_per_step,
                "processes": training_args.world_size,
            }
            options = {**asdict(script_args), **asdict(model_args), **training_args.to_dict()}
            write_report(output, model, trainer.state.log_history, facts, options)
            model.generation_config.save_pretrained(output)
            (output / "sft_data.json").write_text(json.dumps(records, indent=1))
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if script_args.merge_adapter and trainer.is_world_process_zero():  # last, for it takes the adapter off
        save_merged(trainer, tokenizer, output)
    if trainer.is_world_process_zero():
        print(f"{output}: held-out perplexity {shown_perplexity(metrics)}")


if __name__ == "__main__":
    run_script(main, *RecipeParser((ScriptArguments, SFTConfig, ModelConfig), description=__doc__).parse())
