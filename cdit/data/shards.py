"""A dataset in a few large files, for remote storage and datasets larger than a disk.

    <folder>/shards.json            the splits: their tables, and their shards with the trajectories in each
    <folder>/dataset.json           what the dataset is (see cdit.data.layout)
    <folder>/<split>.safetensors    the split's table: position of each frame in its shard, and its pose
    <folder>/<split>-00000.tar, …   the shards: WebDataset's, whole trajectories with their
        <trajectory>/000000.jpg, …  frames (the JPEG or PNG files of the original dataset) and
        <trajectory>/latents.npy    latents (T, S, C, h, w), either or both

Made by `python -m cdit.data.shard`. The tables hold, over all trajectories of a split one after the other, `offset` and
`size` (N,) int64 of every frame's file within its shard, `position` (N, 2) and `yaw` (N,) float64, further conditions
`condition.<name>` (N, …), and, for each trajectory, `latents` (M,) int64: the offset of its latents' file. If there are
texts, `text` (N,) int64 is the index of each frame's text in `texts`, the bytes of a JSON list.

Nothing is unpacked: files are read at their offsets, after checking for the tar header of a plain file with the
expected name and size.
"""

import io
import math
import os
import re
import stat
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cdit.common.cli import parser_instance
from cdit.common.errors import DataError
from cdit.common.files import MAX_TEXT, check_name, parse_json, read_text
from cdit.data.frames import decode, stack
from cdit.data.latents import LatentInfo
from cdit.data.layout import DESCRIPTION as DATASET
from cdit.data.layout import DatasetInfo
from cdit.data.shard_cache import FileRecord, ShardCache, read_remote
from cdit.data.source import DatasetSource, Opened, register_source
from cdit.data.trajectory import MAX_POSE

FORMAT_VERSION = 1
DESCRIPTION = "shards.json"
MAX_DESCRIPTION = 2**28
BLOCK = tarfile.BLOCKSIZE
LATENTS = "latents.npy"
NPY_HEADER = 256
"""Bytes read for the header of an .npy file; that of five dimensions has 128."""
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(?:tar|safetensors)")
FRAME_SUFFIXES = ("jpg", "jpeg", "png")
CONDITION = "condition."


@dataclass(frozen=True)
class ShardRecord(FileRecord):
    """A shard."""

    trajectories: dict[str, int]
    """Number of frames of each trajectory in it, in order."""


@dataclass(frozen=True)
class SplitRecord:
    """A split."""

    table: FileRecord
    shards: list[ShardRecord]
    """In the order of the split's trajectories."""
    frames: bool
    poses: bool
    latents: LatentInfo | None
    """The encoding of the latents in the shards, if any."""
    latent_shape: tuple[int, ...]
    """(S, C, h, w) of a frame's latents."""


def is_sharded(folder: str | Path) -> bool:
    """Whether a folder or URL holds a dataset in shards; all URLs do."""
    return "://" in str(folder) or (Path(folder) / DESCRIPTION).is_file()


