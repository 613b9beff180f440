"""The page of scripts/analyze.py: one HTML file with every figure inside, for a light or a dark screen."""

import base64
import statistics
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5b6068; --page: #fbfbfa; --card: #fff; --line: #dcdcd8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e6; --soft: #a6a9ae; --page: #16181b; --card: #202327; --line: #3a3e44; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
p { margin: .6rem 0; }
.soft { color: var(--soft); }
section, .verdict { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; margin: 1.2rem 0;
  padding: 1rem 1.2rem; }
.verdict { border-left: .5rem solid var(--mark); }
.verdict strong { font-size: 1.25rem; color: var(--mark); }
img { display: block; width: 100%; height: auto; background: #fff; border-radius: .3rem; }
@media (prefers-color-scheme: dark) { img { filter: invert(.87) hue-rotate(180deg); } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
"""
# Green, amber, red and grey that can be read on white and on the dark card.
MARKS = {
    "TRAINED": "#2e9a55",
    "PARTLY TRAINED": "#c98a10",
    "NOT TRAINED": "#d9534a",
    "FRESHLY INITIALISED": "#d9534a",
    "NO EXPERTS": "#7d848c",
}


def write_page(analysis: dict, folder: Path) -> None:
    """Write analysis.html from the numbers and the PNGs in `folder`."""
    verdict = analysis["verdict"]
    text = escape(", ".join(analysis["text"]))
    parts = [
        f"<h1>{escape(str(analysis['model']))}</h1>",
        f'<p class="soft">Measured on {analysis["tokens"]:,} tokens of {text}, in rows of {analysis["row_length"]}, '
        f"beside an untrained model of the same config.</p>",
        f'<div class="verdict" style="--mark: {MARKS[verdict["label"]]}"><strong>{verdict["label"]}</strong>'
        f"<p>{escape(verdict['text'])}</p></div>",
        *(f'<p class="soft">{escape(sentence)}</p>' for sentence in analysis["not_measured"]),
        f"<section><h2>Loss in nats per token</h2>{loss_table(analysis)}</section>",
    ]
    for file, words in analysis["figures"].items():
        picture = base64.b64encode((folder / file).read_bytes()).decode()
        parts.append(
            f"<section><h2>{escape(words['title'])}</h2>"
            f'<img src="data:image/png;base64,{picture}" alt="{escape(words["title"])}">'
            f"<p>{escape(words['caption'])}</p></section>"
        )
    parts.append(f"<section><h2>The model and the measurement</h2>{fact_table(analysis)}</section>")
    title = f"Analysis of {escape(Path(str(analysis['model'])).name)}"
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n<body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )
    (folder / "analysis.html").write_text(page, encoding="utf-8")


def loss_table(analysis: dict) -> str:
    names = {
        "intact": "as it is",
        "next_expert": "every token to the next expert",
        "random": "random experts",
        "removed": "no experts",
    }
    rows = ['<tr><th></th><th class="number">this checkpoint</th><th class="number">untrained</th></tr>']
    for name, label in names.items():
        if name not in analysis["checkpoint"]["losses"]:
            continue
        cells = ""
        for which in ("checkpoint", "untrained"):
            value = analysis[which]["losses"][name]
            if name == "random":
                text = f"{statistics.mean(value):.4f} ({min(value):.4f} to {max(value):.4f})"
            else:
                text = f"{value:.4f}"
            cells += f'<td class="number">{text}</td>'
        rows.append(f"<tr><td>{label}</td>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def fact_table(analysis: dict) -> str:
    names = {"total": "parameters", "trained": "that a gradient can reach", "active": "active for one token"}
    facts = {names[name]: f"{count:,}" for name, count in analysis["parameters"].items()}
    facts |= analysis["config"]
    facts |= {"seed": analysis["seed"], "device": analysis["device"], **analysis["versions"]}
    facts["time"] = f"{analysis['seconds']} s"
    rows = (f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in facts.items())
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'
