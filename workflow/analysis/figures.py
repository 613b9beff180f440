"""The figures of an analysis: each draws one PNG from the numbers, and its caption says how to read it."""

import math
import statistics
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from complexity_deep.workflow.charts import draw_expert_loads, subplots, write_figure

CHECKPOINT, UNTRAINED, NULL = "#1f6fb4", "#777777", "black"
MODELS = (("untrained", UNTRAINED, "untrained"), ("checkpoint", CHECKPOINT, "this checkpoint"))  # key, colour, label
CLASS_COLOURS = {
    "word start": "#2166ac",
    "continuation": "#7fbfe0",
    "digits": "#2ca02c",
    "punctuation": "#d62728",
    "whitespace": "#e6a700",
    "special": "#000000",
}
WIDE = (9.0, 3.6)
MATRICES = {"gate_up_proj": "gate and up projections", "down_proj": "down projections"}


def draw_figures(analysis: dict, drawn: dict, folder: Path) -> dict[str, dict[str, str]]:
    """Write every figure that the model has numbers for; returns file name -> title and caption, in reading order."""
    figures = {}
    for draw in FIGURES:
        drawing = draw(analysis, drawn)
        if drawing is None:
            continue
        figure, title, caption = drawing
        file = f"{draw.__name__}.png"
        write_figure(figure, folder / file)
        figures[file] = {"title": title, "caption": " ".join(caption.split())}
    return figures


def two_panels(**options):
    figure, axes = subplots(1, 2, figsize=WIDE, **options)
    for panel in axes:
        tidy(panel)
    return figure, axes


