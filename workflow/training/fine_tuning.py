"""Fine-tuning's Trainer, its model with or without LoRA, and its conversations."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils.generic import is_flash_attention_requested
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from complexity_deep.workflow.command import InputError, first_line, whole_folder
from complexity_deep.workflow.data.conversations import ChatEncoder, load_conversations, shuffled_mix, split_held_out
from complexity_deep.workflow.data.sources import check_weights
from complexity_deep.workflow.saved_model import check_vocabulary, why_not
from complexity_deep.workflow.training.fine_tuning_arguments import FineTuningArguments
from complexity_deep.workflow.training.resumable_trainer import ResumableTrainerMixin

ADAPTER_CONFIG = "adapter_config.json"
LORA_SETTINGS = ["lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"]
# Under names of their own, so that a checkpoint from before they were compared can be resumed.
MORE_LORA_SETTINGS = ["lora_modules_to_save", "use_rslora", "use_dora"]
RECORDS = ["sft_data.json", "trainer_state.json", "training_summary.json", "training_summary.md", "loss_curve.png"]


class PackedRowsCollator(DataCollatorForLanguageModeling):
    """Stack rows of packed conversations into input_ids, position_ids and labels, each [B, S] with S always the same.

    Positions tell the conversations of a row apart. Every token of padding has position 0, so that it sees nothing but
    itself, and no conversation sees it. TRL lays the rows of a batch behind each other into one. The mask of that row
    has B times as many elements, and its length changes from step to step, so that no step could be replayed.
    """

    def torch_call(self, examples: list[dict]) -> dict[str, Tensor]:
        batch = super().torch_call(examples)
        del batch["attention_mask"]  # with one, nothing looks for conversations in the positions
        # The first token of a conversation would be predicted from the conversation before it.
        batch["labels"][batch["position_ids"] == 0] = -100
        return batch


def begins_conversation(position_ids: Tensor) -> Tensor:
    """Which tokens of packed rows [B, S] are the first of a conversation; a token of padding has position 0 as well."""
    return (position_ids == 0) & (position_ids.roll(-1, dims=1) == 1)


class ChatTrainer(ResumableTrainerMixin, SFTTrainer):
    """SFTTrainer with whole checkpoints, which another run cannot take for its own."""

    def __init__(self, *, args: SFTConfig, **kwargs):
        super().__init__(args=args, **kwargs)
        rows, batch = len(self.train_dataset), args.train_batch_size * args.world_size
        if args.dataloader_drop_last and rows < batch:
            raise InputError(
                f"dataloader_drop_last leaves nothing to train on: a batch has {batch} rows, and there are {rows}. "
                "Lower per_device_train_batch_size, or leave it out."
            )
        if args.packing and self.takes_packed_rows():
            multiple = args.pad_to_multiple_of or 1
            # Set after TRL's own, for TRL refuses to be given a collator where it packs.
            self.data_collator = PackedRowsCollator(
                pad_token_id=self.data_collator.pad_token_id,
                return_position_ids=True,
                pad_to_multiple_of=-(-args.max_length // multiple) * multiple,  # no row is longer
            )
        elif args.packing and args.world_size > 1:
            # Rows of the first batch fill up the last one. They are left out of the scores by counting rows, which
            # cannot be done where several rows have become one.
            args.per_device_eval_batch_size = 1
        # Weights that are divided among processes are not here yet, so that nothing can be tried. Our own models keep
        # conversations apart, as the tests show.
        is_divided = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if args.packing and not is_divided and self.model.config.model_type != "complexity-deep":
            self.check_packing()

    def takes_packed_rows(self) -> bool:
        """Whether the model keeps the conversations of several rows apart by their positions.

        Flash attention does so for a batch of one row. Recurrent layers and convolutions go by the lengths that TRL
        gives for that row. The loss of a router would count padding.
        """
        return not (
            is_flash_attention_requested(self.model.config)
            or any(isinstance(x, nn.Conv1d) or getattr(x, "_is_stateful", False) for x in self.model.modules())
            or self.aux_loss_enabled
        )

    @torch.no_grad()
    def check_packing(self) -> None:
        """Raise `InputError` where a conversation sees the one before it in its row, as in models without positions.

        The logits of a conversation must stay what they are when the one before it becomes another.
        """
        collate = replace(self.data_collator, pad_to_multiple_of=None)
        ids = [number % self.model.config.get_text_config().vocab_size for number in range(40, 56)]
        weights, found = self.model.get_input_embeddings().weight, []
        flash = is_flash_attention_requested(self.model.config)  # computes in half precision alone
        was_training = self.model.training
        self.model.eval()
        try:
            # The same tokens in another order, so that experts that are chosen by a token's id get as many of them.
            for first in (ids[:8], ids[7::-1]):
                row = {"input_ids": first + ids[8:], "labels": first + ids[8:], "seq_lengths": [8, 8]}
                batch = {name: x for name, x in collate([row]).items() if name != "labels"}
                batch = {name: x.to(weights.device) if isinstance(x, Tensor) else x for name, x in batch.items()}
                with self.compute_loss_context_manager() if flash else nullcontext():
                    found.append(self.model(**batch, use_cache=False).logits[0, 8:16].float())
        except Exception as error:  # models refuse packed rows, or what comes with them, by classes of their own
            raise InputError(f"This model takes no packed rows ({first_line(error)}): set packing to false.") from error
        finally:
            self.model.train(was_training)
        tolerance = 1e-4 if weights.dtype == torch.float32 and not flash else 1e-2
        if (found[1] - found[0]).abs().max() > tolerance * found[0].abs().max():
            raise InputError("In this model, packed conversations see each other: set packing to false.")

    def _get_train_sampler(self, *args, **kwargs):
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            # Its order would follow from whatever was drawn before. A run that resumes has drawn less.
            sampler.set_epoch = lambda epoch: setattr(
                sampler, "generator", torch.Generator().manual_seed(self.args.seed + epoch)
            )
        return sampler

    def create_model_card(self, *args, **kwargs):
        """Nothing: export_to_hub.py writes the card, from measured files."""

    def training_step(self, *args, **kwargs):
        # TRL looks here for whether this is training. What torch.compile made of the model has a mode of its own.
        self.model.training = True
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        before = self._total_train_tokens
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training and self.args.packing:
            # TRL takes the length of a row for the number of tokens in the batch.
            positions = inputs["position_ids"]
            tokens = (positions > 0).sum() + begins_conversation(positions).sum()
            self._total_train_tokens = before + self.accelerator.gather(tokens).sum().item() // self._tp_size
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return result

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss, and for each conversation its plain cross-entropy, in nats, and its number of tokens, both [B, N].

        N conversations are in the row that has most, in others the last have no tokens. TRL would run the model a
        second time for logits.
        """
        self.model.training = False  # as in `training_step`
        inputs, seen = self._prepare_inputs(inputs), {}

        def recorded(**arguments):
            seen["outputs"] = model(**arguments)
            return seen["outputs"]

        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(recorded, inputs)
        # Of the next token, [B, S - 1], and 0 where it is not counted.
        nll, counted = -seen["outputs"].log_probs, seen["outputs"].label_mask
        conversations = torch.zeros_like(counted, dtype=torch.int64)  # the number of each within its row
        if "position_ids" in inputs:  # packed
            conversations = begins_conversation(inputs["position_ids"]).cumsum(dim=1)[:, -nll.shape[1] :] - 1
        sums = [
            torch.zeros(len(nll), int(conversations.max()) + 1, dtype=torch.float64, device=nll.device).scatter_add_(
                1, conversations, values.double()
            )
            for values in (nll, counted)
        ]
        return loss, sums[0], sums[1]

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


