"""Pretrain a causal language model on text, from scratch, with Trainer.

    python scripts/pretrain.py --config recipes/demo.yaml
    python scripts/pretrain.py --config recipes/demo.yaml --max-steps 20 --output-dir /tmp/try
    python scripts/pretrain.py --config recipes/30m.yaml --sources 'data/edu/train-*.parquet' --routing balanced
    accelerate launch --config_file recipes/accelerate/ddp.yaml scripts/pretrain.py --config recipes/150m.yaml
    accelerate launch --config_file recipes/accelerate/tp.yaml scripts/pretrain.py --config recipes/1.5b.yaml

A recipe holds PretrainingArguments and any of transformers' TrainingArguments; the command line overrides it. The
model's shape comes from a config file (any architecture that AutoConfig knows), its vocabulary from the tokenizer.
Giving the same command again resumes from the newest intact checkpoint, with no document repeated or skipped.
"""

import math
from dataclasses import asdict

import torch

from complexity_deep.workflow.command import InputError, needs, run_script, uninterrupted

with needs("train"):
    from transformers import TrainingArguments, logging, set_seed

    from complexity_deep.workflow.data.packed_rows import PackedCollator
    from complexity_deep.workflow.evaluation.perplexity import perplexity_metrics, shown_perplexity, token_nll
    from complexity_deep.workflow.flops import flops_per_token
    from complexity_deep.workflow.training.architecture_monitors import ArchitectureMonitors
    from complexity_deep.workflow.training.atomic_checkpoint import last_good_checkpoint
    from complexity_deep.workflow.training.chunked_loss import use_chunked_loss
    from complexity_deep.workflow.training.muon import muon_for_trainer
    from complexity_deep.workflow.training.new_model import load_tokenizer, new_model
    from complexity_deep.workflow.training.pretraining import PretrainTrainer, load_rows
    from complexity_deep.workflow.training.pretraining_arguments import PretrainingArguments, check_pretraining
    from complexity_deep.workflow.training.routing_balance import compare_routing, count_once
    from complexity_deep.workflow.training.run_identity import check_model, files_of
    from complexity_deep.workflow.training.tensor_parallel import requested_parallelism, shard
    from complexity_deep.workflow.training.training_arguments import RecipeParser
    from complexity_deep.workflow.training.training_progress import TrainingProgress
    from complexity_deep.workflow.training.training_report import write_training_report


def main(script_args: PretrainingArguments, training_args: TrainingArguments) -> None:
    check_pretraining(script_args, training_args)
    set_seed(training_args.seed)
    logging.disable_progress_bar()  # the one for writing weights would break into the training bar at every checkpoint
    with training_args.main_process_first(local=False, desc="looking for a checkpoint"):
        checkpoint = last_good_checkpoint(training_args.output_dir)
    training_args.logging_nan_inf_filter = False  # it would show a run that diverged as one at loss 0
    training_args.ignore_data_skip = True  # the stream goes to its place by itself, without reading what was used
    # All columns are used, but Trainer cannot see which ones a compiled model under FSDP2 takes.
    training_args.remove_unused_columns = False
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
    training_rows, validation_rows = load_rows(script_args, training_args, tokenizer, row_length, processes_per_row)

    rows_per_step = (
        training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    ) // processes_per_row
    if training_args.max_steps <= 0:
        training_args.max_steps = math.ceil(script_args.max_tokens / (rows_per_step * row_length))
    routing = model.config.routing if getattr(model.config, "is_routed", False) else None
    if routing == "balanced" and not checkpoint:  # a checkpoint holds its table
        counts = count_once(training_args, training_rows, model.config.vocab_size, script_args.routing_sample_tokens)
        model.balance_routing(counts)
    trainer = PretrainTrainer(
        model=model,
        args=training_args,
        train_dataset=training_rows,
        eval_dataset=validation_rows,
        data_collator=PackedCollator(script_args.mask_across_documents),
        compute_metrics=perplexity_metrics,
        preprocess_logits_for_metrics=token_nll,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=muon_for_trainer(training_args) if script_args.optimizer else None,
        settings={
            "sources": script_args.sources,
            "source_weights": script_args.source_weights,
            "files of the sources": files_of(script_args.sources),
            "text_column": script_args.text_column,
            "mask_across_documents": script_args.mask_across_documents,
            "z_loss": script_args.z_loss,
            "optimizer": script_args.optimizer,
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
            write_training_report(training_args.output_dir, model, trainer.state.log_history, facts, options)
            print(f"{training_args.output_dir}: held-out perplexity {shown_perplexity(metrics)}")
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    run_script(main, *RecipeParser((PretrainingArguments, TrainingArguments), description=__doc__).parse())
