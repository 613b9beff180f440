"""Figures that are written to a file; they need no display."""

from pathlib import Path

from matplotlib.figure import Figure


def subplots(rows: int = 1, columns: int = 1, figsize: tuple[float, float] = (7, 4.2), **options):
    """A figure and its axes, as `pyplot.subplots` gives them, without pyplot's state and its choice of a display."""
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def write_figure(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
