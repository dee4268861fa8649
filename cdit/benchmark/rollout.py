"""One sequence of frames, each predicted from those before, decoding included."""

from collections.abc import Iterator

import torch

from cdit.benchmark.autoencoder import random_codec
from cdit.benchmark.bench import Bench
from cdit.benchmark.tables import Table


def rollout(bench: Bench) -> Iterator[Table]:
    """Every contender at its default number of steps, one sequence of actions at a time."""
    config, length = bench.config, bench.config.rollout_length
    codec = random_codec(config).to(bench.device)
    size = [side * codec.downscale for side in config.image_size]
    frames = torch.rand(1, config.context_frames, 3, *size, device=bench.device) * 2 - 1
    actions = torch.randn(1, 1, length, 3, device=bench.device)
    rows = bench.rates(bench.contenders(), length, lambda c, s: c.rollout(codec, frames, actions, s))
    pixels = "×".join(map(str, size))
    yield Table(
        f"A rollout of {length} frames of {pixels} pixels, coding and decoding included", rows, bench.about_steps
    )
