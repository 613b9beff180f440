"""ablate.py: which runs the plans make, and what is refused before any run begins."""

import contextlib
import json

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from ablation_rows import DATA, PLANS, all_swept, swept
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.evidence import ablation_run
from complexity_deep.workflow.evidence.ablation_plan import (
    check_length,
    expand,
    finish,
    identity,
    missing_of,
    newest_speeds,
    runs_of,
    swept_rate,
)
from complexity_deep.workflow.evidence.ablation_results import read_rows
from complexity_deep.workflow.evidence.ablation_runner import Runner
from complexity_deep.workflow.flops import FLOPS_PER_PARAMETER, flops_per_token, keys_per_query
from support import REPOSITORY, outcome_of

BASES = ("10m.yaml", "30m.yaml", "150m.yaml")
ALL_PLANS = sorted(
    str(path.relative_to(PLANS)) for path in PLANS.rglob("*.yaml") if str(path.relative_to(PLANS)) not in BASES
)


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


def check_that_plans_make(rows):
    """The plans of today make every recorded run again, with the settings that its row has.

    The rate of a run is that of the sweep, and the length of a run of equal seconds that of the speeds, which were
    known at some time before it. Where the family of a variant has changed since, --repeat still makes the run.
    """
    learned = [index for index, row in enumerate(rows) if row["plan"] in ("learning_rates", "whole_rates", "speed")]
    made = {}
    for index, row in enumerate(rows):
        size = "" if row["size"] == "30m" else row["size"]
        plan = PLANS / size / f"{row['plan']}.yaml"
        for until in [place + 1 for place in reversed(learned) if place < index] + [0]:
            key = plan, row["data"], row["variant"], until
            if key not in made:
                with contextlib.suppress(InputError):  # for what was not known yet
                    runs = expand(plan, rows[:until], {"id": row["data"]}, [row["variant"]])
                    made[key] = {identity(finish(run, False)) for run in runs}
            if identity(row) in made.get(key, ()):
                break
        else:
            again = expand(plan, rows, {"id": row["data"]}, [row["variant"]], repeat=True)
            assert identity(row) in {identity(finish(run, False)) for run in again}, f"row {index} of {row['plan']}"


def test_rows_of_runs_csv_count_as_done():
    rows = read_rows(REPOSITORY / "docs/evidence/runs.csv")
    assert len(rows) >= 66
    check_that_plans_make(rows)


def test_rows_count_as_done_though_a_better_rate_is_found_later():
    rows = read_rows(REPOSITORY / "docs/evidence/runs.csv")
    sweep = expand(PLANS / "learning_rates.yaml", [], {"id": "later"}, ["dense_active"])
    losses = {"status": "ok", "tokens_per_second": 1}
    rows += [{**finish(run, False), **losses, "held_out_edu": 3 + run["learning_rate"]} for run in sweep]
    check_that_plans_make(rows)
    with pytest.raises(AssertionError, match="row 1 of learning_rates"):
        check_that_plans_make([rows[0], {**rows[1], "learning_rate": 3e-3}])


def test_speeds_of_a_new_commit_count_once_all_are_measured():
    """The reference, whose commit they are taken of, is timed last: before it the page keeps those of the old one."""
    planned = yaml.safe_load((PLANS / "speed.yaml").read_text())["variants"]
    old = [swept(name, 1e-3, 3.0, "speed", 1000) for name in planned]
    new = [row | {"commit": "newer", "tokens_per_second": 2000} for row in old]
    for number in range(len(planned) + 1):
        speeds = newest_speeds([*old, *new[:number]], "dense_active")
        assert list(speeds.values()) == [2000 if number == len(planned) else 1000] * len(planned)


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
        # The larger dense control takes the rate of the other one, for a sweep of its own would cost too much at 150m.
        family = "dense" if name == "dense_total" else known["variants"][name]["family"]
        assert variant["family"] == family and config.keys() == original.keys()
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
    assert sorted({run["learning_rate"] for run in stability}) == [3e-3, 4e-3, 8e-3, 16e-3]
    with pytest.raises(InputError, match="has no swept learning rate yet, for 0 rates were tried"):
        expand(PLANS / "headline.yaml", [], DATA)


