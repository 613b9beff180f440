"""What a person sees of a training run: the progress bar while it runs, a page and a picture when it is over."""

import json
import math
import re
import statistics
import time
from pathlib import Path

import matplotlib
import torch
from command_line import InputError
from model_flops import active_parameters, total_parameters
from perplexity_metric import held_out as held_out_scores
from perplexity_metric import shown_perplexity, with_error
from provenance import provenance
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProgressCallback

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib import pyplot

# Dense bf16 FLOP/s of the SXM boards, from NVIDIA's data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def peak_flops() -> float | None:
    """Peak of the current GPU where it is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for board, peak in PEAK_FLOPS.items() if board in name), None)


class TrainingProgress(ProgressCallback):
    """Trainer's bar with loss, tokens/s and MFU beside the ETA, counting a resumed run from where it resumes."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, world_size: int):
        super().__init__()
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.peak = (peak_flops() or 0) * world_size
        self.loader = None  # a ResumableLoader, to report how long training waits for it

    def on_train_begin(self, args, state, control, **kwargs):
        self.clock, self.clocked_step, self.clocked_wait = time.perf_counter(), state.global_step, 0.0
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", dynamic_ncols=True
            )
        self.current_step = state.global_step

    def close(self) -> None:
        if self.training_bar is not None:
            self.training_bar.close()

    def measure(self, logs: dict, state) -> None:
        """Add the throughput since the last measurement, and the most GPU memory so far, to the logs."""
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise InputError(
                f"The loss is {logs['loss']} by step {state.global_step}: start again in another output_dir, with a "
                "lower learning_rate or more warmup_steps."
            )
        now = time.perf_counter()
        tokens = (state.global_step - self.clocked_step) * self.tokens_per_step
        logs["seconds"] = now - self.clock
        logs["tokens_per_second"] = tokens / logs["seconds"]
        if self.peak:
            logs["mfu"] = logs["tokens_per_second"] * self.flops_per_token / self.peak
        if self.loader is not None:
            logs["data_wait_share"] = (self.loader.seconds_waited - self.clocked_wait) / logs["seconds"]
            self.clocked_wait = self.loader.seconds_waited
        if torch.cuda.is_available():
            logs["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.clock, self.clocked_step = now, state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or "loss" not in logs:
            return
        shown = {"loss": f"{logs['loss']:.3f}", "tokens/s": f"{logs['tokens_per_second']:,.0f}"}
        if "mfu" in logs:
            shown["MFU"] = f"{logs['mfu']:.1%}"
        self.training_bar.set_postfix(shown)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        if state.is_world_process_zero:
            tqdm.write(f"step {state.global_step}: held-out perplexity {shown_perplexity(metrics)}")


def draw_expert_loads(output_dir: str, entry: dict) -> None:
    """Write expert_loads.png, the share of tokens per expert and layer in an entry of architecture_monitors.py."""
    cells = {}  # a resumed run has its entries sorted by name, where 10 comes before 2
    for name, tokens in entry.items():
        if match := re.fullmatch(r"expert_tokens/layer_(\d+)/expert_(\d+)", name):
            cells[int(match[1]), int(match[2])] = tokens
    layers, experts = (1 + max(indices) for indices in zip(*cells))
    loads = torch.tensor([[cells[layer, expert] for expert in range(experts)] for layer in range(layers)])
    shares = loads / loads.sum(dim=1, keepdim=True)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    left = torch.zeros(len(shares))
    for expert, share in enumerate(shares.T):
        axes.barh(range(len(shares)), share, left=left, label=f"expert {expert}", edgecolor="white", linewidth=0.5)
        left += share
    for expert in range(1, shares.shape[1]):
        axes.axvline(expert / shares.shape[1], color="black", linewidth=0.8, linestyle=":")  # an even load
    axes.set(xlabel="share of tokens", ylabel="layer", yticks=range(len(shares)), xlim=(0, 1))
    axes.set_title(f"expert loads on held-out text, step {entry['step']}")
    axes.invert_yaxis()
    if shares.shape[1] <= 16:  # more do not fit, and single experts cannot be told apart then
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(Path(output_dir, "expert_loads.png"), dpi=150)
    pyplot.close(figure)


def median(entries: list[dict], name: str) -> float | None:
    values = [entry[name] for entry in entries if name in entry]
    return statistics.median(values) if values else None


def as_text(value) -> str:
    """A value of the summary as a cell of its table."""
    if isinstance(value, dict):
        return "; ".join(f"{name.replace('_', ' ')} {as_text(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(as_text, value))
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_report(output_dir: str, model: PreTrainedModel, log_history: list[dict], facts: dict, options=None) -> None:
    """Write training_summary.md, the same for programs in training_summary.json, and the pictures.

    `facts` (text, numbers, lists or dicts of them) become rows; `options`, what the run was started with, goes to the
    JSON only.
    """
    training = [entry for entry in log_history if "loss" in entry]
    held_out = {e["step"]: {"step": e["step"], **held_out_scores(e)} for e in log_history if "eval_loss" in e}
    held_out = list(held_out.values())
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot([entry["step"] for entry in training], [entry["loss"] for entry in training], label="training")
    axes.plot([entry["step"] for entry in held_out], [entry["loss"] for entry in held_out], "o", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=f"{model.config.model_type}: loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(Path(output_dir, "loss_curve.png"), dpi=150)
    pyplot.close(figure)

    summary = {
        "model_type": model.config.model_type,
        "parameters": total_parameters(model),
        "active_parameters": active_parameters(model),
        **facts,
        "training_seconds": sum(entry["seconds"] for entry in training),
        "tokens_per_second": median(training, "tokens_per_second"),
        "mfu": median(training, "mfu"),
        "data_wait_share": median(training, "data_wait_share"),
        "peak_memory_gib": max((entry.get("peak_memory_gib", 0) for entry in training), default=0) or None,
        **provenance(),
    }
    summary = {name: value for name, value in summary.items() if value is not None}
    lines = [f"# {Path(output_dir).name}: training summary", "", "| | |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {as_text(value)} |" for name, value in summary.items()]
    lines += ["", "| step | held-out loss | held-out perplexity |", "|---:|---:|---:|"]
    lines += [f"| {e['step']} | {with_error(e, 'loss', 4)} | {with_error(e, 'perplexity', 2)} |" for e in held_out]
    lines += ["", "± is one standard error."]
    lines += ["", "![training and held-out loss](loss_curve.png)", ""]
    monitored = [entry for entry in log_history if "expert_imbalance/layer_0" in entry]
    if monitored:
        draw_expert_loads(output_dir, monitored[-1])
        lines += ["![tokens per expert](expert_loads.png)", ""]
    Path(output_dir, "training_summary.md").write_text("\n".join(lines))
    summary["held_out"] = held_out
    summary["options"] = options or {}
    Path(output_dir, "training_summary.json").write_text(json.dumps(summary, indent=1))
