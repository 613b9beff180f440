"""Draw one layer of Complexity-Deep as docs/layer.svg, the picture of the README.

    python docs/draw_layer.py

Boxes and arrows are placed by hand. The picture brings its own background, light or dark as the reader's system asks.
So it can be read on any page.
"""

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 900, 690
RAILS = ((90, "residual stream x"), (675, "guidance m"), (765, "highway R"), (850, "velocity v"))
STYLE = """
svg { --page: #ffffff; --ink: #1f2328; --soft: #57606a; --box: #f3f5f8; --ours: #fff1e6; --edge: #d9480f; }
@media (prefers-color-scheme: dark) {
  svg { --page: #14191f; --ink: #e6edf3; --soft: #a3adb8; --box: #232a33; --ours: #3a2417; --edge: #ff8a4c; }
}
.page { fill: var(--page); stroke: var(--soft); stroke-opacity: .35; }
.box { fill: var(--box); stroke: var(--soft); }
.ours { fill: var(--ours); stroke: var(--edge); stroke-width: 1.5; }
.off { fill: none; stroke: var(--soft); stroke-opacity: .6; }
.on { fill: var(--edge); }
.line { fill: none; stroke: var(--ink); stroke-width: 1.6; }
.rail { fill: none; stroke: var(--ink); stroke-width: 3; }
.head { fill: var(--ink); }
text { font-family: Helvetica, Arial, "DejaVu Sans", sans-serif; font-size: 14px; }
text { fill: var(--ink); text-anchor: middle; }
.title { font-weight: bold; }
.soft { fill: var(--soft); font-size: 13px; }
.left { text-anchor: start; }
"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, lines: list[str], kind: str = "box") -> str:
    """A rounded box with centred lines of text, the first of them bold."""
    first = y + height / 2 - (len(lines) - 1) * 9.5 + 5
    words = [text(x + width / 2, first + 19 * i, line, "title" if i == 0 else "") for i, line in enumerate(lines)]
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" class="{kind}"/>' + "".join(words)


def line(*points: tuple[float, float], kind: str = "line", head: bool = True) -> str:
    """A line through the points, with a head at its end."""
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    marker = ' marker-end="url(#head)"' if head else ""
    return f'<path d="{path}" class="{kind}"{marker}/>'


def plus(x: float, y: float) -> str:
    return f'<circle cx="{x}" cy="{y}" r="12" class="box"/>' + text(x, y + 5, "+", "title")


def experts(x: float, y: float, count: int = 8, chosen: int = 2) -> str:
    """A row of small squares, one of them filled: the expert that the token is sent to."""
    kinds = ["on" if number == chosen else "off" for number in range(count)]
    squares = (
        f'<rect x="{x + 24 * i}" y="{y}" width="17" height="17" rx="3" class="{k}"/>' for i, k in enumerate(kinds)
    )
    return "".join(squares)


def drawing() -> str:
    below, above = "from the layer below", "to the layer above"
    parts = [
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="10" class="page"/>',
        # The rails: what runs from layer to layer.
        *(text(x, 32, name, "title") for x, name in RAILS),
        text(330, 32, below, "soft"),
        text(330, 672, above, "soft"),
        *(text(x, 672, name, "title") for x, name in RAILS),
        line((90, 42), (90, 650), kind="rail"),
        line((675, 42), (675, 171), (472, 171)),
        line((765, 42), (765, 434)),
        line((850, 42), (850, 322), (472, 322)),
        text(478, 161, "m", "soft left"),
        text(478, 312, "v", "soft left"),
        # Attention.
        box(170, 82, 300, 32, ["RMSNorm"]),
        line((90, 98), (168, 98)),
        line((320, 114), (320, 138)),
        box(170, 140, 300, 58, ["Mu-guided queries, keys, values", "n W + m W_mu"], "ours"),
        line((320, 198), (320, 222)),
        box(170, 224, 300, 52, ["Grouped-query attention", "QK norm, RoPE, output projection: h"]),
        line((320, 276), (320, 300)),
        # Dynamics.
        box(
            170,
            302,
            300,
            102,
            ["INL dynamics", "mu = mu_0 + W h", "v = clamp(alpha v - beta (h - mu))", "h = h + dt · gate · v"],
            "ours",
        ),
        line((470, 350), (850, 350), (850, 650)),
        line((470, 382), (675, 382), (675, 434)),
        text(478, 376, "mu", "soft left"),
        line((320, 404), (320, 432), (104, 432)),
        plus(90, 432),
        box(635, 436, 195, 71, ["Mu highway", "R = R + mu", "m = mu + 0.1 R"], "ours"),
        line((675, 507), (675, 650)),
        line((765, 507), (765, 650)),
        # Experts.
        box(170, 460, 300, 32, ["RMSNorm"]),
        line((90, 476), (168, 476)),
        line((320, 492), (320, 516)),
        box(170, 518, 300, 78, ["Token-routed MLP", "", ""], "ours"),
        experts(225, 548),
        text(320, 587, "one SwiGLU expert per token"),
        box(520, 518, 120, 78, ["Router", "table[token id],", "mu may override"], "ours"),
        line((580, 382), (580, 516)),
        line((520, 557), (472, 557)),
        line((580, 632), (580, 598)),
        text(580, 650, "token id", "title"),
        line((320, 596), (320, 624), (104, 624)),
        plus(90, 624),
    ]
    head = (
        '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="9" markerHeight="9" '
        'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 L10 5 L0 10 Z" class="head"/></marker>'
    )
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    title = "<title>One layer of Complexity-Deep</title>"
    return "\n".join([opening, title, f"<style>{STYLE}</style>", f"<defs>{head}</defs>", *parts, "</svg>", ""])


if __name__ == "__main__":
    path = Path(__file__).with_name("layer.svg")
    path.write_text(drawing(), encoding="utf-8")
    print(path)