def load_chat_tokenizer(model_args: ModelConfig, script_args: FineTuningArguments, training_args: SFTConfig):
    path = script_args.tokenizer or model_args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=training_args.trust_remote_code)
    except Exception as error:  # a broken tokenizer.json raises a class of its own
        raise InputError(
            f"There is no tokenizer at '{path}': correct --model-name-or-path, or name a tokenizer with --tokenizer."
        ) from error
    if training_args.chat_template_path:
        try:
            tokenizer.chat_template = Path(training_args.chat_template_path).read_text()
        except OSError as error:
            raise InputError(f"'{training_args.chat_template_path}' is not a template file: {error}.") from error
    return tokenizer


def load_model_to_tune(model_args: ModelConfig, training_args: SFTConfig) -> PreTrainedModel:
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
    except Exception as error:  # strict configs, broken weights and code of the folder's own raise classes of their own
        raise InputError(f"'{path}' cannot be loaded: {why_not(path, error)}") from error


def check_sizes(model: PreTrainedModel, tokenizer, training_args: SFTConfig) -> None:
    """Set max_length to the model's where none is given; `InputError` where rows or token ids do not fit the model."""
    positions = getattr(model.config, "max_position_embeddings", training_args.max_length)
    training_args.max_length = training_args.max_length or positions
    if training_args.max_length > positions:
        raise InputError(f"max_length {training_args.max_length} is more than the model's {positions} positions.")
    check_vocabulary(model, tokenizer)


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
        # TRL turns a list of one into a string, which PEFT takes for a pattern.
        config.target_modules = {config.target_modules}
    modules = set() if config.target_modules in (None, "all-linear") else config.target_modules
    names = [name for name, _ in [*model.named_modules(), *model.named_parameters()]]
    for target in [*modules, *(config.target_parameters or ())]:
        # Where only some are missing, PEFT does no more than warn.
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise InputError(f"The model has no '{target}' for LoRA: correct it in the recipe ([] is none).")
    for target in config.modules_to_save or ():
        if not any(name.endswith(target) for name, _ in model.named_modules()):  # as PEFT matches them
            raise InputError(f"The model has no '{target}' for lora_modules_to_save: correct it.")
    return config


def load_chats(script_args: FineTuningArguments, training_args: SFTConfig, encoder: ChatEncoder):
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
    check_weights(script_args.sources, weights)
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
    validation = shuffled_mix(held_out, None, training_args.seed)
    if len(validation) == 0:
        raise InputError(
            f"No conversation is held out to validate on: raise held_out_fraction (now {fraction}) or give "
            "validation_sources."
        )
    validation = validation.select(range(min(script_args.held_out_rows, len(validation))))
    return shuffled_mix(training, weights, training_args.seed), validation, records


def untie_adapted_embedding(model: PreTrainedModel) -> None:
    """Give the head a weight of its own where it shares that of an embedding with an adapter.

    The adapter would otherwise be merged into the head as well. TRL takes no adapter on the head itself.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, BaseTunerLayer) and embedding.weight is head.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False


def save_merged(trainer: ChatTrainer, tokenizer, output: Path) -> None:
    """Write the model with its adapter merged, and the record of the run, into merged/."""
    with whole_folder(output / "merged") as folder:
        adapted = trainer.accelerator.unwrap_model(trainer.model)
        untie_adapted_embedding(adapted.get_base_model())
        adapted.merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name in RECORDS:
            shutil.copy(output / name, folder)
