"""ablate.py: each run is made once and recorded, whatever comes of it."""

import errno
import math
import multiprocessing
import os
import resource
import signal
import threading
import time

import pytest
import torch
from tqdm import tqdm

from ablation_rows import DATA, PLANS
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.evidence import ablation_process, ablation_run
from complexity_deep.workflow.evidence.ablation_plan import (
    expand,
    finish,
    missing_of,
)
from complexity_deep.workflow.evidence.ablation_results import Results, read_rows
from complexity_deep.workflow.evidence.ablation_runner import Runner, visible_gpus


def pretend(run, gpu, threads, log, connection, **options):
    """A child that trains nothing: what becomes of a run depends on its seed."""
    if run["seed"] == 3:
        os._exit(9)
    outcomes = {1: {"status": "diverged"}, 2: {"status": "failed", "reason": "OutOfMemoryError: too big, by far"}}
    measured = {"held_out_edu": 3.0, "held_out_books": 4.0, "seconds": 1.0, "wall_seconds": 2.0, "steps": 5}
    measured |= {"curve": [[1, 3.0, 4.0]], "tokens_per_second": 10, "torch": "2.11", "recorded": run["seed"] == 4}
    measured["median_grad_norm"] = 0.0 if run["seed"] == 6 else 0.2
    if run["seed"] == 5:
        measured["curve"].append([2, 9.7, 9.7])
    connection.send(outcomes.get(run["seed"], {"status": "ok", **measured}))


def work(folder, runs):
    options = {"start_method": "fork", "log_dir": folder / "logs", "runs_per_gpu": 2, "commit": "1e5"}
    runner = Runner(Results(folder / "runs.csv"), pretend, {}, **options)
    runner.work(runs, ["0", "1"])
    return runner


def test_every_outcome_is_recorded_and_a_finished_run_is_not_made_again(tmp_path, capsys):
    run = expand(PLANS / "learning_rates.yaml", [], DATA)[0]
    runs = [finish({**run, "seed": seed}, False) for seed in range(7)]
    assert work(tmp_path, runs).failed == 2
    rows = {row["seed"]: row for row in read_rows(tmp_path / "runs.csv")}
    assert {seed: row["status"] for seed, row in rows.items()} == {
        0: "ok", 1: "diverged", 2: "failed", 3: "failed", 4: "ok", 5: "diverged", 6: "diverged"
    }  # fmt: skip
    assert rows[2]["reason"] == "OutOfMemoryError: too big, by far" and "exit code 9" in rows[3]["reason"]
    assert rows[0]["curve"] == [[1, 3.0, 4.0]] and rows[0]["commit"] == "1e5" and rows[0]["data"] == DATA["id"]
    assert rows[0]["seconds"] == 1.0 and rows[0]["tokens"] == runs[0]["tokens"] and "torch 2.11" in rows[0]["versions"]
    assert "CUDA graphs" in rows[4]["versions"] and "CUDA graphs" not in rows[0]["versions"]
    assert missing_of(runs, read_rows(tmp_path / "runs.csv")) == [runs[2], runs[3]]
    assert {row["optimizer"] for row in rows.values()} == {"adamw"}
    assert "edu 3.0000" in capsys.readouterr().out


def test_rows_without_an_optimizer_are_of_adamw(tmp_path):
    path = tmp_path / "runs.csv"
    run = expand(PLANS / "whole_rates.yaml", [], DATA, ["dense_active_muon"])[0]
    work(tmp_path, [finish(run, False)])
    header, row = path.read_text().splitlines()
    assert header.endswith(",optimizer") and row.endswith(",muon")
    path.write_text("\n".join([header, row, row.removesuffix(",muon")]) + "\n")  # one as it was written before
    assert [row["optimizer"] for row in read_rows(path)] == ["muon", "adamw"]
    path.write_text("\n".join([header.removesuffix(",optimizer"), row.removesuffix(",muon")]) + "\n")
    assert [row["optimizer"] for row in read_rows(path)] == ["adamw"]
    with pytest.raises(InputError, match=r"The first line of .* must be variant,.*,optimizer"):
        Results(path)


def recorded(**changes):
    """A row as a run leaves it."""
    run = finish(expand(PLANS / "learning_rates.yaml", [], DATA, ["v0"])[0], False)
    return {**run, "commit": "1e5", "versions": "torch", "device": "H100", "date": "2026-11-28", **changes}


