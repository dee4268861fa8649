"""LeRobot datasets, version 3.0 (https://huggingface.co/docs/lerobot/lerobot-dataset-v3), of any robot.

    <folder>/meta/info.json                 features, frame rate, and where the other files are
    <folder>/meta/stats.json                smallest and largest numbers of each feature
    <folder>/meta/tasks.parquet             descriptions of the tasks, by `task_index` of the rows; optional
    <folder>/meta/episodes/…/*.parquet      the episodes: where their rows and videos are
    <folder>/data/…/*.parquet               the rows, one for each frame of an episode
    <folder>/videos/<camera>/…/*.mp4        the frames, several episodes in a file

Needs pyarrow: `pip install "cdit[lerobot]"`. Names of trajectories are episode_000000, …; the splits are those of
`splits/<split>/traj_names.txt`, or those of info.json if it has several, or else the last tenth of the episodes is
`test`. Frames are taken at `data.fps`, of which the recorded rate must be a multiple.

The state [x, y, yaw] of a dataset written by `cdit.data.to_lerobot` are poses, and actions are motion; in all other
datasets the feature `data.action_key` gives the actions (see `cdit.data.action_space`). Further features with numbers
become conditions (see `TrajectorySource`).
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdit.common.errors import DataError, UserError
from cdit.common.files import check_inside, read_json
from cdit.data.action_space import MAX_NUMBER, ActionKind, ActionSpace
from cdit.data.layout import DatasetInfo
from cdit.data.source import DatasetSource, Opened, register_source
from cdit.data.trajectory import checked_poses, listed_problems, read_names
from cdit.data.video import frame_time, open_readers, rgb, video_errors

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

VERSION = "v3.0"
INFO, STATS, EPISODES, TASKS = "meta/info.json", "meta/stats.json", "meta/episodes", "meta/tasks.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
STATE, POSE = "observation.state", ["x", "y", "yaw"]
"""The feature that holds poses, and the names of its numbers."""
BOOKKEEPING = {"timestamp", "frame_index", "episode_index", "index"}


@dataclass(frozen=True)
class Episode:
    """A `TrajectorySource` that reads frames from its part of a video."""

    name: str
    path: Path
    """The video."""
    start: float
    """Time of the first frame in the video, in seconds."""
    fps: Fraction
    """Frames per second of the video."""
    stride: int
    """Stride in recorded frames: one of this many is used."""
    length: int
    position: np.ndarray | None = None
    yaw: np.ndarray | None = None
    actions: np.ndarray | None = None
    conditions: Mapping[str, np.ndarray] = field(default_factory=dict)
    texts: Sequence[str] = ()
    dataset = shard = None

    def __len__(self) -> int:
        return self.length

    def frames(self, times: Sequence[int]) -> "Tensor":
        """Frames (N, 3, H, W) uint8; fastest for times close together."""
        import torch

        from cdit.data.frames import stack

        reader = open_readers(os.getpid())(self.path)
        images = {}
        with video_errors(self.path):
            for time in sorted(times):
                # Time stamps are rounded: asks for the frame shown half a frame later.
                at = Fraction(self.start) + (time * self.stride + Fraction(1, 2)) / self.fps
                shown = reader.shown_at(at)
                if reader.start + at - frame_time(shown, self.path) > 1 / self.fps:
                    raise DataError(f"{self.path}: no frame at {float(at):.3f} s, of frame {time} of {self.name}")
                images[time] = torch.from_numpy(rgb(shown)).permute(2, 0, 1)
        return stack([images[time] for time in times], self.path)


@register_source("lerobot")
class LeRobotSource(DatasetSource):
    """A LeRobot dataset in a folder, see `cdit.data.lerobot`."""

    @staticmethod
    def open(
        folder: str,
        split: str,
        *,
        splits: str | None = None,
        follow_links: bool = False,
        fps: float | None = None,
        camera: str | None = None,
        action_key: str = "action",
        action_kind: ActionKind = "absolute",
        **_: Any,
    ) -> Opened:
        """See `DatasetSource.open`."""
        return _Dataset(Path(folder), follow_links, fps).open(split, splits, camera, action_key, action_kind)


def split_ranges(folder: Path) -> dict[str, str]:
    """The splits of a dataset's info.json, such as {"train": "0:80", "test": "80:100"}; none if there is only one."""
    info = read_json(folder / INFO)
    return _ranges(info) if isinstance(info, dict) else {}


