"""Tables in Markdown."""

from collections.abc import Iterable


def table(header: list[str], rows: Iterable[list[str]], text_columns: int = 1) -> list[str]:
    """The lines of a table; its first `text_columns` are text, the others are numbers and stand to the right."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    # A cell may be a file's name, which may have the sign that ends a cell.
    lines = ([cell.replace("|", "\\|") for cell in cells] for cells in (header, rule, *rows))
    return [f"| {' | '.join(cells)} |" for cells in lines]