class Shards:
    """A dataset in shards, in a folder, where they are read in place, or at any fsspec URL.

    Raises:
        DataError: the index is missing or damaged, or of a newer version.
    """

    def __init__(self, location: str | Path, cache: ShardCache | None = None):
        self.location, self.is_remote = str(location), "://" in str(location)
        self.cache = cache or ShardCache()
        origin = f"{self.location.rstrip('/')}/{DESCRIPTION}"
        values = parse_json(self._read_text(DESCRIPTION, MAX_DESCRIPTION), origin, FORMAT_VERSION)
        try:
            self.splits = {name: _split(split, origin) for name, split in values["splits"].items()}
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{origin}: not a description of shards ({error!r})") from error

    @property
    def info(self) -> DatasetInfo:
        """The contents of dataset.json.

        Raises:
            DataError: it is missing or damaged.
        """
        return DatasetInfo.parse(self._read_text(DATASET, MAX_TEXT), f"{self.location.rstrip('/')}/{DATASET}")

    def file(self, record: FileRecord) -> Path:
        """The path of a file on this machine, downloaded if necessary."""
        return self.cache.path(self.location, record) if self.is_remote else Path(self.location) / record.file

    def trajectories(self, split: str) -> "list[ShardTrajectory]":
        """The trajectories of a split.

        Raises:
            DataError: there is no such split, or its table is damaged or does not match the index.
        """
        if split not in self.splits:
            raise DataError(f"{self.location}: no split {split!r} in these shards, only {', '.join(self.splits)}")
        record = self.splits[split]
        table = self._table(record)
        texts = _texts(table, f"{self.location}/{record.table.file}")
        found: list[ShardTrajectory] = []
        start = 0
        for shard in (Shard(self, shard, record) for shard in record.shards):
            for name, frames in shard.record.trajectories.items():
                frame = slice(start, start + frames)
                found.append(
                    ShardTrajectory(
                        name,
                        Path(self.location) / name,
                        shard,
                        frames,
                        *(table[key][frame] if key in table else None for key in ("offset", "size")),
                        int(table["latents"][len(found)]) if record.latents else None,
                        *(table[key][frame] if key in table else None for key in ("position", "yaw")),
                        {
                            key.removeprefix(CONDITION): values[frame]
                            for key, values in table.items()
                            if key.startswith(CONDITION)
                        },
                        texts[frame],
                    )
                )
                start += frames
        return found

    def _table(self, record: SplitRecord) -> dict[str, np.ndarray]:
        """The arrays of a split's table, mapped into memory."""
        path = self.file(record.table)
        counts = [count for shard in record.shards for count in shard.trajectories.values()]
        frames = sum(counts)
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if record.frames:
            expected |= {"offset": ((frames,), torch.int64), "size": ((frames,), torch.int64)}
        if record.poses:
            expected |= {"position": ((frames, 2), torch.float64), "yaw": ((frames,), torch.float64)}
        if record.latents:
            expected["latents"] = ((len(counts),), torch.int64)
        try:
            with safe_open(path, "pt") as file:
                table = {name: file.get_tensor(name) for name in expected}
                further = {name: file.get_tensor(name) for name in file.keys() if name.startswith(CONDITION)}  # noqa: SIM118
                if "text" in file.keys():  # noqa: SIM118
                    table |= {name: file.get_tensor(name) for name in ("text", "texts")}
                    expected |= {"text": ((frames,), torch.int64), "texts": (table["texts"].shape, torch.uint8)}
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: not readable ({error})") from error
        for name, tensor in table.items():
            if (tuple(tensor.shape), tensor.dtype) != expected[name]:
                raise DataError(
                    f"{path}: {name} is {tuple(tensor.shape)} {tensor.dtype}, expected {expected[name][0]} "
                    f"{expected[name][1]}"
                )
        if record.poses and not all((table[name].abs() <= MAX_POSE).all() for name in ("position", "yaw")):
            raise DataError(f"{path}: poses that are not finite, or larger than {MAX_POSE:g}")
        if any(tensor.shape[:1] != (frames,) for tensor in further.values()):
            raise DataError(f"{path}: conditions {', '.join(further)}: expected {frames} rows each")
        return {name: tensor.numpy() for name, tensor in (table | further).items()}

    def _read_text(self, name: str, limit: int) -> str:
        if not self.is_remote:
            return read_text(Path(self.location) / name, limit)
        url = f"{self.location.rstrip('/')}/{name}"
        try:
            return read_remote(url, limit).decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{url}: not UTF-8 text ({error})") from error


