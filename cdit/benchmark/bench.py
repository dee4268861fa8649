"""What all modes share: config, device, comparisons and results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cdit.batch import EncodedBatch
from cdit.benchmark.config import BenchmarkConfig, ModeName
from cdit.benchmark.contenders import CONTENDERS, Contender, random_batch
from cdit.benchmark.measure import Call, Row, Spread, Stopwatch, Table, machine, median
from cdit.common.files import write_json
from cdit.common.output import finished_folder
from cdit.diffusion.config import TIMESTEPS, SamplerConfig
from cdit.loading import find_device

MODULES: dict[str, str] = {
    "training": "train profile",
    "sampling": "sample rollout plan frames",
    "scale": "scale",
    "loading": "data latents",
    "choices": "attention context probes",
}
"""Modules of this package, and the modes in each: generators of tables from a `Bench`."""
MODES: dict[ModeName, str] = {mode: module for module, modes in MODULES.items() for mode in modes.split()}


@dataclass
class Bench:
    """A running benchmark."""

    config: BenchmarkConfig
    figures: dict[str, Image.Image] = field(default_factory=dict)

    def run(self) -> None:
        """Runs the modes, prints their tables, and writes results.json, tables.md and a PNG of every plot to `out`."""
        config, tables = self.config, []
        size = "×".join(map(str, (config.channels, *config.image_size)))
        about = f"{machine(self.device)}; CDiT-{config.model.preset}/{config.model.patch_size} on {size}"
        print(f"{about}\n")
        for name in config.modes:
            for table in getattr(import_module(f"cdit.benchmark.{MODES[name]}"), name)(self):
                print(table, flush=True)
                tables.append(table)
        if config.out is not None:
            with finished_folder(Path(config.out)) as folder:
                values = {"machine": about, "config": asdict(config), "tables": [asdict(table) for table in tables]}
                write_json(folder / "results.json", values, indent=1)
                (folder / "tables.md").write_text("\n".join([f"{about}\n", *map(str, tables)]))
                for name, figure in self.figures.items():
                    figure.save(folder / f"{name}.png")

    @cached_property
    def device(self) -> torch.device:
        """The device of the calls."""
        return find_device(self.config.device)

    @property
    def watch(self) -> Stopwatch:
        """A stopwatch for calls on the device."""
        return Stopwatch(self.device, self.config.rounds, self.config.min_seconds)

    def contender(self, name: str, **changes: Any) -> Contender:
        """A contender with new weights, some fields of the config changed."""
        return CONTENDERS[name](replace(self.config, **changes), self.device)

    def contenders(self, **changes: Any) -> list[Contender]:
        """All contenders of the config."""
        return [self.contender(name, **changes) for name in self.config.contenders]

    def batch(self, contexts: int | None = None, goals: int | None = None, past: int | None = None) -> EncodedBatch:
        """A random batch on the device, by default of the config's sizes."""
        return random_batch(self.config, self.device, contexts, goals, past)

    def compare(self, case: str, alternatives: Mapping[str, Call]) -> Row:
        """A row: the case, milliseconds of each alternative, and the ratios of the others to the first."""
        seconds = self.watch.times(alternatives)
        first, *others = seconds
        row: Row = {"": case, **{f"{name} [ms]": 1000 * median(values) for name, values in seconds.items()}}
        return row | {f"{name} / {first}": Spread.of(seconds[name] / seconds[first]) for name in others}

    @property
    def measured_steps(self) -> int:
        """The largest number of denoising steps that is run."""
        return self.config.measured_steps or (TIMESTEPS if self.device.type == "cuda" else 8)

    @property
    def about_steps(self) -> str:
        """A note on what `sampling_times` did."""
        most = self.measured_steps
        return f"Times of more than {most} denoising steps are extrapolated from 1 and {most}."

    def sampling_times(
        self,
        contenders: Sequence[Contender],
        call: Callable[[Contender, SamplerConfig], object],
        steps: Sequence[int] = (),
    ) -> dict[tuple[str, int], np.ndarray]:
        """Seconds (rounds,) of a call by contender and number of denoising steps: its default and `steps`.

        Those of more than `measured_steps` are extrapolated.
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
        self, title: str, contenders: Sequence[Contender], frames: int, call: Callable[[Contender, SamplerConfig], Any]
    ) -> Table:
        """Frames per second of a call that predicts this many frames, at each contender's default number of steps."""
        times = self.sampling_times(contenders, call)
        first = times[contenders[0].name, contenders[0].sampler.steps]
        rows: list[Row] = []
        for c in contenders:
            seconds = times[c.name, c.sampler.steps]
            row = {"": c.name, "steps": c.sampler.steps, "frames/s": frames / median(seconds)}
            rows.append(row | {"time / first": Spread.of(seconds / first)})
        return Table(title, rows, self.about_steps)
