"""docs/evidence.md and its pages from the rows of runs.csv: every number there is computed."""

import shutil
from collections import Counter
from pathlib import Path

from complexity_deep.workflow.command import whole_files
from complexity_deep.workflow.evidence.ablation_plan import newest_speeds, read_yaml
from complexity_deep.workflow.evidence.ablation_report import (
    EQUAL_SECONDS,
    EQUAL_TOKENS,
    below_table,
    by_data,
    draw_curves,
    draw_differences,
    draw_gaps,
    muon_section,
    old_lengths,
    repeats_section,
    stability_table,
    sweep_section,
    variant_table,
    verdict,
    whole_rates_section,
)
from complexity_deep.workflow.evidence.balance import FILE as BALANCE
from complexity_deep.workflow.evidence.claims import write_claims
from complexity_deep.workflow.evidence.estimate import write_estimate
from complexity_deep.workflow.evidence.parts import parts_section
from complexity_deep.workflow.evidence.scaling import LARGE, SIZES, scaling_section

NAMES_OF_VARIANTS = """\
How to read a name: `v0` is the published architecture with 4 experts, but for the residual-scaled init, which all
variants share. `dense_active` and `dense_total` are dense models with as many parameters as `v0` has active and in
total. `learned_4` and `learned_16` are Qwen3-MoE with 4 and 16 experts as wide as the MLP of `dense_active`, of which
a learned router chooses one. `shared_64` has 64 experts half as wide as those of `v0`, one as wide as them that every
token passes through, and no mu routing; `shared_256` has 256. Then `layers` stands for a random table of its own for
each layer instead of the token's id modulo the number of experts; `values` for value embeddings (a gated vector of the
token's id, added to its values) in every second layer and `all_values` for them in all; `plain` for no mu and no
dynamics; `wide` for the same with their parameters in the shared expert; and `mu_norm` for a mu that is bounded before
it guides attention. `v0_` and the name of a part is `v0` with that part changed: `no_guidance` and the like are
without it and its parameters, `frozen_experts` gives the experts no gradient, as the published CUDA path does,
`random` has a random table, and `router_gradient` trains the router by which mu overrides experts.
""".splitlines()
# The variants of gaps.png.
SHOWN = ("dense_active", "dense_total", "v0", "shared_64_layers_values", "shared_256_layers_values")
TEXT_OF_THE_RUNS = """\
The text of these runs is not in this repository, and no command here makes it: it was drawn from public repositories of
textbooks, documentation and old books. `prepare` takes any text instead, and `learning_rates.yaml` and `speed.yaml`
come first on another text or GPU; `whole_rates.yaml` has the last word on a rate. Losses then differ from those above;
what can be made again is the differences between variants. With text of the Hub, and files of your own that are kept
apart:

    python scripts/train_tokenizer.py --sources HuggingFaceFW/fineweb-edu:sample-10BT --vocab-size 16384 \\
        --model-max-length 1024 --output-dir runs/tokenizer
    python scripts/ablate.py prepare --tokenizer runs/tokenizer --sources HuggingFaceFW/fineweb-edu:sample-10BT \\
        --tokens 1e8 --held-out-edu 'held_out/edu/*.txt' --held-out-books 'held_out/books/*.txt'""".splitlines()


def write_pages(output: Path, rows: list[dict], recipes: str) -> str:
    """Write the page beside `output`, and the others and the figures into it, all or none; returns what they say."""
    with whole_files(output.parent) as folder:
        new = folder / output.name
        new.mkdir()
        if (output / BALANCE).exists():
            shutil.copy(output / BALANCE, new)
        written = {
            f"{output}.md": write_study(new, rows, recipes),
            f"{output}/claims.md": write_claims(new, rows, recipes),
            f"{output}/scaling.md": write_estimate(new, rows, recipes),
        }
    return "\n".join(f"{page}: {found}" for page, found in written.items())


