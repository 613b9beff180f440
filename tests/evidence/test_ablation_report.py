"""ablate.py: the report."""

import math
import resource
import shutil

import pytest
import yaml

from ablation_rows import PLANS, finished
from complexity_deep.workflow.evidence import ablation_report, study_page
from complexity_deep.workflow.evidence.ablation_report import (
    BEYOND,
    difference,
    draw_curves,
    draw_differences,
    gaps,
    interval,
)
from support import REPOSITORY, outcome_of

PREPARE = ["prepare", "--tokenizer", "none", "--sources", "none", "--held-out-edu", "none", "--held-out-books", "none"]


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
    assert "one between the optimizers that is below 0.02 counts as none, as planned" in section
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
    assert "-0.500 (1 and 2 seeds, no interval) at equal seconds on educational text" in text
    assert "At equal tokens, token files second" in text and "| 4.9000 | 5.9000 | -0.100 | -0.100 |" in text
    assert text.index("token files second") < text.index("token files first")  # the newest are read first


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
    assert (
        "At equal seconds the best is `shared_64_values`: -0.160 (1 and 3 seeds, no interval) on educational text"
        in text
    )
    assert "not decided yet**: no candidate has a finished run beside one of `dense_active`." in page([*dense])


def test_a_candidate_is_chosen_by_the_seeds_that_were_planned_for_it(page):
    """Of those that have as many; and the seeds that came later are shown alone."""
    dense = [finished("dense_active", seed, 3.2 + 0.001 * seed) for seed in range(5)]
    ours = [finished("shared_64", seed, loss) for seed, loss in enumerate((3.0, 3.001, 3.002, 3.11, 3.113))]
    other = [
        finished("shared_64_values", seed, 3.01 + seed / 1e3) for seed in range(5)
    ]  # better over five seeds, not over three
    lucky = [finished("shared_64_layers", 0, 2.9)]
    text = page([*dense, *ours, *other, *lucky])
    assert "The best candidate is `shared_64`" in text
    assert "With fewer seeds at equal tokens, and so not compared yet: `shared_64_layers`." in text
    # Two seeds each, 0.003 and 0.001 apart.
    assert "With the seeds 3 and 4 alone, by which it was not chosen, it is -0.092 (95 %: -0.10" in text
    assert "best of" not in text
    assert "alone" not in page([*dense[:3], *ours[:3]]).partition("Written by")[0]
    text = page([*dense[:3], *ours[:3], *other[:3], *lucky])
    assert "It is the best of 2 that were compared" in text and "no seed by which it was not chosen was run" in text


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_first_candidate_with_another_seed_is_not_the_best_for_that_alone(page, seeds):
    names = ("dense_active", "shared_64", "shared_64_values", "shared_64_layers")
    losses = dict(zip(names, (3.2, 3.1, 3.0, 3.05)))
    rows = [finished(name, seed, losses[name] + seed / 1e3) for seed in range(seeds) for name in names]
    rows += [finished(name, seed, 3.2, "equal_seconds") for name in names[1:] for seed in range(seeds)]
    text = page([*rows, *(finished(name, seeds, losses[name]) for name in names[:2])])
    assert "The best candidate is `shared_64_values`" in text and "not compared" not in text


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
        finished(name, seed, 9.0, status="diverged")
        for name, seed in (("shared_64", 2), ("v0", 0), ("shared_64", 0))  # the last was run again
    ]
    text = page(rows)
    assert "Seeds that diverged and are in no mean: `shared_64` (2), `v0` (1)." in text
    assert text.index("Seeds that diverged") < text.index("## Stability")


