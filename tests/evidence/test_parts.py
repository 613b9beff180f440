"""The table of what each part gives, and that of the best candidate beside the controls."""

import pytest
import yaml

from ablation_rows import PLANS, finished
from complexity_deep.workflow.evidence.parts import CONTROLS, PARTS, parts_section

BASE = yaml.safe_load((PLANS / "30m.yaml").read_text())


def runs(variant, edu, seeds=3, **changes):
    """Runs around a loss on both texts, 0.001 apart from seed to seed."""
    return [finished(variant, seed, edu + 0.001 * (seed - 1), **changes) for seed in range(seeds)]


def line_of(rows, variants):
    lines = [line for line in parts_section(rows, BASE) if f"| {variants} |" in line]
    return lines[-1].strip("| ").split(" | ")


@pytest.mark.parametrize(("loss", "reading"), [(3.3, "better"), (3.1, "worse"), (3.2002, "open")])
def test_a_part_is_read_by_its_interval(loss, reading):
    found = line_of(runs("v0", 3.2) + runs("v0_random", loss), "v0 minus v0_random")
    assert found[-1] == reading
    # Welch with equal spreads of 0.001 and 3 seeds each: 2.776 x 0.001 x sqrt(2 / 3) = 0.0023.
    assert found[-2] == found[-3] and (reading != "better" or found[-2] == "-0.100 [-0.102, -0.098]")


def test_texts_that_disagree_are_named():
    other = [row | {"held_out_books": 4.2 + 0.001 * row["seed"]} for row in runs("v0_random", 3.3)]
    assert line_of(runs("v0", 3.2) + other, "v0 minus v0_random")[-1] == "edu better, books open"


def test_parameters_and_rates_stand_beside_a_part():
    rows = runs("v0", 3.2, active_parameters=2e6) + runs("v0_no_guidance", 3.3, 1, learning_rate=2e-3)
    found = line_of(rows, "v0 minus v0_no_guidance")
    assert found[2:5] == ["2.0 / 2.0; 2.0 / 1.0", "0.001; 0.002", "3; 1"]
    assert found[5:] == ["-0.099", "-0.099", "no interval"]


def test_what_is_not_measured_and_what_is_one_computation_say_so():
    rows = runs("v0", 3.2) + runs("v0_no_mu_routing", 3.2, 1)
    assert line_of(rows, "v0 minus v0_no_mu_routing")[-3:] == ["0", "0", "the same computation"]
    assert line_of(rows, "v0 minus v0_random")[-1] == "not measured yet"
    assert parts_section([], BASE) == []


def test_seeds_that_diverged_stand_beside_the_reading():
    rows = runs("v0", 3.2) + runs("v0_random", 3.3) + [finished("v0_random", 3, 9.0, status="diverged")]
    assert line_of(rows, "v0 minus v0_random")[-1] == "better; 1 seed of v0_random diverged"


def test_token_files_that_are_not_the_newest_stand_beside_the_reading():
    """A difference of lost files, at old rates perhaps, may be the only one with several seeds."""
    rows = runs("v0", 3.2) + runs("v0_random", 3.3) + runs("v0", 3.2, data="second")
    assert line_of(rows, "v0 minus v0_random")[-1] == "better; files first"
    assert "second where the reading names no others." in parts_section(rows, BASE)
    rows += runs("v0_random", 3.1, data="second")
    assert line_of(rows, "v0 minus v0_random")[-1] == "worse"


def test_the_best_candidate_stands_beside_every_control_of_the_plan():
    rows = runs("dense_active", 3.2) + runs("shared_64", 3.0) + runs("shared_64_values", 2.9)
    text = "\n".join(parts_section(rows, BASE))
    assert "`shared_64_values` has the lowest loss" in text
    assert all(f"| shared_64_values minus {control} |" in text for control in CONTROLS)
    assert line_of(rows, "shared_64_values minus dense_total_64")[-1] == "not measured yet"


def test_every_name_is_a_variant_and_every_candidate_is_in_a_pair():
    names = {name for _, *pair in PARTS for name in pair}
    assert names | set(CONTROLS) <= BASE["variants"].keys()
    assert set(BASE["candidates"]) <= names