def tidy(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def layer_axis(axes, layers: int) -> None:
    axes.set_xlabel("layer")
    axes.set_xticks(range(0, layers, math.ceil(layers / 12)))
    axes.set_xlim(-0.05 * layers, layers - 1 + 0.05 * layers)


def from_zero(axes, values: list[list[float]], least: float) -> None:
    """Limits from 0 to a little above the largest of `values` and `least`, with room for points that lie at 0."""
    top = 1.1 * max(least, *(value for row in values for value in row))
    axes.set_ylim(-0.04 * top, top)


def plot_band(axes, rows: list[list[float]], colour: str, label: str) -> None:
    """Mean of each layer's list as a line, least to most as a band."""
    kept = [(layer, row) for layer, row in enumerate(rows) if row]
    layers, rows = [layer for layer, _ in kept], [row for _, row in kept]
    axes.plot(layers, [statistics.mean(row) for row in rows], color=colour, label=label, marker="o", ms=3.5)
    axes.fill_between(layers, list(map(min, rows)), list(map(max, rows)), color=colour, alpha=0.18, linewidth=0)


def expert_use(analysis, drawn):
    losses = {name: analysis[name]["losses"] for name in ("checkpoint", "untrained")}
    if "removed" not in losses["checkpoint"]:
        return None
    figure, panels = two_panels(sharey=True)
    names = {"intact": "as it is", "next_expert": "next\nexpert", "random": "random\nexperts", "removed": "no\nexperts"}
    for axes, (which, colour) in zip(panels, (("checkpoint", CHECKPOINT), ("untrained", UNTRAINED))):
        found = losses[which]
        heights = [statistics.mean(found[name]) if name == "random" else found[name] for name in names]
        bars = axes.bar(list(names.values()), heights, color=colour, width=0.62)
        bars[0].set(hatch="//", edgecolor="white", linewidth=0)
        axes.bar_label(bars, [f"{height:.3f}" for height in heights], padding=6, fontsize=9)
        spread = [[heights[2] - min(found["random"])], [max(found["random"]) - heights[2]]]
        axes.errorbar([2], [heights[2]], yerr=spread, color="black", capsize=4, linewidth=1)
        axes.axhline(heights[0], color="black", linewidth=0.8, linestyle=":")
        axes.set_title("this checkpoint" if which == "checkpoint" else "untrained, same config", fontsize=11)
        axes.grid(axis="x", visible=False)
    top = max(max(found["removed"], found["next_expert"], *found["random"]) for found in losses.values())
    panels[0].set(ylabel="loss (nats per token)", ylim=(0, top * 1.15))
    caption = """Loss on the text with the experts left alone, with every token sent to the expert after its own,
        with random experts of the same size in their place (mean and range of several sets) and with their output
        removed. A model that learned to use its experts gets much worse in all three; an untrained one does not
        notice. A small rise in a model whose experts are noise means that its other parts were trained together with
        that noise. It does not show that routing by token was worth it: for that, a dense model of the same size has to
        be trained."""
    return figure, "Does the model need its own experts?", caption


def noise_excess(analysis, drawn):
    figure, panels = two_panels(sharey=True)
    parts = {"expert_noise_excess": "experts", "attention_noise_excess": "attention projections"}
    if "expert_noise_excess" not in analysis["checkpoint"]:
        return None
    limit = analysis["noise_limit"]
    found = [value for key in parts for which in ("checkpoint", "untrained") for value in analysis[which][key]]
    for axes, (key, title) in zip(panels, parts.items()):
        axes.axhspan(-limit, limit, color=UNTRAINED, alpha=0.15, linewidth=0, label="where noise lies")
        for name, colour, label in MODELS:
            axes.plot(analysis[name][key], color=colour, marker="o", ms=4, label=label)
        axes.set_yscale("symlog", linthresh=10)
        axes.set_ylim(min(-10, 1.5 * min(found)), max(100, 2 * max(found)))
        layer_axis(axes, len(analysis["checkpoint"][key]))
        axes.set_title(title, fontsize=11)
    panels[0].set_ylabel("excess over noise\n(standard deviations)")
    panels[1].legend(fontsize=9)
    caption = f"""The largest singular value of each weight matrix against the one that independent random entries of
        the same size and rms have, in standard deviations of the Tracy-Widom law, combined over a layer's matrices.
        Untrained matrices lie in the grey band (within {limit:g}; a single one leaves it less than once in a
        million) whatever their scale; training leaves directions far above it. The verdict rests on the left panel;
        the right one tells whether the rest of the model was trained. It says that something was learned, not that
        it is good. Weights that are random but not independent (orthogonal initialisation, say) fall outside the law
        as well, below the band."""
    return figure, "Are the weights more than noise?", caption


def expert_norms(analysis, drawn):
    if "gate_up_proj_norm" not in analysis["checkpoint"]:
        return None
    figure, panels = two_panels()
    for axes, (key, title) in zip(panels, MATRICES.items()):
        for which, colour, label in MODELS:
            plot_band(axes, analysis[which][f"{key}_norm"], colour, label)
        start = analysis["initial_norms"][key]
        axes.axhline(start["norm"], color=NULL, linestyle="--", linewidth=1, label=f"initial: {start['norm']:.4g}")
        axes.set_title(title, fontsize=11)
        axes.set_ylim(bottom=0)
        layer_axis(axes, len(analysis["checkpoint"][f"{key}_norm"]))
        axes.legend(fontsize=9)
    panels[0].set_ylabel("norm of one expert")
    start = analysis["initial_norms"]["gate_up_proj"]
    caption = f"""Frobenius norm of the experts' matrices, mean of a layer and range over its experts. Before
        training it is the standard deviation of the initializer times the square root of the number of entries
        (dashed), the same in every layer to within {start["sd"] / start["norm"]:.2%}. A norm that sits on the dashed
        line in every layer was not trained; one that left it was trained, or only shrunk by weight decay, which the
        figure above tells apart."""
    return figure, "Norms of the experts' weights", caption


def draw_similarity(analysis, key: str):
    figure, panels = two_panels()
    for axes, (matrix, title) in zip(panels, MATRICES.items()):
        name = f"{matrix}_{key}"
        for which, colour, label in MODELS:
            plot_band(axes, analysis[which][name], colour, label)
        axes.set_title(title, fontsize=11)
        layer_axis(axes, len(analysis["checkpoint"][name]))
    panels[0].set_ylabel("cosine between two experts")
    panels[1].legend(fontsize=9)
    return figure, panels


def weight_similarity(analysis, drawn):
    if "gate_up_proj_cosine" not in analysis["checkpoint"]:
        return None
    figure, panels = draw_similarity(analysis, "cosine")
    for axes, matrix in zip(panels, MATRICES):
        deviation = 1 / math.sqrt(analysis["initial_norms"][matrix]["numel"])
        for sign in (-2, 2):
            axes.axhline(
                sign * deviation, color=NULL, linestyle="--", linewidth=1, label="independent" if sign > 0 else None
            )
    panels[1].legend(fontsize=9)
    caption = """Cosine similarity between the weights of every two experts of a layer: mean and range over the
        pairs. Pairs of independent random matrices lie between the dashed lines 95 % of the time. Cosines near zero
        are what random initialisation gives and also what training gives, so they show neither that experts
        specialised nor that they were left untrained. Only values far from zero say something: experts that share a
        direction."""
    return figure, "Similarity of the experts' weights", caption


def gradient_similarity(analysis, drawn):
    if "gate_up_proj_gradient_cosine" not in analysis["checkpoint"]:
        return None
    figure, _ = draw_similarity(analysis, "gradient_cosine")
    caption = """The same for the gradient of the loss on this text. An untrained model gives cosines near zero here,
        too, because each expert's gradient passes through its own random matrices; they scatter more than those of
        weights, since a gradient has few directions. So values near zero do not show that experts learn different
        things. Positive ones mean that the text now pushes two experts the same way. It is the gradient that this
        text would give now; it does not tell whether the experts received any in training."""
    return figure, "Similarity of the experts' gradients", caption


def tokens_per_expert(analysis, drawn):
    loads = analysis["checkpoint"].get("tokens_per_expert")
    if loads is None:
        return None
    figure, relative = draw_expert_loads(loads)
    least, worst = (f"{value:.2f}" for value in (relative.max(1).min(), relative.max()))
    worst = (
        f"{worst} times the mean" if least == worst else f"{least} to {worst} times the mean, depending on the layer"
    )
    caption = f"""Tokens of the text that each expert receives; the colour is the load against an even one. The
        fullest expert has {worst}. Layers are equal unless mu re-routes tokens or each has a table of its own. The load
        follows from the routing table and the frequencies of words, so it looks the same before training and is no
        sign of learning; it matters for speed and for how much text each expert sees."""
    return figure, "Tokens per expert", caption


def rerouted_tokens(analysis, drawn):
    if "rerouted_share" not in analysis["checkpoint"]:
        return None
    figure, axes = subplots(figsize=(WIDE[0], 3.0))
    tidy(axes)
    shares = {name: analysis[name]["rerouted_share"] for name in ("untrained", "checkpoint")}
    for name, colour, label in MODELS:
        axes.plot([100 * share for share in shares[name]], color=colour, marker="o", ms=4, label=label)
    axes.set_ylabel("tokens re-routed (%)")
    from_zero(axes, [[100 * share for share in row] for row in shares.values()], least=1.0)
    layer_axis(axes, len(shares["checkpoint"]))
    axes.legend(fontsize=9)
    caption = """Share of tokens that mu sent to another expert than the one of their id. The published code never
        trains the mu router, so a share near 0 is the rule, and the experts are a function of the token id alone. A
        share above 0 shows that context takes part in routing, not that the other expert was the better one."""
    return figure, "Tokens re-routed by mu", caption


def mu_contribution(analysis, drawn):
    found = analysis["checkpoint"].get("mu_contribution")
    if found is None or all(value is None for value in found["q"]):
        return None
    figure, panels = subplots(1, 3, figsize=(WIDE[0], 3.2), sharey=True)
    for axes, (letter, title) in zip(panels, (("q", "queries"), ("k", "keys"), ("v", "values"))):
        tidy(axes)
        for name, colour, label in MODELS:
            values = [math.nan if value is None else value for value in analysis[name]["mu_contribution"][letter]]
            axes.plot(values, color=colour, marker="o", ms=4, label=label)
        axes.set_title(title, fontsize=11)
        layer_axis(axes, len(values))
    shares = [
        [v for v in row if v is not None]
        for name in ("checkpoint", "untrained")
        for row in analysis[name]["mu_contribution"].values()
    ]
    from_zero(panels[0], shares, least=0.01)
    panels[0].set_ylabel("rms(mu W_mu) / rms(x W)")
    panels[2].legend(fontsize=9)
    caption = """How large the guidance from mu of the layer below is beside the layer's own projection, root mean
        square over tokens and channels, before the query and key norms. Layer 0 has no layer below. mu is 0 in a new
        model, so the untrained line lies at 0. A large share shows that the trained model uses the path, not that
        the model is better for having it."""
    return figure, "What mu adds to queries, keys and values", caption


def velocity(analysis, drawn):
    if "velocity_rms_quantiles" not in analysis["checkpoint"]:
        return None
    figure, panels = two_panels()
    quantiles = analysis["checkpoint"]["velocity_rms_quantiles"]
    layers = range(len(quantiles))
    low, lower, median, upper, high = zip(*quantiles)
    axes = panels[0]
    axes.fill_between(layers, low, high, color=CHECKPOINT, alpha=0.15, linewidth=0, label="5 to 95 % of tokens")
    axes.fill_between(layers, lower, upper, color=CHECKPOINT, alpha=0.3, linewidth=0, label="middle half")
    for index, token in enumerate(analysis["checkpoint"]["velocity_rms_tokens"]):
        axes.plot(token, color=CHECKPOINT, linewidth=0.5, alpha=0.7, label="single tokens" if index == 0 else None)
    axes.plot(median, color=CHECKPOINT, marker="o", ms=4, label="median")
    axes.plot(
        [row[2] for row in analysis["untrained"]["velocity_rms_quantiles"]],
        color=UNTRAINED,
        marker="o",
        ms=4,
        label="untrained, median",
    )
    axes.set(ylabel="rms velocity of a token", yscale="log")
    axes.legend(fontsize=8)
    for name, colour, label in MODELS:
        panels[1].plot(
            [100 * share for share in analysis[name]["velocity_clamped_share"]],
            color=colour,
            marker="o",
            ms=4,
            label=label,
        )
    panels[1].set(ylabel="velocities at the limit of 10 (%)")
    shares = [
        [100 * share for share in analysis[name]["velocity_clamped_share"]] for name in ("checkpoint", "untrained")
    ]
    from_zero(panels[1], shares, least=1.0)
    panels[1].legend(fontsize=9)
    for axes in panels:
        layer_axis(axes, len(quantiles))
    caption = """Left: how the velocity of the dynamics grows with depth, root mean square over channels of each
        token. Right: the share of velocities that the clamp holds at 10, where no gradient passes; more than a few
        percent means that the dynamics run into the wall. The figure describes what the model computes; whether the
        dynamics help is seen only by training without them."""
    return figure, "Velocity over depth", caption


def expert_tsne(analysis, drawn):
    if "checkpoint" not in drawn:
        return None
    layers, experts = list(drawn["checkpoint"]), analysis["config"]["num_experts"]
    palette = colormaps["Dark2"] if experts <= 8 else colormaps["turbo"].resampled(experts)
    figure = Figure(figsize=(12, 2.9 * len(layers) + 1.6), layout="constrained")
    halves = figure.subfigures(1, 2, wspace=0.03)
    for half, (name, title) in zip(halves, (("checkpoint", "this checkpoint"), ("untrained", "untrained"))):
        grid = half.subplots(len(layers), 2, squeeze=False)
        half.suptitle(title, fontsize=13)
        for row, layer in zip(grid, layers):
            found = drawn[name][layer]
            colours = {
                "expert": [palette(int(expert)) for expert in found["experts"]],
                "class": [CLASS_COLOURS[token_class] for token_class in drawn["classes"]],
            }
            for axes, what in zip(row, colours):
                axes.scatter(*found["points"].T, c=colours[what], s=6, linewidths=0)
                axes.set(xticks=[], yticks=[])
                same, chance = found["neighbours"][f"same_{what}"], found["neighbours"][f"same_{what}_by_chance"]
                axes.set_title(f"same {what} {same:.0%} (chance {chance:.0%})", fontsize=9.5)
            row[0].set_ylabel(f"layer {layer}", fontsize=11)

    def dots(labels: dict) -> list:
        return [Line2D([], [], marker="o", ls="", color=colour, label=label) for label, colour in labels.items()]

    present = {name: colour for name, colour in CLASS_COLOURS.items() if name in drawn["classes"]}
    style = {"fontsize": 9.5, "frameon": False, "title_fontsize": 9.5}
    for half in halves:
        half.legend(handles=dots(present), title="right: token class", loc="outside lower right", ncols=2, **style)
        if experts <= 8:
            numbers = {str(expert): palette(expert) for expert in range(experts)}
            half.legend(handles=dots(numbers), title="left: expert", loc="outside lower left", ncols=2, **style)
    caption = f"""Outputs of the experts for {len(drawn["classes"]):,} different tokens, laid out by t-SNE and
        coloured by expert (left) and by token class (right). The numbers above the panels do not depend on the
        layout: of the ten nearest outputs, how many belong to the same expert, or to a token of the same class, and
        how many would by chance. Clusters by expert appear in an untrained model too, since different random
        matrices send tokens to different places; what counts is the difference from the untrained panels. Distances
        between clusters and their sizes mean nothing in t-SNE, and clusters do not show that the experts do
        different work."""
    return figure, "Expert outputs by expert and by token class", caption


FIGURES = (  # in reading order
    expert_use,
    noise_excess,
    expert_norms,
    weight_similarity,
    gradient_similarity,
    expert_tsne,
    tokens_per_expert,
    rerouted_tokens,
    mu_contribution,
    velocity,
)