def test_seeds_that_diverged_are_those_of_the_rate_that_a_mean_is_of(page):
    """What came of a seed at a rate that was left says nothing of the one that was found better."""
    rows = [finished("dense_active", seed, 3.2 + 0.01 * seed) for seed in range(2)]
    rows += [finished("v0", seed, 3.1 + 0.01 * seed) for seed in range(2)]
    again = {"learning_rate": 5e-4}
    rows += [finished("v0", 0, 3.0, **again), finished("v0", 1, 9.0, status="diverged", **again)]
    text = page(rows)
    assert "| v0 | 2.0 / 1.0 | 0.0005 | 1 |" in text and "in no mean: `v0` (1)." in text
    rows[4] = {**rows[4], "status": "diverged"}
    text = page(rows)
    assert "| v0 |" not in text and "in no mean: `v0` (2)." in text
    rows += [finished("v0", seed, 3.1 + 0.01 * seed) for seed in range(2)]
    assert "Seeds that diverged" not in page(rows)


def test_runs_at_a_rate_that_was_left_are_named(page):
    """The sweep may find another rate best when they are trained already."""
    rows = [finished(name, seed, 3.2 + 0.01 * seed) for seed in range(2) for name in ("dense_active", "v0")]
    rows += [finished("v0", 0, 3.3, "equal_seconds", tokens=7e7)]
    sweep = [finished("v0", 0, 3 + abs(r - 1e-3), "learning_rates", learning_rate=r) for r in (5e-4, 1e-3, 2e-3)]
    assert "best by now" not in page([*rows, *sweep])
    sweep.append(finished("v0", 0, 2.5, "learning_rates", learning_rate=5e-4))
    text = page([*rows, *sweep])
    assert text.count("Another rate is found best by now: `v0` (0.001, now 0.0005).") == 2  # in either table
    rows += [finished("v0", 0, 3.1, learning_rate=5e-4)]
    text = page([*rows, *sweep])
    assert text.count("best by now") == 1
    assert text.count("are in no mean: `v0` at 0.001 (3.2050 and 4.2050, 2 seeds).") == 1
    assert "may look better" not in text
    sweep += [finished("dense_active", 0, 5 - r, "learning_rates", learning_rate=r) for r in (5e-4, 1e-3, 2e-3)]
    old = "`dense_active` (0.001, now 0.002). Beside `dense_active` at the rate that it left, others may look better"
    assert old in page([*rows, *sweep])


def test_runs_of_equal_seconds_follow_the_newest_speeds(page):
    rows = [finished("dense_active", 0, 3.2), finished("v0", 0, 3.3, "equal_seconds", tokens=7e7)]
    speeds = [finished("dense_active", 0, 5.0, "speed", tokens_per_second=1000)]
    speeds += [finished("v0", 0, 5.0, "speed", tokens_per_second=702)]
    text = page([*rows, *speeds])
    assert (
        "newest speeds" not in text
        and text.count("as many tokens as it trains on in the seconds that `dense_active`") == 1
    )
    again = [row | {"commit": "newer"} for row in speeds]
    again[1]["tokens_per_second"] = 800
    assert "The newest speeds give another number of tokens: `v0` (70.0M, now 80.0M)." in page(rows + speeds + again)


def test_runs_that_all_diverged_are_named(page):
    lost = {"status": "diverged"}
    rows = [finished("shared_64", 0, 9.0, "equal_seconds", **lost), finished("v0_muon", 0, 9.0, "muon", **lost)]
    text = page([finished("dense_active", 0, 3.2), *rows])
    seconds, muon = (text[text.index(title) :] for title in ("## At the seconds of dense_active", "## With Muon"))
    assert "in no mean: `shared_64` (1)." in seconds and "in no mean: `v0_muon` (1)." in muon


