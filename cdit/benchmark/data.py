"""Whether the loader keeps the training fed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F

from cdit.benchmark.autoencoder import random_codec
from cdit.benchmark.bench import Bench
from cdit.benchmark.config import BenchmarkConfig
from cdit.benchmark.contenders import Batch
from cdit.benchmark.stopwatch import Call, Spread
from cdit.benchmark.tables import Cell, Table
from cdit.data.config import DataConfig
from cdit.data.latents import Encoding, LatentCache
from cdit.data.layout import write_split, write_trajectory
from cdit.data.loader import loader
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.windows import WindowDataset


def data(bench: Bench) -> Iterator[Table]:
    """Frames a second that come out of the loader, from images and from latents, against what a training step takes."""
    config = bench.config
    contender = bench.contender(config.contenders[0])
    batch = Batch.random(config, bench.device, config.batch_size, config.goals)
    with TemporaryDirectory() as folder:
        sets = recorded_windows(Path(folder), bench)
        name = f"training, {contender.name}"
        calls: dict[str, Call] = {name: contender.training_step(batch)}
        for kind, dataset in sets.items():
            for workers in config.data.workers:
                calls[f"loader, {kind}, workers: {workers}"] = lambda d=dataset, w=workers: read(d, config, w)
        seconds = bench.watch.times(calls)
    seconds = {key: values / (1 if key == name else config.data.batches) for key, values in seconds.items()}
    frames, first = config.batch_size * (config.context_frames + config.goals), seconds[name]
    rows: list[dict[str, Cell]] = [
        {"": name, "frames/s": float(frames / np.median(values)), "rate / that of training": Spread.of(first / values)}
        for name, values in seconds.items()
    ]
    recorded, size = (
        "×".join(map(str, s)) for s in (config.data.recorded_size, next(iter(sets.values())).config.image_size)
    )
    yield Table(f"Frames read and frames trained on: JPEGs of {recorded} to {size}, and their latents", rows)


def read(dataset: WindowDataset, config: BenchmarkConfig, workers: int) -> None:
    """Batches of a loader from its start, that of its workers included."""
    sampler = KeyedBatchSampler(len(dataset), config.batch_size, seed=0, start_step=0, steps=config.data.batches)
    for _ in loader(dataset, sampler, replace(dataset.config, workers=workers)):
        pass


def recorded_windows(folder: Path, bench: Bench) -> dict[str, WindowDataset]:
    """Windows of a few random frames: from images that are decoded each time, and from their latents."""
    config = bench.config
    codec = random_codec(config)
    coarse = torch.rand(config.data.frames, 3, 30, 40)
    frames = F.interpolate(coarse, config.data.recorded_size, mode="bilinear").mul(255).byte()
    write_trajectory(folder, "walk", frames.permute(0, 2, 3, 1).numpy())
    write_split(folder, "train", ["walk"])
    shared = DataConfig(
        str(folder),
        image_size=tuple(side * codec.downscale for side in config.image_size),
        crop="4:3",
        context_frames=config.context_frames,
        min_history=config.context_frames,
        goals=config.goals,
        min_offset=-4,
        max_offset=4,
        cache_gb=0,
    )
    images, latents = WindowDataset(shared, "train"), WindowDataset(shared, "train")
    encoding = Encoding(codec.kind, "random weights", codec.fingerprint(), shared.image_size, shared.crop)
    moments = torch.randn(len(frames), 2, config.channels, *config.image_size)  # reading them costs the same
    LatentCache.create(folder, encoding, "float16").write(images.trajectories[0], moments)
    latents.use_latents(encoding)
    return {"images": images, "latents": latents}