def write_study(output: Path, rows: list[dict], recipes: str) -> str:
    """Write the figures into `output` and the page, which has its name, beside it; returns what it is made of."""
    base = read_yaml(Path(recipes, "30m.yaml"))
    name = base["reference"]
    number, studied = len(rows), [row for row in rows if row["size"] in SIZES]
    rows = [row for row in studied if row["size"] == base["size"]]
    equal_tokens, equal_seconds = by_data(rows, EQUAL_TOKENS), by_data(rows, EQUAL_SECONDS)
    speeds = newest_speeds(rows, name)
    lines = ["# Evidence", "", *verdict(rows, base, equal_tokens, equal_seconds), ""]
    lines += [
        f"Written by `python scripts/ablate.py report` from [runs.csv]({output.name}/runs.csv); the plan, which is",
        f"older than the runs, is [plan.md]({output.name}/plan.md). Losses are in nats per token. Means ± standard",
        "errors, 95 % intervals in brackets: with two seeds that of a mean reaches 12.7 standard errors to each side;",
        "seeds that diverged are named below each table. `rate` is the highest learning rate of the schedule,",
        "`shifted experts` the loss with each token sent to the next expert, `norm` the growth of the experts' norms",
        "(1 where they were not trained), and `tokens/s alone` the speed of training with nothing else on the GPU.",
        "Parameters include the tied embedding. Losses compare within one set of token files only; the newest comes",
        f"first. [scaling.md]({output.name}/scaling.md) has the spread of seeds pooled over variants.",
        f"All runs are of the study's {base['size']} shape where nothing else is said, which is wider than",
        "`configs/30m.json`; [30m.yaml](../recipes/evidence/30m.yaml) has it and says what each variant is.",
        f"[claims.md]({output.name}/claims.md) puts what the preprints claim beside what these runs say.",
        "",
        *NAMES_OF_VARIANTS,
        "",
        *parts_section(rows, base),
    ]
    for title, found, plans in (
        ("At equal tokens", equal_tokens, EQUAL_TOKENS),
        (f"At the seconds of {name}", equal_seconds, EQUAL_SECONDS),
    ):
        for data, runs in reversed(found.items()):
            reference = equal_tokens.get(data, {}).get(name, [])
            lines += [f"## {title}, token files {data}", ""]
            if plans == EQUAL_SECONDS:
                lines += [
                    f"Each has as many tokens as it trains on in the seconds that `{name}` takes at equal tokens,"
                ]
                lines += ["by speeds of runs alone on a GPU, and a whole schedule. Differences are to the latter.", ""]
            lines += [*variant_table(runs, reference, speeds), ""]
            lines += below_table(rows, data, plans, base)
            lines += old_lengths(runs, reference, speeds) if plans == EQUAL_SECONDS else []
    if equal_tokens:
        data = max(equal_tokens, key=lambda data: len(equal_tokens[data]))
        runs, reference = equal_tokens[data], equal_tokens[data].get(name, [])
        if headline := by_data(rows, ("headline",)).get(data):
            draw_curves(output / "curves.png", headline)
            lines += [f"![held-out loss against tokens, token files {data}]({output.name}/curves.png)", ""]
        if reference and len(runs) > 1:
            draw_differences(output / "differences.png", runs, reference)
            lines += [f"![differences to {name}, token files {data}]({output.name}/differences.png)", ""]
        lines += write_gaps(output, studied, base)
    lines += muon_section(rows, base)
    lines += ["## Stability", "", *stability_table(rows), "", *scaling_section(output, studied, Path(recipes))]
    for size in SIZES:
        own = [row for row in studied if row["size"] == size]
        lines += [*sweep_section(own, size), *whole_rates_section(own, size)]
    lines += repeats_section(studied)
    counted = Counter(row["status"] for row in studied)
    outcomes = ", ".join(f"{number} {status}" for status, number in sorted(counted.items()))
    places = sorted({f"{row['device']}, {row['versions']}" for row in studied if row["device"]})
    lines += ["## Runs", "", f"{len(studied)} runs: {outcomes}.", *(f"- {place}" for place in places), ""]
    lines += ["The command that makes a row again, with the names in it:", ""]
    lines += [
        "    python scripts/ablate.py run --plan recipes/evidence/PLAN.yaml --only VARIANT --seeds SEED --repeat",
        "",
    ]
    lines += ["Plans of the 10m and 150m shapes lie in folders of these names.", "", *TEXT_OF_THE_RUNS]
    (output.parent / f"{output.name}.md").write_text("\n".join(lines) + "\n")
    others = number - len(studied)
    return f"{len(studied)} runs" + (f"; {others} of other sizes are left out" if others else "")


def write_gaps(output: Path, studied: list[dict], base: dict) -> list[str]:
    """Draw gaps.png of runs at the size of `base` and of those on more tokens; returns its lines.

    Of each size it takes the token files that most of `SHOWN` were trained on, the newest of equals.
    """
    name, panels = base["reference"], {}
    for size in SIZES:
        plans, title = (("headline",), size) if size == base["size"] else (LARGE, f"{size} on more tokens")
        found = by_data([row for row in studied if row["size"] == size], plans)
        shown = {data: {v: runs[v] for v in SHOWN if v in runs} for data, runs in found.items() if name in runs}
        data = max(reversed(shown), key=lambda data: len(shown[data]), default=None)
        if data and len(shown[data]) > 1:
            panels[f"{title}, token files {data}"] = shown[data]
    if not panels:
        return []
    draw_gaps(output / "gaps.png", panels, name, SHOWN)
    return [f"![difference to {name} while training goes on]({output.name}/gaps.png)", ""]
