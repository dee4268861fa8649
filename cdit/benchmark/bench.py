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
from cdit.diffusion import TIMESTEPS, SamplerConfig


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

    @property
    def measured_steps(self) -> int:
        """The most denoising steps of a sampling that are run."""
        return self.config.measured_steps or (TIMESTEPS if self.device.type == "cuda" else 8)

    @property
    def about_steps(self) -> str:
        """A note on what `sampling_times` did."""
        most = self.measured_steps
        return f"Of more than {most} denoising steps 1 and {most} were run, each further one added in proportion."

    def sampling_times(
        self,
        contenders: Sequence[Contender],
        call: Callable[[Contender, SamplerConfig], object],
        steps: Sequence[int] = (),
    ) -> dict[tuple[str, int], np.ndarray]:
        """Seconds (rounds,) of a call by contender and number of denoising steps; of long ones only some are run.

        Args:
            contenders: who takes part.
            call: what is timed.
            steps: numbers of steps beside each contender's default.
        """
        most = self.measured_steps
        wanted = [(c, n) for c in contenders for n in (c.sampler.steps, *steps)]
        timed = self.watch.times({
            (c.name, run): partial(call, c, replace(c.sampler, steps=run))
            for c, n in wanted
            for run in ((n,) if n <= most else (1, most))
        })  # fmt: skip

        def whole(name: str, n: int) -> np.ndarray:
            if n <= most:
                return timed[name, n]
            return timed[name, 1] + (timed[name, most] - timed[name, 1]) * (n - 1) / (most - 1)

        return {(c.name, n): whole(c.name, n) for c, n in wanted}

    def rates(
        self, contenders: Sequence[Contender], frames: int, call: Callable[[Contender, SamplerConfig], object]
    ) -> list[dict[str, Cell]]:
        """A row for each contender, at its default number of steps, of a call that predicts so many frames."""
        times = self.sampling_times(contenders, call)
        seconds = {c.name: times[c.name, c.sampler.steps] for c in contenders}
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
