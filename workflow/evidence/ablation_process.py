"""The process of one run of ablate.py, light to import for the parent, which trains nothing itself."""

import multiprocessing
import os
import sys
import threading
import traceback

from complexity_deep.workflow.command import first_line


def end_with_parent() -> None:
    """Without its parent a run has nobody to give its result to, and would slow down those of the next command."""
    multiprocessing.parent_process().join()
    os._exit(1)


def train_in_child(run: dict, gpu: str, threads: int, log: str, connection, **options) -> None:
    """Send the result of `ablation_run.train`, or why there is none, to the parent; what is printed goes to `log`."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA starts, which the imports below do not do
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            import torch
            from tqdm import tqdm

            # tqdm's own lock is a semaphore, which Python reports as leaked, because this process ends without cleanup.
            tqdm.set_lock(threading.RLock())

            from complexity_deep.workflow.evidence.ablation_run import train
            from complexity_deep.workflow.provenance import provenance

            torch.set_num_threads(threads)
            result = train(run, **options)
            result |= {name: provenance()[name] for name in ("device", "torch", "transformers", "triton")}
        except Exception as error:
            traceback.print_exc()
            result = {"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}
        connection.send(result)
        connection.close()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)  # at once, for compile workers would be waited for
