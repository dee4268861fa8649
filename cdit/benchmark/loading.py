"""Reading of a dataset: whether the loader keeps up with training, and what latents on disk save."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from cdit.batch import Batch
from cdit.benchmark.bench import Bench
from cdit.benchmark.config import BenchmarkConfig
from cdit.benchmark.contenders import random_codec
from cdit.benchmark.measure import Call, Row, Spread, Table, median
from cdit.common.frames import to_float
from cdit.data.config import DataConfig
from cdit.data.latents import Encoding, LatentCache
from cdit.data.layout import write_split, write_trajectory
from cdit.data.loader import loader
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.windows import WindowDataset


def data(bench: Bench) -> Iterator[Table]:
    """Frames per second of the loader, from images and from latents, beside those of a training step."""
    config = bench.config
    contender = bench.contender(config.contenders[0])
    name = f"training, {contender.name}"
    with TemporaryDirectory() as folder:
        sets = recorded_windows(Path(folder), config)
        calls: dict[str, Call] = {name: contender.training_step(bench.batch())}
        for kind, dataset in sets.items():
            for workers in config.data.workers:
                calls[f"loader, {kind}, workers: {workers}"] = partial(read, dataset, config, workers)
        seconds = bench.watch.times(calls)
    seconds = {key: values / (1 if key == name else config.data.batches) for key, values in seconds.items()}
    frames = config.batch_size * (config.context_frames + config.goals)
    rows: list[Row] = [
        {"": key, "frames/s": frames / median(s), "rate / training": Spread.of(seconds[name] / s)}
        for key, s in seconds.items()
    ]
    recorded, size = (
        "×".join(map(str, s)) for s in (config.data.recorded_size, next(iter(sets.values())).config.image_size)
    )
    yield Table(f"Frames read and frames trained on: JPEGs of {recorded} to {size}, and their latents", rows)


def latents(bench: Bench) -> Iterator[Table]:
    """Training steps from the images of a dataset, loading included, and from its latents on disk."""
    config, ours = bench.config, bench.contender("ours-nwm")
    codec = random_codec(config).to(bench.device)
    batch = bench.batch()
    train = ours.training_step(batch)
    with TemporaryDirectory() as folder:
        sets = recorded_windows(Path(folder), config)

        def load(kind: str) -> Batch:
            return Batch.collate([sets[kind][window] for window in range(config.batch_size)])

        def step(kind: str) -> None:
            windows = load(kind)
            recorded = torch.cat((windows.context, windows.target), dim=1).to(bench.device)
            noise = torch.randn(*recorded.shape[:2], *batch.context.shape[2:], device=bench.device)
            encode = codec.draw if kind == "latents" else lambda frames, noise: codec.encode(to_float(frames), noise)
            batch.context, batch.clean = encode(recorded, noise).split((config.context_frames, config.goals), dim=1)
            train()

        rows = [
            bench.compare(case, {kind: partial(call, kind) for kind in ("latents", "images")})
            for case, call in (("loading alone", load), ("whole step", step))
        ]
    recorded = "×".join(map(str, config.data.recorded_size))
    yield Table(f"Training from latents on disk or from JPEGs of {recorded}", rows)


def read(dataset: WindowDataset, config: BenchmarkConfig, workers: int) -> None:
    """Reads all batches of a new loader, including the start-up of its workers."""
    sampler = KeyedBatchSampler(len(dataset), config.batch_size, seed=0, start_step=0, steps=config.data.batches)
    for _ in loader(dataset, sampler, replace(dataset.config, workers=workers)):
        pass


def recorded_windows(folder: Path, config: BenchmarkConfig) -> dict[str, WindowDataset]:
    """Windows of a few random frames: from images that are decoded each time, and from their latents."""
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
