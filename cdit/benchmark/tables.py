"""Tables as people and as programs read them."""

from dataclasses import dataclass

from cdit.benchmark.stopwatch import Spread
from cdit.common.tables import markdown_table

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
        table = markdown_table(columns, [[row[column] for column in columns] for row in self.rows])
        return f"### {self.title}\n\n{table}" + (f"\n{self.note}\n" if self.note else "")
