"""Latents on disk against an autoencoder in the training."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from cdit.benchmark.autoencoder import random_codec
from cdit.benchmark.bench import Bench
from cdit.benchmark.contenders import Batch
from cdit.benchmark.data import recorded_windows
from cdit.benchmark.tables import Table
from cdit.common.pictures import to_float
from cdit.data.loader import collate
from cdit.data.windows import WindowDataset


def latents(bench: Bench) -> Iterator[Table]:
    """Training steps from the images of a dataset, loading included, and from its latents on disk."""
    config, ours = bench.config, bench.contender("ours-nwm")
    codec = random_codec(config).to(bench.device)
    batch = Batch.random(config, bench.device, config.batch_size, config.goals)
    train = ours.training_step(batch)
    with TemporaryDirectory() as folder:
        sets = recorded_windows(Path(folder), bench)

        def load(dataset: WindowDataset) -> dict[str, Tensor]:
            return collate([dataset[window] for window in range(config.batch_size)])

        def step(dataset: WindowDataset) -> None:
            items = load(dataset)
            recorded = torch.cat((items["context"], items["target"]), dim=1).to(bench.device)
            noise = torch.randn(
                *batch.context.shape[:1], recorded.shape[1], *batch.context.shape[2:], device=bench.device
            )
            is_latent = dataset is sets["latents"]
            seen = codec.draw(recorded, noise) if is_latent else codec.encode(to_float(recorded), noise)
            batch.context, batch.clean = seen.split((config.context_frames, config.goals), dim=1)
            train()

        rows = [
            bench.compare(case, {name: partial(call, sets[name]) for name in ("latents", "images")})
            for case, call in (("loading alone", load), ("whole step", step))
        ]
    recorded = "×".join(map(str, config.data.recorded_size))
    yield Table(f"Training from latents on disk or from JPEGs of {recorded}", rows)
