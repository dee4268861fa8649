"""Results of an evaluation: means with intervals, and the values of every sample for later comparisons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cdit.common.errors import UserError
from cdit.common.files import read_json, write_json
from cdit.common.statistics import Estimate, estimates, paired_difference
from cdit.evaluate.cases import Case
from cdit.evaluate.frechet import frechet_distance
from cdit.evaluate.methods import DIFFERENCES, METHODS
from cdit.evaluate.metrics import HIGHER_IS_BETTER
from cdit.evaluate.protocols import Protocol
from cdit.evaluate.tables import Row

RESULTS = "results.json"
MAX_BYTES = 2**30
"""Largest results.json, which has a value for every sample."""
FRECHET = ("fid", "fvd")


@dataclass(frozen=True)
class ProtocolResult:
    """Results of one protocol."""

    name: str
    fps: float
    cases: list[tuple[str, int]]
    """(trajectory, time) of each sample."""
    rows: list[Row]
    """Ordered by method, then metric, then horizon; the differences between methods come last."""
    shown: list[float] = field(default_factory=list)
    """The horizons in tables; all if empty."""

    @property
    def shown_rows(self) -> list[Row]:
        """The rows of tables."""
        return [row for row in self.rows if not self.shown or row.seconds in self.shown]

    @property
    def trajectories(self) -> list[str]:
        """The trajectory of each sample."""
        return [name for name, _ in self.cases]

    def values(self, method: str, metric: str, seconds: float) -> np.ndarray:
        """(N,) float64: one number for each sample, in the order of the cases.

        Raises:
            KeyError: there are none.
        """
        for row in self.rows:
            if (row.method, row.metric, row.seconds) == (method, metric, seconds) and row.values is not None:
                return np.array(row.values)
        raise KeyError(f"{self.name}: no values of {metric} for {method} at {seconds:g} s")


@dataclass(frozen=True)
class Results:
    """The contents of results.json."""

    about: dict[str, Any]
    """Checkpoint, sampler, config and versions."""
    protocols: dict[str, ProtocolResult] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes `<folder>/results.json` atomically."""
        protocols = {
            name: {
                "fps": result.fps,
                "samples": len(result.cases),
                "trajectories": len(set(result.trajectories)),
                "cases": result.cases,
                "shown": result.shown,
                "rows": [row._asdict() for row in result.rows],
            }
            for name, result in self.protocols.items()
        }
        write_json(folder / RESULTS, {**self.about, "protocols": protocols}, indent=1)

    @classmethod
    def load(cls, folder: Path | str) -> "Results":
        """Reads what `save` wrote.

        Raises:
            UserError: there is no such file, or it has another format.
        """
        path = Path(folder) / RESULTS
        try:
            about = read_json(path, MAX_BYTES)
            protocols = {
                name: ProtocolResult(
                    name,
                    found["fps"],
                    [(trajectory, now) for trajectory, now in found["cases"]],
                    [_row(row) for row in found["rows"]],
                    found.get("shown", []),
                )
                for name, found in about.pop("protocols").items()
            }
        except Exception as error:  # any value may be of any type
            raise UserError(f"{path}: not results of cdit.evaluate ({error})") from error
        return cls(about, protocols)


def summarize(protocol: Protocol, cases: Sequence[Case], found: dict[str, Tensor], seed: int) -> ProtocolResult:
    """The means with their intervals, over trajectories, and Fréchet distances.

    `found` has `<method>/<metric>` of all cases, see `Study.compute`.
    """
    frames = [protocol.offsets[i] for i in protocol.measured]
    horizons = list(zip(protocol.seconds, frames, strict=True))
    names = [case.name for case in cases]
    rows = []
    for method in METHODS:
        for metric in (name for name in HIGHER_IS_BETTER if f"{method}/{name}" in found):
            values = found[f"{method}/{metric}"]
            if metric in FRECHET and len(cases) < 2:
                continue  # one sample has no distribution
            if metric == "fvd":  # of whole videos
                rows.append(Row(method, *max(horizons), metric, frechet_distance(found["truth/fvd"], values)))
            elif metric == "fid":
                for at, *pair in zip(horizons, found["truth/fid"].unbind(1), values.unbind(1), strict=True):
                    rows.append(Row(method, *at, metric, frechet_distance(*pair)))
            else:
                means = estimates(values.double().numpy(), names, seed)
                for at, value, mean in zip(horizons, values.unbind(1), means, strict=True):
                    rows.append(Row(method, *at, metric, mean.mean, value.tolist(), mean.low, mean.high))
    for method in DIFFERENCES:
        pair = method.split("-")
        for metric in (name for name in HIGHER_IS_BETTER if name not in FRECHET):
            if all(f"{one}/{metric}" in found for one in pair):
                values = (found[f"{one}/{metric}"].double().numpy() for one in pair)
                for at, mean in zip(horizons, paired_difference(*values, names, seed), strict=True):
                    rows.append(Row(method, *at, metric, mean.mean, None, mean.low, mean.high))
    return ProtocolResult(protocol.name, protocol.fps, [(case.name, case.now) for case in cases], rows, protocol.shown)


def difference(
    first: ProtocolResult,
    second: ProtocolResult,
    metric: str,
    seconds: float,
    methods: tuple[str, str] = ("model", "model"),
) -> Estimate:
    """The mean of the first result's metric minus the second's on the same cases, with its interval.

    Raises:
        UserError: the two are not of the same cases.
    """
    if first.cases != second.cases:
        raise UserError(f"{first.name}: the two evaluations are of different cases and cannot be compared in pairs")
    pair = (result.values(method, metric, seconds) for result, method in zip((first, second), methods, strict=True))
    return paired_difference(*pair, first.trajectories)[0]


def _row(values: dict[str, Any]) -> Row:
    row = Row(**values)
    if row.values is None:
        return row
    return row._replace(values=[math.nan if value is None else float(value) for value in row.values])
