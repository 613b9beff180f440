"""The table of claims: each verdict from made-up rows, by the rule that the page states, and the counts of tokens."""

import itertools
import json
import shlex

import numpy as np
import pytest
import torch
import yaml

from ablation_rows import finished
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.evidence import claim_measures, claims
from complexity_deep.workflow.evidence.balance import FILE, measure_balance
from support import REPOSITORY, run_command

PLANS = REPOSITORY / "recipes" / "evidence"
CAPACITY = "It has the capacity"
SPECIALISED = "Experts specialise"
CONVERGENCE = "Mu makes training converge"
STABILITY = "The controller"


@pytest.fixture
def line(tmp_path):
    """The measurement and the verdict of a claim, from the page that these rows make."""

    def read(rows, claim):
        claims.write_claims(tmp_path, rows, str(PLANS))
        lines = [line for line in (tmp_path / "claims.md").read_text().splitlines() if f" | {claim}" in line]
        assert len(lines) == 1
        *_, measured, verdict = lines[0].split(" | ")
        return measured, verdict.strip("| *")

    return read


def runs(variant, edu, seeds=3, books=None, **changes):
    """Runs around a loss, 0.001 apart from seed to seed; books is 1 nat above edu unless said."""
    made = [finished(variant, seed, edu + 0.001 * (seed - 1), "ablations", **changes) for seed in range(seeds)]
    return [row | {"held_out_books": row["held_out_books"] + (books - edu - 1 if books else 0)} for row in made]


@pytest.mark.parametrize(
    ("total", "active", "expected"),
    [
        (3.21, 3.3, "holds"),
        (3.19, 3.3, "holds"),  # behind by less than the margin
        (3.15, 3.3, "holds in part"),
        (3.15, 3.21, "holds in part"),
        (3.15, 3.15, "does not hold"),
        (3.17, 3.2, "does not hold"),  # by more than the margin, and a gain as large as the margin is excluded
    ],
)
def test_capacity_of_dense(line, total, active, expected):
    rows = runs("v0", 3.2) + runs("dense_total", total) + runs("dense_active", active)
    measured, verdict = line(rows, CAPACITY)
    assert verdict == expected
    # Welch with equal spreads of 0.001 and 3 seeds each: 2.776 x 0.001 x sqrt(2 / 3) = 0.0023.
    mean = 3.2 - total
    assert f"v0 minus dense_total: edu {mean:+.3f} [{mean - 0.0023:+.3f}, {mean + 0.0023:+.3f}]" in measured
    assert "(3 seeds, files first)" in measured


def test_a_claim_that_is_shown_on_one_text_holds_in_part(line):
    rows = runs("v0", 3.2) + runs("v0_no_mu_routing", 3.3, books=4.1) + runs("v0_router_gradient", 3.4)
    assert line(rows, "Routing that mu may override")[1] == "holds in part"
    rows = runs("v0", 3.2) + runs("v0_no_mu_routing", 3.15) + runs("v0_router_gradient", 3.1)
    assert line(rows, "Routing that mu may override")[1] == "holds in part"  # its router needs a gradient


def test_one_seed_and_wide_intervals_decide_nothing(line):
    measured, verdict = line(runs("v0", 3.2, seeds=1) + runs("dense_total", 3.0) + runs("dense_active", 3.0), CAPACITY)
    assert "v0 minus dense_total: edu +0.199, books +0.199 (1 and 3 seeds, so no interval" in measured
    assert verdict == "open"
    wide = [finished("v0", seed, 3.2 + seed, "ablations") for seed in range(2)]
    measured, verdict = line(wide + runs("dense_total", 3.2) + runs("dense_active", 3.2), CAPACITY)
    assert "[" in measured and verdict == "open"
    assert line([], CAPACITY) == (
        "v0 minus dense_total: not measured yet<br>v0 minus dense_active: not measured yet",
        "open",
    )


def test_losses_of_other_token_files_are_not_subtracted(line):
    rows = runs("v0", 3.2, data="first") + runs("dense_total", 3.0, data="second") + runs("dense_active", 3.3)
    measured, verdict = line(rows, CAPACITY)
    assert "v0 minus dense_total: not measured yet" in measured and verdict == "open"
    rows += runs("v0", 2.2, seeds=2, data="second")
    assert "v0 minus dense_total: edu -0.80" in line(rows, CAPACITY)[0]
    assert "(2 and 3 seeds, files second)" in line(rows, CAPACITY)[0]


