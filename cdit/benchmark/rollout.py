"""One sequence of frames, each predicted from those before, decoding included."""

from collections.abc import Iterator

import numpy as np
import torch

from cdit.benchmark.autoencoder import random_autoencoder
from cdit.benchmark.bench import Bench
from cdit.benchmark.stopwatch import Spread
from cdit.benchmark.tables import Cell, Table
from cdit.codec import AutoencoderCodec


def rollout(bench: Bench) -> Iterator[Table]:
    """Every contender at its default number of steps, one sequence of actions at a time."""
    config, length = bench.config, bench.config.rollout_length
    codec = AutoencoderCodec("kl", random_autoencoder(config.codec.blocks, config.channels)).to(bench.device)
    size = [side * codec.downscale for side in config.image_size]
    frames = torch.rand(1, config.context_frames, 3, *size, device=bench.device) * 2 - 1
    actions = torch.randn(1, 1, length, 3, device=bench.device)
    contenders = bench.contenders()
    seconds = bench.watch.times({c.name: lambda c=c: c.rollout(codec, frames, actions, c.sampler) for c in contenders})
    first = seconds[contenders[0].name]
    rows: list[dict[str, Cell]] = [
        {
            "": c.name,
            "steps": c.sampler.steps,
            "frames/s": float(length / np.median(seconds[c.name])),
            "time / that of the first": Spread.of(seconds[c.name] / first),
        }
        for c in contenders
    ]
    pixels = "×".join(map(str, size))
    yield Table(f"A rollout of {length} frames of {pixels} pixels, coding and decoding included", rows)
