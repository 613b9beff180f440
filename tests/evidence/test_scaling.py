"""The scaling section and the estimate for 1.5b: sizes are kept apart, intervals are those of textbooks."""

import csv
import math
import re
import shutil

import numpy as np
import pytest
import yaml
from scipy import stats

from ablation_rows import finished
from complexity_deep.workflow.evidence import estimate, scaling, study_page
from support import REPOSITORY, run_command

PLANS = REPOSITORY / "recipes" / "evidence"
ACTIVE = {"10m": 8e6, "30m": 28e6, "150m": 80e6}


def at_sizes(variant, gain=0.0, gain_per_decade=0.0, seeds=2, active=1.0, slope=-0.5, noise=0.01, **changes):
    """Runs at three sizes on a line in log10 of compute, `noise` above and below it from seed to seed."""
    rows = []
    for size, number in ACTIVE.items():
        x = math.log10(6 * number * active * 1e8)
        middle = 3.0 + slope * (x - 16) - gain - gain_per_decade * (math.log10(6 * number * 1e8) - 16)
        for seed in range(seeds):
            plan = "headline" if size == "30m" else "scaling"
            loss = middle + noise * (2 * (seed % 2) - 1)
            rows.append(finished(variant, seed, loss, plan, size=size, active_parameters=number * active, **changes))
    return rows


def family():
    return [
        *at_sizes("dense_active"),
        *at_sizes("shared_64_layers_values", 0.12, -0.04),
        *at_sizes("shared_64_layers_values_plain", 0.08, active=0.65),
        *at_sizes("dense_total", 0.04, active=1.7),
    ]


def section(folder, rows):
    output = folder / "evidence"
    output.mkdir(exist_ok=True)
    study_page.write_study(output, rows, str(PLANS))
    page = (folder / "evidence.md").read_text()
    return re.split(r"^## (?:Learning rates|Runs)", page[page.index("## Scaling") :], maxsplit=1, flags=re.MULTILINE)[0]


