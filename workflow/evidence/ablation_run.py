"""One run of ablate.py: a variant with one seed, trained by Trainer on token files in a process of its own.

The loop is that of pretrain.py without what a short run has no use for (checkpoints, a stream of text, monitors): fp32
weights under bf16 autocast, AdamW or Muon that decays matrices, a loss in chunks, every decoder layer compiled.
"""

import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter, load_balancing_loss_func

from complexity_deep.accelerated_complexity_deep import cggr_experts_forward
from complexity_deep.training_graph_complexity_deep import is_replayed
from complexity_deep.workflow.evidence.ablation_data import TrainingBatches, batch_of, token_counts, token_rows
from complexity_deep.workflow.evidence.ablation_plan import MUON, name_of
from complexity_deep.workflow.flops import active_parameters, total_parameters
from complexity_deep.workflow.training.chunked_loss import use_chunked_loss
from complexity_deep.workflow.training.muon import muon_for_trainer
from complexity_deep.workflow.training.new_model import load_tokenizer, model_of_shape

WARM_UP_STEPS = 10  # compiled and not timed; their time is taken to be that of the others
CURVE_POINTS = 16
SHORT_RUN = 5e7  # tokens below which a quarter of the points will do, for a point reads 480,000 held-out tokens
LOG_STEPS = 20
DEAD_WINDOWS = 5  # of LOG_STEPS, in a row, that end without a gradient: such a run never learns again, and is stopped
SPIKE = 0.2  # nats that the mean training loss of a window of LOG_STEPS lies above the lowest before it


def weighted_cggr_forward(experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The kernels of this repository for a learned top-1 router: each output times its routing weight [T, 1]."""
    out = cggr_experts_forward(experts, hidden_states, top_k_index, torch.ones_like(top_k_weights).detach())
    return out * top_k_weights.to(out.dtype)


ALL_EXPERTS_FUNCTIONS.register("cggr_weighted", weighted_cggr_forward)


def build(run: dict, data: str) -> PreTrainedModel:
    """The fresh model of a run, on the CPU, with everything about it that is no config field."""
    tokenizer = load_tokenizer(f"{data}/tokenizer")
    is_ours = run["config"]["model_type"] == "complexity-deep"
    implementations = {"attn_implementation": "flex_attention" if torch.cuda.is_available() else "sdpa"}
    if not is_ours:
        implementations["experts_implementation"] = "cggr_weighted" if torch.cuda.is_available() else "eager"
    model = model_of_shape(run["config"], run["variant"], tokenizer, **implementations)
    if is_ours and model.config.is_routed and model.config.routing == "balanced":
        model.balance_routing(token_counts(data, model.config.vocab_size))
    if run["init"] == "published":
        published_init(model)
    if run["freeze_mlp"]:
        freeze_mlp(model)
    return model


@torch.no_grad()
def published_init(model: PreTrainedModel) -> None:
    """Every matrix from N(0, initializer_range) and every bias zero, the dynamics and the mu router included."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith((".bias", "dynamics.mu")):
            tensor.zero_()
        elif tensor.is_floating_point() and tensor.ndim > 1:
            tensor.normal_(0.0, model.config.initializer_range)


def freeze_mlp(model: PreTrainedModel) -> None:
    """What the published CUDA path did: no gradient reaches the experts and their norm, or flows through them."""
    for layer in model.base_model.layers:
        for module in (layer.post_attention_layernorm, layer.mlp):
            module.requires_grad_(False)
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(),))


def compile_parts(model: PreTrainedModel) -> None:
    """Compile each layer and the loss; layers of one kind share their code."""
    torch._dynamo.config.recompile_limit = 64  # first, guided and embedded layers, each in training and evaluation
    for layer in model.base_model.layers:
        layer.compile(dynamic=False)
    head = model.get_output_embeddings()
    head.forward = torch.compile(head.forward, dynamic=False)


def keep_logits(router: Qwen3MoeTopKRouter, inputs: tuple, outputs: tuple) -> None:
    """Leave the logits [T, E] of a forward pass on the router; a list of them would be recompiled per length."""
    router.logits = outputs[0]


