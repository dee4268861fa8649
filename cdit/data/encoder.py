"""Writes the latent caches of `python -m cdit.data.encode`; no other module of cdit.data uses codecs."""

import math
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from cdit.codec import CODECS, Codec, load_codec
from cdit.common.errors import DataError, UserError
from cdit.common.frames import to_float
from cdit.common.options import names
from cdit.data.config import DataConfig
from cdit.data.encode import EncodeConfig
from cdit.data.frames import FrameStore
from cdit.data.latents import Encoding, LatentCache
from cdit.data.loader import Reporting, WindowLoader
from cdit.data.shards import is_sharded
from cdit.data.source import TrajectorySource
from cdit.data.sources import Source, listed_splits, open_source

PATIENCE = timedelta(hours=24)
"""How long a process waits for those with more to encode."""


def encode(config: EncodeConfig) -> None:
    """Writes the latent cache of every dataset; several processes share the trajectories.

    Raises:
        UserError: frames are damaged, or of a size that the codec does not support; or another kind of cache exists.
    """
    if ":" in config.codec.kind:
        CODECS.load(config.codec.kind)
    codec = load_codec(config.codec)
    if codec.moments is None:
        raise UserError(f"codec.kind is {config.codec.kind}, which is not encoded: expected kl, tiny or features")
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    codec.to(state.device)
    data = config.data
    frame_shape = (1 + codec.samples, *codec.latent_shape(data.image_size))
    encoding = Encoding(codec.kind, config.codec.weights, codec.fingerprint(), data.image_size, data.crop)
    for source in data.sources:
        trajectories = _trajectories(source, names(config.split))
        with state.main_process_first():
            cache = LatentCache.create(Path(source.folder), encoding, config.precision)
        mine = trajectories[state.process_index :: state.num_processes]
        missing = [trajectory for trajectory in mine if cache.problem(trajectory, checksum=True)]
        if state.is_main_process:
            frames = sum(map(len, trajectories))
            size = frames * math.prod(frame_shape) * cache.info.dtype.itemsize
            print(f"{cache.folder}: {len(trajectories)} trajectories, {frames} frames, {size / 1e9:.3g} GB", flush=True)
        rounding = _encode(missing, cache, codec, config, state)
        state.wait_for_everyone()
        if state.is_main_process and missing:
            print(f"{cache.folder}: rounded to {config.precision}, {rounding}")


def _encode(
    trajectories: Sequence[TrajectorySource],
    cache: LatentCache,
    codec: Codec,
    config: EncodeConfig,
    state: PartialState,
) -> "Rounding":
    """Writes this process's share; the main process shows its progress."""
    batches = _Batches(trajectories, config.data, config.batch_size)
    loader = WindowLoader(Reporting(batches), batch_size=None, num_workers=config.data.workers)
    share = f" (share 1 of {state.num_processes})" if state.num_processes > 1 else ""
    bar = tqdm(
        total=sum(map(len, trajectories)), unit="frame", desc=f"encoding{share}", disable=not state.is_main_process
    )
    rounding, parts = Rounding(), []
    with bar:
        for (trajectory, _, stop), frames in zip(batches.spans, loader, strict=True):
            moments = codec.moments(to_float(frames.to(state.device))).cpu()
            parts.append(moments.to(cache.info.dtype))
            rounding.add(moments, parts[-1])
            if stop == len(trajectories[trajectory]):
                cache.write(trajectories[trajectory], torch.cat(parts))
                parts = []
            bar.update(len(frames))
    return rounding


def verify(config: EncodeConfig) -> None:
    """Checks the checksums of the latent caches.

    Raises:
        DataError: latents are missing or damaged; the message lists them.
    """
    for source in config.data.sources:
        cache = LatentCache.open(Path(source.folder))
        if cache is None:
            raise DataError(f"{source.folder}: no latents here")
        trajectories = _trajectories(source, names(config.split))
        bar = tqdm(trajectories, "checking", leave=False)
        if problems := [problem for trajectory in bar if (problem := cache.problem(trajectory, checksum=True))]:
            lines = "\n  ".join(problems)
            raise DataError(f"{cache.folder}: {len(problems)} of {len(trajectories)} must be encoded again\n  {lines}")
        print(f"{cache.folder}: fine ({len(trajectories)} trajectories; {cache.info.encoding})")


class _Batches(Dataset):
    """Consecutive frames of one trajectory after another, as training sees them."""

    def __init__(self, trajectories: Sequence[TrajectorySource], config: DataConfig, size: int):
        self.frames = FrameStore(trajectories, config.image_size, config.crop, cache_gb=0)
        self.spans = [
            (index, start, min(start + size, len(trajectory)))
            for index, trajectory in enumerate(trajectories)
            for start in range(0, len(trajectory), size)
        ]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Tensor:
        trajectory, start, stop = self.spans[index]
        return self.frames.read(trajectory, range(start, stop))


class Rounding:
    """Rounding errors of latents relative to their spread, as root mean squares."""

    def __init__(self):
        self.error, self.latents, self.posterior = 0.0, 0.0, 0.0

    def add(self, exact: Tensor, rounded: Tensor) -> None:
        """Adds moments (…, S, C, h, w)."""
        mean = exact.select(-4, 0).double()
        self.error += (mean - rounded.select(-4, 0)).square().sum().item()
        self.latents += mean.square().sum().item()
        self.posterior += exact[..., 1:, :, :, :].double().square().sum().item()

    def __str__(self) -> str:
        relative = f"an error of {math.sqrt(self.error / self.latents):.2g} of the latents' size"
        if self.posterior:
            relative += f", {math.sqrt(self.error / self.posterior):.2g} of their posterior's standard deviation"
        return relative


def _trajectories(source: Source, splits: Sequence[str] | None) -> list[TrajectorySource]:
    """The trajectories of some or all splits, without duplicates."""
    if is_sharded(source.folder):
        raise DataError(f"{source.folder}: holds shards; encode the dataset that they were made from")
    splits = splits or listed_splits(source)
    found = {trajectory.name: trajectory for split in splits for trajectory in open_source(source, split)[0]}
    if any(trajectory.dataset is None for trajectory in found.values()):
        tqdm.write(
            f"{source.folder}: training does not read latents of source {source.source} from here; pack them into "
            "shards with `python -m cdit.data.shard convert --content both`",
            file=sys.stderr,
        )
    return list(found.values())
