"""What each part of the architecture gives, and the best candidate beside every control, from the rows of runs.csv."""

from complexity_deep.workflow.evidence.ablation_report import (
    EQUAL_TOKENS,
    TEXTS,
    best_of,
    by_data,
    column,
    difference,
    most_candidates,
    old_rates,
    signed,
    sizes_of,
)
from complexity_deep.workflow.evidence.claim_measures import (
    OPEN,
    Study,
    diverged,
    most_seeds,
    no_measurement,
    seeds_of_one_computation,
)
from complexity_deep.workflow.markdown_table import table

Pair = tuple[str, str, str]  # a part, a variant with it, and one without it

PARTS: tuple[Pair, ...] = (
    ("all parts of `v0`, beside dense of equal active size", "v0", "dense_active"),
    ("experts that are trained", "v0", "v0_frozen_experts"),
    ("a modulo table instead of a random one", "v0", "v0_random"),
    ("a modulo table instead of one balanced by frequency", "v0", "v0_balanced"),
    ("a random table for each layer instead of one", "v0_random_per_layer", "v0_random"),
    ("a table instead of a learned router, 4 experts", "v0", "learned_4"),
    ("the residual-scaled init instead of the published one", "v0", "v0_published_init"),
    ("mu-guided attention", "v0", "v0_no_guidance"),
    ("mu that is bounded", "v0_mu_norm", "v0"),
    ("INL dynamics", "v0", "v0_no_dynamics"),
    ("mu-guided attention and INL dynamics", "v0", "v0_plain"),
    ("mu that may override experts", "v0", "v0_no_mu_routing"),
    ("a gradient for the router by which mu overrides experts", "v0_router_gradient", "v0"),
    ("16 experts instead of 4", "experts_16", "v0"),
    ("64 experts instead of 4", "experts_64", "v0"),
    ("256 experts instead of 4", "experts_256", "v0"),
    ("a shared expert beside 4, each half as wide", "shared_4", "v0"),
    ("a shared expert beside 16, each half as wide", "shared_16", "experts_16"),
    ("a shared expert beside 64, each half as wide", "shared_64", "experts_64"),
    ("a shared expert beside 256, each half as wide", "shared_256", "experts_256"),
    ("64 experts and a shared one, each half as wide, instead of 4", "shared_64", "v0"),
    ("a random table for each layer instead of modulo", "shared_64_layers", "shared_64"),
    ("the same, beside value embeddings", "shared_64_layers_values", "shared_64_values"),
    ("value embeddings in every second layer", "shared_64_values", "shared_64"),
    ("the same, beside a table for each layer", "shared_64_layers_values", "shared_64_layers"),
    ("the same, in the dense model", "dense_active_values", "dense_active"),
    ("value embeddings in all layers, not every second", "shared_64_layers_all_values", "shared_64_layers_values"),
    ("256 experts instead of 64", "shared_256_layers_values", "shared_64_layers_values"),
    ("mu and dynamics", "shared_64_layers_values", "shared_64_layers_values_plain"),
    ("mu and dynamics instead of a wider shared expert", "shared_64_layers_values", "shared_64_layers_values_wide"),
    ("mu that is bounded, with 64 experts", "shared_64_layers_values_mu_norm", "shared_64_layers_values"),
)
CONTROLS = {
    "dense_active": "dense of equal active size",
    "dense_active_values": "dense of equal active size with value embeddings",
    "dense_total": "dense of the total size of `v0`",
    "dense_total_64": "dense of the total size of `shared_64`",
    "learned_16": "a learned router, 16 experts",
}
BETTER, WORSE = "better", "worse"


def outcome(bounds: tuple[float, float]) -> str:
    """What the interval of a difference in loss says of the first of two variants."""
    if bounds[1] < 0:
        return BETTER
    return WORSE if bounds[0] > 0 else OPEN


def pair_line(pair: Pair, study: Study, newest: str) -> list[str]:
    """Cells of a pair: what it differs in, how the loss with it differs from that without it, and how to read that.

    Token files are named where they are not the `newest`.
    """
    part, *variants = pair
    named = f"{variants[0]} minus {variants[1]}"
    data, groups = most_seeds(study, tuple(variants), lambda row: True)
    if not data:
        return [part, named, "", "", "", "", "", no_measurement(study, tuple(variants))]
    sizes = "; ".join(sizes_of(rows[0]) for rows in groups)
    left = old_rates(study.rows, data, EQUAL_TOKENS, study.base)
    now = [f" (now {left[variant][1]:g})" if variant in left else "" for variant in variants]
    rates = "; ".join(f"{rows[0]['learning_rate']:g}{found}" for rows, found in zip(groups, now))
    cells = [part, named, sizes, rates, "; ".join(str(len(rows)) for rows in groups)]
    files = [f"files {data}"] if data != newest else []
    if seeds_of_one_computation(*groups):
        return [*cells, "0", "0", "; ".join(["the same computation", *files])]
    found = [difference(column(groups[0], text), column(groups[1], text)) for text in TEXTS]
    cells += [signed(mean, bounds) for mean, bounds in found]
    if any(bounds is None for _, bounds in found):
        reading = "no interval"
    else:
        edu, books = (outcome(bounds) for _, bounds in found)
        reading = edu if edu == books else f"edu {edu}, books {books}"
    return [*cells, "; ".join([reading, *files, *diverged(study, data, tuple(variants))])]


def pair_table(title: str, pairs: list[Pair], study: Study, newest: str) -> list[str]:
    header = [title, "variants", "parameters, M (total / active)", "rates", "seeds"]
    header += ["edu, difference", "books, difference"]
    lines = [pair_line(pair, study, newest) for pair in pairs]
    return table([*header, "reading"], lines, text_columns=2)


def parts_section(rows: list[dict], base: dict) -> list[str]:
    """Lines with a table of `PARTS`, and one of the best candidate minus each control; `rows` are of one size.

    None without runs at equal tokens.
    """
    study = Study(rows, base, None)
    runs = by_data(rows, EQUAL_TOKENS)
    if not any(runs.values()):
        return []
    newest = next(reversed(runs))  # token files, by their id
    lines = [
        "## What each part gives",
        "",
        "Held-out loss at equal tokens of a variant with the part minus that of one without it, so that less than 0 is",
        "a gain. `better` or `worse`: the interval lies wholly below or above 0. `open`: it holds 0, which does not",
        "say that the part gives nothing. A part may bring parameters and another learning rate: those of the first",
        "variant stand before a semicolon, those of the second behind it. `now` is a rate that was found better since.",
        "Both variants of a line are of the token files on which both have most seeds, which are",
        f"{newest} where the reading names no others.",
        f"Intervals are at 95 %, without a correction for {len(PARTS)} lines.",
        "",
        *pair_table("part", list(PARTS), study, newest),
        "",
    ]
    data, candidates = most_candidates(runs, base["reference"], base["candidates"])
    if not candidates:
        return lines
    best = best_of(runs[data], candidates, "held_out_edu")
    return [
        *lines,
        "## The best candidate beside the controls",
        "",
        f"`{best}` has the lowest loss of the candidates at equal tokens, by which it was chosen; that makes its",
        "differences look larger than they are. They are read as those above.",
        "",
        *pair_table("control", [(title, best, control) for control, title in CONTROLS.items()], study, newest),
        "",
    ]
