"""The latent cache of a dataset: the output of a codec's encoder for every frame, so that training need not recompute
it.

    <dataset>/latents/latents.json                how the frames were encoded, and the numbers' precision
    <dataset>/latents/<trajectory>.safetensors    `latents` (T, S, C, h, w)

S = 2: the mean and standard deviation of a posterior, which training samples; S = 1: latents. Both before the codec's
shift and scale. Each file's metadata holds one entry, `shard`: JSON with the trajectory's name, the encoding again, and
the SHA-256 of the numbers.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cdit.common.cli import parser_instance
from cdit.common.errors import DataError
from cdit.common.files import parse_json, read_json, write_json, write_whole
from cdit.data.config import Crop, Precision
from cdit.data.layout import LATENTS
from cdit.data.source import TrajectorySource

FORMAT_VERSION = 1
DESCRIPTION = "latents.json"
TENSOR = "latents"
METADATA = "shard"


@dataclass(frozen=True)
class Encoding:
    """How frames are encoded to latents: the settings of a cache, or those that a run requires."""

    codec: str
    name: str = field(compare=False)
    """Where its weights came from, for information."""
    fingerprint: str
    """Of its encoder."""
    image_size: tuple[int, int]
    crop: Crop
    """How recorded frames were resized to it (see cdit.data.frames.crop_and_resize)."""

    def __str__(self) -> str:
        size = "×".join(map(str, self.image_size))
        return f"{self.codec} {self.name} (encoder {self.fingerprint[:12]}), frames of {size}, crop {self.crop}"


@dataclass(frozen=True)
class LatentInfo:
    """The contents of `latents.json`."""

    encoding: Encoding
    precision: Precision
    version: int = FORMAT_VERSION

    @property
    def dtype(self) -> torch.dtype:
        """The precision as a torch dtype."""
        return getattr(torch, self.precision)


class LatentCache:
    """The latents of one dataset on disk, possibly not of all its trajectories yet."""

    def __init__(self, folder: Path, info: LatentInfo):
        self.folder, self.info = folder, info

    @classmethod
    def open(cls, dataset: Path) -> "LatentCache | None":
        """The cache in a dataset's folder; None if there is none.

        Raises:
            DataError: its description is damaged, or of a newer version.
        """
        path = dataset / LATENTS / DESCRIPTION
        if not path.is_file():
            return None
        values = read_json(path, version=FORMAT_VERSION)
        try:
            return cls(path.parent, parser_instance(LatentInfo, values))
        except Exception as error:
            raise DataError(f"{path}: not a description of latents ({error})") from error

    @classmethod
    def create(cls, dataset: Path, encoding: Encoding, precision: Precision) -> "LatentCache":
        """The cache in a dataset's folder, created if there is none.

        Raises:
            DataError: there is one with another encoding or precision.
        """
        if cache := cls.open(dataset):
            cache.expect(encoding)
            if cache.info.precision != precision:
                raise DataError(f"{cache.folder} holds {cache.info.precision}, expected {precision}: delete it first")
            return cache
        cache = cls(dataset / LATENTS, LatentInfo(encoding, precision))
        cache.folder.mkdir(parents=True, exist_ok=True)
        write_json(cache.folder / DESCRIPTION, asdict(cache.info))
        return cache

    def expect(self, encoding: Encoding) -> None:
        """Rejects a cache with another encoding.

        Raises:
            DataError: the encodings differ; the message shows both.
        """
        if self.info.encoding != encoding:
            raise DataError(
                f"{self.folder} was made with {self.info.encoding}; expected {encoding}. Delete it and run "
                "`python -m cdit.data.encode` with this config, or train on the images with --data.latents no"
            )

    def file(self, trajectory: TrajectorySource) -> Path:
        """The file of a trajectory's latents."""
        return self.folder / f"{trajectory.name}.safetensors"

    def write(self, trajectory: TrajectorySource, latents: Tensor) -> None:
        """Writes a trajectory's latents (T, S, C, h, w) atomically."""
        latents = latents.to("cpu", self.info.dtype).contiguous()
        final = self.file(trajectory)
        final.parent.mkdir(parents=True, exist_ok=True)
        shard = json.dumps({**self._belongs(trajectory), "sha256": _sha256(latents)})
        write_whole(final, save({TENSOR: latents}, {METADATA: shard}))

    def problem(self, trajectory: TrajectorySource, checksum: bool = False) -> str | None:
        """The problem of a trajectory's metadata or, with `checksum`, also of its numbers; None if there is none."""
        path = self.file(trajectory)
        if not path.is_file():
            return f"{path}: missing"
        try:
            with opened(path) as file:
                shard = parse_json(file.metadata()[METADATA], path)
                recorded = shard.pop("sha256")
                stored = file.get_slice(TENSOR)
                shape, dtype = stored.get_shape(), stored[:0].dtype
                found = _sha256(file.get_tensor(TENSOR)) if checksum else recorded
        except Exception as error:  # safetensors and torch raise many types
            return f"{path}: damaged ({error})"
        if shard != self._belongs(trajectory):
            return f"{path}: from another trajectory or encoding"
        if dtype != self.info.dtype:
            return f"{path}: not in {self.info.precision}"
        if len(shape) != 5:
            return f"{path}: an array {tuple(shape)}, expected (T, S, C, h, w)"
        if shape[0] != len(trajectory):
            return f"{path}: {shape[0]} frames, but the trajectory has {len(trajectory)}"
        return None if found == recorded else f"{path}: damaged (checksum mismatch)"

    def _belongs(self, trajectory: TrajectorySource) -> dict[str, Any]:
        """The metadata of a file."""
        encoding = self.info.encoding
        return {
            "trajectory": trajectory.name,
            "codec": encoding.codec,
            "fingerprint": encoding.fingerprint,
            "image_size": list(encoding.image_size),
            "crop": encoding.crop,
        }


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        DataError: it is missing, truncated or not a safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: torch's, of a damaged shape
        raise DataError(f"{path}: not readable ({error})") from error


def _sha256(numbers: Tensor) -> str:
    return hashlib.sha256(numbers.numpy()).hexdigest()
