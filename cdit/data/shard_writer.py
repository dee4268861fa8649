"""Writes datasets to shards, and verifies them: the work of `python -m cdit.data.shard`."""

import hashlib
import io
import json
import math
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from cdit.common.errors import DataError, UserError, writing
from cdit.common.files import read_json, sha256, write_json, write_whole
from cdit.data.check import frame_problems
from cdit.data.config import Content, StoredDataset
from cdit.data.latents import TENSOR, LatentCache, opened
from cdit.data.layout import DESCRIPTION as DATASET
from cdit.data.layout import write_trajectory
from cdit.data.shard_cache import FileRecord
from cdit.data.shards import (
    BLOCK,
    CONDITION,
    DESCRIPTION,
    FORMAT_VERSION,
    LATENTS,
    LatentMember,
    ShardRecord,
    Shards,
    ShardTrajectory,
    SplitRecord,
    is_sharded,
)
from cdit.data.source import TrajectorySource
from cdit.data.sources import listed_splits, open_source
from cdit.data.trajectory import Trajectory

WORK = ".unfinished"
CHUNK = 64
"""Frames in memory at a time, of trajectories that are not in files."""


def convert(
    source: StoredDataset, out: Path, splits: Sequence[str] | None, content: Content = "frames", shard_mb: float = 256.0
) -> None:
    """Writes a dataset's splits to shards, in the order of the splits; existing shards are kept.

    Args:
        source: the dataset. Frames that are not files, such as those of videos, are written as JPEGs.
        out: the folder to write to.
        splits: their names; by default all.
        content: frames, latents (of the dataset's latent cache), or both.
        shard_mb: size of a shard in MB (10⁶ bytes); one trajectory alone may take more.

    Raises:
        UserError: the dataset has problems; `out` holds shards of another one, or of these splits, or is full.
    """
    folder = Path(source.folder)
    splits = splits or listed_splits(source)
    there = Shards(out) if is_sharded(out) else None
    finished = dict(there.splits) if there else {}
    if again := [split for split in splits if split in finished]:
        raise UserError(f"{out}: already contains split {again[0]!r}; remove the folder, or choose others with --split")
    if is_sharded(source.folder):
        raise DataError(f"{source.folder}: holds shards; expected the folder that they were made from")
    trajectories, infos = {}, []
    for split in splits:
        trajectories[split], info = open_source(source, split)
        infos.append(replace(info, fps=source.fps or info.fps))
    if infos[0].actions.kind != "motion":
        raise DataError(f"{source.folder}: shards hold poses, not actions such as {infos[0].actions.names[0]}")
    info = replace(infos[0], has_actions=trajectories[splits[0]][0].position is not None)
    if not (folder / DATASET).is_file():
        info.name = folder.resolve().name
    if there and there.info != info:
        raise UserError(f"{out}: contains shards of another dataset, according to its dataset.json")
    cache = None
    if content != "frames":
        cache = LatentCache.open(folder)
        if cache is None:
            raise UserError(f"{folder}: has no latents; make them with `python -m cdit.data.encode`")
    with writing(out):
        info.save(out)
        options = hashlib.sha256(repr(asdict(source)).encode()).hexdigest()[:16]
        made = out / WORK / f"frames_{options}"  # where frames of other options are not found
        for split in splits:
            finished[split] = _Split(out, split, trajectories[split], content, cache, shard_mb, made).write()
        index = {"version": FORMAT_VERSION, "splits": {name: asdict(record) for name, record in finished.items()}}
        write_json(out / DESCRIPTION, index, indent=1)
    shutil.rmtree(out / WORK, ignore_errors=True)