def test_runs_that_diverged_are_named(line):
    lost = finished("dense_total", 3, 9.0, "ablations", status="diverged")
    repeated = finished("dense_total", 0, 9.0, "ablations", status="diverged")  # seed 0 has ended since
    rows = [repeated, *runs("v0", 3.2), *runs("dense_total", 3.21), lost, *runs("dense_active", 3.3)]
    measured, verdict = line(rows, CAPACITY)
    assert "(3 seeds, files first, 1 seed of dense_total diverged and left out)" in measured and verdict == "holds"


def test_a_rate_that_was_left_is_named(line):
    rows = runs("v0", 3.2) + runs("learned_4", 3.2)
    rows += [finished("learned_16", 0, 3 + r, "learning_rates", learning_rate=r) for r in (5e-4, 1e-3, 2e-3)]
    found = "(3 seeds, files first, learned_4 at the rate 0.001, where 0.0005 is found best by now)"
    assert found in line(rows, "Routing by id is as good as a learned router: 4 experts")[0]


def test_a_variant_whose_runs_all_diverged_is_not_one_without_runs(line):
    lost = [finished("v0_frozen_experts", seed, 9.0, "ablations", status="diverged") for seed in range(3)]
    rows = [*runs("v0", 3.2, shifted_edu=6.0, expert_norm_ratio=2.0), *lost]
    found = "not measured (3 seeds of v0_frozen_experts diverged, files first)"
    measured, verdict = line(rows, "The published CUDA path")
    assert measured == f"v0_frozen_experts minus v0: {found}" and verdict == "open"
    rows.append(finished("v0", 3, 9.0, "ablations", status="diverged"))  # of a variant that has others
    assert (
        line(rows, "The published CUDA path")[0] == measured
        and "minus v0_random: not measured yet" in line(rows, SPECIALISED)[0]
    )
    assert f"cost of shifted experts, v0 minus v0_frozen_experts: {found}; v0 alone" in line(rows, SPECIALISED)[0]
    again = [finished("v0", seed, 9.0, "ablations", status="diverged", learning_rate=5e-4) for seed in range(2)]
    assert "norm growth of v0: not measured (2 seeds of v0 diverged, files first)" in line(rows + again, SPECIALISED)[0]


@pytest.mark.parametrize(
    ("growth", "shifted", "frozen_shifted", "random", "expected"),
    [
        (2.0, 6.0, 3.6, 3.3, "holds"),
        (2.0, 6.0, 3.6, 3.2, "holds in part"),  # a random table does as well
        (0.9, 3.2, 3.6, 3.1, "does not hold"),
        (2.0, None, 3.6, 3.3, "open"),
    ],
)
def test_specialisation_against_its_nulls(line, growth, shifted, frozen_shifted, random, expected):
    v0 = runs("v0", 3.2, shifted_edu=shifted)
    rows = [row | {"expert_norm_ratio": growth + 0.01 * row["seed"]} for row in v0]
    rows += runs("v0_frozen_experts", 3.6, shifted_edu=frozen_shifted, expert_norm_ratio=1.0) + runs(
        "v0_random", random
    )
    measured, verdict = line(rows, SPECIALISED)
    assert verdict == expected and f"norm growth of v0: {growth + 0.01:.2f} [" in measured
    if shifted == 6.0:
        assert "cost of shifted experts, v0 minus v0_frozen_experts: edu +2.800 [" in measured


def falling(tokens, per_nat):
    """A curve whose losses fall by one nat every `per_nat` tokens, from 10 and 11."""
    return [[t, 10 - t / per_nat, 11 - t / per_nat] for t in range(0, tokens + 1, 10)]


@pytest.mark.parametrize(
    ("ratios", "expected", "shown"),
    [
        ((2.5, 2.5, 2.6), "holds", "edu 2.53 ["),
        ((1.5, 1.5, 1.6), "holds in part", "edu 1.53 ["),
        ((0.8, 0.8, 0.9), "does not hold", "edu 0.83 ["),
        ((2.5,), "open", "edu 2.50, books 2.50 (1 seed, so no interval"),
        ((0.2, 5.0), "open", "edu 1.00 ["),
    ],
)
def test_tokens_to_a_loss_with_and_without_mu(line, ratios, expected, shown):
    rows = []
    for seed, ratio in enumerate(ratios):
        rows.append(finished("v0", seed, 3.0, curve=falling(100, 20)))
        rows.append(finished("v0_no_guidance", seed, 3.0, "ablations", curve=falling(100, 20 * ratio)))
    measured, verdict = line(rows, CONVERGENCE)
    assert verdict == expected and shown in measured


