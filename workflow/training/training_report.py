"""What a person sees of a training run when it is over: a page and pictures."""

import json
import re
import statistics
from pathlib import Path

from transformers import PreTrainedModel

from complexity_deep.workflow.charts import draw_expert_loads, subplots, write_figure
from complexity_deep.workflow.evaluation.perplexity import held_out as held_out_scores
from complexity_deep.workflow.evaluation.perplexity import with_error
from complexity_deep.workflow.flops import active_parameters, total_parameters
from complexity_deep.workflow.markdown_table import as_text, table
from complexity_deep.workflow.provenance import provenance


def write_expert_loads(output_dir: str, entry: dict) -> None:
    """Write expert_loads.png, the tokens per expert and layer in an entry of architecture_monitors.py."""
    cells = {}  # a resumed run has its entries sorted by name, where 10 comes before 2
    for name, tokens in entry.items():
        if match := re.fullmatch(r"expert_tokens/layer_(\d+)/expert_(\d+)", name):
            cells[int(match[1]), int(match[2])] = tokens
    layers, experts = (1 + max(indices) for indices in zip(*cells))
    tokens = [[cells[layer, expert] for expert in range(experts)] for layer in range(layers)]
    figure, _ = draw_expert_loads(tokens, f"tokens per expert on held-out text, step {entry['step']}")
    write_figure(figure, Path(output_dir, "expert_loads.png"))


def median(entries: list[dict], name: str) -> float | None:
    values = [entry[name] for entry in entries if name in entry]
    return statistics.median(values) if values else None


def held_out_cells(entry: dict) -> list[str]:
    return [str(entry["step"]), with_error(entry, "loss", 4), with_error(entry, "perplexity", 2)]


def write_training_report(
    output_dir: str | Path, model: PreTrainedModel, log_history: list[dict], facts: dict, options: dict | None = None
) -> None:
    """Write training_summary.md, the same for programs in training_summary.json, and the pictures.

    `facts` (text, numbers, lists or dicts of them) become rows; `options`, what the run was started with, goes to the
    JSON only.
    """
    training = [entry for entry in log_history if "loss" in entry]
    held_out = {e["step"]: {"step": e["step"], **held_out_scores(e)} for e in log_history if "eval_loss" in e}
    held_out = list(held_out.values())
    figure, axes = subplots()
    if training:  # none with logging_strategy "no"
        marker = "o" if len(training) == 1 else ""  # a line has two points
        losses = [entry["loss"] for entry in training]
        axes.plot([entry["step"] for entry in training], losses, marker=marker, label="training")
    axes.plot([entry["step"] for entry in held_out], [entry["loss"] for entry in held_out], "o", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=f"{model.config.model_type}: loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(figure, Path(output_dir, "loss_curve.png"))

    summary = {
        "model_type": model.config.model_type,
        "parameters": total_parameters(model),
        "active_parameters": active_parameters(model),
        **facts,
        "training_seconds": sum(entry["seconds"] for entry in training) or None,
        "tokens_per_second": median(training, "tokens_per_second"),
        "mfu": median(training, "mfu"),
        "data_wait_share": median(training, "data_wait_share"),
        "peak_memory_gib": max((entry.get("peak_memory_gib", 0) for entry in training), default=0) or None,
        **provenance(),
    }
    summary = {name: value for name, value in summary.items() if value is not None}
    lines = [f"# {Path(output_dir).name}: training summary", ""]
    lines += table(["", ""], ([name.replace("_", " "), as_text(value)] for name, value in summary.items()))
    lines += ["", *table(["step", "held-out loss", "held-out perplexity"], map(held_out_cells, held_out))]
    lines += ["", "± is one standard error."]
    lines += ["", "![training and held-out loss](loss_curve.png)", ""]
    monitored = [entry for entry in log_history if "expert_imbalance/layer_0" in entry]
    if monitored:
        write_expert_loads(output_dir, monitored[-1])
        lines += ["![tokens per expert](expert_loads.png)", ""]
    Path(output_dir, "training_summary.md").write_text("\n".join(lines))
    summary["held_out"] = held_out
    summary["options"] = options or {}
    Path(output_dir, "training_summary.json").write_text(json.dumps(summary, indent=1))
