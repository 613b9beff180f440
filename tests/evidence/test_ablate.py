"""ablate.py: which runs a plan makes, that each is made once and recorded whatever comes of it, and the report."""

import itertools
import json
import math
import multiprocessing
import os
import resource
import signal
import threading
import time

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

from ablation_rows import finished
from complexity_deep import training_graph_complexity_deep as training_graph
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.evidence import ablation_data, ablation_process, ablation_run, study_page
from complexity_deep.workflow.evidence.ablation_plan import (
    check_length,
    expand,
    finish,
    identity,
    missing_of,
    newest_speeds,
    swept_rate,
)
from complexity_deep.workflow.evidence.ablation_report import difference, interval
from complexity_deep.workflow.evidence.ablation_results import Results, read_rows
from complexity_deep.workflow.evidence.ablation_runner import Runner, visible_gpus
from complexity_deep.workflow.flops import FLOPS_PER_PARAMETER, flops_per_token, keys_per_query
from support import REPOSITORY, outcome_of

PLANS = REPOSITORY / "recipes" / "evidence"
PREPARE = ["prepare", "--tokenizer", "none", "--sources", "none", "--held-out-edu", "none", "--held-out-books", "none"]
DATA = {"id": "4e12", "eos_token_id": 0}  # an id that could be taken for a number


BASES = ("10m.yaml", "30m.yaml", "150m.yaml")
ALL_PLANS = sorted(
    str(path.relative_to(PLANS)) for path in PLANS.rglob("*.yaml") if str(path.relative_to(PLANS)) not in BASES
)


def swept(variant, rate, loss, plan="learning_rates", speed=1000, status="ok", size="30m"):
    return {
        "variant": variant,
        "size": size,
        "data": DATA["id"],
        "status": status,
        "plan": plan,
        "learning_rate": rate,
        "held_out_edu": loss,
        "tokens_per_second": speed,
        "seed": 0,
        "commit": "new",
        "device": "H100",
        "runs_per_gpu": 1,
    }


def all_swept(base="30m.yaml", best=2e-3):
    """A finished sweep of every family, in which `best` is best."""
    base = yaml.safe_load((PLANS / base).read_text())
    rates = (1e-3, 2e-3, 4e-3)
    return [swept(n, rate, 3.0 + abs(rate - best), size=base["size"]) for n in base["variants"] for rate in rates]


@pytest.mark.parametrize("plan", ALL_PLANS)
def test_every_plan_expands_seed_by_seed(plan):
    fields = yaml.safe_load((PLANS / plan).read_text())
    sweep = all_swept((PLANS / plan).parent.joinpath(fields["base"]).resolve().name)
    speeds = [swept(name, 1e-3, 3.0, "speed") for name in fields["variants"]] + [swept("dense_active", 1, 3, "speed")]
    runs = [finish(run, smoke=False) for run in expand(PLANS / plan, sweep + speeds, DATA)]
    rates = 1 if fields["learning_rates"] == "swept" else len(fields["learning_rates"])
    rates *= len(fields.get("learning_rate_factors", [1]))
    assert len(runs) == len(fields["seeds"]) * len(fields["variants"]) * rates
    assert [run["seed"] for run in runs] == sorted(run["seed"] for run in runs)
    assert len({identity(run) for run in runs}) == len(runs)


def test_rows_of_runs_csv_count_as_done():
    """The plans of today make every recorded run again, with the settings that its row has."""
    rows = read_rows(REPOSITORY / "docs/evidence/runs.csv")
    assert len(rows) >= 66
    made = {}
    for index, row in enumerate(rows):
        size = "" if row["size"] == "30m" else row["size"]
        # The length of a run of equal seconds is that of the speeds which were known then.
        until = index if row["plan"] == "equal_seconds" else len(rows)
        key = (size, row["plan"], row["data"], until, row["variant"] if until == index else None)
        if key not in made:
            only = [row["variant"]] if until == index else None
            plan = PLANS / size / f"{row['plan']}.yaml"
            made[key] = {identity(finish(run, False)) for run in expand(plan, rows[:until], {"id": row["data"]}, only)}
        assert identity(row) in made[key], f"row {index} of {row['plan']}"


def test_a_size_takes_the_rate_of_its_own_sweep():
    rows = all_swept() + all_swept("150m.yaml", best=1e-3)
    assert {run["learning_rate"] for run in expand(PLANS / "150m/scaling.yaml", rows, DATA)} == {1e-3}
    with pytest.raises(InputError, match="has no swept learning rate yet"):
        expand(PLANS / "10m/scaling.yaml", rows, DATA)


@pytest.mark.parametrize("size", ["10m", "150m"])
def test_scaled_variants_are_those_of_30m(size):
    """Experts keep their proportion to hidden_size, every other field is that of 30m, and so is the training."""
    ours, known = (yaml.safe_load((PLANS / base).read_text()) for base in (f"{size}.yaml", "30m.yaml"))
    assert ours["training"] == known["training"] and ours["shape"].keys() == known["shape"].keys()
    scale = known["shape"]["hidden_size"] / ours["shape"]["hidden_size"]
    layers = ours["shape"]["num_hidden_layers"]
    assert ours["shape"]["intermediate_size"] * scale == known["shape"]["intermediate_size"]
    for name, variant in ours["variants"].items():
        config, original = variant["config"], dict(known["variants"][name]["config"])
        assert variant["family"] == known["variants"][name]["family"] and config.keys() == original.keys()
        for field, value in config.items():
            if field == "value_embedding_layers":
                assert value == list(range(1, layers, 2))
            elif not field.endswith("intermediate_size"):
                assert value == original[field]
            elif not name.startswith("dense"):
                assert value * scale == original[field]