def test_losses_that_are_no_numbers_are_read_back(tmp_path):
    row = recorded(status="diverged", train_loss=math.nan, max_grad_norm=math.inf, curve=[[1, math.nan, math.nan]])
    Results(tmp_path / "runs.csv").append(row)
    (read,) = read_rows(tmp_path / "runs.csv")
    assert math.isnan(read["train_loss"]) and read["max_grad_norm"] == math.inf and math.isnan(read["curve"][0][1])


def test_a_line_that_is_no_row_is_named(tmp_path):
    path = tmp_path / "runs.csv"
    for seed in range(3):
        Results(path).append(recorded(status="failed", seed=seed, curve=[[1, 2.0, 3.0]]))
    header, *lines = path.read_text().splitlines()
    for cut in (lines[1][:20], lines[1][: lines[1].index("2.0")], lines[1].replace("failed", "fail"), header):
        path.write_text("\n".join([header, lines[0], cut, lines[2]]) + "\n")
        with pytest.raises(InputError, match=r"runs.csv' has no whole row on line [34], as after a crash"):
            read_rows(path)
    path.write_text("variant,seed\nv0,0\n")
    with pytest.raises(InputError, match="The first line of"):
        read_rows(path)
    path.write_text("\n".join([header, *lines[:2]]))  # without an end of its last line
    Results(path).append(recorded(status="failed", seed=2))
    assert [row["seed"] for row in read_rows(path)] == [0, 1, 2]


def test_a_finished_run_without_its_numbers_is_no_row(tmp_path):
    path = tmp_path / "runs.csv"
    numbers = {"held_out_edu": 3.0, "held_out_books": 4.0, "curve": [[1, 3.0, 4.0]], "median_grad_norm": 0.2}
    Results(path).append(recorded(status="ok", **numbers))
    (row,) = read_rows(path)
    for name in ("held_out_edu", "held_out_books", "curve", "seed", "tokens"):
        path.unlink()
        Results(path).append({**recorded(status="ok", **numbers), name: ""})
        with pytest.raises(InputError, match=r"runs.csv' has no whole row on line 2"):
            read_rows(path)
    assert row["held_out_edu"] == 3.0


def test_runs_csv_as_spreadsheets_save_it(tmp_path):
    path = tmp_path / "runs.csv"
    Results(path).append(recorded(status="failed"))
    before, (row,) = path.read_text(), read_rows(path)
    path.write_text("\n\n".join(before.splitlines()) + "\n\n", encoding="utf-8-sig")
    Results(path).append(recorded(status="failed", seed=1))
    assert read_rows(path) == [row, {**row, "seed": 1}]
    path.write_text(before, encoding="utf-16")
    for read in (read_rows, Results):
        with pytest.raises(InputError, match=r"runs.csv' cannot be read .*: save it as CSV in UTF-8"):
            read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"runs.csv' cannot be read .*Is a directory"):
        read_rows(path)


def test_a_full_disk_leaves_whole_rows_and_the_row_that_is_missing_is_said(tmp_path):
    path = tmp_path / "runs.csv"
    Results(path).append(recorded(status="failed"))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written \(File too large\), and lacks this row: v0,7,30m"):
            Results(path).append(recorded(status="failed", seed=7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


def test_runs_csv_that_takes_no_row_is_refused_before_any_run(tmp_path, monkeypatch):
    path = tmp_path / "runs.csv"
    Results(path).append(recorded(status="failed"))
    open_any = type(path).open

    def refuse(own, mode="r", **options):
        if "a" in mode:
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_any(own, mode, **options)

    monkeypatch.setattr(type(path), "open", refuse)  # as root may write everywhere
    with pytest.raises(InputError, match=r"runs.csv' cannot be written \(Permission denied\): name another"):
        Results(path)


def test_two_commands_write_one_header(tmp_path, monkeypatch):
    path = tmp_path / "runs.csv"
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "exists", lambda own: False)  # as both find before either has written
        for _ in range(2):
            Results(path).append(recorded(status="failed"))
    assert len(read_rows(path)) == 2


def test_an_exit_code_is_known_though_other_threads_start_processes(tmp_path, monkeypatch):
    """A process that ended is collected by whoever asks first: the thread that waits for it, or one that starts one."""
    collect, collected_at_start = os.waitpid, threading.Event()

    def collect_slowly(pid, flags):
        if flags == 0 and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT).si_status == 9:
            collected_at_start.wait(1)
        collected, status = collect(pid, flags)
        if flags == os.WNOHANG and os.waitstatus_to_exitcode(status) == 9:
            collected_at_start.set()
            time.sleep(0.5)  # in which no other thread can know the exit code
        return collected, status

    monkeypatch.setattr(os, "waitpid", collect_slowly)
    run = finish(expand(PLANS / "learning_rates.yaml", [], DATA)[0], False)
    work(tmp_path, [{**run, "seed": seed} for seed in (3, 0, 0, 0, 0, 0, 0, 0)])
    (failed,) = (row for row in read_rows(tmp_path / "runs.csv") if row["seed"] == 3)
    assert failed["reason"] == "the process ended with exit code 9"


