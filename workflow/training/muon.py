"""Muon for the matrices of a model and AdamW for its other parameters, in the one optimizer that Trainer takes.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) makes the momentum of a matrix orthogonal before
it is subtracted. `torch.optim.Muon` takes parameters of two dimensions, one after the other. Experts are stacks of
matrices, so that the iteration below takes a batch of them. What it does to each is what `torch.optim.Muon` does, and
tests compare the two. `torch.func.vmap` over torch's own function is no replacement: it splits each `addmm` into three
operations, which doubles the error in bf16 and reads the matrices more often.
"""

import math
from collections.abc import Callable, Iterator

import torch
from accelerate import ParallelismConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.training.tensor_parallel import sharded_by_accelerate

# The defaults of torch.optim.Muon.
MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7
# torch's adjust_lr_fn="match_rms_adamw" (Liu et al. 2025, arXiv:2502.16982): an update as large as AdamW's usually is,
# so that learning rate and weight decay mean the same for both.
UPDATE_RMS = 0.2
BATCH_ELEMENTS = 2**25  # of matrices that are made orthogonal together, which bounds what a step needs beside the model
DIVIDED = (
    "Muon needs whole matrices on every process: it goes with DDP, but not with FSDP, DeepSpeed, tensor or expert "
    "parallelism."
)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Each of `matrices` [N, A, B] with its singular values brought near 1, in bf16.

    Five steps of a Newton-Schulz iteration whose quintic X (a + b X'X + c (X'X)^2) is steep at zero. They end between
    about 0.7 and 1.2, which serves as well as 1 (see the page of Muon). A matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16()
    x = x.mT if is_tall else x  # the smaller Gram matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def batches(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one shape and dtype together, at most BATCH_ELEMENTS of them or a single one."""
    alike: dict[tuple, list[Tensor]] = {}
    for parameter in parameters:
        alike.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
    for group in alike.values():
        number = max(1, BATCH_ELEMENTS // group[0].numel())
        yield from (group[start : start + number] for start in range(0, len(group), number))


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the parameter groups with `use_muon`, torch's AdamW for the others.

    Args:
        params: parameter groups, each with `use_muon` and `weight_decay`. A parameter of a Muon group is a matrix
            [A, B] or a stack of matrices [..., A, B], in any floating dtype; its momentum has the same.
        lr, betas, eps: of both kinds and of AdamW; a schedule scales the `lr` of every group.

    Raises `InputError` for a Muon parameter with fewer than two dimensions and for one that is divided among processes.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(params, {"lr": lr})
        for parameter in (p for group in self._groups(True) for p in group["params"]):
            if isinstance(parameter, DTensor):
                raise InputError(DIVIDED)
            if parameter.ndim < 2:
                raise InputError(f"Muon is for matrices, and a parameter has the shape {tuple(parameter.shape)}.")
        self.adamw = torch.optim.AdamW(self._groups(False), lr=lr, betas=betas, eps=eps, fused=True)

    def _groups(self, use_muon: bool) -> list[dict]:
        return [group for group in self.param_groups if group["use_muon"] == use_muon]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of both; `closure` computes the loss once more, as for every optimizer of torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading a checkpoint replaces both of these.
        self.adamw.param_groups, self.adamw.state = self._groups(False), self.state
        self.adamw.step()
        for group in self._groups(True):
            for parameters in batches([p for p in group["params"] if p.grad is not None]):
                self._muon_step(parameters, group["lr"], group["weight_decay"])
        return loss

    def _muon_step(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        """A step of parameters that all have one shape [..., A, B]."""
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        nesterov = torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM))  # [n, ..., A, B]
        updates = orthogonalized(nesterov.flatten(0, -3)).unflatten(0, nesterov.shape[:-2])
        rate = lr * UPDATE_RMS * math.sqrt(max(nesterov.shape[-2:]))  # without it, the RMS is about sqrt(1 / max(A, B))
        for parameter, update in zip(parameters, updates):
            parameter.mul_(1 - lr * weight_decay)  # `_foreach_mul_` rounds the factor to bf16 on the CPU
            parameter.add_(update, alpha=-rate)


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict]:
    """The trained parameters of a model in three groups: matrices for Muon, then embeddings and vectors for AdamW.

    Muon gets every matrix that multiplies hidden states: of attention and mu, of experts, of the controller of the
    dynamics, of gates and routers. A row of an embedding belongs to one token and has a gradient when the token
    occurs; to make rows orthogonal to each other would move those of all other tokens too. The head is the same matrix
    where it is tied, and stays with AdamW where it is not, as in both papers. Convolutions are no matrices.
    `weight_decay` is for what has two dimensions or more.
    """
    looked_up = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.Conv1d)]
    others = {parameter for module in looked_up for parameter in module.parameters(recurse=False)}
    if (head := model.get_output_embeddings()) is not None:
        others |= set(head.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.ndim in (2, 3) and p not in others]
    taken = set(matrices)
    groups = [
        {"params": matrices, "use_muon": True, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim >= 2 and p not in taken], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [{"use_muon": False, **group} for group in groups if group["params"]]


def check_muon(args: TrainingArguments, expert_parallel_size: int) -> None:
    """Raise `InputError` for options that name another optimizer too, and where matrices would be divided."""
    for name in ("optim", "optim_args", "optim_target_modules"):
        if getattr(args, name) != TrainingArguments.__dataclass_fields__[name].default:
            raise InputError(f"optimizer muon and {name} do not go together: leave one of them out.")
    sizes = ParallelismConfig()  # from the environment that `accelerate launch` makes of its config file
    is_divided = sizes.tp_enabled or sizes.dp_shard_enabled or expert_parallel_size > 1
    if is_divided or sharded_by_accelerate() or args.fsdp or args.deepspeed:
        raise InputError(DIVIDED)


def muon_for_trainer(args: TrainingArguments) -> tuple[Callable, dict]:
    """What Trainer takes as `optimizer_cls_and_kwargs`: a factory that it calls with the model, and its options."""

    def create(model: PreTrainedModel, weight_decay: float, **options) -> MuonWithAdamW:
        return MuonWithAdamW(parameter_groups(model, weight_decay), **options)

    betas = (args.adam_beta1, args.adam_beta2)
    options = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "weight_decay": args.weight_decay}
    return (lambda: create), options