def test_whole_runs_at_other_rates_are_compared_with_those_of_the_sweep(page):
    rows = [finished("dense_active", seed, 3.1, learning_rate=1e-3) for seed in (0, 1)]
    rows += [
        finished("dense_active", 0, 4 + abs(r - 1e-3), "learning_rates", learning_rate=r) for r in (5e-4, 1e-3, 2e-3)
    ]
    assert "30m, whole runs" not in page(rows)
    for rate, loss in ((5e-4, 3.2), (2e-3, 3.09)):
        rows += [finished("dense_active", 0, loss, "whole_rates", learning_rate=rate)]
    text = page(rows)
    assert "| dense_active | first | 0 | 3.2000 / 4.2000 | 3.1000 / 4.1000 | 3.0900 / 4.0900 |" in text
    assert "Families of variants without a line here have what the sweep alone says." in text
    assert "below that of the sweep's best rate" not in text and "`dense_active` ends lower" not in text
    assert "The best rate may lie beyond those that were tried for `dense_active`." in text
    assert "| dense_active | 2.0 / 1.0 | 0.001 | 2 |" in text  # at equal tokens, those of the headline alone
    rows += [finished("dense_active", 0, 3.07, "whole_rates", learning_rate=2e-3, held_out_books=4.04)]  # again
    rows += [finished("dense_active", 0, 3.3, "whole_rates", learning_rate=4e-3)]
    rows += [finished("v0", 0, 9.0, "whole_rates", learning_rate=2e-3, status="diverged")]
    rows += [finished("v0", seed, 3.0 + seed / 9) for seed in range(2)]
    rows += [finished("shared_64", seed, 3.0 + seed / 9) for seed in range(2)]
    rows += [finished("shared_64", 0, 3.5, "whole_rates", learning_rate=5e-4)]  # its best lies between two worse ones
    rows += [finished("shared_64", 0, 9.0, "whole_rates", learning_rate=2e-3, status="diverged")]
    text = page(rows)
    assert "More than 0.02 nats below that of the sweep's best rate: `dense_active` (-0.030 at 0.002)." in text
    assert "| v0 | first | 0 | | 3.0000 / 4.0000 | diverged | |" in text and "tried for `v0`." in text
    assert (
        "`dense_active` ends lower at a rate of 0.002 than at the 0.001 of its runs here, by 0.030 on educational text "
        "and 0.060 on books (one seed)." in text
    )
    assert "| 0.001; 0.001 (now 0.002) |" in text  # what each part gives
    rows += [finished("shared_64", 0, 3.2, "equal_seconds")]
    assert page(rows).count("Another rate is found best by now: `dense_active` (0.001, now 0.002).") == 2
    rows += [finished("dense_active", seed, 3.07, learning_rate=2e-3) for seed in (0, 1)]
    text = page(rows)
    assert "`dense_active` ends lower" not in text and "now 0.002" not in text
    swept = [finished("dense_active", 0, 4 + r, "learning_rates", learning_rate=r) for r in (5e-4, 1e-3, 2e-3)]
    text = page([finished("dense_active", 0, 3.1), finished("shared_64", 0, 3.0), *swept])
    assert (
        "`dense_active` ends lower" not in text and "`dense_active` (0.001, now 0.0005)" in text
    )  # by the sweep alone


def test_differences_while_training_goes_on_are_drawn(page, tmp_path):
    """Of the points that every run of both has."""
    page([finished("dense_active", seed, 3.2) for seed in range(2)])
    assert not (tmp_path / "evidence/gaps.png").exists()
    text = page([finished(variant, seed, 3.2) for variant in ("dense_active", "v0") for seed in range(2)])
    assert (tmp_path / "evidence/gaps.png").stat().st_size > 20_000 and "(evidence/gaps.png)" in text
    curves = [[1, 5.0, 9.0], [2, 4.0, 8.0], [3, 3.0, 7.0], [4, 2.0, 6.0]], [[1, 6.0, 9.0], [3, 3.0, 7.0], [4, 2.0, 6.0]]
    ours = [finished("v0", seed, 3.0, curve=curve) for seed, curve in enumerate(curves)]
    dense = [finished("dense_active", 0, 3.0, curve=[[1, 6.0, 9.0], [2, 4.5, 8.0], [3, 3.5, 7.0]])]
    assert gaps(ours, dense, "held_out_edu") == [(1, -0.5), (3, -0.5)]
    assert gaps(ours, dense, "held_out_books") == [(1, 0.0), (3, 0.0)]


