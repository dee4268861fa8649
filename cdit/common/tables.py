"""Tables written as Markdown, HTML and CSV."""

import csv
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

Cell = object
"""Anything with a `str`; floats are shown with four significant digits, None and NaN as a dash."""


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], left: int = 1) -> str:
    """A Markdown table that ends in a newline; the first `left` columns are aligned left, the others right."""
    rule = ["---" if i < left else "---:" for i in range(len(columns))]
    lines = [[_text(cell).replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    lines.insert(1, rule)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def html_table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """An HTML table without style or attributes; the first cell of each row is its header."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{escape(_text(first))}</th>{''.join(f'<td>{escape(_text(cell))}</td>' for cell in cells)}</tr>\n"
        for first, *cells in rows
    )
    return f"<table>\n<tr>{head}</tr>\n{body}</table>\n"


def write_csv(path: Path | str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Writes a CSV file in UTF-8 with all digits of floats; None becomes an empty cell."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def _text(cell: Cell) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
