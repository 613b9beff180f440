"""Fine-tune a causal language model on conversations, with TRL's SFTTrainer: every weight, or LoRA through PEFT.

    python scripts/sft.py --config recipes/sft_chat.yaml --model-name-or-path runs/30m
    python scripts/sft.py --config recipes/sft_chat.yaml --sources 'data/sft/*.parquet' --use-peft --merge-adapter
    accelerate launch --config_file recipes/accelerate/ddp.yaml scripts/sft.py --config recipes/sft_academic.yaml

A recipe holds FineTuningArguments, TRL's ModelConfig and TRL's SFTConfig; the command line overrides it. The loss is
on what the assistant says, which the generation marks of the chat template tell. Giving the same command again resumes
from the newest intact checkpoint. scripts/show_data.py shows a source; the sources are recorded in sft_data.json.

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
from dataclasses import asdict
from pathlib import Path

from complexity_deep.workflow.command import needs, run_script, uninterrupted

with needs("train"):
    from transformers import logging, set_seed
    from trl import ModelConfig, SFTConfig

    from complexity_deep.workflow.data.conversations import ChatEncoder
    from complexity_deep.workflow.evaluation.perplexity import shown_perplexity, summed_metrics
    from complexity_deep.workflow.flops import flops_per_token
    from complexity_deep.workflow.training.atomic_checkpoint import last_good_checkpoint
    from complexity_deep.workflow.training.fine_tuning import (
        LORA_SETTINGS,
        MORE_LORA_SETTINGS,
        ChatTrainer,
        check_sizes,
        load_chat_tokenizer,
        load_chats,
        load_model_to_tune,
        lora_config,
        save_merged,
    )
    from complexity_deep.workflow.training.fine_tuning_arguments import (
        FineTuningArguments,
        check_fine_tuning,
        set_router_loss,
    )
    from complexity_deep.workflow.training.run_identity import check_model
    from complexity_deep.workflow.training.training_arguments import RecipeParser
    from complexity_deep.workflow.training.training_progress import TrainingProgress
    from complexity_deep.workflow.training.training_report import write_training_report


def main(script_args: FineTuningArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    check_fine_tuning(script_args, training_args, model_args)
    set_seed(training_args.seed)
    training_args.logging_nan_inf_filter = False  # it would show a run that diverged as one at loss 0
    logging.disable_progress_bar()  # the one for writing weights would break into the training bar at every checkpoint
    with training_args.main_process_first(local=False, desc="looking for a checkpoint"):
        checkpoint = last_good_checkpoint(training_args.output_dir)
    training_args.assistant_only_loss = True
    training_args.eval_on_start = checkpoint is None
    training_args.logging_first_step = True  # else a run shorter than logging_steps would have nothing to report

    tokenizer = load_chat_tokenizer(model_args, script_args, training_args)
    encoder = ChatEncoder(tokenizer)
    model = load_model_to_tune(model_args, training_args)
    set_router_loss(training_args, model)
    if checkpoint:
        check_model(checkpoint, model.config)
    peft_config = lora_config(model_args, model)
    check_sizes(model, tokenizer, training_args)
    with training_args.main_process_first(desc="reading conversations"):
        training, validation, records = load_chats(script_args, training_args, encoder)

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
            **{name: getattr(model_args, name) for name in MORE_LORA_SETTINGS},
            "data": records,
            "tokens": tokens,
            "max_length": training_args.max_length,
            "packing": training_args.packing,
            "rows per step": rows_per_step,
            "seed": training_args.seed,
        },
        progress=progress,
    )
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
            write_training_report(output, model, trainer.state.log_history, facts, options)
            model.generation_config.save_pretrained(output)
            (output / "sft_data.json").write_text(json.dumps(records, indent=1))
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if script_args.merge_adapter and trainer.is_world_process_zero():  # last, for it takes the adapter off
        save_merged(trainer, tokenizer, output)
    if trainer.is_world_process_zero():
        print(f"{output}: held-out perplexity {shown_perplexity(metrics)}")


if __name__ == "__main__":
    run_script(main, *RecipeParser((FineTuningArguments, SFTConfig, ModelConfig), description=__doc__).parse())
