"""The tables of a model card, from a model and the reports of its run."""

import html
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from complexity_deep.workflow.evaluation.perplexity import held_out
from complexity_deep.workflow.flops import parameter_counts
from complexity_deep.workflow.markdown_table import as_text
from complexity_deep.workflow.publishing.run_reports import Run, is_hub_id

SHAPE = {
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key and value heads",
    "max_position_embeddings": "context (tokens)",
    "sliding_window": "attention window (tokens)",
    "vocab_size": "vocabulary",
    "hidden_act": "activation",
    "tie_word_embeddings": "tied embeddings",
}
HYPERPARAMETERS = {
    "optim": "optimizer",
    "optimizer": "optimizer of the matrices",
    "learning_rate": "learning rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warm-up",
    "weight_decay": "weight decay",
    "adam_beta1": "beta 1",
    "adam_beta2": "beta 2",
    "adam_epsilon": "epsilon",
    "max_grad_norm": "gradient clipping",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "rows per device",
    "gradient_accumulation_steps": "gradient accumulation",
    "max_length": "longest row (tokens)",
    "packing": "packing",
    "mask_across_documents": "documents of a row masked from each other",
    "scaled_residual_init": "scaled residual initialisation",
    "z_loss": "z-loss",
    "lora_r": "LoRA rank",
    "lora_alpha": "LoRA alpha",
    "lora_dropout": "LoRA dropout",
    "lora_target_modules": "LoRA modules",
    "lora_target_parameters": "LoRA parameters",
    "bf16": "bf16 autocast",
    "fp16": "fp16 autocast",
    "seed": "seed",
}
# Rows of training_summary.json that stand elsewhere on the card, or concern nobody but the person who ran it.
NOT_PROCEDURE = {"model_type", "parameters", "active_parameters", "text", "held_out", "options", "conversations"}
NOT_PROCEDURE |= {"fine_tuned_from", "data_wait_share", "documents_read_by_process_0", "triton"}
RENAMED = {"mfu": "model FLOPs utilisation", "peak_memory_gib": "peak GPU memory (GiB)", "date": "finished"}
RENAMED |= {"processes": "devices", "commit": "commit of the training code"}


def shown(value) -> str:
    """A value as a cell of a Markdown table."""
    text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else as_text(value)
    return html.escape(text, quote=False).replace("|", "\\|")


def number(value: float, digits: int, stderr: float | None = None) -> str:
    return f"{value:,.{digits}f}" + (f"&nbsp;±&nbsp;{stderr:.{digits}f}" if stderr is not None else "")


def architecture_rows(model: PreTrainedModel) -> dict[str, str]:
    config = model.config
    labels = {
        "total": "parameters",
        "trained": "parameters that training changes",
        "active": "parameters active per token",
    }
    rows = {labels[name]: f"{count:,}" for name, count in parameter_counts(model).items()}
    rows |= {label: shown(value) for key, label in SHAPE.items() if (value := getattr(config, key, None)) is not None}
    if getattr(config, "is_routed", False):
        rows["experts x width, per layer"] = f"{config.num_experts} x {config.moe_intermediate_size:,}"
        rows["experts per token"] = str(config.num_experts_per_tok)
        rows["routing table"] = config.routing + (", one for each layer" if config.routing_per_layer else "")
        if config.shared_expert_intermediate_size:
            rows["shared expert width"] = f"{config.shared_expert_intermediate_size:,}"
    else:
        rows["MLP width"] = shown(config.intermediate_size)
    rows["dtype of the weights"] = str(model.dtype).removeprefix("torch.")
    if method := quantizer(config):
        rows["dtype of the weights"] += f", where {method} did not quantize them"
    return rows


def quantizer(config: PreTrainedConfig) -> str | None:
    """What quantized the weights, as the library calls it: torchao, bitsandbytes. None for whole ones."""
    settings = getattr(config, "quantization_config", None)
    return settings and str(getattr(settings.quant_method, "value", settings.quant_method))