@pytest.mark.parametrize("base", BASES)
def test_controls_have_the_active_size_of_what_they_control(base):
    data = {"vocab_size": 16384}
    variants = yaml.safe_load((PLANS / base).read_text())
    counts = {}
    for name in variants["variants"]:
        shape = {**variants["shape"], **variants["variants"][name]["config"], **data}
        with torch.device("meta"):
            config = AutoConfig.for_model(shape.pop("model_type"), **shape)
            model = AutoModelForCausalLM.from_config(config)
        counts[name] = ablation_run.total_parameters(model), ablation_run.active_parameters(model)
        # What the report takes as compute is the count of workflow/flops.py without attention.
        attention = 12 * keys_per_query(config, 1024) * config.hidden_size
        assert FLOPS_PER_PARAMETER * counts[name][1] == flops_per_token(model, 1024) - attention
    same_active = {"dense_active", "dense_active_values", "shared_64", "shared_64_layers_values", "experts_16"}
    for name in same_active | {"learned_16"}:
        if name in counts:
            assert counts[name][1] == pytest.approx(counts["v0"][1], rel=0.005)
    assert counts["dense_total"][0] == pytest.approx(counts["v0"][0], rel=0.005)
    if "dense_total_64" in counts:
        assert counts["dense_total_64"][0] == pytest.approx(counts["shared_64"][0], rel=0.005)


def test_a_family_takes_the_best_rate_of_its_sweep():
    rows = [
        *all_swept(),
        swept("dense_active", 8e-3, 2.0, status="diverged"),
        swept("dense_active", 8e-3, 1.0, "other"),
    ]
    runs = expand(PLANS / "headline.yaml", rows, DATA)
    assert {run["learning_rate"] for run in runs} == {2e-3}
    stability = expand(PLANS / "stability.yaml", rows, DATA)
    assert sorted({run["learning_rate"] for run in stability}) == [4e-3, 8e-3, 16e-3]
    with pytest.raises(InputError, match="has no swept learning rate yet, for 0 rates were tried"):
        expand(PLANS / "headline.yaml", [], DATA)


def test_equal_seconds_gives_the_slower_model_fewer_tokens():
    speeds = [swept("dense_active", 1e-3, 3.0, "speed", 1000), swept("shared_64", 1e-3, 3.0, "speed", 700)]
    with pytest.raises(InputError, match="The speed of 'shared_64_layers_values' is not measured by the commit"):
        expand(PLANS / "equal_seconds.yaml", all_swept() + speeds, DATA)
    planned = yaml.safe_load((PLANS / "equal_seconds.yaml").read_text())["variants"]
    others = [swept(name, 1e-3, 3.0, "speed", 500) for name in planned if name != "shared_64"]
    earlier = {"commit": "old", "tokens_per_second": 100}
    speeds.insert(0, speeds[1] | earlier)  # measured again since
    assert newest_speeds(speeds, "dense_active") == {"dense_active": 1000, "shared_64": 700}
    alone = {**speeds[2], "commit": "newer", "tokens_per_second": 900}  # without the one that it would be compared with
    assert newest_speeds([*speeds, alone], "dense_active") == newest_speeds(speeds, "dense_active")
    with pytest.raises(InputError, match="'shared_64' is not measured by the commit"):
        expand(PLANS / "equal_seconds.yaml", [*all_swept(), speeds[0], speeds[1]], DATA, ["shared_64"])
    (run, *_) = expand(
        PLANS / "equal_seconds.yaml", all_swept() + speeds, DATA, ["shared_64"]
    )  # asks for no other speed
    assert run["variant"] == "shared_64"
    runs = expand(PLANS / "equal_seconds.yaml", all_swept() + speeds + others, DATA)
    assert next(run for run in runs if run["variant"] == "shared_64")["tokens"] == pytest.approx(0.7e8)


def test_speeds_of_another_gpu_or_a_shared_one_do_not_count():
    rows = [swept(name, 1e-3, 3.0, "speed", 1000) for name in ("shared_64", "dense_active")]
    shared = {"runs_per_gpu": 2, "tokens_per_second": 10}
    assert newest_speeds([*rows, *(row | shared for row in rows)], "dense_active")["shared_64"] == 1000
    rows.append(rows[1] | {"device": "H200"})
    assert newest_speeds(rows, "dense_active") == {"dense_active": 1000}
    with pytest.raises(InputError, match="is not measured by the commit and on the GPU that 'dense_active'"):
        expand(PLANS / "equal_seconds.yaml", all_swept() + rows, DATA, ["shared_64"])


