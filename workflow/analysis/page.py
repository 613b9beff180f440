"""The page of an analysis: one HTML file with every figure inside, for a light or a dark screen."""

import base64
from pathlib import Path

from jinja2 import Environment, StrictUndefined

# Green, amber, red and grey that can be read on white and on the dark card.
MARKS = {
    "TRAINED": "#2e9a55",
    "PARTLY TRAINED": "#c98a10",
    "NOT TRAINED": "#d9534a",
    "FRESHLY INITIALISED": "#d9534a",
    "NO EXPERTS": "#7d848c",
}
LOSSES = {
    "intact": "as it is",
    "next_expert": "every token to the next expert",
    "random": "random experts",
    "removed": "no experts",
}
COUNTS = {"total": "parameters", "trained": "that a gradient can reach", "active": "active for one token"}


def write_page(analysis: dict, folder: Path) -> None:
    """Write analysis.html from the numbers and the PNGs in `folder`."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8"))
    page = template.render(
        name=Path(str(analysis["model"])).name,
        analysis=analysis,
        mark=MARKS[analysis["verdict"]["label"]],
        losses=LOSSES,
        figures=[
            {**words, "picture": base64.b64encode((folder / file).read_bytes()).decode()}
            for file, words in analysis["figures"].items()
        ],
        facts={
            **{COUNTS[name]: f"{count:,}" for name, count in analysis["parameters"].items()},
            **analysis["config"],
            "seed": analysis["seed"],
            "device": analysis["device"],
            **analysis["versions"],
            "time": f"{analysis['seconds']} s",
        },
    )
    (folder / "analysis.html").write_text(page, encoding="utf-8")