def test_panels_are_of_the_newest_token_files_and_of_longer_runs(page, monkeypatch):
    panels = {}
    monkeypatch.setattr(study_page, "draw_gaps", lambda path, found, *rest: panels.update(found))
    rows = [finished(name, 0, 3.0, data=data) for data in ("1", "2") for name in ("dense_active", "v0", "shared_64")]
    rows += [finished("dense_active", 0, 3.0, "large", size="150m")]
    page(rows)
    assert list(panels) == ["30m, token files 2"] and list(*panels.values()) == ["dense_active", "v0"]
    page([*rows, finished("v0", 0, 3.0, "large", size="150m")])
    assert list(panels) == ["30m, token files 2", "150m on more tokens, token files first"]


def test_stability_is_of_one_set_of_token_files_and_of_whole_numbers(page):
    rows = [finished("v0", seed, 3.0 + 0.01 * seed, "stability") for seed in range(2)]
    rows += [finished("v0", 0, 3.0, "stability", spikes=4)]  # again
    rows += [finished("v0", 0, 5.0, "stability", data="second")]
    rows += [finished("v0", 1, 9.0, "stability", data="second", status="diverged", max_grad_norm=math.nan)]
    text = page(rows)
    assert "| v0 | first | 0.001 | 2 | 0 | 2.0 | 1.0 | 3.0050 ± 0.0050" in text
    assert "| v0 | second | 0.001 | 2 | 1 | 0.0 | not finite | 5.0000 |" in text


def test_stability_where_all_diverged_is_said_to_tell_nothing(page):
    rows = [finished(name, 0, 9.0, "stability", status="diverged") for name in ("v0", "v0_no_dynamics")]
    sentence = "All of them diverged, so that they do not tell the variants apart."
    assert sentence in page(rows) and sentence not in page([*rows, finished("v0", 1, 3.0, "stability")])


def test_a_sweep_says_where_it_does_not_enclose_its_best(page):
    rates = (1e-3, 2e-3, 4e-3)
    rows = [finished("v0", 0, 3 + abs(rate - 2e-3), "learning_rates", learning_rate=rate) for rate in rates]
    rows += [finished("dense_active", 0, 3 + rate, "learning_rates", learning_rate=rate) for rate in rates]
    text = page(rows)
    assert "The best rate may lie beyond those that were tried for `dense_active`. ##" in text
    rows[2] = {**rows[2], "status": "diverged", "held_out_edu": None}
    text = page([*rows, finished("v0", 0, 1.0, "learning_rates", learning_rate=2e-3, data="second")])
    assert "| v0 | first | 3.0010 | 3.0000 | diverged |" in text and "for `dense_active`. ##" in text


def test_a_sweep_names_variants_for_which_token_files_disagree(page):
    def sweep(variant, losses, data):
        rates = (5e-4, 1e-3, 2e-3)
        return [
            finished(variant, 0, loss, "learning_rates", learning_rate=rate, data=data)
            for rate, loss in zip(rates, losses)
            if loss
        ]

    rows = sweep("v0", (3.2, 3.0, 3.1), "first") + sweep("v0", (3.2, 3.1, 3.0), "second")
    rows += sweep("shared_64", (None, 3.1, 3.2), "first") + sweep("shared_64", (3.0, 3.1, 3.2), "second")
    text = page(rows)
    assert "Two sets of token files find different rates best, of those that both have, for `v0`: so short" in text
    assert "Held-out loss on educational text after 100M tokens, one seed each." in text


