"""Probes of attention."""

from collections.abc import Iterator
from tempfile import TemporaryDirectory

import numpy as np
import torch

from cdit.benchmark.bench import Bench
from cdit.benchmark.contenders import PIXELS, Batch
from cdit.benchmark.stopwatch import Spread
from cdit.benchmark.tables import Cell, Table
from cdit.common.errors import UserError
from cdit.heads.config import AttentionConfig
from cdit.heads.probe import inspect_attention


def probes(bench: Bench) -> Iterator[Table]:
    """A probe of attention, all that it measures, draws and writes, against the training steps from one to the next.

    Raises:
        UserError: frames are not RGB.
    """
    config, attention = bench.config, AttentionConfig()
    if config.channels != 3:
        raise UserError(f"channels is {config.channels}, expected 3: probes draw pixels")
    ours = bench.contender("ours", mixed_precision="no")
    world = ours.world(PIXELS)
    samples, goals = attention.samples, config.goals
    batch = {
        "context": torch.randint(256, (samples, config.context_frames, 3, *config.image_size), dtype=torch.uint8),
        "context_mask": torch.ones(samples, config.context_frames, dtype=torch.bool),
        "target": torch.randint(256, (samples, goals, 3, *config.image_size), dtype=torch.uint8),
        "action": torch.randn(samples, goals, 3),
        "action_mask": torch.ones(samples, goals, dtype=torch.bool),
        "time_shift": torch.rand(samples, goals),
        "spacing": torch.ones(samples),
    }
    grid = world.cdit.grid
    shape = (samples, goals, grid[0] * grid[1], config.context_frames, 2)
    places = torch.rand(shape) * torch.tensor(grid)  # as a dataset gives them that knows them

    with TemporaryDirectory() as folder:

        def probe() -> None:
            report = inspect_attention(world, batch, attention, 0, list(map(str, range(samples))), places)
            report.save(folder)
            report.to_wandb(folder)

        step = ours.training_step(Batch.random(config, bench.device, config.batch_size, goals))
        seconds = bench.watch.times({"step": step, "probe": probe})
    row: dict[str, Cell] = {
        "": "float32",
        f"step of {config.batch_size} contexts of {goals} goals [ms]": float(1000 * np.median(seconds["step"])),
        f"probe of {samples} contexts [ms]": float(1000 * np.median(seconds["probe"])),
        "probe / training time [%]": Spread.of(100 * seconds["probe"] / (config.probe_every * seconds["step"])),
    }
    yield Table(f"Probes of attention, one every {config.probe_every} steps", [row])
