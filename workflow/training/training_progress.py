"""What a person sees of a training run while it runs: the bar with loss, speed and held-out perplexity."""

import math
import time

import torch
from tqdm.auto import tqdm
from transformers import ProgressCallback

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.evaluation.perplexity import shown_perplexity
from complexity_deep.workflow.flops import peak_flops


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
        """Add the throughput since the last measurement, and the most GPU memory so far, to the logs.

        Raises `InputError` where a loss is not finite. The held-out one is looked at too, because no other shows what
        the last step did to the weights.
        """
        for name, what in (("loss", "loss"), ("eval_loss", "held-out loss")):
            if not math.isfinite(logs.get(name, 0.0)):
                raise InputError(
                    f"The {what} is {logs[name]} by step {state.global_step}: start again in another output_dir, with "
                    "a lower learning_rate or more warmup_steps."
                )
        if "loss" not in logs:
            return
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

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True  # else the steps since the last log would be in no curve and no sum of seconds

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