def test_one_wide_interval_does_not_hide_the_others(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(ablation_report, "write_figure", lambda figure, path: figures.append(figure))
    runs = {"dense_active": [finished("dense_active", seed, 3.2 + seed / 1000) for seed in range(2)]}
    runs["shared_64"] = [finished("shared_64", seed, 3.0 + seed / 1000) for seed in range(2)]
    runs["v0_router_gradient"] = [finished("v0_router_gradient", seed, 3.2 + seed / 2) for seed in range(2)]
    draw_differences(tmp_path / "differences.png", runs, runs["dense_active"])
    axes = figures[0].axes[0]
    assert axes.get_xlim() == pytest.approx((-0.2 - BEYOND, 0.2495 + BEYOND))
    draw_curves(tmp_path / "curves.png", runs)
    ends = [line.get_ydata()[-1] for line in figures[1].axes[0].get_lines()]
    assert ends == sorted(ends, reverse=True)  # as the legend is read


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


def test_runs_that_were_made_again_stand_beside_each_other(page):
    """Whatever the plan; each pair with how far it is apart, and how many agree as two seeds do."""
    rows = [finished("dense_active", seed, 3.2, settings="d") for seed in range(2)]
    rows += [finished("v0", 0, 3.1, settings="a"), finished("v0", 0, 3.1, settings="a", data="second")]
    assert "## Runs that were made again" not in page(rows)
    rows += [finished("v0", 0, 3.115, "ablations", settings="a", commit="newer")]
    text = page([*rows, finished("v0", 0, 3.1, settings="a", status="failed")])
    shown = "| v0 | headline, ablations | first | new, newer | 30m | 0 | 100.0 | 3.1000, 3.1150 | 4.1000, 4.1150 |"
    assert f"{shown} 0.0150 | 0.0150 | 1 of 1 agree within 0.02 nats" in text
    rows += [finished("dense_active", 0, 3.221, settings="d")]
    rows += [finished("dense_active", 1, 9.0, settings="d", status="diverged")]
    text = page(rows)
    assert "3.2000, 3.2210 | 4.2000, 4.2210 | 0.0210 | 0.0210 |" in text and "1 of 3 agree" in text
    assert "| 3.2000, diverged | 4.2000, diverged | | |" in text


def test_a_full_disk_leaves_the_pages_as_they_were(tmp_path):
    """All of them: a page would otherwise be of other rows than its figures."""
    output = tmp_path / "evidence"
    output.mkdir()
    shutil.copy(REPOSITORY / "docs/evidence/runs.csv", output)
    shutil.copy(REPOSITORY / "docs/evidence/balance.json", output)
    assert outcome_of("ablate", "report", "--output-dir", output)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"evidence.md", "claims.md", "scaling.md", "curves.png"} <= {path.name for path in before}
    rows = before[output / "runs.csv"].splitlines(keepends=True)
    (output / "runs.csv").write_bytes(b"".join(rows[:-1]))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        status, _, errors = outcome_of("ablate", "report", "--output-dir", output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status and "A file cannot be written (File too large): make room" in errors and errors.count("\n") == 1
    del before[output / "runs.csv"]
    assert all(path.read_bytes() == found for path, found in before.items())
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == len(before) + 1


def test_the_page_lies_beside_its_folder(tmp_path, monkeypatch):
    (tmp_path / "study-1.5").mkdir()
    monkeypatch.chdir(tmp_path / "study-1.5")
    assert outcome_of("ablate", "report", "--output-dir", ".")[0] == 0
    assert (tmp_path / "study-1.5.md").exists() and "(study-1.5/claims.md)" in (tmp_path / "study-1.5.md").read_text()


def test_a_candidate_without_runs_was_not_tried(page):
    names = yaml.safe_load((PLANS / "30m.yaml").read_text())["candidates"]
    rows = [finished(name, seed, 3.0 + seed / 100) for seed in range(2) for name in ("dense_active", "shared_64")]
    others = ", ".join(f"`{name}`" for name in names if name != "shared_64")
    assert f"Tried were `shared_64`. Without a finished run are {others}." in page(rows)
    rows += [finished(name, 0, 3.0) for name in names]
    assert "Without a finished run" not in page(rows)