def _ranges(info: dict[str, Any]) -> dict[str, str]:
    listed = info.get("splits")
    return listed if isinstance(listed, dict) and len(listed) > 1 else {}


class _Dataset:
    def __init__(self, folder: Path, follow_links: bool, fps: float | None):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such dataset folder")
        self.folder, self.follow_links = folder, follow_links
        self.file = folder / INFO
        info = read_json(self.inside(self.file))
        if not isinstance(info, dict) or info.get("codebase_version") != VERSION:
            version = info.get("codebase_version") if isinstance(info, dict) else None
            raise DataError(f"{self.file}: codebase_version is {version!r}, expected {VERSION!r}")
        for name, kind in {"fps": int | float, "features": dict}.items():
            if not isinstance(info.get(name), kind):
                raise DataError(f"{self.file}: {name} is missing or of another type")
        if info.get("video_path") != VIDEO_PATH:
            raise DataError(f"{self.file}: video_path is {info.get('video_path')!r}, expected {VIDEO_PATH!r}")
        self.info, self.features = info, info["features"]
        self.recorded = Fraction(info["fps"]).limit_denominator(10**6)
        if not 0 < self.recorded <= 10**6:
            raise DataError(f"{self.file}: fps is {info['fps']}, expected more than 0")
        self.stride = round(float(self.recorded) / (fps or float(self.recorded)))
        if self.stride < 1 or abs(float(self.recorded) / self.stride - (fps or float(self.recorded))) > 1e-3:
            raise DataError(f"{folder}: fps is {fps:g}, expected {float(self.recorded):g} divided by a whole number")

    def open(
        self, split: str, splits: str | None, camera: str | None, action_key: str, kind: ActionKind
    ) -> tuple[list[Episode], DatasetInfo]:
        camera = self.camera(camera)
        has_poses = self.numbers(STATE) == POSE
        info = DatasetInfo(self.folder.name)
        if "cdit" in self.info:  # written by to_lerobot
            info = DatasetInfo.parse(json.dumps(self.info["cdit"]), self.file)
            kind = kind if info.actions.kind == "motion" else info.actions.kind
        info.fps, info.has_actions = float(self.recorded) / self.stride, has_poses
        if has_poses:
            info.actions = ActionSpace()
        elif action_key in self.features or action_key != "action":
            info.actions, info.has_actions = self.action_space(action_key, kind), True
        # Conditions are what is left of the features with numbers.
        columns = {name for name in self.features if self.numbers(name) is not None} - BOOKKEEPING
        if has_poses:
            columns.discard("action")
        rows, self.tasks = self.read_rows(columns), self.read_tasks()
        problems, trajectories = [], []
        episodes = self.episodes(camera)
        for number in self.split(split, splits, sorted(episodes)):
            try:
                name = f"episode_{number:06d}"
                if number not in episodes or number not in rows:
                    raise DataError(f"{self.folder}: {name} of split {split!r} is not in {EPISODES} or not in the data")
                space = info.actions if info.has_actions else None
                trajectories.append(self.episode(name, episodes[number], rows[number], action_key, space))
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise listed_problems(str(self.folder), split, problems)
        return trajectories, info

    def episode(
        self, name: str, where: Mapping, columns: dict[str, np.ndarray], action_key: str, space: ActionSpace | None
    ) -> Episode:
        recorded = len(columns["episode_index"])
        if where["length"] != recorded:
            raise DataError(f"{self.folder}: {name} has {recorded} rows in the data, but length {where['length']}")
        length = recorded // self.stride
        taken = slice(0, length * self.stride, self.stride)
        position = yaw = actions = None
        numbers = {key: values for key, values in columns.items() if key not in BOOKKEEPING}
        if space is not None and space.kind == "motion":
            state = numbers.pop(STATE)[taken]
            position, yaw, _ = checked_poses({"position": state[:, :2], "yaw": state[:, 2]}, self.folder / name)
        elif space is not None:
            values = numbers.pop(action_key).astype(np.float64).reshape(recorded, -1)
            if values.shape[1] != len(space.names):
                raise DataError(f"{self.folder}: {name}: {action_key} has {values.shape[1]} numbers, not as in {INFO}")
            if not (np.abs(values) <= MAX_NUMBER).all():
                raise DataError(f"{self.folder}: {name}: {action_key} is not finite, or beyond {MAX_NUMBER:g}")
            steps = values[: length * self.stride].reshape(length, self.stride, -1)
            actions = steps.sum(axis=1) if space.kind == "sum" else steps[:, -1]
        conditions = {key: values[taken] for key, values in numbers.items()}
        texts = [self.tasks.get(task, "") for task in np.ravel(conditions.get("task_index", ())).tolist()]
        start = float(where["start"])
        return Episode(
            name, where["path"], start, self.recorded, self.stride, length, position, yaw, actions, conditions, texts
        )

    def inside(self, path: Path) -> Path:
        """A path of the dataset, which must not point outside it."""
        if not self.follow_links:
            check_inside(path, self.folder)
        return path

    def camera(self, wanted: str | None) -> str:
        cameras = [x for x, feature in self.features.items() if _get(feature, "dtype") == "video" and "/" not in x]
        if not cameras or wanted not in (None, *cameras):
            listed = ", ".join(cameras) or "none"
            raise DataError(f"{self.file}: data.camera is {wanted}, expected a feature of dtype video ({listed})")
        return wanted or cameras[0]

    def numbers(self, name: str) -> list[str] | None:
        """Names of the numbers of a feature; None if it has none, or an array of them."""
        feature = self.features.get(name)
        shape, kind = _get(feature, "shape"), str(_get(feature, "dtype"))
        if not isinstance(shape, list) or len(shape) != 1 or not isinstance(shape[0], int):
            return None
        if not kind.startswith(("float", "int", "uint", "bool")):
            return None
        names = _get(feature, "names")
        if isinstance(names, dict):  # {"motors": […]}
            names = next(iter(names.values()), None)
        if not isinstance(names, list) or len(names) != shape[0] or not all(isinstance(one, str) for one in names):
            names = [f"{name}.{i}" for i in range(shape[0])]
        return names

    def action_space(self, key: str, kind: ActionKind) -> ActionSpace:
        names = self.numbers(key)
        if names is None:
            raise DataError(f"{self.file}: data.action_key is {key}, expected a feature with a vector of numbers")
        file = self.inside(self.folder / STATS)
        stats = _get(read_json(file), key)
        try:
            low, high = (
                np.asarray(_get(stats, name), np.float64).reshape(len(names)).tolist() for name in ("min", "max")
            )
        except (TypeError, ValueError) as error:
            raise DataError(f"{file}: {key}: expected min and max of {len(names)} numbers") from error
        if kind == "sum":  # of a step of stride frames
            low, high = [x * self.stride for x in low], [x * self.stride for x in high]
        units = _get(self.features[key], "units")
        if not isinstance(units, list) or len(units) != len(names) or not all(isinstance(one, str) for one in units):
            units = [""] * len(names)
        space = ActionSpace(names, units, low, high, kind)
        if len(set(names)) < len(names) or len(names) > 64 or space.problem():
            raise DataError(f"{file}: {key}: {space.problem() or 'expected up to 64 different names'}")
        return space

    def split(self, split: str, splits: str | None, episodes: list[int]) -> list[int]:
        listed = _ranges(self.info)
        if splits is not None or (self.folder / "splits").is_dir():
            names = read_names(self.folder, split, splits)
            numbers = [name.removeprefix("episode_") for name in names]
            if bad := [name for name, number in zip(names, numbers, strict=True) if not number.isdecimal()]:
                raise DataError(f"{self.folder}: split {split!r} lists {bad[0]}, expected names such as episode_000000")
            return [int(number) for number in numbers]
        if listed:
            first, _, stop = str(listed.get(split)).partition(":")
            if not (first.isdecimal() and stop.isdecimal()):
                raise DataError(f"{self.file}: splits has no {split!r} with a range such as 0:10")
            return list(range(int(first), int(stop)))
        test = max(1, len(episodes) // 10)
        found = {"train": episodes[:-test], "test": episodes[-test:]}.get(split)
        if not found:
            raise DataError(f"{self.folder}: no split {split!r} can be made of {len(episodes)} episodes")
        return found

    def episodes(self, camera: str) -> dict[int, dict[str, Any]]:
        """Length, video and start of every episode."""
        video = f"videos/{camera}/"
        columns = ["episode_index", "length", *(video + x for x in ("chunk_index", "file_index", "from_timestamp"))]
        found = {}
        for file, table in self.tables(EPISODES, columns):
            for number, length, chunk, index, start in zip(*(table[x].to_pylist() for x in columns), strict=True):
                with _as_data_error(file):
                    if not 0 <= start < MAX_NUMBER:
                        raise ValueError(f"from_timestamp is {start}")
                    path = VIDEO_PATH.format(video_key=camera, chunk_index=chunk, file_index=index)
                    found[number] = {
                        "length": length, "path": self.inside(self.folder / path), "start": float(start)
                    }  # fmt: skip
        return found

    def read_rows(self, columns: set[str]) -> dict[int, dict[str, np.ndarray]]:
        """The columns of every episode, in the order of its frames."""
        parts: dict[int, list[dict[str, np.ndarray]]] = {}
        for file, table in self.tables("data", sorted(columns | {"episode_index", "frame_index"})):
            with _as_data_error(file):
                arrays = {name: _array(table[name]) for name in table.column_names}
            numbers = arrays["episode_index"]
            cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
            for start, stop in pairwise(cuts):
                part = {name: values[start:stop] for name, values in arrays.items()}
                parts.setdefault(int(numbers[start]), []).append(part)
        episodes = {}
        for number, found in parts.items():
            joined = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
            if not np.array_equal(joined["frame_index"], np.arange(len(joined["frame_index"]))):
                raise DataError(f"{self.folder}: data of episode {number}: frame_index does not count from 0")
            episodes[number] = joined
        return episodes

    def read_tasks(self) -> dict[int, str]:
        """The text description of each task."""
        file, tasks = self.folder / TASKS, {}
        if file.is_file():
            table = self.table(file)
            with _as_data_error(file):
                name = "task" if "task" in table.column_names else "__index_level_0__"  # the index of a pandas table
                texts = [text.strip() for text in table[name].to_pylist()]
                tasks = dict(zip(table["task_index"].to_pylist(), texts, strict=True))
        return tasks

    def tables(self, folder: str, columns: Sequence[str]) -> Iterator[tuple[Path, "pa.Table"]]:
        """The columns of all parquet files of a folder, in order."""
        files = sorted((self.folder / folder).glob("chunk-*/file-*.parquet"))
        if not files:
            raise DataError(f"{self.folder / folder}: no chunk-*/file-*.parquet")
        for file in files:
            yield file, self.table(file, columns)

    def table(self, file: Path, columns: Sequence[str] | None = None) -> "pa.Table":
        """The columns of a parquet file, by default all."""
        import_pyarrow()
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            parquet = pq.ParquetFile(self.inside(file))
            if missing := [name for name in columns or () if name not in parquet.schema_arrow.names]:
                raise DataError(f"{file}: has no column {missing[0]}")
            return parquet.read(columns=columns and list(columns))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def import_pyarrow() -> None:
    """Raises a UserError if pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError('LeRobot datasets need pyarrow: pip install "cdit[lerobot]"') from error


@contextmanager
def _as_data_error(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise DataError(f"{file}: not in the format of LeRobot {VERSION} ({error})") from error


def _get(mapping: Any, name: str) -> Any:
    return mapping.get(name) if isinstance(mapping, dict) else None


def _array(column: "pa.ChunkedArray") -> np.ndarray:
    """(N,) or (N, K) numbers of a column of numbers or of lists of K numbers."""
    import pyarrow as pa

    column = column.combine_chunks()
    if column.null_count:
        raise ValueError("empty values")
    if not pa.types.is_nested(column.type):
        return column.to_numpy(zero_copy_only=False)
    flat = column.flatten()
    if flat.null_count or (len(column) and len(flat) % len(column)):
        raise ValueError("lists of different lengths")
    if pa.types.is_list(column.type) and len(set(np.diff(column.offsets.to_numpy()))) > 1:
        raise ValueError("lists of different lengths")
    return flat.to_numpy(zero_copy_only=False).reshape(len(column), -1)