def test_a_run_is_repeated_as_it_was():
    """Sweeps and speeds of later rows give other rates and lengths. What is not there is not made by this."""
    rows = all_swept(best=1e-3) + [swept(name, 1e-3, 3.0, "speed", 700) for name in ("dense_active", "shared_64")]
    plans = [str(PLANS / f"{name}.yaml") for name in ("headline", "equal_seconds")]
    asked = {"data": DATA, "only": ["shared_64"], "seeds": [0, 1]}
    first = runs_of(plans, rows, **asked)
    rows += [{**run, "status": "ok", "held_out_edu": 3.0} for run in first if run["seed"] == 0]
    rows += [swept("shared_64", 1e-3, 9.0), swept("shared_64", 1e-3, 3.0, "speed", 350)]
    now = runs_of(plans, rows, **asked)
    assert [run["learning_rate"] for run in now] == [2e-3] * 4
    assert {run["tokens"] for run in now} != {run["tokens"] for run in first}
    assert runs_of(plans, rows, **asked, repeat=True) == [run for run in first if run["seed"] == 0]
    with pytest.raises(InputError, match=r"runs\.csv has no such run on these token files: leave --repeat out"):
        runs_of(plans, rows, DATA, ["shared_64"], [1], repeat=True)
    with pytest.raises(InputError, match="token files, for those of --smoke do not count: leave --repeat out"):
        runs_of(plans, [], DATA, ["shared_64"], smoke=True, repeat=True)


def test_a_run_that_failed_is_repeated_beside_those_that_ended():
    plans, asked = [str(PLANS / "stability.yaml")], {"data": DATA, "only": ["dense_active"], "seeds": [0]}
    first = runs_of(plans, all_swept(), **asked)
    assert len(first) > 1
    rows = all_swept() + [{**run, "status": "failed" if run is first[0] else "ok"} for run in first]
    assert runs_of(plans, rows, **asked, repeat=True) == first


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


def test_whole_runs_have_the_last_word_on_a_rate():
    """But by no less than two seeds differ by, and only beside a whole run at the rate of the sweep."""
    rate = lambda rows: swept_rate("dense", yaml.safe_load((PLANS / "30m.yaml").read_text()), rows)  # noqa: E731
    sweep = [swept("dense_active", r, 4.0 + abs(r - 1e-3)) for r in (5e-4, 1e-3, 2e-3)]
    headline = swept("dense_active", 1e-3, 3.07, "headline")
    near, better = (swept("dense_active", 2e-3, loss, "whole_rates") for loss in (3.051, 3.04))
    assert rate([*sweep, better]) == 1e-3
    assert rate([*sweep, headline, near]) == 1e-3
    assert rate([*sweep, headline, better]) == 2e-3
    assert rate([*sweep, headline | {"plan": "scaling"}, better]) == 2e-3
    newer = [headline | {"data": "other"}, near | {"data": "other"}]
    assert rate([*sweep, headline, better, *newer]) == 1e-3 and rate([*sweep, *newer, headline, better]) == 2e-3
    assert (
        rate([*sweep, headline, better | {"data": "other"}]) == rate([*sweep, headline, better | {"seed": 1}]) == 1e-3
    )
    assert rate([*sweep, headline, better | {"tokens": 2 * headline["tokens"]}]) == 1e-3  # another length
    assert rate([*sweep, headline, better | {"status": "diverged"}]) == 1e-3
    lost = headline | {"status": "diverged", "held_out_edu": 9.7}
    assert rate([*sweep, lost, near]) == 2e-3
    assert rate([*sweep, lost, near | {"status": "diverged"}]) == 1e-3
    assert rate([*sweep, headline, better, headline | {"learning_rate": 2e-3, "held_out_edu": 3.2}]) == 1e-3  # again
    whole = [headline | {"learning_rate": r, "plan": "whole_rates", "held_out_edu": 3 + r} for r in (1e-3, 2e-3, 4e-3)]
    assert rate(whole) == 1e-3  # without a sweep
    with pytest.raises(InputError, match=r"or whole_rates.yaml first. Those of --smoke do not count"):
        rate(whole[:2])