def source_rows(run: Run) -> list[dict]:
    """Training text: `name`, `hub_id` where it is on the Hub, `share`, and of conversations `split` and `rows`."""
    if run.sft_data:
        rows = [dict(record) for record in run.sft_data]
    else:
        sources = run.options.get("sources") or []
        weights = run.options.get("source_weights") or [None] * len(sources)
        rows = [{"name": name, "weight": weight} for name, weight in zip(sources, weights)]
    total = sum(row["weight"] or 0 for row in rows)
    for row in rows:
        row["share"] = f"{number(100 * row['weight'] / total, 1)} %" if row["weight"] else "all of it"
        hub_id = row["name"].partition(":")[0]
        row["hub_id"] = hub_id if is_hub_id(hub_id) else None
        if row["hub_id"] is None:
            row["name"] = Path(row["name"]).name
    return rows


def procedure_rows(run: Run) -> dict[str, str]:
    rows = {
        RENAMED.get(name, name.replace("_", " ")): shown(value)
        for name, value in (run.summary or {}).items()
        if name not in NOT_PROCEDURE
    }
    if not rows and run.state:
        rows["steps"] = shown(run.state["global_step"])
    return rows


def hyperparameter_rows(run: Run) -> dict[str, str]:
    absent = {key for key, value in run.options.items() if value is None or value is False or value == []}
    if run.options.get("max_steps", -1) > 0:
        absent.add("num_train_epochs")  # Trainer takes no notice of it then
    if not run.options.get("use_peft"):
        absent |= {key for key in HYPERPARAMETERS if key.startswith("lora_")}
    rows = {
        label: shown(run.options[key])
        for key, label in HYPERPARAMETERS.items()
        if key in run.options and key not in absent
    }
    if warmup := run.options.get("warmup_steps"):  # Trainer takes a number below 1 for a share
        rows["warm-up"] = f"{number(100 * warmup, 1)} % of the steps" if warmup < 1 else f"{shown(warmup)} steps"
    return rows


def loss_rows(run: Run) -> list[dict]:
    """Loss on held-out text before and after training."""
    entries = [entry for entry in (run.state or {}).get("log_history", []) if "eval_loss" in entry]
    ends = {entry["step"]: held_out(entry) for entry in [*entries[:1], *entries[-1:]]}
    return [
        {
            "step": shown(step),
            "loss": number(scores["loss"], 4, scores.get("loss_stderr")),
            "perplexity": number(scores["perplexity"], 2, scores.get("perplexity_stderr")),
        }
        for step, scores in ends.items()
    ]


def task_rows(run: Run) -> list[dict]:
    return [
        {
            "task": row["task"],
            "metric": row["metric"],
            "value": number(100 * row["value"], 1, row["stderr"] and 100 * row["stderr"]),
            "random": number(100 * row["random"], 1),
            "n": shown(row["n"]),
            "num_fewshot": shown(row["num_fewshot"]),
        }
        for row in (run.evaluation or {}).get("tasks", [])
    ]


def perplexity_rows(run: Run) -> list[dict]:
    return [
        {
            "corpus": shown(row["corpus"] if is_hub_id(row["corpus"].partition(":")[0]) else Path(row["corpus"]).name),
            "perplexity": number(row["perplexity"], 2, row["stderr"] and row["stderr"] * row["perplexity"]),
            "nll": number(row["nll_per_token"], 4, row["stderr"]),
            "bits_per_byte": number(row["bits_per_byte"], 4),
            **{name: shown(row[name]) for name in ("tokens", "documents", "context", "stride")},
        }
        for row in (run.evaluation or {}).get("perplexity", [])
    ]


def notes(rows: list[dict]) -> dict[str, str]:
    """Each note, and what it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        if row.get("note"):
            about.setdefault(shown(row["note"]), []).append(shown(row.get("task") or Path(row["corpus"]).name))
    return {note: ", ".join(dict.fromkeys(names)) for note, names in about.items()}
