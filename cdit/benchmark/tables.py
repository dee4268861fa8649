"""Tables as people and as programs read them."""

from dataclasses import dataclass

from cdit.benchmark.stopwatch import Spread

Cell = str | float | int | Spread | None
"""None where there is nothing to say."""


@dataclass
class Table:
    """Rows of named cells; all have the columns of the first, which names its row."""

    title: str
    rows: list[dict[str, Cell]]
    note: str = ""
    """What a reader has to know to read it rightly."""

    def __str__(self) -> str:
        """As Markdown."""
        columns = list(self.rows[0])
        lines = [f"### {self.title}", ""]
        for cells in (columns, ["---", *["---:"] * (len(columns) - 1)]):
            lines.append(f"| {' | '.join(cells)} |")
        lines += [f"| {' | '.join(_text(row[column]) for column in columns)} |" for row in self.rows]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])


def _text(cell: Cell) -> str:
    if cell is None:
        return "–"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