def test_rates_that_the_headline_has_are_not_trained_again():
    runs = [finish(run, False) for run in expand(PLANS / "whole_rates.yaml", [], DATA, ["dense_active"])]
    assert [run["learning_rate"] for run in missing_of(runs, [])] == [2e-3, 4e-3, 1e-3]
    made = {run["learning_rate"]: run | {"plan": "headline", "status": "ok"} for run in runs}
    assert [run["learning_rate"] for run in missing_of(runs, [made[1e-3]])] == [2e-3, 4e-3]
    assert missing_of([runs[0] | {"plan": "headline"}], [runs[0] | {"status": "ok"}])  # whose table has rows of its own


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
        ({"seeds": []}, "needs a list for seeds, of whole numbers"),
        ({"seeds": [0, -1]}, "has the seed -1, but a seed is 0 or more"),
        ({"learning_rates": []}, "has learning_rates that are no numbers above 0"),
        ({"base": 30}, "30' is not a readable YAML file"),
        (
            {"base": "plan.yaml"},
            "is no file of variants: it lacks size, shape, training, variants",
        ),
        ({"base": "latin.yaml"}, "latin.yaml' is not a readable YAML file"),
        ({"base": "few.yaml"}, "The variant 'v0' of .* needs a family and a config"),
    ],
)
def test_a_plan_that_cannot_be_read_is_refused(tmp_path, change, sentence):
    (tmp_path / "30m.yaml").write_text((PLANS / "30m.yaml").read_text())
    (tmp_path / "latin.yaml").write_bytes("size: größer".encode("latin-1"))
    (tmp_path / "few.yaml").write_text("{size: 30m, shape: {}, training: {}, variants: {v0: {config: {}}}}")
    whole = {"base": "30m.yaml", "variants": ["v0"], "tokens": "1e8", "learning_rates": [1e-3], "seeds": [0]}
    plan = change if isinstance(change, str) else yaml.safe_dump(whole | change)
    (tmp_path / "plan.yaml").write_text(plan)
    with pytest.raises(InputError, match=sentence):
        expand(tmp_path / "plan.yaml", [], DATA)


def test_numbers_of_a_plan_may_be_written_without_a_point(tmp_path):
    """YAML takes 2e0 and 1e-3 for text."""
    (tmp_path / "30m.yaml").write_text((PLANS / "30m.yaml").read_text())
    plan = (
        "base: 30m.yaml, variants: [v0], tokens: 1e8, learning_rates: [1e-3], learning_rate_factors: [2e0], seeds: [0]"
    )
    (tmp_path / "plan.yaml").write_text(f"{{{plan}}}")
    (run,) = expand(tmp_path / "plan.yaml", [], DATA)
    assert run["learning_rate"] == 2e-3 and run["tokens"] == 1e8