def test_curves_that_share_no_loss_and_no_seed_say_so(line):
    ours, control = finished("v0", 0, 3.0), finished("v0_no_guidance", 1, 3.0, "ablations")
    ours["curve"], control["curve"] = (
        falling(100, 20),
        [[t, loss + 20, more + 20] for t, loss, more in falling(100, 20)],
    )
    assert "v0: not measured yet for one seed of both" in line([ours, control], CONVERGENCE)[0]
    measured, verdict = line([ours, control | {"seed": 0}], CONVERGENCE)
    assert "one begins its curve below the loss that the other ends at (1 seed" in measured and verdict == "open"


def test_tokens_are_read_off_between_points():
    curve = [[10, 5.0, 6.0], [20, 4.0, 5.5], [30, 4.0, 5.0]]
    assert claim_measures.tokens_to_reach(4.25, curve, 1) == 17.5
    assert claim_measures.tokens_to_reach(5.0, curve, 2) == 30
    assert claim_measures.tokens_to_reach(4.0, curve, 1) == 20
    assert claim_measures.tokens_to_reach(3.9, curve, 1) is None
    assert claim_measures.tokens_to_reach(5.5, curve, 1) is None


@pytest.mark.parametrize(
    ("ours", "control", "expected"), [(0, 6, "holds"), (6, 0, "does not hold"), (3, 4, "open"), (9, 9, "open")]
)
def test_unstable_runs_with_and_without_the_controller(line, ours, control, expected):
    rows = []
    for index, (rate, seed) in enumerate(itertools.product((4e-3, 8e-3, 16e-3), range(3))):
        for variant, unstable in (("v0", ours), ("v0_no_dynamics", control)):
            bad = [{"spikes": 2}, {"status": "diverged", "held_out_edu": None}][index % 2] if index < unstable else {}
            rows.append(finished(variant, seed, 3.0, "stability", **{"learning_rate": rate, **bad}))
    rows.append(finished("v0", 7, 3.0, "stability", spikes=5))  # the other has no such run
    measured, verdict = line(rows, STABILITY)
    assert (
        verdict == expected and f"{ours} and {control} of 9, a difference of {(ours - control) / 9:+.3f} [" in measured
    )
    one_seed = [row for row in rows if row["seed"] == 0]
    measured, verdict = line(one_seed, STABILITY)
    assert "1 seed, so no interval" in measured and "[" not in measured and verdict == "open"


def test_interval_of_shares_is_newcombes():
    # His table of 1998, method 10, 9/10 - 3/10.
    assert claim_measures.newcombe(9, 3, 10) == pytest.approx((0.1705, 0.8090), abs=1e-4)


def test_verdict_of_outcomes():
    holds, fails, open_, missing = "holds", "does not hold", "open", claim_measures.UNMEASURED
    verdict = claim_measures.verdict
    assert verdict([holds, holds], [missing]) == "holds"
    assert (
        verdict([holds, open_], []) == verdict([fails, fails], [holds]) == verdict([open_], [holds]) == "holds in part"
    )
    assert verdict([fails, fails], []) == verdict([fails], [open_]) == "does not hold"
    assert verdict([fails, open_], []) == verdict([holds, missing], []) == verdict([fails], [missing]) == "open"


