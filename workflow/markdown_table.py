"""Tables in Markdown."""

from collections.abc import Iterable


def as_text(value) -> str:
    """A value of a run's summary as a cell of a table."""
    if isinstance(value, dict):
        return "; ".join(f"{name.replace('_', ' ')} {as_text(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(as_text, value))
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(header: list[str], rows: Iterable[list[str]], text_columns: int = 1) -> list[str]:
    """The lines of a table; its first `text_columns` are text, the others are numbers and stand to the right."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    # A cell may be a file's name, which may have the sign that ends a cell.
    lines = ([cell.replace("|", "\\|") for cell in cells] for cells in (header, rule, *rows))
    return [f"| {' | '.join(cells)} |" for cells in lines]
