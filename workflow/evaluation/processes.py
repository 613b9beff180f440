"""The processes of one evaluation: each holds the whole model and takes every so many-th document."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from complexity_deep.workflow.command import InputError

LONGEST_WAIT = timedelta(days=1)  # of one process for another, whose documents may be longer


def join_processes(device: str | None) -> tuple[PartialState, str]:
    """What `accelerate launch` or torchrun started, or this process alone; and the device of this process.

    `device` is a torch device, or None for a GPU where there is one. Raises `InputError` where the processes cannot
    hold a whole model each.
    """
    with_gpus = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    given, device = device, device or ("cuda" if with_gpus else "cpu")
    processes, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if processes == 1:
        return PartialState(cpu=device == "cpu"), device
    if any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED", "PARALLELISM_CONFIG")):
        raise InputError(
            "Every process of an evaluation holds the whole model, and this configuration of accelerate divides it: "
            "launch with recipes/accelerate/ddp.yaml."
        )
    if device not in ("cuda", "cpu"):
        raise InputError(f"--device {given} is one device for {processes} processes: leave it out.")
    if device == "cuda" and here > torch.cuda.device_count():
        raise InputError(
            f"{here} processes need a GPU each, and there are {torch.cuda.device_count()}: launch fewer by "
            "--num_processes."
        )
    state = PartialState(cpu=device == "cpu", timeout=LONGEST_WAIT)
    return state, str(state.device)
