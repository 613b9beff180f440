"""Places on the GPUs, and the queue of runs that they take from."""

import datetime
import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch

from complexity_deep.workflow.evidence.ablation_plan import name_of
from complexity_deep.workflow.evidence.ablation_results import Results, is_dead


def visible_gpus() -> list[str]:
    """What each process is to be given as CUDA_VISIBLE_DEVICES: one of the GPUs that this one sees."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    names = given.split(",") if given else [str(index) for index in range(count)]
    return names[:count] or [""]


class Runner:
    """Places on the GPUs, each of which takes the next run from the queue when it is free."""

    def __init__(
        self,
        results: Results,
        train_in_child: Callable,
        options: dict,
        *,
        log_dir: str | Path,
        commit: str,
        runs_per_gpu: int = 1,
        minutes: float = float("inf"),
        start_method: str = "forkserver",
    ):
        """`train_in_child` is called in a process of its own with a run and `options`.

        `log_dir` takes what each run prints, `commit` stands in every row, and no run begins after `minutes`.
        """
        self.results, self.train_in_child, self.options = results, train_in_child, options
        self.commit, self.runs_per_gpu, self.minutes = commit, runs_per_gpu, minutes
        self.context = multiprocessing.get_context(start_method)
        self.started = time.monotonic()
        self.logs = Path(log_dir)
        self.logs.mkdir(parents=True, exist_ok=True)
        self.queue, self.failed = deque(), 0
        self.running, self.stopped, self.interrupted = set(), False, False
        # A start collects the children that have ended. If another thread joins one at the time, its exit code is lost.
        self.starts_and_joins = threading.Lock()

    def work(self, runs: list[dict], gpus: list[str]) -> None:
        self.queue.extend(runs)
        places = [gpu for _ in range(self.runs_per_gpu) for gpu in gpus]
        self.threads = max(1, (os.cpu_count() or 1) // len(places))
        with ThreadPoolExecutor(len(places)) as pool:
            ends = []
            try:
                for gpu in places:
                    ends.append(pool.submit(self._serve, gpu))
                wait(ends)
            except KeyboardInterrupt:
                self._interrupt()
                wait(ends)  # each records that its run was stopped
                raise
        errors = [error for error in (end.exception() for end in ends) if error is not None]
        for error in errors[1:]:
            print(error, file=sys.stderr)
        if errors:
            raise errors[0]

    def _interrupt(self) -> None:
        """Begin no further run, and end those that go on."""
        with self.starts_and_joins:
            self.stopped = self.interrupted = True
            for process in self.running:
                process.terminate()

    def _serve(self, gpu: str) -> None:
        try:
            self._serve_runs(gpu)
        except Exception:  # where a row cannot be written, no further run is begun
            self.stopped = True
            raise

    def _serve_runs(self, gpu: str) -> None:
        while not self.stopped and time.monotonic() - self.started < self.minutes * 60:
            try:
                run = self.queue.popleft()
            except IndexError:
                return
            result = self._train(run, gpu)
            if result is None:
                return
            row = {**run, **result, "commit": self.commit, "runs_per_gpu": self.runs_per_gpu}
            row["versions"] = ", ".join(f"{n} {row.get(n, '')}" for n in ("torch", "transformers", "triton"))
            row["versions"] += ", steps as CUDA graphs" if row.pop("recorded", False) else ""
            row["date"] = datetime.date.today().isoformat()
            row["status"] = "diverged" if is_dead(row) else row["status"]
            self.results.append(row)
            self.failed += row["status"] == "failed"
            print(self._line(row), flush=True)

    def _train(self, run: dict, gpu: str) -> dict | None:
        """What the child sends, or why it sent nothing; None for a run that was not begun."""
        receiver, sender = self.context.Pipe(duplex=False)
        log = self.logs / f"{name_of(run)}.log"
        arguments = (run, gpu, self.threads, str(log), sender)
        process = self.context.Process(target=self.train_in_child, args=arguments, kwargs=self.options)
        with self.starts_and_joins:
            if self.stopped:
                return None
            process.start()
            self.running.add(process)
        sender.close()
        try:
            result = receiver.recv()
        except (EOFError, OSError):  # it was killed, or crashed in compiled code
            result = None
        with self.starts_and_joins:  # by now it has ended, or is about to
            process.join()
            self.running.remove(process)
        reason = "stopped by Ctrl-C" if self.interrupted else f"the process ended with exit code {process.exitcode}"
        return result or {"status": "failed", "reason": reason}

    def _line(self, row: dict) -> str:
        minutes = (time.monotonic() - self.started) / 60
        what = f"{minutes:5.1f} min  {row['plan']}: {row['variant']} seed {row['seed']} lr {row['learning_rate']:g}"
        if row["status"] != "ok":
            return f"{what}: {row['status']} {row.get('reason', '')}"
        return (
            f"{what}: edu {row['held_out_edu']:.4f}, books {row['held_out_books']:.4f}, {row['seconds']:.0f} s of "
            f"{row['wall_seconds']:.0f}, {row['tokens_per_second']:,} tokens/s"
            + (f"; {row['reason']}" if row.get("reason") else "")
        )