def nap(run, gpu, threads, log, connection, **options):
    time.sleep(60)


def test_ctrl_c_ends_the_runs_and_begins_no_other(tmp_path):
    run = finish(expand(PLANS / "learning_rates.yaml", [], DATA)[0], False)
    options = {"start_method": "fork", "log_dir": tmp_path / "logs", "runs_per_gpu": 2, "commit": "1e5"}
    runner = Runner(Results(tmp_path / "runs.csv"), nap, {}, **options)

    def press():
        while len(runner.running) < 2:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        runner.work([{**run, "seed": seed} for seed in range(4)], ["0"])
    rows = read_rows(tmp_path / "runs.csv")
    assert sorted(row["seed"] for row in rows) == [0, 1] and len(runner.queue) == 2
    assert {row["reason"] for row in rows} == {"stopped by Ctrl-C"}


def test_no_run_begins_after_one_whose_row_cannot_be_written(tmp_path):
    run = finish(expand(PLANS / "learning_rates.yaml", [], DATA)[0], False)
    (tmp_path / "runs.csv").mkdir()
    results = Results(tmp_path / "none.csv")
    results.path = tmp_path / "runs.csv"
    runner = Runner(results, pretend, {}, start_method="fork", log_dir=tmp_path / "logs", commit="1e5")
    with pytest.raises(InputError, match=r"cannot be written \(Is a directory\), and lacks this row: dense_active"):
        runner.work([{**run, "seed": seed} for seed in range(3)], ["0"])
    assert len(runner.queue) == 2


def start_a_run(sender):
    options = {"data": "", "eos_token_id": 0, "compiled": False}
    target, arguments = ablation_process.train_in_child, ({}, "", 1, os.devnull, sender)
    multiprocessing.get_context("fork").Process(target=target, args=arguments, kwargs=options).start()
    sender.send("started")
    time.sleep(60)


def test_a_run_ends_with_a_parent_that_is_killed(monkeypatch):
    monkeypatch.setattr(ablation_run, "train", lambda run, **options: time.sleep(60))
    receiver, sender = multiprocessing.Pipe(duplex=False)
    parent = multiprocessing.get_context("fork").Process(target=start_a_run, args=(sender,))
    parent.start()
    sender.close()
    assert receiver.recv() == "started"
    parent.kill()
    parent.join()
    assert receiver.poll(50), "the run holds its end of the pipe still"
    with pytest.raises(EOFError):
        receiver.recv()


def test_a_bar_of_a_run_makes_no_semaphore(tmp_path, monkeypatch):
    """A run ends without cleaning up, and Python would print that the semaphore of tqdm is leaked."""

    def show_a_bar(run, **options):
        list(tqdm([1], leave=False))
        return {"status": "failed", "reason": type(tqdm.get_lock()).__name__}

    monkeypatch.setattr(ablation_run, "train", show_a_bar)
    options = {"start_method": "fork", "log_dir": tmp_path / "logs", "commit": "1e5"}
    runner = Runner(Results(tmp_path / "runs.csv"), ablation_process.train_in_child, {}, **options)
    runner.work([finish(expand(PLANS / "learning_rates.yaml", [], DATA)[0], False)], [""])
    assert [row["reason"] for row in read_rows(tmp_path / "runs.csv")] == ["RLock"]


def test_a_process_gets_one_of_the_gpus_that_are_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-3f")
    assert visible_gpus() == ["2", "GPU-3f"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_gpus() == [""]