class RunTrainer(Trainer):
    """Trainer over batches that lie on the device, with the balance loss of a learned router."""

    def __init__(self, *, batches: TrainingBatches, balance_loss: float, **kwargs):
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)
        self.batches, self.balance_loss = batches, balance_loss
        self.gradient_norms: list[Tensor] = []
        self.routers = [module for module in self.model.modules() if isinstance(module, Qwen3MoeTopKRouter)]
        for router in self.routers:
            router.register_forward_hook(keep_logits)

    def get_train_dataloader(self) -> TrainingBatches:
        return self.batches

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if self.routers:
            logits = tuple(router.logits for router in self.routers)
            loss = loss + self.balance_loss * load_balancing_loss_func(logits, model.config.num_experts, top_k=1)
        return loss

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        self.gradient_norms.append(norm.detach())
        return norm


class RunClock(TrainerCallback):
    """Seconds of training alone, and the held-out losses at points of the run."""

    def __init__(self, steps: int, tokens_per_step: int, evaluate):
        self.warm_up = min(WARM_UP_STEPS, steps // 2)
        self.steps, self.tokens_per_step, self.evaluate = steps, tokens_per_step, evaluate
        points = CURVE_POINTS if steps * tokens_per_step >= SHORT_RUN else CURVE_POINTS // 4
        self.points = {round(steps * point / points) for point in range(1, points + 1)}
        self.seconds, self.started, self.last_step = 0.0, None, 0
        self.curve, self.windows, self.diverged = [], [], False
        self.windows_without_gradient = 0  # at the end so far

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.last_step = state.global_step
        if state.global_step in self.points:
            if self.started is not None:
                self.seconds += self._now() - self.started
            self.curve.append([state.global_step * self.tokens_per_step, *self.evaluate().values()])
            if self.started is not None:
                self.started = self._now()
        if state.global_step == self.warm_up:
            self.started = self._now()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.windows.append(logs["loss"])
            still = logs.get("grad_norm") == 0
            self.windows_without_gradient = self.windows_without_gradient + 1 if still else 0
            if not math.isfinite(logs["loss"]) or self.windows_without_gradient == DEAD_WINDOWS:
                self.diverged = control.should_training_stop = True

    @property
    def training_seconds(self) -> float:
        """Of all steps, those of the warm-up counted as if they had been as fast as the others."""
        return self.seconds * self.steps / (self.steps - self.warm_up)

    @property
    def spikes(self) -> int:
        """Windows after the learning rate's warm-up whose loss lies SPIKE above the lowest before."""
        windows = self.windows[len(self.windows) // 10 :]
        return sum(loss > min(windows[:index]) + SPIKE for index, loss in enumerate(windows) if index)


class HeldOut:
    """Mean loss in nats per token of each held-out text, in batches of one shape."""

    def __init__(self, model: PreTrainedModel, data: str, row_length: int, rows_per_batch: int, eos_token_id: int):
        self.model, self.batches = model, {}
        for name in ("edu", "books"):
            rows = token_rows(data, f"held_out_{name}", row_length, model.device)
            self.batches[name] = []
            for part in rows.split(rows_per_batch):
                batch = batch_of(part[torch.arange(rows_per_batch) % len(part)], eos_token_id)
                batch["labels"][len(part) :] = -100  # rows that fill a batch up do not count
                self.batches[name].append(batch)

    @torch.no_grad()
    def __call__(self, names=("edu", "books")) -> dict[str, float]:
        was_training = self.model.training
        self.model.eval()
        losses = {}
        for name in names:
            total, count = 0.0, 0
            for batch in self.batches[name]:
                total += self.model(**batch).token_losses.double().sum()
                count += (batch["labels"][:, 1:] != -100).sum()
            losses[name] = (total / count).item()
        self.model.train(was_training)
        return losses


def shifted_loss(model: PreTrainedModel, held_out: HeldOut) -> float:
    """Held-out loss with every token sent to the expert after its own: near the true one where experts do nothing."""
    table = model.base_model.token_to_expert
    own = table.clone()
    table.copy_((own + 1) % model.config.num_experts)
    loss = held_out(["edu"])["edu"]
    table.copy_(own)
    return loss


def expert_norm(model: PreTrainedModel) -> float:
    """Mean norm of the gate and up weights of an expert, over experts and layers."""
    norms = [layer.mlp.experts.gate_up_proj.detach().flatten(1).norm(dim=1) for layer in model.base_model.layers]
    return torch.cat(norms).mean().item()


def training_arguments(run: dict, steps: int, folder: str) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=run["rows_per_step"],
        learning_rate=run["learning_rate"],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": run["min_lr_rate"]},
        warmup_steps=max(1, round(run["warmup"] * steps)),
        weight_decay=run["weight_decay"],
        adam_beta2=run["adam_beta2"],
        max_grad_norm=run["max_grad_norm"],
        bf16=on_gpu,
        use_cpu=not on_gpu,
        seed=run["seed"],
        logging_steps=min(LOG_STEPS, max(1, steps // 4)),
        logging_nan_inf_filter=False,  # it would show a run that diverged as one at loss 0
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def save(model: PreTrainedModel, data: str, folder: Path) -> None:
    """Model and tokenizer as `from_pretrained` takes them; in `folder` once all of it is written."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    load_tokenizer(f"{data}/tokenizer").save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def train(run: dict, data: str, eos_token_id: int, compiled: bool, models: str | None = None) -> dict:
    """Train and measure one run; returns the columns of runs.csv that only the run itself can know.

    `models` is a folder that a model which did not diverge is saved in. Where that fails, the row says so.
    Raises `InputError` for data that do not suffice, and whatever training raises.
    """
    wall = time.perf_counter()
    set_seed(run["seed"])
    model = build(run, data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counted = {"parameters": total_parameters(model), "active_parameters": active_parameters(model)}
    model.to(device)
    use_chunked_loss(model)
    if compiled:
        compile_parts(model)
    tokens_per_step = run["rows_per_step"] * run["row_length"]
    steps = int(run["tokens"] // tokens_per_step)
    rows = token_rows(data, "train", run["row_length"], device)
    repeat = run.get("repeat_data", False)
    batches = TrainingBatches(rows, run["rows_per_step"], steps, run["seed"], eos_token_id, repeat)
    held_out = HeldOut(model, data, run["row_length"], run["rows_per_step"], eos_token_id)
    has_experts = any(hasattr(getattr(layer, "mlp", None), "experts") for layer in model.base_model.layers)
    norm_before = expert_norm(model) if has_experts else None
    clock = RunClock(steps, tokens_per_step, held_out)
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(run, steps, folder)
        trainer = RunTrainer(
            model=model,
            args=args,
            optimizer_cls_and_kwargs=muon_for_trainer(args) if run.get("optimizer") == MUON else None,
            train_dataset=batches,
            callbacks=[clock],
            batches=batches,
            balance_loss=run["balance_loss"],
        )
        trainer.train()
    after_warm_up = trainer.gradient_norms[round(run["warmup"] * steps) :]
    norms = torch.stack(after_warm_up or trainer.gradient_norms)  # of all, where it diverged before
    is_finite = not clock.diverged and all(map(math.isfinite, clock.curve[-1][1:]))
    result = {
        **counted,
        "recorded": is_replayed(model.base_model),
        "status": "ok" if is_finite else "diverged",
        "steps": clock.last_step,
        "curve": [[tokens, *(round(loss, 5) for loss in losses)] for tokens, *losses in clock.curve],
        "max_grad_norm": round(norms.max().item(), 3),
        "median_grad_norm": round(statistics.median(norms.tolist()), 3),
        "spikes": clock.spikes,
        "train_loss": clock.windows[-1],
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else "",
    }
    if result["status"] == "ok":
        _, result["held_out_edu"], result["held_out_books"] = result["curve"][-1]
        result["seconds"] = round(clock.training_seconds, 2)
        result["tokens_per_second"] = round(steps * tokens_per_step / clock.training_seconds)
        if has_experts:
            result["expert_norm_ratio"] = round(expert_norm(model) / norm_before, 4)
        if getattr(model.base_model, "token_to_expert", None) is not None:
            result["shifted_edu"] = round(shifted_loss(model, held_out), 5)
        if models:
            try:
                save(model, data, Path(models, name_of(run)))
            except Exception as error:  # the measurements are kept; a full disk has a class of its own
                result["reason"] = f"its model was not saved: {error}"
    result["wall_seconds"] = round(time.perf_counter() - wall, 1)
    return result