def test_a_rate_is_chosen_on_one_set_of_token_files():
    """And from three rates at least, as each run came out last."""
    rate = lambda rows: swept_rate("dense", yaml.safe_load((PLANS / "30m.yaml").read_text()), rows)  # noqa: E731
    first = [swept("dense_active", 10**-n, 3.0 + 0.1 * n) for n in (2, 3, 4)]
    assert rate(first) == 1e-2
    assert rate([*first, swept("dense_active", 1e-3, 2.5) | {"data": "other"}]) == 1e-2
    newer = [row | {"data": "other", "held_out_edu": 10 - row["held_out_edu"]} for row in first]
    assert rate([*first, *newer]) == 1e-4
    assert rate([*first, swept("dense_active", 1e-2, None, status="diverged")]) == 1e-3
    with pytest.raises(InputError, match="2 rates were tried on one set of token files and 2 of them ended"):
        rate(first[:2])


def test_the_stability_plan_makes_runs_that_the_sweep_had():
    """One that counted as done would be missing from its table, whose rows are those of the plan."""
    rows = [row for row in all_swept() if row["variant"] != "v0"]
    rows += [swept("v0", rate, loss) for rate, loss in ((5e-4, 3.2), (1e-3, 3.0), (2e-3, 3.1))]
    (twice,) = (
        finish(run, False)
        for run in expand(PLANS / "stability.yaml", rows, DATA, ["v0"])
        if run["learning_rate"] == 2e-3 and run["seed"] == 0
    )
    sweep = [finish(run, False) | {"status": "ok"} for run in expand(PLANS / "learning_rates.yaml", [], DATA, ["v0"])]
    assert identity(twice) in map(identity, sweep)
    assert missing_of([twice], sweep) == [twice]
    assert missing_of([twice], [twice | {"status": "ok"}]) == []
    assert missing_of([twice | {"plan": "headline"}], [twice | {"plan": "ablations", "status": "ok"}]) == []


@pytest.mark.parametrize(
    "change, sentence",
    [
        ("", "is no plan, for it has no fields"),
        ("tokens: 1e8", "lacks base, variants, learning_rates, seeds: its fields"),
        ({"learning_rate_factor": [2]}, "plan.yaml has learning_rate_factor, which no plan has: its"),
        ({"learning_rates": "Swept"}, "has learning_rates that are no numbers above 0"),
        ({"tokens": "many"}, "has tokens that are no numbers above 0"),
        ({"learning_rate_factors": [0]}, "has learning_rate_factors that are no numbers above 0"),
        ({"seeds": 3}, "needs a list for seeds, of whole numbers"),
        ({"variants": "v0"}, "needs a list for variants, of names"),
    ],
)
def test_a_plan_that_cannot_be_read_is_refused(tmp_path, change, sentence):
    (tmp_path / "30m.yaml").write_text((PLANS / "30m.yaml").read_text())
    whole = {"base": "30m.yaml", "variants": ["v0"], "tokens": "1e8", "learning_rates": [1e-3], "seeds": [0]}
    plan = change if isinstance(change, str) else yaml.safe_dump(whole | change)
    (tmp_path / "plan.yaml").write_text(plan)
    with pytest.raises(InputError, match=sentence):
        expand(tmp_path / "plan.yaml", [], DATA)


