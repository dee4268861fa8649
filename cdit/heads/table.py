"""The table of heads: a row for each kind, layer, head and diffusion time."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cdit.common.statistics import Estimate
from cdit.heads.config import Kind
from cdit.heads.statistics import HeadRow

Cell = str | int | float | None

FIRST = ("correspondence lift", "correspondence share", "correspondence accuracy", "loss rise", "LPIPS rise")
"""Measures with which the table begins, where there are any: those that answer a question by themselves."""


@dataclass(frozen=True)
class HeadLine:
    """A line of the table."""

    kind: Kind
    row: HeadRow
    further: Mapping[str, Estimate] = field(default_factory=dict)
    """By measure, what does not come from attention weights, such as the importance of the head."""

    @property
    def numbers(self) -> dict[str, float]:
        """All measures by name, without intervals."""
        return self.row.numbers | {name: estimate.mean for name, estimate in self.further.items()}

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Those that have an interval."""
        found = self.row.means | self.further
        trends = {"turning slope": self.row.turning, "walking slope": self.row.walking}
        return found | {name: trend.slope for name, trend in trends.items() if trend is not None}

    @property
    def thumbnail(self) -> str:
        """File of its small picture."""
        row = self.row
        return f"thumbnails/{self.kind}_layer{row.layer:02d}_head{row.head}_t{row.time:g}.png"


def measure_names(lines: Iterable[HeadLine]) -> list[str]:
    """The measures of any line, `FIRST` first and what is moved last."""
    names = dict.fromkeys(name for line in lines for name in line.numbers)
    return sorted(names, key=lambda name: (name.startswith("moved "), name not in FIRST))


def table(lines: Sequence[HeadLine]) -> tuple[list[str], list[list[Cell]]]:
    """Columns and rows; beside each mean, the ends of its 95 % interval. None where a line has no such measure."""
    measures = measure_names(lines)
    with_interval = {name for line in lines for name, estimate in line.estimates.items() if estimate.low is not None}
    columns: list[str] = ["kind", "layer", "head", "time", "type", "reason"]
    for name in measures:
        columns += [name, f"{name} low", f"{name} high"] if name in with_interval else [name]
    rows = []
    for line in lines:
        row = line.row
        cells: list[Cell] = [line.kind, row.layer, row.head, row.time, row.type.name, row.type.reason]
        for name in measures:
            cells.append(line.numbers.get(name))
            if name in with_interval:
                estimate = line.estimates.get(name)
                cells += [None, None] if estimate is None else [estimate.low, estimate.high]
        rows.append(cells)
    return columns, rows


def series(lines: Sequence[HeadLine]) -> dict[str, float]:
    """Numbers to follow over training: per head, means over diffusion times.

    Names are `attention/layer03/head2/entropy`, those of self-attention begin with `attention/self/`. What is moved and
    single offsets stay in the table.
    """
    values: dict[str, list[float]] = {}
    for line in lines:
        place = f"attention/{'' if line.kind == 'cross' else 'self/'}layer{line.row.layer:02d}/head{line.row.head}"
        for name, value in line.numbers.items():
            if not name.startswith("moved ") and name not in ("offset rows", "offset columns"):
                values.setdefault(f"{place}/{name.replace(' ', '_')}", []).append(value)
    return {name: _mean(found) for name, found in values.items()}


def by_layer(lines: Sequence[HeadLine], kind: Kind, time: float, measure: str) -> np.ndarray:
    """A measure as (layers, heads), NaN where a head has none."""
    chosen = [line for line in lines if (line.kind, line.row.time) == (kind, time)]
    layers = len({line.row.layer for line in chosen})
    return np.array([line.numbers.get(measure, np.nan) for line in chosen]).reshape(layers, -1)


def _mean(values: Sequence[float]) -> float:
    finite = np.array(values)[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