@dataclass(frozen=True)
class _Entry:
    """A file to write: that of a frame, or the latents of a trajectory."""

    name: str
    source: Path
    size: int
    modified: int
    is_latents: bool

    @property
    def room(self) -> int:
        """Bytes in the shard."""
        return BLOCK + -(-self.size // BLOCK) * BLOCK


class _Split:
    """One split being written."""

    def __init__(
        self,
        out: Path,
        name: str,
        trajectories: Sequence[TrajectorySource],
        content: Content,
        cache: LatentCache | None,
        shard_mb: float,
        made: Path,
    ):
        self.made = made
        self.out, self.name, self.trajectories = out, name, trajectories
        self.has_frames, self.cache, self.target = content != "latents", cache, shard_mb * 1e6
        self.latent_shape: tuple[int, ...] = ()

    def write(self) -> SplitRecord:
        """Writes shards and table."""
        work = self.out / WORK
        work.mkdir(parents=True, exist_ok=True)
        entries = [self._entries(trajectory) for trajectory in self.trajectories]
        groups = _groups([sum(entry.room for entry in group) for group in entries], self.target)
        records, offsets = [], []
        total = sum(entry.room for group in entries for entry in group)
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"{self.out} {self.name}") as bar:
            for number, group in enumerate(groups):
                file = f"{self.name}-{number:05d}.tar"
                record, found = self._shard(file, [entry for i in group for entry in entries[i]], work / f"{file}.json")
                trajectories = {self.trajectories[i].name: len(self.trajectories[i]) for i in group}
                records.append(ShardRecord(**vars(record), trajectories=trajectories))
                offsets += found
                bar.update(record.bytes - 2 * BLOCK)
        table = self._table([entry for group in entries for entry in group], offsets)
        path = self.out / f"{self.name}.safetensors"
        write_whole(path, save(table))
        return SplitRecord(
            table=FileRecord(path.name, path.stat().st_size, sha256(path)),
            shards=records,
            frames=self.has_frames,
            poses="position" in table,
            latents=self.cache.info if self.cache else None,
            latent_shape=self.latent_shape,
        )

    def _entries(self, trajectory: TrajectorySource) -> list[_Entry]:
        """The files of a trajectory."""
        files: dict[str, Path] = {}
        if self.has_frames:
            in_files = _in_files(trajectory, self.made)
            for time in range(len(trajectory)):
                file = in_files.frame(time)
                files[f"{trajectory.name}/{time:06d}{file.suffix.lower()}"] = file
        entries = [_Entry(name, file, *_size_and_time(file), is_latents=False) for name, file in files.items()]
        if self.cache:
            if problem := self.cache.problem(trajectory):
                raise DataError(f"{problem}; make it again with `python -m cdit.data.encode`")
            file = self.cache.file(trajectory)
            with opened(file) as latents:
                shape = tuple(latents.get_slice(TENSOR).get_shape())
            if self.latent_shape not in ((), shape[1:]):
                raise DataError(f"{file}: latents of a different shape than before, {shape[1:]}")
            self.latent_shape = shape[1:]
            dtype = self.cache.info.dtype
            size = len(_npy_header(shape, dtype)) + math.prod(shape) * dtype.itemsize
            name = f"{trajectory.name}/{LATENTS}"
            entries.append(_Entry(name, file, size, _size_and_time(file)[1], is_latents=True))
        return entries

    def _shard(self, file: str, entries: Sequence[_Entry], done: Path) -> tuple[FileRecord, list[int]]:
        """Writes a shard, unless it exists, and the offsets of its files."""
        listed = json.dumps([[entry.name, entry.size, entry.modified] for entry in entries])
        of = hashlib.sha256(listed.encode()).hexdigest()
        offsets = (np.cumsum([0, *(entry.room for entry in entries[:-1])]) + BLOCK).tolist()
        path = self.out / file
        if done.is_file() and path.is_file():
            before = read_json(done)
            if before["of"] == of and path.stat().st_size == before["bytes"]:
                return FileRecord(file, before["bytes"], before["sha256"]), offsets
        digest = hashlib.sha256()
        partial = path.with_name(f".{file}.partial")
        with open(partial, "wb") as shard:
            for part in _tar(entries):
                digest.update(part)
                shard.write(part)
            shard.flush()
            os.fsync(shard.fileno())
        record = FileRecord(file, partial.stat().st_size, digest.hexdigest())
        os.replace(partial, path)
        write_json(done, {"of": of, "bytes": record.bytes, "sha256": record.sha256})
        return record, offsets

    def _table(self, entries: Sequence[_Entry], offsets: Sequence[int]) -> dict[str, Tensor]:
        """Offsets and poses of the split."""
        is_latents = torch.tensor([entry.is_latents for entry in entries])
        offset, size = torch.tensor(offsets), torch.tensor([entry.size for entry in entries])
        table = {}
        if self.has_frames:
            table |= {"offset": offset[~is_latents], "size": size[~is_latents]}
        if self.cache:
            table["latents"] = offset[is_latents]
        if self.trajectories[0].position is not None:
            for key in ("position", "yaw"):
                table[key] = torch.from_numpy(np.concatenate([getattr(t, key) for t in self.trajectories]))
        texts = [text for t in self.trajectories for text in t.texts or [""] * len(t)]
        if any(texts):
            rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
            table["text"] = torch.tensor([rows[text] for text in texts])
            table["texts"] = torch.frombuffer(bytearray(json.dumps(list(rows)).encode()), dtype=torch.uint8)
        of_each = [{(name, x.shape[1:], x.dtype) for name, x in t.conditions.items()} for t in self.trajectories]
        for name, *_ in set.intersection(*of_each):
            table[CONDITION + name] = torch.from_numpy(np.concatenate([t.conditions[name] for t in self.trajectories]))
        return table