@dataclass(frozen=True)
class Shard:
    """One shard of a split."""

    shards: Shards
    record: ShardRecord
    split: SplitRecord

    def __str__(self) -> str:
        return f"{self.shards.location.rstrip('/')}/{self.record.file}"

    @property
    def is_remote(self) -> bool:
        """Whether it has to be downloaded before it is read."""
        return self.shards.is_remote

    def fetch(self) -> None:
        """Downloads it, unless it is cached."""
        self.shards.file(self.record)

    def read(self, offset: int, size: int) -> bytes:
        """These bytes of the shard.

        Raises:
            DataError: it is missing or has fewer bytes.
        """
        if not 0 <= offset <= offset + size <= self.record.bytes:
            raise DataError(f"{self}: bytes {offset} to {offset + size} requested, but it has {self.record.bytes}")
        while True:
            path = self.shards.file(self.record)
            try:
                # Opening a pipe would wait for a writer.
                with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
                    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                        raise DataError(f"{self}: not a regular file")
                    content = os.pread(file.fileno(), size, offset)
                break
            except OSError as error:
                # A remote shard may have been evicted in the meantime.
                if not (self.shards.is_remote and isinstance(error, FileNotFoundError)):
                    raise DataError(f"{self}: not readable ({error.strerror})") from error
        if len(content) < size:
            raise DataError(f"{self}: ends before byte {offset + size}, but has {self.record.bytes} in the index")
        return content


@dataclass(frozen=True)
class ShardTrajectory:
    """A `TrajectorySource` in a shard."""

    name: str
    folder: Path
    """For messages."""
    shard: Shard
    length: int
    offset: np.ndarray | None
    """(T,) offset of each frame's file in the shard; None without frames."""
    size: np.ndarray | None
    """(T,) size of each frame's file."""
    latents: int | None
    """Offset of the latents' file; None without latents."""
    position: np.ndarray | None
    yaw: np.ndarray | None
    conditions: Mapping[str, np.ndarray]
    texts: Sequence[str]
    actions = None

    def __len__(self) -> int:
        return self.length

    @property
    def dataset(self) -> Path:
        """The dataset's folder."""
        return Path(self.shard.shards.location)

    def frame(self, time: int) -> "FrameMember":
        """The frame's file at `time` (0…T-1).

        Raises:
            DataError: the shards hold only latents.
        """
        if self.offset is None:
            raise DataError(f"{self.shard}: contains latents only, but frames are needed")
        return FrameMember(self, time)

    def frames(self, times: Sequence[int]) -> Tensor:
        """Frames (N, 3, H, W) uint8."""
        return stack([decode(self.frame(time)) for time in times], self.folder)


@dataclass(frozen=True)
class FrameMember:
    """A frame's file in a shard."""

    trajectory: ShardTrajectory
    time: int

    def __str__(self) -> str:
        return f"{self.trajectory.shard}:{self.trajectory.name}/{self.time:06d}"

    def read(self) -> bytes:
        """The contents of the file.

        Raises:
            DataError: it is not where the index says.
        """
        offset, size = int(self.trajectory.offset[self.time]), int(self.trajectory.size[self.time])
        content = self.trajectory.shard.read(offset - BLOCK, BLOCK + size)
        name, stored = member(content[:BLOCK], str(self))
        stem, _, suffix = name.rpartition(".")
        expected = f"{self.trajectory.name}/{self.time:06d}"
        if (stem, stored) != (expected, size) or suffix not in FRAME_SUFFIXES:
            raise DataError(f"{self}: found {name!a} where the index says it is")
        return content[BLOCK:]


@dataclass(frozen=True)
class LatentMember:
    """A trajectory's latents in a shard."""

    trajectory: ShardTrajectory

    def __str__(self) -> str:
        return f"{self.trajectory.shard}:{self.trajectory.name}/{LATENTS}"

    def read(self, times: Sequence[int]) -> Tensor:
        """Latents (len(times), S, C, h, w), in the precision they are stored in.

        Raises:
            DataError: they are not where the index says.
        """
        shard, split = self.trajectory.shard, self.trajectory.shard.split
        shape = (len(self.trajectory), *split.latent_shape)
        dtype = np.dtype(split.latents.precision).newbyteorder("<")
        frame_bytes = math.prod(shape[1:]) * dtype.itemsize
        offset = self.trajectory.latents
        content = shard.read(offset - BLOCK, BLOCK + NPY_HEADER)
        stored, header = npy_header(content[BLOCK:], str(self))
        if stored != (shape, dtype):
            raise DataError(f"{self}: {stored[0]} {stored[1]}, expected {shape} {dtype}")
        expected = f"{self.trajectory.name}/{LATENTS}", header + shape[0] * frame_bytes
        if member(content[:BLOCK], str(self)) != expected:
            raise DataError(f"{self}: not where the index says")
        rows = [shard.read(offset + header + time * frame_bytes, frame_bytes) for time in times]
        return torch.from_numpy(np.frombuffer(bytearray(b"".join(rows)), dtype).reshape(len(times), *shape[1:]))