def cells(text, *start):
    """The cells of the one line of a table that begins with these."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {' | '.join(start)} |")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_section_of_known_runs(tmp_path):
    text = section(tmp_path, family())
    # 6 x 28e6 x 1e8 = 16.8e15; -0.12 - -0.04 x log10(1.68) on the line, with Welch's 4.303 x sqrt(2 x 0.0002 / 2).
    line = cells(text, "30m", "shared_64_layers_values")
    assert line[2:5] == ["2.0 / 28.0", "16.8", "2"]
    middle = -0.12 + 0.04 * math.log10(1.68)
    half = 4.303 * math.sqrt(0.0002)
    assert line[-2] == line[-1] == f"{middle:+.3f} [{middle - half:+.3f}, {middle + half:+.3f}]"
    assert cells(text, "150m", "dense_active")[-2:] == ["", ""]
    # Every residual of the line is 0.01: its deviation is 0.01 x sqrt(6 / 4), on 4 degrees of freedom.
    x = [math.log10(6e8 * number) for number in ACTIVE.values()]
    squares = sum((value - np.mean(x)) ** 2 for value in x)
    half = stats.t.ppf(0.975, 4) * 0.01 * math.sqrt(1.5 / (2 * squares))
    expected = f"-0.500 [{-0.5 - half:+.3f}, {-0.5 + half:+.3f}]"
    assert cells(text, "dense_active", "educational text")[2:] == [expected, "4", "", ""]
    # The variance within each of 6 groups is 0.0002, and a mean difference has that of two halves of it.
    half = stats.t.ppf(0.975, 6) * math.sqrt(0.0002 / squares)
    expected = f"+0.040 [{0.04 - half:+.3f}, {0.04 + half:+.3f}]"
    assert cells(text, "shared_64_layers_values", "books")[-2:] == [expected, "6"]
    assert (tmp_path / "evidence" / "scaling.png").stat().st_size > 30_000 and "evidence/scaling.png" in text


def test_line_is_that_of_scipy():
    x, y = [1.0, 1.0, 2.0, 3.0, 3.5], [3.0, 3.1, 2.7, 2.2, 2.3]
    line, found = scaling.fit_line(x, y), stats.linregress(x, y)
    assert line.slope == pytest.approx(found.slope)
    half = stats.t.ppf(0.975, 3) * found.stderr
    assert line.bounds == pytest.approx((found.slope - half, found.slope + half))
    middle, half = line.band(np.array([0.0]))
    assert middle[0] == pytest.approx(found.intercept)
    assert half[0] == pytest.approx(stats.t.ppf(0.975, 3) * found.intercept_stderr)
    with pytest.raises(ValueError, match="2 points leave no degree of freedom"):
        scaling.fit_line([1, 2], [1, 2])


def test_interval_of_the_trend_holds_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    x, true, held = [0.0, 0.5, 1.1], 0.3, 0
    for _ in range(400):
        ours, dense = ([list(generator.normal(slope * v, 0.1, 2)) for v in x] for slope in (true, 0.0))
        _, bounds, freedom = scaling.trend(x, ours, dense)
        held += bounds[0] <= true <= bounds[1]
    assert freedom == 6 and 0.92 <= held / 400 <= 0.98
    assert scaling.trend([0, 1], [[1.0], [3.0]], [[1.0], [1.0]]) == (2.0, None, 0)


@pytest.mark.parametrize("missing", ["10m", "150m"])
def test_nothing_is_fitted_while_a_size_is_missing(tmp_path, missing):
    """The runs that there are stand in their table all the same, unless they are those of the headline alone."""
    text = section(tmp_path, [row for row in family() if row["size"] != missing])
    there = "150m" if missing == "10m" else "10m"
    assert "No line is fitted" in text and "slope" not in text and "Not measured yet." not in text
    assert cells(text, there, "dense_total")[-1].startswith("-0.") and f"| {missing} |" not in text
    assert not (tmp_path / "evidence" / "scaling.png").exists()
    text = section(tmp_path, [row for row in family() if row["size"] == "30m"])
    assert "Not measured yet." in text and "|" not in text


def test_a_variant_that_lacks_a_size_is_named_and_left_out(tmp_path):
    rows = [r for r in family() if (r["variant"], r["size"]) != ("dense_total", "10m")]
    text = section(tmp_path, rows)
    assert "Not measured at every size: `dense_total`." in text and "| dense_total |" not in text
    assert "| shared_64_layers_values |" in text


def test_token_files_are_not_mixed_in_a_fit(tmp_path):
    other = [row for row in at_sizes("dense_active", -5, data="second") if row["size"] != "150m"]
    assert section(tmp_path, family()) == section(tmp_path, [*other, *family()])
    assert section(tmp_path, family()) == section(tmp_path, [*family(), *other])


def test_sizes_are_not_mixed_in_tables(tmp_path):
    (tmp_path / "evidence").mkdir()
    small = [finished("dense_active", seed, 3.2 + 0.01 * seed) for seed in range(3)]
    small += [finished("shared_64_layers_values", seed, 3.0 + 0.01 * seed) for seed in range(3)]
    small += [finished("dense_active", 0, 4.25, "learning_rates")]

    def page(rows):
        study_page.write_study(tmp_path / "evidence", rows, str(PLANS))
        return (tmp_path / "evidence.md").read_text()

    alone = page(small)
    larger = [row | {"held_out_edu": 1.5, "held_out_books": 1.5, "size": "150m"} for row in small]
    larger += [
        finished("dense_active", seed, 1.5, plan, size="10m") for seed in range(2) for plan in ("headline", "speed")
    ]
    both = page([*larger, *small, *larger])
    assert both[: both.index("## Scaling")] == alone[: alone.index("## Scaling")]
    first, second = both.split("## Learning rates at ")[1:]  # none of 10m
    assert first.startswith("30m") and "| 4.2500 |" in first and "1.5" not in first
    assert second.startswith("150m") and "| 1.5000 |" in second


def test_longer_runs_have_a_table_of_their_own(tmp_path):
    rows = family()
    for variant, loss in (("dense_active", 2.5), ("shared_64_layers_values", 2.4)):
        rows += [finished(variant, seed, loss + 0.01 * seed, "large", size="150m", tokens=3e8) for seed in range(2)]
    text = section(tmp_path, rows)
    assert "## 150m on more tokens, token files first" in text
    table = text[text.index("## 150m on more tokens") :]
    assert cells(table, "shared_64_layers_values")[4] == "300.0" and "-0.100 [" in table
    assert "`shared_64_layers_values` minus `dense_active` is lowest at 0M tokens: -0.100 on educational" in table
    assert "Rates are those that shorter runs found best: none was chosen at this length." in table
    assert "other rates" not in table
    rows.insert(0, finished("dense_active", 0, 2.7, "large", size="150m", tokens=3e8, learning_rate=5e-4))
    left = "Runs at other rates, on both texts, are in no mean: `dense_active` at 0.0005 (2.7000 and 3.7000, 1 seed)."
    assert left in section(tmp_path, rows)
    assert text.split("## 150m")[0] in section(tmp_path, family())


def test_the_largest_lead_of_a_longer_run_is_named():
    """Of the points after the first quarter, before which losses differ most."""
    edu = [3.0, 5.0, 4.6, 4.5, 4.9]
    runs = {"dense_active": [finished("dense_active", 0, 5.0, curve=[[n * 1e6, 5.0, 6.0] for n in range(5)])]}
    assert scaling.while_training(runs, "dense_active") == []
    runs["v0"] = [finished("v0", 0, 4.9, curve=[[n * 1e6, loss, loss + 1.5] for n, loss in enumerate(edu)])]
    (line, _) = scaling.while_training(runs, "dense_active")
    assert scaling.while_training({"v0": runs["v0"]}, "dense_active") == []
    assert line == (
        "After the first quarter, `v0` minus `dense_active` is lowest at 3M tokens: -0.500 on educational text and "
        "+0.000 on books. It ends at -0.100 and +0.400."
    )


def test_seeds_that_diverged_are_named_at_every_size(tmp_path):
    lost = {"status": "diverged"}
    rows = [*family(), finished("dense_total", 1, 9.0, "scaling", size="10m", **lost)]
    rows += [finished("dense_active", seed, 2.5 + 0.01 * seed, "large", size="150m") for seed in range(2)]
    rows += [finished("shared_64_layers_values", 0, 9.0, "large", size="150m", **lost)]
    before, large = section(tmp_path, rows).split("## 150m on more tokens")
    assert "Seeds that diverged at 10m and are in no mean: `dense_total` (1)." in before
    assert "Seeds that diverged and are in no mean: `shared_64_layers_values` (1)." in large


def test_power_is_that_of_simulated_tests():
    generator = np.random.default_rng(0)
    for seeds, distance in ((2, 4.0), (3, 2.5), (6, 1.8)):
        ours, dense = generator.normal(-distance, 1, (20_000, seeds)), generator.normal(0, 1, (20_000, seeds))
        found = (stats.ttest_ind(ours, dense, axis=1).pvalue < 0.05).mean()
        assert estimate.power_of(seeds, distance, 1.0) == pytest.approx(found, abs=0.01)


def test_seeds_needed_grow_as_the_difference_shrinks():
    needed = [estimate.seeds_needed(distance, 1.0) for distance in (60, 14, 8.6, 4.3, 2, 1, 0.5, 0.25)]
    assert needed == sorted(needed) and needed[0] == 2
    assert needed[5] == 17  # as tables of power have it for one standard deviation
    assert estimate.seeds_needed(1e-3, 1.0) is None


def test_spread_is_pooled_within_variants_and_token_files():
    rows = [finished("v0", seed, loss) for seed, loss in enumerate((3.0, 3.02))]
    rows += [finished("dense_active", seed, loss, data="second") for seed, loss in enumerate((5.0, 5.01, 5.02))]
    rows += [finished("dense_active", 0, 4.0), finished("shared_64", 0, 9.0)]  # one seed each
    rows += [finished("v0_plain", seed, 3.0 + seed, plan="ablations") for seed in (0, 1)]  # takes part in no comparison
    spread = estimate.spread_of_seeds(rows, "held_out_edu")
    assert spread.freedom == 3 and spread.deviation == pytest.approx(math.sqrt((0.0002 + 0.0002) / 3))
    assert spread.upper == pytest.approx(spread.deviation * math.sqrt(3 / stats.chi2.ppf(0.05, 3)))
    assert estimate.spread_of_seeds(rows[-4:], "held_out_edu") is None


def test_interval_of_a_difference_by_the_pooled_spread():
    losses = {"v0": [3.0, 3.02], "dense_active": [3.2, 3.21]}
    rows = [finished(name, seed, loss) for name, both in losses.items() for seed, loss in enumerate(both)]
    spread = estimate.spread_of_seeds(rows, "held_out_edu")
    bounds = stats.ttest_ind(*losses.values(), equal_var=True).confidence_interval(0.95)
    assert spread.half_width(2) == pytest.approx((bounds.high - bounds.low) / 2)


@pytest.fixture
def results(tmp_path):
    """Made-up rows of results.csv: an older one, the newest on an H100, and one of another GPU after it."""
    with (tmp_path / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "variant", "tokens_per_s", "tflops", "device", "commit", "date"])
        for speed, device in ((10, "NVIDIA H100"), (50_000, "NVIDIA H100"), (99_999, "NVIDIA H200")):
            for variant in (estimate.OURS, estimate.DENSE):
                writer.writerow([estimate.CASE, variant, speed, 400, device, "abc", "2026-11-27"])
    return tmp_path / "results.csv"


def test_estimate_is_computed_from_rows(results):
    config = REPOSITORY / "configs/1.5b.json"
    speeds = [finished(name, 0, 3.0, "speed", tokens_per_second=1000) for name in ("dense_active", "v0")]
    speeds += [finished("shared_64_layers_values", 0, 3.0, "speed", tokens_per_second=500)]
    text = "\n".join(estimate.estimate_lines([*family(), *speeds], PLANS, results, config))
    model = estimate.empty_model(yaml.safe_load(config.read_text()))
    tokens = 20 * model.parameter_counts()["active"]
    hours = tokens / 50_000 / 3600
    assert cells(text, "1.5b.json")[2:4] == ["50,000", f"{hours:,.0f}"]
    assert cells(text, "1.5b.json")[5] == f"{hours * estimate.PRICE_PER_GPU_HOUR:,.0f}"
    line = cells(text, "shared_64_layers_values")
    assert "times 0.500" in line[1] and line[2:4] == ["25,000", f"{2 * hours:,.0f}"]
    assert cells(text, "dense, equal active size")[2] == f"{400e12 / estimate.flops_per_token(model, 2048):,.0f}"
    # At 150m, the largest size with repeats: 4 variants of two seeds, 0.02 apart.
    assert "At 150m, `shared_64_layers_values` is" in text and "| 150m | 4 | 0.0141 (at most" in text
    distance = 0.12 - 0.04 * math.log10(6e8 * 80e6 / 1e16)
    line = cells(text, f"{distance:.3f}")
    seeds = estimate.seeds_needed(distance, 0.01 * math.sqrt(2))
    dense = tokens / (400e12 / estimate.flops_per_token(model, 2048)) / 3600
    assert line[1:3] == [str(seeds), f"{(seeds + 1) * (3 * hours + dense):,.0f}"]


def test_the_estimate_is_of_a_size_with_runs_at_equal_tokens(results):
    """Longer runs of a larger one have a spread of seeds, and no difference that it could take."""
    config = REPOSITORY / "configs/1.5b.json"
    rows = [row for row in family() if row["size"] == "30m"]
    rows += [finished("dense_active", seed, 3.0 + seed / 50, "large", size="150m") for seed in range(2)]
    text = " ".join(" ".join(estimate.estimate_lines(rows, PLANS, results, config)).split())
    assert "At 30m, `shared_64_layers_values` is" in text and "| 150m | 1 | 0.0141" in text and "had a rate" not in text
    rows += [finished("dense_active", 0, 5 - r, "learning_rates", learning_rate=r) for r in (1e-3, 2e-3, 4e-3)]
    text = " ".join(" ".join(estimate.estimate_lines(rows, PLANS, results, config)).split())
    assert "And `dense_active` had a rate of 0.001 there, where 0.004 is found best by now." in text


def test_the_estimate_is_of_a_size_with_repeats(results):
    """One seed of a larger size is no reason to leave the difference of several, whose number is said."""
    config = REPOSITORY / "configs/1.5b.json"
    rows = [row for row in family() if row["size"] != "150m" or row["seed"] == 0]
    rows += [finished("dense_active", seed, 3.0 + seed / 50, "large", size="150m") for seed in range(2)]
    text = " ".join(" ".join(estimate.estimate_lines(rows, PLANS, results, config)).split())
    assert "At 30m, `shared_64_layers_values` is" in text and "(2 and 2 seeds, token files first)" in text
    rows = [row for row in rows if row["size"] == "150m"]
    text = " ".join(" ".join(estimate.estimate_lines(rows, PLANS, results, config)).split())
    assert "At 150m, `shared_64_layers_values` is" in text and "(1 and 1 seeds, token files first)" in text


def test_nothing_is_estimated_from_nothing(results, tmp_path):
    config = REPOSITORY / "configs/1.5b.json"
    for rows, file in (([], results), (family(), tmp_path / "none.csv"), (at_sizes("dense_total"), results)):
        assert estimate.estimate_lines(rows, PLANS, file, config) == ["Not measured yet."]


def test_widths_at_1_5b_are_in_proportion():
    base = yaml.safe_load((PLANS / "30m.yaml").read_text())
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24}
    made = estimate.scaled_shape(shape, base, base["variants"]["shared_64_layers_values"]["config"])
    expert = made["intermediate_size"] / made["num_experts"]
    assert made["shared_expert_intermediate_size"] == expert == 5632 / 4 / 2  # active is what v0 has active
    assert made["value_embedding_layers"] == list(range(1, 24, 2))


def test_report_writes_the_estimate(tmp_path):
    (tmp_path / "evidence").mkdir()
    shutil.copy(REPOSITORY / "docs/evidence/runs.csv", tmp_path / "evidence")
    run_command("ablate", "report", "--output-dir", tmp_path / "evidence")
    text = (tmp_path / "evidence/scaling.md").read_text()
    assert (
        "US dollars, which is an assumption" in text and cells(text, "dense, equal total width")[1] == "Llama, measured"
    )
    assert "## Scaling" in (tmp_path / "evidence.md").read_text()
