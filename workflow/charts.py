"""Figures that are written to a file; they need no display."""

import math
from pathlib import Path

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure


def subplots(rows: int = 1, columns: int = 1, figsize: tuple[float, float] = (7, 4.2), **options):
    """A figure and its axes, as `pyplot.subplots` gives them, without pyplot's state and its choice of a display."""
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def write_figure(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)


def draw_expert_loads(tokens, title: str = "") -> tuple[Figure, np.ndarray]:
    """A map of how many `tokens` [layers, experts] each expert gets, and the loads, 1 where all get as many.

    Up to 16 experts in a layer, the counts are written into the map.
    """
    tokens = np.asarray(tokens, dtype=np.float64)
    layers, experts = tokens.shape
    figure, axes = subplots(figsize=(9, min(8.0, 1.5 + 0.36 * layers)))
    axes.set_title(title)
    loads = tokens / tokens.mean(1, keepdims=True)
    norm = TwoSlopeNorm(vcenter=1, vmin=0, vmax=max(2.0, loads.max()))
    image = axes.imshow(loads, cmap="PuOr_r", norm=norm, aspect="auto")
    if experts <= 16:
        for (layer, expert), count in np.ndenumerate(tokens):
            colour = "white" if abs(norm(loads[layer, expert]) - 0.5) > 0.35 else "black"
            axes.text(expert, layer, f"{count:,.0f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(experts))
    axes.set_yticks(range(0, layers, math.ceil(layers / 12)))
    axes.set(xlabel="expert", ylabel="layer")
    figure.colorbar(image, ax=axes, label="load (1 = even)")
    return figure, loads