def test_a_run_that_its_tokens_do_not_suffice_for_is_refused():
    run = finish(expand(PLANS / "headline.yaml", all_swept(), DATA)[0], False)
    check_length(run, {"files": {"train": {"tokens": 100_000_000}}})
    few = {"files": {"train": {"tokens": 99_000_000}}}
    check_length(run | {"repeat_data": True}, few)
    with pytest.raises(InputError, match="'dense_active' takes 99,975,168 tokens, but the token files have 96,679"):
        check_length(run, few)
    with pytest.raises(InputError, match="needs 2 steps of 32,768 tokens or more, and gets 32,768"):
        check_length(run | {"tokens": 32768}, few)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--only", "v0", "v9"], "--only names v9, which no plan of"),
        (["--seeds", 7], "The plans have no run of the seeds that --seeds names"),
        (["--tokens", 1e9], "takes 999,981,056 tokens, but the token files have 2 rows"),
        (["--tokens", "nan"], "'nan' is not a number above 0"),
        (["--gpus", 0], "'0' is not a whole number of at least 1"),
        (["--output-dir", "/dev/null/here"], "--output-dir '/dev/null/here' cannot be a folder"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence(tmp_path, options, sentence):
    (tmp_path / "data.json").write_text(json.dumps({**DATA, "files": {"train": {"tokens": 2048}}}))
    folders = ["--data", tmp_path, "--log-dir", tmp_path / "logs", "--output-dir", tmp_path / "out"]
    plan = ["--plan", PLANS / "learning_rates.yaml", "--start-method", "spawn"]
    status, _, errors = outcome_of("ablate", "run", *plan, *folders, *options)
    assert status and sentence in errors and errors.count("\n") == 1 and not (tmp_path / "out" / "runs.csv").exists()


def test_runs_of_another_length_stand_in_no_table_of_the_plan(tmp_path, monkeypatch):
    (tmp_path / "data.json").write_text(json.dumps({**DATA, "files": {"train": {"tokens": 10**8}}}))
    begun = []
    monkeypatch.setattr(Runner, "work", lambda runner, runs, gpus: begun.extend(runs))
    folders = ["--data", tmp_path, "--log-dir", tmp_path / "logs", "--output-dir", tmp_path / "out"]
    plan = ["--plan", PLANS / "learning_rates.yaml", "--start-method", "spawn", "--only", "v0"]
    outcome_of("ablate", "run", *plan, *folders, "--tokens", "1e6")
    outcome_of("ablate", "run", *plan, *folders)
    assert [run["plan"] for run in begun] == ["learning_rates of 1e+06 tokens"] * 4 + ["learning_rates"] * 4


def test_settings_tell_runs_apart():
    run = expand(PLANS / "learning_rates.yaml", [], DATA)[0]
    same, other = finish(dict(run), False), finish({**run, "config": {**run["config"], "num_experts": 8}}, False)
    assert same["settings"] == finish({**run, "plan": "another"}, False)["settings"] != other["settings"]
    assert same["tokens"] % (1024 * 32) == 0 and 2.5e7 - same["tokens"] < 1024 * 32


def test_muon_is_a_variant_with_a_sweep_of_its_own():
    """The model and its training are those of the variant with AdamW, and nothing of one is taken for the other."""
    runs = {run["variant"]: run for run in expand(PLANS / "muon.yaml", all_swept(), DATA)}
    with_adamw = {run["variant"]: run for run in expand(PLANS / "headline.yaml", all_swept(), DATA) if run["seed"] == 0}
    assert len(runs) == 2
    for name, run in runs.items():
        other = with_adamw[name.removesuffix("_muon")]
        differing = {"variant", "plan", "optimizer"}
        assert {k: v for k, v in run.items() if k not in differing} == {
            k: v for k, v in other.items() if k not in differing
        }
        assert run["optimizer"] == "muon" and "optimizer" not in other
        assert finish({**run, "variant": other["variant"]}, False)["settings"] != finish(other, False)["settings"]
    only_adamw = [row for row in all_swept() if not row["variant"].endswith("_muon")]
    with pytest.raises(InputError, match="The family 'dense_muon' has no swept learning rate yet"):
        expand(PLANS / "muon.yaml", only_adamw, DATA)


@pytest.mark.parametrize(
    "variant, sentence",
    [
        ("v0_muon: {family: f, config: {}}", "'v0_muon' must have optimizer: muon if its name ends with _muon"),
        ("v0: {family: f, optimizer: muon, config: {}}", "'v0' must have optimizer: muon if its name ends with _muon"),
        ("v0: {family: f, optimizer: sgd, config: {}}", "'v0' has the optimizer 'sgd', but only muon can be named"),
    ],
)
def test_a_variant_says_its_optimizer(tmp_path, variant, sentence):
    (tmp_path / "30m.yaml").write_text(f"{{size: 30m, shape: {{}}, training: {{}}, variants: {{{variant}}}}}")
    name = variant.partition(":")[0]
    plan = f"{{base: 30m.yaml, variants: [{name}], tokens: 1, learning_rates: [1], seeds: [0]}}"
    (tmp_path / "plan.yaml").write_text(plan)
    with pytest.raises(InputError, match=sentence):
        expand(tmp_path / "plan.yaml", [], DATA)


def test_unknown_variants_are_refused(tmp_path):
    (tmp_path / "30m.yaml").write_text((PLANS / "30m.yaml").read_text())
    (tmp_path / "plan.yaml").write_text("{base: 30m.yaml, variants: [v9], tokens: 1, learning_rates: [1], seeds: [0]}")
    with pytest.raises(InputError, match=r"plan\.yaml names v9, which 30m\.yaml does not have"):
        expand(tmp_path / "plan.yaml", [], DATA)


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
    run = expand(PLANS / "learning_rates.yaml", [], DATA, ["dense_active_muon"])[0]
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
    with pytest.raises(OSError, match="Is a directory"):
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


def test_a_process_gets_one_of_the_gpus_that_are_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-3f")
    assert visible_gpus() == ["2", "GPU-3f"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_gpus() == [""]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Token files of a made-up language in which the next id is mostly the last plus one."""
    folder = tmp_path_factory.mktemp("data")
    words = {word: index for index, word in enumerate(["<eos>", "<pad>", "<bos>", *(f"w{i}" for i in range(61))])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        eos_token="<eos>",
        pad_token="<pad>",
        bos_token="<bos>",
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    generator = np.random.default_rng(0)

    def write(name, tokens):
        ids = 3 + (np.arange(tokens) + generator.integers(0, 2, tokens)) % 61
        ids[generator.random(tokens) < 0.02] = 0
        ids.astype(np.uint16).tofile(folder / f"{name}.bin")

    write("train", 20_000), write("held_out_edu", 64 * 5 + 3), write("held_out_books", 64 * 2)
    return str(folder)


def toy_run(**changes):
    shape = {"model_type": "complexity-deep", "vocab_size": None, "hidden_size": 32, "intermediate_size": 64}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4}
    training = yaml.safe_load((PLANS / "30m.yaml").read_text())["training"] | {"row_length": 64, "rows_per_step": 4}
    run = {"variant": "toy", "seed": 0, "tokens": 64 * 4 * 40, "learning_rate": 1e-2, "init": "default", **training}
    config = {**shape, "max_position_embeddings": 64, "scaled_residual_init": True, **changes.pop("config", {})}
    return {**run, "freeze_mlp": False, "balance_loss": 0.0, "config": config, **changes}


def test_a_run_learns_and_measures_itself(data):
    result = ablation_run.train(toy_run(), data, eos_token_id=0, compiled=False)
    assert result["status"] == "ok" and result["steps"] == 40
    tokens, edu, books = zip(*result["curve"])
    assert len(tokens) == 4 and tokens[-1] == 64 * 4 * 40 and edu[-1] == result["held_out_edu"]
    assert edu[-1] < edu[0] < math.log(64) and edu[-1] < 2 and books[-1] < 2
    assert 0 < result["seconds"] < result["wall_seconds"] and result["expert_norm_ratio"] > 1
    again = ablation_run.train(toy_run(), data, eos_token_id=0, compiled=False)
    assert again["curve"] == result["curve"]
    assert ablation_run.train(toy_run(seed=1), data, eos_token_id=0, compiled=False)["curve"] != result["curve"]


@pytest.mark.parametrize("config", [{}, {"use_token_routed_mlp": False, "use_mu_guidance": False}])
def test_a_run_with_muon_learns_and_repeats(data, config):
    short = {"config": config, "tokens": 64 * 4 * 12}
    run = toy_run(optimizer="muon", **short)
    result, again = (ablation_run.train(run, data, eos_token_id=0, compiled=False) for _ in range(2))
    assert result["status"] == "ok" and result["held_out_edu"] < 3 and again["curve"] == result["curve"]
    with_adamw = ablation_run.train(toy_run(**short), data, eos_token_id=0, compiled=False)
    assert with_adamw["curve"] != result["curve"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config", [{}, {"value_embedding_layers": [1], "routing": "random", "routing_per_layer": True}]
)
def test_replayed_steps_give_the_same_run(data, config, monkeypatch):
    config = {**config, "use_mu_routing": False, "hidden_size": 64}
    recorded = ablation_run.train(toy_run(config=config), data, 0, True)
    monkeypatch.setattr(training_graph, "MAX_PRODUCTS", 0)
    plain = ablation_run.train(toy_run(config=config), data, 0, True)
    assert recorded["recorded"] and not plain["recorded"]
    assert recorded["held_out_edu"] == pytest.approx(plain["held_out_edu"], abs=0.02)
    assert recorded["max_grad_norm"] == pytest.approx(plain["max_grad_norm"], rel=0.05)


def test_a_run_that_diverges_says_so(data):
    result = ablation_run.train(toy_run(learning_rate=1e30), data, eos_token_id=0, compiled=False)
    assert result["status"] == "diverged" and "held_out_edu" not in result


def test_a_run_that_diverges_in_its_warm_up_says_so(data):
    result = ablation_run.train(toy_run(learning_rate=1e30, warmup=0.9), data, eos_token_id=0, compiled=False)
    assert result["status"] == "diverged" and result["steps"] < 36


def test_frozen_experts_do_not_move_and_a_learned_router_trains(data):
    frozen = ablation_run.train(toy_run(freeze_mlp=True), data, eos_token_id=0, compiled=False)
    assert frozen["expert_norm_ratio"] == 1.0
    moe = {"model_type": "qwen3_moe", "head_dim": 16, "num_experts_per_tok": 1, "norm_topk_prob": False}
    moe |= {"moe_intermediate_size": 16, "scaled_residual_init": True}
    learned = ablation_run.train(toy_run(config=moe, balance_loss=0.01), data, eos_token_id=0, compiled=False)
    assert learned["status"] == "ok" and learned["held_out_edu"] < 3.5 and "shifted_edu" not in learned


def test_frozen_mlps_get_and_pass_no_gradient(data):
    model = ablation_run.build(toy_run(freeze_mlp=True), data)
    ids = torch.arange(3, 23)[None]
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        assert layer.post_attention_layernorm.weight.grad is None
        assert all(parameter.grad is None for parameter in layer.mlp.parameters())
    # With the branch detached, what layer 0 gets is what it would get if the branch were a constant.
    expected = model.model.layers[0].self_attn.o_proj.weight.grad.clone()
    outputs = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, out: (out[0].detach(), out[1]))
        outputs.append(layer)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    assert torch.equal(model.model.layers[0].self_attn.o_proj.weight.grad, expected)


def test_published_init(data):
    model = ablation_run.build(toy_run(init="published", config={"hidden_size": 128}), data)
    dynamics = model.model.layers[1].dynamics
    for weight in (
        dynamics.mu_proj.weight,
        dynamics.controller_out.weight,
        model.model.layers[1].self_attn.o_proj.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not dynamics.controller_out.bias.any() and (model.model.norm.weight == 1).all()


def test_held_out_loss_is_that_of_the_rows_one_by_one(data):
    model = ablation_run.build(toy_run(), data)
    rows = ablation_data.token_rows(data, "held_out_edu", 64, "cpu")
    assert len(rows) == 5
    total = count = 0
    for row in rows:  # documents apart, so that no mask is needed
        starts = [0, *(1 + torch.where(row[:-1] == 0)[0]).tolist(), 64]
        for start, end in itertools.pairwise(starts):
            ids = row[start:end].long()[None]
            if end - start > 1:
                logits = model(ids).logits[0, :-1]
                total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
                count += end - start - 1
    ablation_run.use_chunked_loss(model)
    held_out = ablation_run.HeldOut(model, data, 64, 4, 0)
    assert held_out(["edu"])["edu"] == pytest.approx(total / count, rel=1e-5)


def test_the_order_of_rows_depends_on_the_seed_alone():
    rows = torch.arange(40, dtype=torch.int32).view(10, 4)
    first, same, other = (
        [batch["input_ids"] for batch in ablation_data.TrainingBatches(rows, 2, 4, seed, 0)] for seed in (0, 0, 1)
    )
    assert len(first) == 4 and all(torch.equal(a, b) for a, b in zip(first, same))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))
    assert len({int(row[0]) for batch in first for row in batch}) == 8  # no row twice
    with pytest.raises(InputError, match="6 steps of 2 rows are more than the 10 rows"):
        ablation_data.TrainingBatches(rows, 2, 6, 0, 0)


def test_repeated_data_are_shuffled_anew_in_each_pass():
    rows = torch.arange(36, dtype=torch.int32).view(9, 4)

    def chosen(steps, repeat):
        batches = ablation_data.TrainingBatches(rows, 2, steps, 5, 0, repeat)
        return [int(row[0]) // 4 for batch in batches for row in batch["input_ids"]]

    order = chosen(14, True)  # 28 rows of three passes and one row of a fourth
    passes = [order[start : start + 9] for start in (0, 9, 18)]
    assert len(order) == 28 and all(sorted(found) == list(range(9)) for found in passes)
    assert len({tuple(found) for found in passes}) == 3
    assert order[:8] == chosen(4, False) == chosen(4, True)  # the first pass is that of runs that make no second


def test_only_a_plan_that_says_so_repeats_its_data():
    rows = all_swept("150m.yaml")
    large, once = (expand(PLANS / f"150m/{plan}.yaml", rows, DATA) for plan in ("large", "scaling"))
    assert all(run["repeat_data"] for run in large) and not any("repeat_data" in run for run in once)


def test_a_run_may_take_its_data_twice(data):
    run = toy_run(tokens=64 * 4 * 100)
    with pytest.raises(InputError, match="100 steps of 4 rows are more than the 312 rows"):
        ablation_run.train(run, data, eos_token_id=0, compiled=False)
    assert ablation_run.train({**run, "repeat_data": True}, data, eos_token_id=0, compiled=False)["steps"] == 100


def test_a_batch_keeps_documents_apart():
    batch = ablation_data.batch_of(torch.tensor([[5, 6, 0, 7, 0, 0, 8]], dtype=torch.int32), eos_token_id=0)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 0, -100, 0, -100, -100]]
    assert batch["input_ids"].dtype == torch.int64


def test_prepare_takes_whole_documents_up_to_each_share(data, tmp_path):
    for name, word, number in (("a", "w1", 30), ("b", "w2", 30), ("held", "w3", 2)):
        lines = [json.dumps({"text": word}) for _ in range(number)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    held_out = {"edu": str(tmp_path / "held.jsonl"), "books": str(tmp_path / "held.jsonl")}
    facts = ablation_data.prepare(str(tmp_path / "out"), f"{data}/tokenizer", sources, [1, 3], 40, held_out)
    tokens = np.fromfile(tmp_path / "out" / "train.bin", dtype=np.uint16)
    ids = {4: 5, 5: 15, 0: 20}  # w1, w2 and an EOS after each: documents of two tokens, 10 and 30 tokens
    assert dict(zip(*(part.tolist() for part in np.unique(tokens, return_counts=True)))) == ids
    assert facts["files"]["train"]["documents"] == 20 and facts["files"]["held_out_edu"]["tokens"] == 4
    assert json.loads((tmp_path / "out" / "data.json").read_text())["id"] == facts["id"]
    with pytest.raises(InputError, match="holds 60 tokens, but its share is 75"):
        ablation_data.prepare(str(tmp_path / "out"), f"{data}/tokenizer", sources, [1, 3], 100, held_out)


def test_weighted_experts_are_those_of_the_library():
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    shape |= {"num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**shape, norm_topk_prob=False, initializer_range=0.3))
    experts = model.model.layers[0].mlp.experts
    hidden, chosen, weights = torch.randn(9, 32), torch.randint(0, 4, (9, 1)), torch.rand(9, 1)
    model.set_experts_implementation("eager")
    expected = experts(hidden, chosen, weights)
    model.set_experts_implementation("cggr_weighted")
    with torch.no_grad():  # the weights count without a gradient too
        assert torch.allclose(experts(hidden, chosen, weights), expected, atol=1e-5)


@pytest.fixture
def page(tmp_path):
    (tmp_path / "evidence").mkdir()

    def make(rows):
        study_page.write_study(tmp_path / "evidence", rows, str(PLANS))
        return " ".join((tmp_path / "evidence.md").read_text().split())

    return make


def test_report_of_known_runs(page, tmp_path):
    dense = [finished("dense_active", seed, 3.2 + 0.01 * (seed - 1)) for seed in range(3)]
    shared = [finished("shared_64", seed, 3.0 + 0.01 * (seed - 1), expert_norm_ratio=1.5) for seed in range(3)]
    seconds = [finished("shared_64", seed, 3.05 + 0.01 * (seed - 1), "equal_seconds") for seed in range(3)]
    other = [finished("learning", 0, 9.9, size="30m smoke"), finished("dense_active", 2, 8.0, status="failed")]
    text = page([*dense, *shared, *seconds, *other])
    # Welch with equal spreads of 0.01 and 3 seeds each: 4 degrees of freedom, 2.776 x 0.01 x sqrt(2 / 3) = 0.0227.
    assert "**The goal is reached.**" in text
    assert "`shared_64`: -0.200 (95 %: -0.223 to -0.177) at equal tokens on educational text" in text
    assert "-0.150 (95 %: -0.173 to -0.127) at equal seconds on books" in text
    # Student's: 4.303 x 0.01 / sqrt(3) = 0.0248.
    assert "| 3 | 100.0 | 3.0000 ± 0.0058 [2.975, 3.025] |" in text and "| 1.50 |" in text
    assert "10 runs: 1 failed, 9 ok" in text and "9.9" not in text
    assert "--seeds SEED --repeat" in text  # without which a row that is there is left out
    for name in ("curves.png", "differences.png"):
        assert (tmp_path / "evidence" / name).stat().st_size > 10_000


def test_runs_with_muon_stand_apart(page):
    """With tables of their own, whose differences are to dense with Muon and to the same variant with AdamW."""
    dense = [finished("dense_active", seed, 3.19 + 0.02 * seed) for seed in range(2)]
    shared = [finished("shared_64", seed, 2.99 + 0.02 * seed) for seed in range(2)]
    before = page([*dense, *shared])
    muon = {"optimizer": "muon", "tokens_per_second": 4000.0}
    with_muon = [
        finished("dense_active_muon", 0, 3.1, "muon", runs_per_gpu=1, **muon),
        finished("shared_64_muon", 0, 2.95, "muon", runs_per_gpu=2, **muon),
    ]
    text = page([*dense, *shared, *with_muon])
    assert "Muon" not in before and before.partition("## Stability")[0] in text
    start, end = text.index("## With Muon, token files first"), text.index("## Stability")
    section = text[start:end]
    assert "| shared_64_muon | 2.0 / 1.0 | 0.001 | 1 | 100.0 | 2.9500 | 3.9500 | -0.150 | -0.150 | | | |" in section
    assert "| dense_active_muon | 2.0 / 1.0 | 0.001 | 1 | 100.0 | 3.1000 | 4.1000 | | | | | 4,000 |" in section
    assert "| dense_active_muon | 1 and 2 | -0.100 | -0.100 |" in section
    assert "| shared_64_muon | 1 and 2 | -0.050 | -0.050 |" in section
    assert "_muon" not in text[:start]


def test_losses_of_other_token_files_are_not_compared(page):
    """The difference is that of the token files with most seeds, for each comparison; every table names its own."""
    dense = [finished("dense_active", seed, 3.2 + 0.01 * seed) for seed in range(3)]
    shared = [finished("shared_64", seed, 3.0 + 0.01 * seed) for seed in range(3)]
    other = [finished("dense_active", seed, 5.0, data="second") for seed in range(2)]
    other += [
        finished("shared_64", 0, 4.9, data="second"),
        finished("shared_64", 0, 4.5, "equal_seconds", data="second"),
    ]
    text = page([*dense, *shared, *other])
    assert "-0.200 (95 %: -0.223 to -0.177) at equal tokens on educational text" in text
    assert "-0.500 (one seed) at equal seconds on educational text" in text
    assert "At equal tokens, token files second" in text and "| 4.9000 | 5.9000 | -0.100 | -0.100 |" in text


def test_the_best_at_equal_seconds_is_that_of_the_token_files_with_most_runs(page):
    rows = [finished("dense_active", seed, 3.2 + 0.01 * seed, data=data) for seed in range(3) for data in ("1", "2")]
    rows += [finished("shared_64", seed, 3.0 + 0.01 * seed, data="1") for seed in range(3)]
    rows += [finished("shared_64", seed, 3.0 + 0.01 * seed, "equal_seconds", data="1") for seed in range(3)]
    rows += [finished("shared_64_values", seed, 3.02, "equal_seconds", data="1") for seed in range(3)]
    rows += [finished("shared_64_values", 0, 2.9, "equal_seconds", data="2")]
    assert "At equal seconds the best is" not in page(rows)


def test_report_says_first_when_the_goal_is_not_reached_or_not_decided(page):
    dense = [finished("dense_active", seed, 3.2 + 0.01 * seed) for seed in range(3)]
    close = [finished("shared_64", seed, 3.1 + 0.01 * seed) for seed in range(3)]
    seconds = [finished("shared_64", seed, 3.1 + 0.01 * seed, "equal_seconds") for seed in range(3)]
    assert page([*dense, *close, *seconds]).startswith("# Evidence **The goal is not reached.**")
    assert "**The goal is not reached.**" in page([*dense, *close])
    far = [finished("shared_64", seed, 2.9 + 0.01 * seed) for seed in range(3)]
    assert "**The goal is not decided yet.**" in page([*dense, *far])
    lucky = finished("shared_64_values", 0, 3.05, "equal_seconds")
    text = page([*dense, *far, *seconds, lucky])
    assert "At equal seconds the best is" not in text
    assert "With fewer seeds at equal seconds, and so not compared yet: `shared_64_values`." in text
    text = page([*dense, *far, seconds[0], lucky])
    assert "At equal seconds the best is `shared_64_values`: -0.160 (one seed) on educational text" in text
    assert "**The goal is not decided yet**: the headline has no finished runs." in page([])


def test_a_candidate_is_chosen_by_the_seeds_that_were_planned_for_it(page):
    """Of those that have as many; and the seeds that came later are shown alone."""
    dense = [finished("dense_active", seed, 3.2 + 0.001 * seed) for seed in range(5)]
    ours = [finished("shared_64", seed, loss) for seed, loss in enumerate((3.0, 3.001, 3.002, 3.11, 3.113))]
    other = [
        finished("shared_64_values", seed, 3.01 + seed / 1e3) for seed in range(5)
    ]  # better over five seeds, not over three
    lucky = [finished("shared_64_layers", seed, 2.9 + seed / 1e3) for seed in range(2)]
    text = page([*dense, *ours, *other, *lucky])
    assert "The best candidate is `shared_64`" in text
    assert "With fewer seeds at equal tokens, and so not compared yet: `shared_64_layers`." in text
    # Two seeds each, 0.003 and 0.001 apart.
    assert "With the seeds 3 and 4 alone, by which it was not chosen, it is -0.092 (95 %: -0.10" in text
    assert "alone" not in page([*dense[:3], *ours[:3]]).partition("Written by")[0]


def test_a_mean_is_of_one_rate_and_one_length(page):
    """Those of the last run of a variant; the others stay in runs.csv."""
    rows = [finished("dense_active", seed, 3.2 + 0.01 * seed) for seed in range(3)]
    rows += [finished("shared_64", seed, 3.1 + 0.01 * seed) for seed in range(3)]
    rows += [finished("shared_64", seed, 3.0 + 0.01 * seed, learning_rate=5e-4) for seed in range(2)]
    rows += [finished("shared_64", 0, 2.9, "equal_seconds", tokens=7e7, curve=[[1, 3.0, 4.0], [2, 2.9, 3.9]])]
    rows += [finished("shared_64", 1, 3.3, "equal_seconds", tokens=6e7)]
    text = page(rows)
    assert "| shared_64 | 2.0 / 1.0 | 0.0005 | 2 | 100.0 | 3.0050 ± 0.0050" in text
    assert "| shared_64 | 2.0 / 1.0 | 0.001 | 1 | 60.0 | 3.3000 |" in text


def test_seeds_that_diverged_are_named_below_the_table(page):
    rows = [finished(name, seed, 3.0 + seed / 100) for seed in range(2) for name in ("dense_active", "shared_64")]
    assert "Seeds that diverged" not in page(rows)
    rows += [
        finished(name, seed, 9.0, status="diverged") for name, seed in (("shared_64", 2), ("v0", 0), ("shared_64", 0))
    ]
    text = page(rows)
    assert "Seeds that diverged and are in no mean: `shared_64` (1), `v0` (1)." in text
    assert text.index("Seeds that diverged") < text.index("## Stability")


def test_stability_is_of_one_set_of_token_files_and_of_whole_numbers(page):
    rows = [finished("v0", seed, 3.0 + 0.01 * seed, "stability") for seed in range(2)]
    rows += [finished("v0", 0, 3.0, "stability", spikes=4)]  # again
    rows += [finished("v0", 0, 5.0, "stability", data="second")]
    rows += [finished("v0", 1, 9.0, "stability", data="second", status="diverged", max_grad_norm=math.nan)]
    text = page(rows)
    assert "| v0 | first | 0.001 | 2 | 0 | 2.0 | 1.0 | 3.0050 ± 0.0050" in text
    assert "| v0 | second | 0.001 | 2 | 1 | 0.0 | not finite | 5.0000 |" in text


def test_a_sweep_says_where_it_does_not_enclose_its_best(page):
    rates = (1e-3, 2e-3, 4e-3)
    rows = [finished("v0", 0, 3 + abs(rate - 2e-3), "learning_rates", learning_rate=rate) for rate in rates]
    rows += [finished("dense_active", 0, 3 + rate, "learning_rates", learning_rate=rate) for rate in rates]
    text = page(rows)
    assert "The best rate may lie beyond those that were tried for `dense_active`. ##" in text
    rows[2] = {**rows[2], "status": "diverged", "held_out_edu": None}
    text = page([*rows, finished("v0", 0, 1.0, "learning_rates", learning_rate=2e-3, data="second")])
    assert "| v0 | first | 3.0010 | 3.0000 | diverged |" in text and "for `dense_active`. ##" in text


def test_seeds_without_a_spread_have_no_interval():
    assert interval([2.5, 2.5, 2.5]) is None and difference([3.0, 3.0], [3.25, 3.25]) == (-0.25, None)
    mean, bounds = difference([3.0, 3.0], [3.2, 3.3])
    assert bounds[0] < mean == -0.25 < bounds[1]


def test_report_makes_its_folder(tmp_path):
    assert outcome_of("ablate", "report", "--output-dir", tmp_path / "new" / "evidence")[0] == 0
    assert (tmp_path / "new" / "evidence.md").exists()
    for command in (["report", "--output-dir", "/dev/null/x"], [*PREPARE, "--data", "/dev/null/x"]):
        status, _, errors = outcome_of("ablate", *command)
        assert status and "'/dev/null/x' cannot be a folder" in errors and errors.count("\n") == 1


def test_a_candidate_without_runs_was_not_tried(page):
    names = yaml.safe_load((PLANS / "30m.yaml").read_text())["candidates"]
    rows = [finished(name, seed, 3.0 + seed / 100) for seed in range(2) for name in ("dense_active", "shared_64")]
    others = ", ".join(f"`{name}`" for name in names if name != "shared_64")
    assert f"Tried were `shared_64`. Without a finished run are {others}." in page(rows)
    rows += [finished(name, 0, 3.0) for name in names]
    assert "Without a finished run" not in page(rows)