@register_source("shards")
class ShardSource(DatasetSource):
    """Shards in a folder or at a URL."""

    @staticmethod
    def open(folder: str, split: str, *, cache: ShardCache | None = None, **_: Any) -> Opened:
        """See `DatasetSource.open`."""
        shards = Shards(folder, cache)
        return shards.trajectories(split), shards.info


def member(block: bytes, origin: str) -> tuple[str, int]:
    """Name and size in a tar header.

    Raises:
        DataError: it is not the header of a plain file.
    """
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise DataError(f"{origin}: no file starts here in the shard ({error})") from error
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise DataError(f"{origin}: {header.name!a} is not a plain file")
    if header.size < 0:
        raise DataError(f"{origin}: {header.name!a} has {header.size} bytes")
    return header.name, header.size


def npy_header(start: bytes, origin: str) -> tuple[tuple[tuple[int, ...], np.dtype], int]:
    """Shape and dtype in the header that an .npy file starts with, and its length.

    Raises:
        DataError: it is not such a header, or the array is in Fortran order.
    """
    file = io.BytesIO(start)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not version 1.0 of the format")
        shape, in_fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        if in_fortran_order:
            raise ValueError("in Fortran's order")
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise DataError(f"{origin}: not an array of numbers ({error})") from error
    return (shape, dtype), file.tell()


def _texts(table: Mapping[str, np.ndarray], path: str) -> list[str]:
    """The text description of every frame of a split; empty without texts."""
    if "text" not in table:
        return []
    listed, rows = parse_json(table["texts"].tobytes().decode(errors="replace"), path), table["text"]
    if not (isinstance(listed, list) and all(isinstance(text, str) for text in listed)):
        raise DataError(f"{path}: texts: expected a list of strings")
    if not ((rows >= 0) & (rows < len(listed))).all():
        raise DataError(f"{path}: text: expected indices of texts, 0 to {len(listed) - 1}")
    return [listed[row] for row in rows]


def _split(values: dict[str, Any], origin: str) -> SplitRecord:
    """A split as the index describes it."""
    latents = values["latents"]
    record = SplitRecord(
        table=_file(values["table"], origin),
        shards=[_shard(shard, origin) for shard in values["shards"]],
        frames=bool(values["frames"]),
        poses=bool(values["poses"]),
        latents=None if latents is None else parser_instance(LatentInfo, latents),
        latent_shape=tuple(_count(length) for length in values["latent_shape"]),
    )
    names = [name for shard in record.shards for name in shard.trajectories]
    if not names or len(set(names)) < len(names):
        raise DataError(f"{origin}: a split without trajectories, or with duplicate ones")
    return record


def _shard(values: dict[str, Any], origin: str) -> ShardRecord:
    for name in values["trajectories"]:
        check_name(name, origin)
    trajectories = {name: _count(frames) for name, frames in values["trajectories"].items()}
    return ShardRecord(**vars(_file(values, origin)), trajectories=trajectories)


def _file(values: dict[str, Any], origin: str) -> FileRecord:
    file, checksum = values["file"], values["sha256"]
    if not FILE.fullmatch(file):
        raise DataError(f"{origin}: {file!a} is not the name of a shard or table")
    if not re.fullmatch("[0-9a-f]{64}", checksum):
        raise DataError(f"{origin}: {file} has no valid SHA-256")
    return FileRecord(file, _count(values["bytes"]), checksum)


def _count(value: Any) -> int:
    if not (isinstance(value, int) and 0 < value < 2**50):
        raise ValueError(f"{value!r} is not a number of frames or bytes")
    return value
