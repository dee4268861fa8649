"""Tables of results: for each metric, methods down and horizons across."""

from collections.abc import Sequence
from typing import NamedTuple

from cdit.common.statistics import Estimate
from cdit.common.tables import html_table, markdown_table
from cdit.evaluate.methods import DIFFERENCES, METHODS
from cdit.evaluate.metrics import HIGHER_IS_BETTER

NAMES = {
    "latents": "squared error of latents",
    "rank": "share of recorded frames further away than the truth",
    "right_sign": "turns in the correct direction",
    "turn": "measured / commanded turn",
}
"""Titles of metrics whose name in capitals would not say what they are."""


class Row(NamedTuple):
    """One number of a table."""

    method: str
    """A key of `METHODS` or `DIFFERENCES`, or a text for tables; that of a difference has a minus sign."""
    seconds: float
    frames: int
    """The horizon in frames of the model's fps."""
    metric: str
    mean: float
    """Mean over the samples; for fid and fvd the distance of all samples together."""
    values: list[float] | None = None
    """One for each sample, in their order; fid, fvd and differences have none."""
    low: float | None = None
    """Lower end of the 95 % interval of the mean, if there is one."""
    high: float | None = None


def digits(metric: str) -> int:
    """How many decimals tables show."""
    return {"psnr": 2, "fid": 1, "fvd": 1}.get(metric, 3)


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table for each metric, in the order of the rows; ± is half the width of the interval."""
    return "\n".join(markdown_table(*table) for table in _tables(rows))


def html(rows: Sequence[Row]) -> str:
    """The same tables as HTML."""
    return "".join(html_table(*table) for table in _tables(rows))


def _tables(rows: Sequence[Row]) -> list[tuple[list[str], list[list[str]]]]:
    found = []
    for metric in dict.fromkeys(row.metric for row in rows):
        chosen = {(row.method, row.seconds): row for row in rows if row.metric == metric}
        methods, horizons = (list(dict.fromkeys(keys)) for keys in zip(*chosen, strict=True))
        arrow = {True: " ↑", False: " ↓", None: ""}[HIGHER_IS_BETTER.get(metric)]
        columns = [NAMES.get(metric, metric.upper()) + arrow, *(f"{seconds:g} s" for seconds in horizons)]
        lines = [
            [(METHODS | DIFFERENCES).get(method, method), *(_cell(chosen[method, seconds]) for seconds in horizons)]
            for method in methods
        ]
        found.append((columns, lines))
    return found


def _cell(row: Row) -> str:
    is_difference = row.method in DIFFERENCES or " − " in row.method
    return f"{Estimate(row.mean, row.low, row.high):{'+' if is_difference else ''}.{digits(row.metric)}f}"
