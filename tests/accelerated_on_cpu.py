"""scripts/pretrain.py in a process where accelerate takes two gloo processes on the CPU for two GPUs.

    ACCELERATE_TORCH_DEVICE=cpu accelerate launch --config_file recipes/accelerate/fsdp2.yaml THIS_FILE --config ...

accelerate turns to FSDP and DeepSpeed, and Trainer to bf16, only where they found an accelerator. These choices aside,
everything is as on GPUs: the shipped config, the wrapping of the model, gathering weights for a checkpoint.
How often FSDP2 gathered weights is printed at the end.
"""

import atexit
import runpy

import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp
import transformers.training_args
from accelerate.state import PartialState
from accelerate.utils import DistributedType

PartialState._prepare_backend = lambda self, *arguments: ("gloo", DistributedType.MULTI_GPU)
transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def count(*arguments, **options):
    global gathers
    gathers += 1
    return gather(*arguments, **options)


gather, gathers = fsdp.foreach_all_gather, 0
fsdp.foreach_all_gather = count
atexit.register(lambda: print(f"weights gathered {gathers} times", flush=True))
runpy.run_module("complexity_deep.scripts.pretrain", run_name="__main__")