def test_a_run_that_its_tokens_do_not_suffice_for_is_refused():
    run = finish(expand(PLANS / "headline.yaml", all_swept(), DATA)[0], False)
    check_length(run, {"files": {"train": {"tokens": 100_000_000}}})
    few = {"files": {"train": {"tokens": 99_000_000}}}
    check_length(run | {"repeat_data": True}, few)
    with pytest.raises(InputError, match="'dense_active' takes 99,975,168 tokens, but the token files have 96,679"):
        check_length(run, few)
    with pytest.raises(InputError, match="needs 2 steps of 32,768 tokens or more, and gets 32,768"):
        check_length(run | {"tokens": 32768}, few)
    with pytest.raises(InputError, match="and gets 0, for --smoke takes 1/25,000 of the plan's"):
        check_length(finish(run | {"tokens": 1e6}, True), few)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--only", "v0", "v9"], "--only names v9, which no plan of"),
        (["--seeds", 0, 7], "--seeds names 7, which no plan of"),
        (["--tokens", 1e9], "takes 999,981,056 tokens, but the token files have 2 rows"),
        (["--tokens", "nan"], "'nan' is not a number above 0"),
        (["--gpus", 0], "'0' is not a whole number of at least 1"),
        (["--output-dir", "/dev/null/here"], "--output-dir '/dev/null/here' cannot be a folder"),
        (["--save-models", "/dev/null/here"], "--save-models '/dev/null/here' cannot be a folder"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence(tmp_path, options, sentence):
    (tmp_path / "data.json").write_text(json.dumps({**DATA, "files": {"train": {"tokens": 2048}}}))
    folders = ["--data", tmp_path, "--log-dir", tmp_path / "logs", "--output-dir", tmp_path / "out"]
    plan = ["--plan", PLANS / "learning_rates.yaml", "--start-method", "spawn"]
    status, _, errors = outcome_of("ablate", "run", *plan, *folders, *options)
    assert status and sentence in errors and errors.count("\n") == 1 and not (tmp_path / "out" / "runs.csv").exists()


@pytest.fixture
def token_files(tmp_path):
    """Files of 1e8 and twice 1,024 tokens, which take no room on the disk."""
    sizes = {"train": 10**8, "held_out_edu": 1024, "held_out_books": 1024}
    for name, tokens in sizes.items():
        with (tmp_path / f"{name}.bin").open("wb") as file:
            file.truncate(2 * tokens)
    (tmp_path / "tokenizer").mkdir()
    described = {**DATA, "files": {name: {"tokens": tokens} for name, tokens in sizes.items()}}
    (tmp_path / "data.json").write_text(json.dumps(described))
    return tmp_path


def sweep_of_v0(folder):
    folders = ["--data", folder, "--log-dir", folder / "logs", "--output-dir", folder / "out"]
    return ["run", "--plan", PLANS / "learning_rates.yaml", "--start-method", "spawn", "--only", "v0", *folders]


def test_runs_of_another_length_stand_in_no_table_of_the_plan(token_files, monkeypatch):
    begun = []
    monkeypatch.setattr(Runner, "work", lambda runner, runs, gpus: begun.extend(runs))
    outcome_of("ablate", *sweep_of_v0(token_files), "--tokens", "1e6")
    outcome_of("ablate", *sweep_of_v0(token_files))
    assert [run["plan"] for run in begun] == ["learning_rates of 1e+06 tokens"] * 4 + ["learning_rates"] * 4


@pytest.mark.parametrize(
    "name, tokens, sentence",
    [
        ("tokenizer", None, "There is no tokenizer in"),
        ("train.bin", None, "train.bin' should hold 100,000,000 tokens of two bytes, but is not there"),
        ("train.bin", 999, "train.bin' should hold 100,000,000 tokens of two bytes, but has 1,998 bytes"),
        ("held_out_edu.bin", 100, "held_out_edu.bin' holds 100 tokens, fewer than one row of 1,024: give more text"),
        ("data.json", None, "holds no token files"),
        ("data.json", 0, "holds no token files"),
    ],
)
def test_token_files_that_no_run_could_read_are_refused_before_any(token_files, name, tokens, sentence):
    path = token_files / name
    if tokens is None:
        path.rmdir() if path.is_dir() else path.unlink()
    elif name == "data.json":
        path.write_text('["of another program"]')
    else:
        path.write_bytes(bytes(2 * tokens))
    if name == "held_out_edu.bin":
        described = json.loads((token_files / "data.json").read_text())
        described["files"]["held_out_edu"]["tokens"] = tokens
        (token_files / "data.json").write_text(json.dumps(described))
    status, _, errors = outcome_of("ablate", *sweep_of_v0(token_files))
    assert status and sentence in errors and errors.count("\n") == 1
    assert not (token_files / "out" / "runs.csv").exists()


def test_settings_tell_runs_apart():
    run = expand(PLANS / "learning_rates.yaml", [], DATA)[0]
    same, other = finish(dict(run), False), finish({**run, "config": {**run["config"], "num_experts": 8}}, False)
    assert same["settings"] == finish({**run, "plan": "another"}, False)["settings"] != other["settings"]
    assert same["tokens"] % (1024 * 32) == 0 and 2.5e7 - same["tokens"] < 1024 * 32


def test_muon_is_a_variant_with_rates_of_its_own():
    """The model and its training are those of the variant with AdamW, and nothing of one is taken for the other."""
    runs = {run["variant"]: run for run in expand(PLANS / "muon.yaml", all_swept(), DATA)}
    with_adamw = {run["variant"]: run for run in expand(PLANS / "headline.yaml", all_swept(), DATA) if run["seed"] == 1}
    tried = {run["variant"] for run in expand(PLANS / "whole_rates.yaml", [], DATA)}
    assert len(runs) == 2 and set(runs) < tried
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


def test_only_a_plan_that_says_so_repeats_its_data():
    rows = all_swept("150m.yaml")
    large, once = (expand(PLANS / f"150m/{plan}.yaml", rows, DATA) for plan in ("large", "scaling"))
    assert all(run["repeat_data"] for run in large) and not any("repeat_data" in run for run in once)
