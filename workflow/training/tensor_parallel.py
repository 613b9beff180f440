"""Tensor and expert parallelism for a Trainer: the library's plans, sharded loading and optimizer checkpoints.

The processes of a tensor-parallel group hold a slice of every matrix each, and read the same rows. Several such groups
share weights and optimizer by FSDP2, and read different rows. accelerate's config file gives the sizes
(recipes/accelerate/tp.yaml); this checks them, and closes the gaps that Trainer leaves for such models.
"""

from fnmatch import fnmatch
from pathlib import Path

import torch
import transformers
from accelerate import ParallelismConfig
from accelerate.utils import parse_flag_from_env
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig, load_optimizer_distributed, save_optimizer_distributed
from transformers.trainer import SCHEDULER_NAME

from complexity_deep.workflow.command import InputError

OPTIMIZER_FOLDER = "optimizer"


def sharded_by_accelerate() -> bool:
    """Whether accelerate is to shard the model by FSDP or DeepSpeed, from what `accelerate launch` or Trainer set."""
    return any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))


def requested_parallelism(world_size: int, expert_parallel_size: int) -> DistributedConfig | None:
    """How to divide the model among the processes; None where Trainer and accelerate do all of it."""
    sizes = ParallelismConfig()  # from the environment that `accelerate launch` makes of its config file
    if sizes.cp_enabled or sizes.sp_enabled:
        raise InputError("Context and sequence parallelism, which divide the tokens of a row, are not supported.")
    if not sizes.tp_enabled and expert_parallel_size == 1:
        return None
    if Version(transformers.__version__) < Version("5.23"):
        raise InputError(
            f"Tensor and expert parallelism need transformers 5.23 or newer, and this is {transformers.__version__}."
        )
    if sharded_by_accelerate():
        raise InputError(
            "With tensor or expert parallelism the library shards the model: take recipes/accelerate/tp.yaml, whose "
            "distributed_type is MULTI_GPU, and its parallelism_config_dp_shard_size for FSDP2."
        )
    if sizes.tp_size * sizes.dp_shard_size != world_size:
        raise InputError(
            f"parallelism_config_tp_size {sizes.tp_size} x parallelism_config_dp_shard_size {sizes.dp_shard_size} must "
            f"be the number of processes, which is {world_size}."
        )
    try:
        return DistributedConfig(tp_size=sizes.tp_size, fsdp_size=sizes.dp_shard_size, ep_size=expert_parallel_size)
    except ValueError as error:  # the size for experts does not divide the others
        raise InputError(f"The experts cannot be divided so: {error}") from error


def shard(model: PreTrainedModel, parallelism: DistributedConfig, checkpoint: Path | None) -> PreTrainedModel:
    """This process's part of the model, with the weights of the checkpoint if there is one."""
    divided = {"num_attention_heads": parallelism.tp_size, "num_key_value_heads": parallelism.tp_size}
    if parallelism.ep_size > 1:
        divided["num_experts"] = parallelism.ep_size
    for name, size in divided.items():
        if (number := getattr(model.config, name, 0)) % size:
            raise InputError(f"{name} is {number}, which {size} processes cannot divide among themselves.")
    # What every process applies to its own attention heads (q_norm), so that it sees a part of the gradient only. The
    # library's own way adds up over processes what is accumulated so far, so early micro-batches count several times.
    partial = [name for name, style in model.tp_plan.items() if style == "replicated_with_grad_allreduce"]
    parallelism.tp_plan = dict.fromkeys(partial, "replicate") or None
    fresh = {} if checkpoint else {"config": model.config, "state_dict": model.state_dict()}
    try:
        sharded = type(model).from_pretrained(
            checkpoint,
            **fresh,
            distributed_config=parallelism,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
        )
    except ValueError as error:  # there is no such plan
        raise InputError(f"{model.config.model_type} cannot be divided: {error}") from error
    if parallelism.tp_size > 1:
        for name, module in sharded.named_modules():
            if any(fnmatch(name, pattern) for pattern in partial):
                sum_gradients(module, sharded._device_mesh.get_group("tp"))
    return sharded


def sum_gradients(module: nn.Module, group: torch.distributed.ProcessGroup) -> None:
    """Add up the gradients of a module's parameters over a group of processes, those of every backward pass once."""
    hooked = set()

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        torch.distributed.all_reduce(gradient, group=group)
        return gradient

    def hook_parameters(module, _):
        # Before a forward pass, for only then has FSDP2 put the whole parameters into their places.
        for parameter in module.parameters():
            if torch.is_grad_enabled() and parameter not in hooked:
                parameter.register_hook(summed)
                hooked.add(parameter)

    module.register_forward_pre_hook(hook_parameters)


class ShardedModelMixin:
    """Put before Trainer in the bases of a class that may get a model of `shard`."""

    def __init__(self, *, args, **kwargs):
        # Trainer refuses to store the optimizer of a sharded model; the methods below do it by the library's functions.
        args.save_only_model, wanted = True, args.save_only_model
        super().__init__(args=args, **kwargs)
        args.save_only_model = wanted

    @property
    def is_sharded(self) -> bool:
        return getattr(self, "is_distributed_loading_by_transformers", False)  # transformers 5.17 does not know it

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_optimizer_distributed(self.model, self.optimizer.optimizer, str(Path(output_dir, OPTIMIZER_FOLDER)))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer_distributed(self.model, self.optimizer.optimizer, str(Path(checkpoint, OPTIMIZER_FOLDER)))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if not self.is_sharded:  # else `shard` has read the weights
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def floating_point_ops(self, inputs: dict) -> float:
        return super().floating_point_ops(inputs) / self.get_tp_size()  # Trainer adds up those of all processes

    def evaluation_loop(self, *args, **kwargs):
        if self.is_sharded:
            self.gather_function = self.gather_rows  # Trainer takes it back after every evaluation
        return super().evaluation_loop(*args, **kwargs)

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """As accelerate's `gather_for_metrics`, but a row that a whole tensor-parallel group has comes once."""
        gathered = self.accelerator.gather(tensor).unflatten(0, (-1, self.get_tp_size(), len(tensor)))
        gathered = gathered[:, 0].flatten(0, 1)
        state = self.accelerator.gradient_state
        return gathered[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else gathered