def _in_files(trajectory: TrajectorySource, folder: Path) -> Trajectory:
    """A trajectory with a file for each frame: its own, or JPEGs in the folder."""
    if isinstance(trajectory, Trajectory):
        return trajectory
    name, length = trajectory.name, len(trajectory)
    if not (folder / name).is_dir():
        parts = (trajectory.frames(range(start, min(start + CHUNK, length))) for start in range(0, length, CHUNK))
        write_trajectory(folder, name, (frame.permute(1, 2, 0).numpy() for part in parts for frame in part))
    return Trajectory(name, folder / name, np.array([f"{time}.jpg" for time in range(length)]), None, None)


def _tar(entries: Iterable[_Entry]) -> Iterator[bytes]:
    """The bytes of a shard."""
    for entry in entries:
        header = tarfile.TarInfo(entry.name)
        header.size = entry.size
        try:
            yield header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
        except ValueError as error:
            raise DataError(f"{entry.source}: does not fit into a shard ({error})") from error
        content = _npy(entry.source) if entry.is_latents else entry.source.read_bytes()
        if len(content) != entry.size:
            raise DataError(f"{entry.source}: changed while it was read")
        yield content
        yield bytes(-len(content) % BLOCK)
    yield bytes(2 * BLOCK)


def _npy(file: Path) -> bytes:
    with opened(file) as latents:
        numbers = latents.get_tensor(TENSOR)
    return _npy_header(tuple(numbers.shape), numbers.dtype) + numbers.numpy().tobytes()


def _npy_header(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    header = io.BytesIO()
    descr = {torch.float16: "<f2", torch.float32: "<f4"}[dtype]
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue()


def _size_and_time(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _groups(sizes: Sequence[int], target: float) -> list[list[int]]:
    """Groups consecutive indices whose sizes add up to at most the target; larger ones are single."""
    groups: list[list[int]] = []
    room = 0.0
    for index, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = target
        groups[-1].append(index)
        room -= size
    return groups


def verify(location: str, decode_frames: bool = True) -> tuple[list[str], str]:
    """Reads everything, with a progress bar, and compares checksums and contents with the tables.

    Returns:
        The problems, one line each, naming the file; and a summary.

    Raises:
        DataError: the index is missing or damaged.
    """
    shards = Shards(location)
    problems, counts = [], []
    try:
        shards.info  # noqa: B018
    except DataError as error:
        problems.append(str(error))
    for split, record in shards.splits.items():
        try:
            table = shards.file(record.table)
            if problem := _file_problem(table, record.table):
                problems.append(problem)
            trajectories = shards.trajectories(split)
        except UserError as error:
            problems.append(str(error))
            continue
        counts.append(f"{split}: {len(trajectories)} trajectories, {sum(map(len, trajectories))} frames")
        with tqdm(record.shards, split, unit="shard", leave=False) as bar:
            for shard in bar:
                found = [trajectory for trajectory in trajectories if trajectory.shard.record is shard]
                problems += _shard_problems(shards, shard, found, decode_frames)
    return problems, "; ".join(counts)


def _file_problem(path: Path, record: FileRecord) -> str | None:
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != record.bytes:
        return f"{path}: {path.stat().st_size} bytes, expected {record.bytes}"
    return None if sha256(path) == record.sha256 else f"{path}: damaged (checksum mismatch)"


def _shard_problems(
    shards: Shards, record: ShardRecord, trajectories: Sequence[ShardTrajectory], decode_frames: bool
) -> list[str]:
    try:
        path = shards.file(record)
    except UserError as error:
        return [str(error)]
    if problem := _file_problem(path, record):
        return [problem]
    problems: list[str] = []
    for trajectory in trajectories:
        if decode_frames and trajectory.offset is not None:
            with ThreadPoolExecutor() as threads:
                problems += frame_problems(trajectory, f"{trajectory.shard}:{trajectory.name}", threads)
        if trajectory.latents is not None:
            try:
                LatentMember(trajectory).read([0, len(trajectory) - 1])
            except DataError as error:
                problems.append(str(error))
    return problems
