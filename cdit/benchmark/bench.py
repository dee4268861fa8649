"""What all modes share: the config, the device, the stopwatch, and what came of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from cdit.benchmark.config import BenchmarkConfig
from cdit.benchmark.contenders import CONTENDERS, Contender
from cdit.benchmark.stopwatch import Call, Spread, Stopwatch
from cdit.benchmark.tables import Cell, Table


@dataclass
class Bench:
    """A benchmark under way."""

    config: BenchmarkConfig
    device: torch.device
    figures: dict[str, Figure] = field(default_factory=dict)
    """Plots by name."""

    @property
    def watch(self) -> Stopwatch:
        """For calls on the device."""
        return Stopwatch(self.device, self.config.rounds, self.config.min_seconds)

    def contender(self, name: str, **changes: Any) -> Contender:
        """A contender with new weights, some fields of the config changed."""
        return CONTENDERS[name](replace(self.config, **changes), self.device)

    def contenders(self, **changes: Any) -> list[Contender]:
        """All that take part."""
        return [self.contender(name, **changes) for name in self.config.contenders]

    def compare(self, case: str, alternatives: Mapping[str, Call]) -> dict[str, Cell]:
        """A row: the case, milliseconds of each alternative, and the ratios of the others to the first."""
        seconds = self.watch.times(alternatives)
        first, *others = seconds
        row: dict[str, Cell] = {"": case}
        row |= {f"{name} [ms]": float(1000 * np.median(values)) for name, values in seconds.items()}
        return row | {f"{name} / {first}": Spread.of(seconds[name] / seconds[first]) for name in others}

    def rates(
        self, contenders: Sequence[Contender], frames: int, call: Callable[[Contender], object]
    ) -> list[dict[str, Cell]]:
        """A row for each contender, at its default number of steps, of a call that predicts so many frames."""
        seconds = self.watch.times({c.name: partial(call, c) for c in contenders})
        first = seconds[contenders[0].name]
        return [
            {
                "": c.name,
                "steps": c.sampler.steps,
                "frames/s": float(frames / np.median(seconds[c.name])),
                "time / that of the first": Spread.of(seconds[c.name] / first),
            }
            for c in contenders
        ]


Mode = Callable[[Bench], Iterator[Table]]
