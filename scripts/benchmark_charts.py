"""Draw benchmarks/results.csv: five pictures, each of which answers one question.

    python scripts/benchmark_charts.py benchmarks

    near_dense.png     How near is the token-routed MLP to a dense MLP of the same active size?
    near_limit.png     How near do the kernels and the whole training step come to what the card can do?
    experts.png        What do more experts cost?
    tokens_per_s.png   How many tokens per second, beside the peers?
    users.png          How much faster than Llama is what comes without being asked for?

A picture takes the newest measurement that has all it shows, and names its device, versions and commit.
`scripts/benchmark.py` calls `draw` after every measurement. A picture whose rows were never measured is left out.
"""

import argparse
from pathlib import Path

from complexity_deep.workflow.command import ArgumentParser, InputError, needs, run_script

with needs("train"):
    from complexity_deep.workflow.benchmarks.charts import draw


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="folder of results.csv; the pictures go there")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if not (args.directory / "results.csv").is_file():
        raise InputError(f"'{args.directory}' holds no results.csv. scripts/benchmark.py writes one.")
    drawn = draw(args.directory)
    if not drawn:
        raise InputError(f"'{args.directory / 'results.csv'}' has not all rows of any picture, so none is drawn.")
    for path in drawn:
        print(path)


if __name__ == "__main__":
    run_script(main, parse_args())
