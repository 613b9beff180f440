"""What to watch while a Complexity-Deep model trains: experts, mu, velocity and where the gradient goes.

    python scripts/pretrain.py --config recipes/demo.yaml --monitor-steps 50 --report-to tensorboard

Every `monitor_steps` steps the model reads one fixed batch of held-out rows, and these go to the log (and so to
whatever `report_to` names), N being a layer and E an expert:

    expert_tokens/layer_N/expert_E    tokens of the batch that the expert received
    expert_imbalance/layer_N          most tokens of an expert over the mean of all
    mu_rerouted/layer_N               share of tokens that mu sent to another expert than their id's
    velocity_rms, mu_rms /layer_N     root mean square over tokens and channels
    velocity_clamped/layer_N          share of velocities at the limit
    gradient_norm/COMPONENT           of the training step, before clipping
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback

from complexity_deep.kernels.kernel_reference import VELOCITY_LIMIT

PROBE_ROWS = 4  # enough for a share to be steady; every layer's mu and velocity of them are in memory at once
# A parameter belongs to the first component that has a part of its name.
COMPONENTS = {
    "norms": ("norm",),
    "mu_guidance": ("mu_to_", "dynamics.mu", "mu_router"),
    "dynamics": ("dynamics.",),
    "attention": ("self_attn.",),
    "experts_and_mlp": ("mlp.",),
    "embeddings": ("",),  # what is left: embed_tokens and an untied lm_head
}


def component_of(parameter_name: str) -> str:
    return next(name for name, parts in COMPONENTS.items() if any(part in parameter_name for part in parts))


def gradient_norms(model: torch.nn.Module) -> dict[str, float]:
    """Norm of the gradient by component; a collective where gradients are sharded (FSDP2, tensor parallelism).

    Empty under DeepSpeed, which keeps gradients to itself.
    """
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # Tensors that are sharded over different processes, or not at all, cannot go into one norm.
            key = component_of(name), getattr(parameter.grad, "device_mesh", None)
            gradients.setdefault(key, []).append(parameter.grad)
    squares = Counter()
    for (name, mesh), tensors in gradients.items():
        norm = torch.nn.utils.get_total_norm(tensors)
        squares[name] += (norm.full_tensor() if mesh else norm).item() ** 2
    return {f"gradient_norm/{name}": math.sqrt(square) for name, square in squares.items()}


@contextlib.contextmanager
def recording_hooks_removed(model: PreTrainedModel) -> Iterator[None]:
    """Afterwards the hooks are gone that the library put on modules to record their outputs.

    It leaves them there, and modules with hooks run without the fused kernels and CUDA graphs.
    """
    mark = "_output_capturing_hooks_installed"  # by which the library knows that it has put them there
    before = [(module, set(module._forward_hooks), hasattr(module, mark)) for module in model.modules()]
    try:
        yield
    finally:
        for module, hooks, is_marked in before:
            for key in module._forward_hooks.keys() - hooks:
                del module._forward_hooks[key]
            if not is_marked and hasattr(module, mark):
                delattr(module, mark)


@torch.no_grad()
def read_monitors(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, float]:
    """Everything but the gradients, from one forward pass over `batch` (input_ids and position_ids, each [B, S])."""
    config = model.config
    was_training = model.training
    model.eval()
    # The whole model, since that is where autocast and FSDP hook in, but hardly any logits.
    asked = {"output_expert_ids": True, "output_velocities": True, "output_mus": True}
    with recording_hooks_removed(model):
        outputs = model(**batch, **asked, use_cache=False, logits_to_keep=1)
    model.train(was_training)

    measured = {}
    if config.is_routed:
        by_id = model.base_model.expert_ids_by_layer(batch["input_ids"])  # L times (B, S)
        for layer, expert_ids in enumerate(outputs.expert_ids):
            tokens = torch.bincount(expert_ids.flatten(), minlength=config.num_experts)  # (E,)
            for expert in range(config.num_experts):
                measured[f"expert_tokens/layer_{layer}/expert_{expert}"] = tokens[expert]
            measured[f"expert_imbalance/layer_{layer}"] = tokens.max() / tokens.float().mean()
            if config.use_mu_routing:
                measured[f"mu_rerouted/layer_{layer}"] = (expert_ids != by_id[layer]).float().mean()
    for layer, mu in enumerate(outputs.mus or ()):
        measured[f"mu_rms/layer_{layer}"] = mu.float().square().mean().sqrt()
    if config.use_dynamics:
        for layer, velocity in enumerate(outputs.velocities):
            measured[f"velocity_rms/layer_{layer}"] = velocity.float().square().mean().sqrt()
            measured[f"velocity_clamped/layer_{layer}"] = (velocity.abs() >= VELOCITY_LIMIT).float().mean()
    # One transfer for all of them: each on its own would wait for the device. A model with no such part has none.
    values = torch.stack([value.float() for value in measured.values()]).tolist() if measured else []
    return dict(zip(measured, values))


class ArchitectureMonitors(TrainerCallback):
    """Logs the above every `steps` steps, and at the last one so that the report has it."""

    def __init__(self, trainer: Trainer, steps: int):
        rows = trainer.eval_dataset.select(range(min(PROBE_ROWS, len(trainer.eval_dataset))))
        batch = trainer.data_collator(rows.to_list())
        self.batch = {name: batch[name] for name in ("input_ids", "position_ids")}
        self.trainer = trainer
        self.steps = steps
        self.gradient_norms = {}

    def is_due(self, step: int) -> bool:
        return step % self.steps == 0 or step == self.trainer.state.max_steps

    def on_gradients(self) -> None:
        """To be called when a step's gradients are complete; the events of a callback come only after clipping."""
        if self.is_due(self.trainer.state.global_step + 1):
            self.gradient_norms = gradient_norms(self.trainer.model)

    def on_step_end(self, args, state, control, **kwargs):
        if not self.is_due(state.global_step):
            return
        # Uncompiled: the recorders would make the compiler trace the model once more.
        model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        batch = {name: tensor.to(args.device) for name, tensor in self.batch.items()}
        should_log = control.should_log
        self.trainer.log({**read_monitors(model, batch), **self.gradient_norms})
        control.should_log = should_log  # every log resets it, and Trainer may still have the loss of this step to log
