"""Tables of results: for each metric methods down and horizons across."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from torch import Tensor

from cdit.evaluate.methods import DIFFERENCES, METHODS
from cdit.evaluate.metrics import HIGHER_IS_BETTER


class Row(NamedTuple):
    """One number of a table."""

    method: str
    """A key of `METHODS` or `DIFFERENCES`."""
    seconds: float
    """How far ahead."""
    frames: int
    """How far ahead, in frames of the model's fps."""
    metric: str
    """Name of the metric."""
    mean: float
    """Mean over the samples; of fid and fvd, which belong to all samples together, the value."""
    values: Tensor | None = None
    """(B,) float32 on the CPU, one for each sample, in their order; fid, fvd and differences have none."""
    low: float | None = None
    """Lower end of the 95 % interval of the mean, where it is known."""
    high: float | None = None
    """Upper end."""


class Table(NamedTuple):
    """The text of a table."""

    title: str
    horizons: list[str]
    lines: list[tuple[str, list[str]]]
    """Name of the method, and its number at each horizon."""


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each metric, in the order of the rows; ± is half the width of the interval."""
    found = []
    for metric in dict.fromkeys(row.metric for row in rows):
        chosen = [row for row in rows if row.metric == metric]
        horizons = list(dict.fromkeys(row.seconds for row in chosen))
        arrow = {True: " ↑", False: " ↓", None: ""}[HIGHER_IS_BETTER.get(metric)]
        digits = {"psnr": 2, "fid": 1, "fvd": 1}.get(metric, 3)
        lines = []
        for method in dict.fromkeys(row.method for row in chosen):
            cells = {row.seconds: _cell(row, digits) for row in chosen if row.method == method}
            lines.append(((METHODS | DIFFERENCES).get(method, method), [cells[seconds] for seconds in horizons]))
        found.append(Table(metric.upper() + arrow, [f"{seconds:g} s" for seconds in horizons], lines))
    return found


def markdown_table(rows: Sequence[Row]) -> str:
    """The tables as Markdown."""
    texts = []
    for table in tables(rows):
        lines = [f"| {' | '.join([table.title, *table.horizons])} |", "|---|" + "---:|" * len(table.horizons)]
        lines += [f"| {' | '.join([name, *cells])} |" for name, cells in table.lines]
        texts.append("\n".join(lines))
    return "\n\n".join(texts) + "\n"


def html_table(rows: Sequence[Row]) -> str:
    """The tables as HTML."""
    texts = []
    for table in tables(rows):
        head = "".join(f"<th>{escape(text)}</th>" for text in (table.title, *table.horizons))
        body = "".join(
            f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>\n"
            for name, cells in table.lines
        )
        texts.append(f"<table>\n<tr>{head}</tr>\n{body}</table>")
    return "\n".join(texts) + "\n"


def _cell(row: Row, digits: int) -> str:
    text = f"{row.mean:{'+' if row.method in DIFFERENCES else ''}.{digits}f}"
    return text if row.low is None else f"{text} ± {(row.high - row.low) / 2:.{digits}f}"
