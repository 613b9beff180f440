"""What the Trainers of pretrain.py and sft.py share: whole checkpoints, one bar, and going on where a run stopped."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from complexity_deep.workflow.command import InputError, one_line
from complexity_deep.workflow.training.atomic_checkpoint import AtomicCheckpointMixin
from complexity_deep.workflow.training.run_identity import argument_settings, check_same_run, model_settings
from complexity_deep.workflow.training.training_progress import TrainingProgress


@torch.no_grad()  # with gradients, `to_local` is an operation of autograd
def clip_shards(gradients: list[Tensor], max_norm: float) -> Tensor | None:
    """Scale FSDP2's gradients in place to a total norm of at most `max_norm`; returns the norm before, a scalar.

    The library's way leads through DTensor's dispatch, which keeps the host busy for longer than the GPU. None, and
    nothing is done, where gradients are offloaded or not all sharded over one group of processes.
    """
    layouts = {(grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None for grad in gradients}
    meshes = {layout and layout[0] for layout in layouts}
    if len(meshes) != 1 or None in meshes or not all(len(kinds) == 1 and kinds[0].is_shard() for _, kinds in layouts):
        return None
    mesh, shards = meshes.pop(), [grad.to_local() for grad in gradients]
    if shards[0].device.type != mesh.device_type:  # offloaded
        return None
    norm = torch.nn.utils.get_total_norm(shards).square()
    torch.distributed.all_reduce(norm, group=mesh.get_group())
    norm = norm.sqrt()
    torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


@contextlib.contextmanager
def options_in_one_sentence() -> Iterator[None]:
    """Within it, what the library says of an option that cannot be used is an `InputError`."""
    try:
        yield
    except (ImportError, TypeError, ValueError) as error:  # a TypeError is of keyword arguments given as an option
        raise InputError(one_line(error)) from error


class ResumableTrainerMixin(AtomicCheckpointMixin):
    """Put before Trainer in the bases of a class that has `load_extra_state`, the reverse of `save_extra_state`.

    `settings`, with the model's and those of the training arguments, make a run what it is: a checkpoint that was
    written with others is refused.
    """

    def __init__(self, *, model, args, settings: dict, progress: TrainingProgress, **kwargs):
        # Taken before Trainer changes the model's config.
        self.settings = {**model_settings(model), **settings, **argument_settings(args)}
        args.eval_do_concat_batches, args.batch_eval_metrics = True, False  # the metrics are computed from one array
        args.label_names = ["labels"]  # what the collators give; by another name there would be no held-out loss
        # Every metric here is one of loss. Trainer takes those whose name does not say so for scores.
        args.greater_is_better = False
        with options_in_one_sentence():
            super().__init__(model=model, args=args, **kwargs)
        self.progress = progress
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            # accelerate's policy would round the loss and each token's to bf16 too, and sum gradients in it.
            policy = replace(plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32)
            plugin.mixed_precision_policy = policy
        if self.accelerator.ddp_handler is not None:
            # Gradients lie in the buckets that are summed: no copies to and fro, and no second set of them in memory.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        # Layer by layer: that compiles in a fraction of the time.
        self.accelerator.state.dynamo_plugin.use_regional_compilation = True
        torch._dynamo.config.optimize_ddp = False  # it cuts what is compiled at the buckets, here each layer in two
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, JITCheckpointCallback):
                # Only between two steps: a checkpoint within one would count its rows as used, and nothing has learned
                # from them yet.
                callback.on_step_begin = callback.on_pre_optimizer_step = lambda *args, **kwargs: None
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(progress)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Matrices only. Trainer goes by names, and would decay the equilibrium of the dynamics, a vector, as well."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_optimizer(self, *args, **kwargs):
        with options_in_one_sentence():
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        with options_in_one_sentence():
            return super().create_scheduler(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.state.global_step >= self.state.max_steps:
            # Trainer takes one step more when it resumes a run that is already over, and guesses why it gets no rows.
            logging.getLogger("transformers.trainer").addFilter(lambda record: "single sample" not in str(record.msg))
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def get_eval_dataloader(self, *args, **kwargs):
        """The loader of held-out rows, all of them: `dataloader_drop_last` is for training."""
        drops_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drops_last

    def training_step(self, model, *args, **kwargs):
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)  # none for a model that was sharded when loaded
        keeps_weights = isinstance(model, FSDPModule) and plugin is not None and not plugin.reshard_after_forward
        if keeps_weights and self.args.gradient_accumulation_steps > 1:
            # Not resharded between the batches of a step, for weights change only at its end.
            model.set_reshard_after_backward(self.accelerator.sync_gradients)
        return super().training_step(model, *args, **kwargs)

    def _clip_grad_norm(self, model):
        norm = None
        if self.accelerator.is_fsdp2 and self.accelerator.mixed_precision != "fp16":  # fp16 gradients are scaled
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            norm = clip_shards(gradients, self.args.max_grad_norm)
        return super()._clip_grad_norm(model) if norm is None else norm

    def log(self, logs, start_time=None):
        self.progress.measure(logs, self.state)
        super().log(logs, start_time)

    def check_settings(self, checkpoint: Path, written: dict) -> None:
        """Raise `InputError` where the settings that a checkpoint was written with are not those of now."""
        check_same_run(checkpoint, written, self.settings, self.args)

    def train_and_evaluate(self, checkpoint: Path | None) -> dict[str, float]:
        """Train from the checkpoint, or from the start, to the end; returns the metrics of the held-out rows."""
        if checkpoint:
            print(f"Resuming from {checkpoint}")
            self.load_extra_state(checkpoint)
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except ImportError as error:  # a package that an option asks for
            raise InputError(one_line(error)) from error
        finally:
            self.progress.close()  # else the bar would be drawn once more below the sentence of an error
        return self.evaluate()