def write_tokens(folder, ids):
    folder.mkdir()
    np.array(ids, dtype=np.uint16).tofile(folder / "train.bin")
    (folder / "data.json").write_text(json.dumps({"id": "abc", "vocab_size": 8, "eos_token_id": 0, "files": {}}))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((10,) * 8, "holds"),
        ((10, 10, 10, 10, 11, 10, 10, 10), "holds in part"),  # 1.04 by modulo, which random tables can miss too
        ((60, 1, 1, 1, 60, 1, 1, 1), "does not hold"),  # the two frequent ids meet in one expert
    ],
)
def test_balance_in_the_corpus_is_counted(tmp_path, line, counts, expected):
    base = yaml.safe_load((PLANS / "30m.yaml").read_text())
    base["training"] |= {"row_length": 4, "rows_per_step": 2}
    ids = np.repeat(np.arange(8), counts)
    ids = ids[: len(ids) // 4 * 4]
    write_tokens(tmp_path / "data", ids)
    written = measure_balance(tmp_path, str(tmp_path / "data"), base)
    loads = np.bincount(ids % 4, minlength=4)
    found = written["experts"]["4"]
    assert written["data"] == "abc" and found["modulo"]["ids"] == [2, 2]
    assert found["modulo"]["most_over_mean"]["total"] == pytest.approx(loads.max() / loads.mean(), abs=1e-4)
    assert found["modulo"]["shares"] == pytest.approx([loads.min() / len(ids), loads.max() / len(ids)], abs=1e-5)
    assert found["balanced"]["most_over_mean"]["total"] <= found["modulo"]["most_over_mean"]["total"]
    assert found["chance"][0] <= found["chance"][1]
    if expected != "holds in part":
        assert line([], "Experts are perfectly balanced: each")[1] == expected
    # In part is below the range of chance, whatever that is.
    written["experts"]["4"]["modulo"]["most_over_mean"]["total"] = 1.02
    written["experts"]["4"]["chance"] = [1.03, 1.4]
    (tmp_path / FILE).write_text(json.dumps(written))
    measured, verdict = line([], "Experts are perfectly balanced: each")
    assert verdict == "holds in part" and "4 experts: modulo 1.020" in measured and "files abc" in measured


def test_report_counts_tokens_and_writes_both_pages(tmp_path):
    write_tokens(tmp_path / "data", np.arange(64 * 1024) % 8)
    (tmp_path / "evidence").mkdir()
    run_command("ablate", "report", "--output-dir", tmp_path / "evidence", "--data", tmp_path / "data")
    assert json.loads((tmp_path / "evidence" / FILE).read_text())["experts"]["4"]["modulo"]["shares"] == [0.25, 0.25]
    assert "evidence/claims.md" in (tmp_path / "evidence.md").read_text()
    assert "4 experts: modulo 1.000" in (tmp_path / "evidence" / "claims.md").read_text()


def test_balance_needs_token_files(tmp_path):
    with pytest.raises(InputError, match="holds no token files"):
        measure_balance(tmp_path, str(tmp_path), yaml.safe_load((PLANS / "30m.yaml").read_text()))


def test_nothing_is_said_without_measurements(tmp_path):
    claims.write_claims(tmp_path, [], str(PLANS))
    page = (tmp_path / "claims.md").read_text()
    study = claim_measures.Study([], yaml.safe_load((PLANS / "30m.yaml").read_text()), None)
    words = {claim.claim: claims.assess(claim, study) for claim in claims.CLAIMS}
    exact = "Experts are perfectly balanced: in the vocabulary"
    assert words.pop(exact)[1] == "holds"  # it needs no run
    assert {word for _, word in words.values()} == {"open", "not testable here"}
    assert all("not measured yet" in measured for measured, word in words.values() if word == "open")
    assert f"**{len(claims.CLAIMS)} claims: holds (1)" in page


def test_commands_make_the_rows_that_a_claim_compares():
    for claim in claims.CLAIMS:
        words = shlex.split(claims.command_of(claim, PLANS))
        names = {name for measure in (*claim.measures, *claim.weaker) for name in measure.variants}
        if names:
            plans = words[words.index("--plan") + 1 : words.index("--only")]
            planned = set().union(*(yaml.safe_load((REPOSITORY / plan).read_text())["variants"] for plan in plans))
            assert set(words[words.index("--only") + 1 :]) == names <= planned


def test_expected_cosine_of_fresh_experts():
    torch.manual_seed(0)
    base = {"shape": {"hidden_size": 16, "intermediate_size": 64, "num_experts": 4}}
    pairs = torch.randn(2, 20_000, 2 * 16 * 16)
    found = torch.nn.functional.cosine_similarity(*pairs, dim=-1).abs().mean().item()
    assert claims.fresh_cosine(base) == pytest.approx(found, rel=0.02)


def test_the_same_losses_at_every_point_are_no_gain_and_level():
    """With one seed too, for that is no chance; one that differs at a point is compared as all others are."""
    rows = [finished("v0", 0, 3.2), finished("v0_no_mu_routing", 0, 3.2, "ablations"), finished("v0", 1, 3.3)]
    study = claim_measures.Study(rows, {"variants": {}}, None)
    outcomes = []
    for allowed in (0.0, claim_measures.MARGIN):
        measured = claim_measures.LossDifference("v0", "v0_no_mu_routing", allowed).measure(study)
        assert measured.text.endswith("exactly 0 at every point of the curves (1 seed, files first)")
        outcomes += measured.outcomes
    assert outcomes == ["does not hold", "holds"]
    rows[1]["curve"] = [*rows[1]["curve"][:-1], [8, 3.25, 4.25]]
    assert "exactly" not in claim_measures.LossDifference("v0", "v0_no_mu_routing").measure(study).text
