"""Writes a dataset in the format of LeRobot, version 3.0 (see `cdit.data.lerobot`).

    python -m cdit.data.to_lerobot FOLDER OUT

Poses become observation.state (x, y, yaw), and the motion from each frame to the next the action (dx, dy, dyaw); other
actions keep their names. Each trajectory is an episode with a video of its own. The dataset's description is kept in
info.json, so `data.source: lerobot` reads the same poses and actions again. Needs pyarrow
(`pip install "cdit[lerobot]"`).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from cdit.common.cli import parse_config, run
from cdit.common.errors import DataError, UserError, writing
from cdit.common.files import write_json
from cdit.common.options import names
from cdit.data.config import StoredDataset
from cdit.data.lerobot import EPISODES, INFO, POSE, STATE, STATS, TASKS, VERSION, VIDEO_PATH, import_pyarrow

if TYPE_CHECKING:
    from cdit.data.action_space import ActionSpace
    from cdit.data.source import TrajectorySource

CAMERA = "observation.images.camera"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
CHUNK = 1000
"""Files in a folder."""
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
BATCH = 64
"""Frames that are read at a time."""


@dataclass(kw_only=True)
class ToLeRobotConfig(StoredDataset):
    """What to write."""

    out: str
    """The folder to write to, which must not exist yet."""
    split: str | None = None
    """Splits to write, separated by commas; by default all that the dataset lists."""
    task: str | None = None
    """Task description where the dataset has no text; by default the dataset's name."""


def to_lerobot(source: StoredDataset, out: Path, splits: Sequence[str] | None = None, task: str | None = None) -> int:
    """Writes splits of a dataset, by default all, one after the other; returns the number of episodes.

    Raises:
        UserError: `out` exists, or pyarrow is missing.
        DataError: the dataset has problems, frames of an odd size, or of different sizes.
    """
    import_pyarrow()
    from cdit.data.sources import listed_splits, open_source  # imports torch

    if out.exists():
        raise UserError(f"{out}: exists; remove it, or choose another folder")
    trajectories: list[TrajectorySource] = []
    ranges, info = {}, None
    for split in splits or listed_splits(source):
        found, info = open_source(source, split)
        info = replace(info, fps=source.fps or info.fps)
        ranges[split] = f"{len(trajectories)}:{len(trajectories) + len(found)}"
        trajectories += found
    space = info.actions if info.actions.recorded(trajectories[0]) else None
    has_poses = trajectories[0].position is not None
    task, start, size = task or info.name, 0, None
    rows, episodes, pictures, tasks = [], [], [], {}
    with writing(out):
        for number, trajectory in enumerate(tqdm(trajectories, unit="episode")):
            path = VIDEO_PATH.format(video_key=CAMERA, chunk_index=number // CHUNK, file_index=number % CHUNK)
            sample = _write_video(out / path, trajectory, info.fps)
            if size not in (None, sample.shape[1:3]):
                raise DataError(f"{source.folder}: {trajectory.name} has frames of another size than the first")
            size, length = sample.shape[1:3], len(trajectory)
            texts = [text or task for text in trajectory.texts or [""] * length]
            for text in texts:
                tasks.setdefault(text, len(tasks))
            columns = {
                **_numbers(trajectory, space, has_poses),
                "timestamp": (np.arange(length) / info.fps).astype(np.float32),
                "frame_index": np.arange(length),
                "episode_index": np.full(length, number),
                "index": start + np.arange(length),
                "task_index": np.array([tasks[text] for text in texts]),
            }
            statistics = {CAMERA: _of_pixels(sample), **{key: _statistics(x) for key, x in columns.items()}}
            rows.append(columns)
            pictures.append(sample[:: max(1, len(sample) // 8)])
            episodes.append({
                "episode_index": number,
                "tasks": list(dict.fromkeys(texts)),
                "length": length,
                "data/chunk_index": 0,
                "data/file_index": 0,
                "dataset_from_index": start,
                "dataset_to_index": start + length,
                f"videos/{CAMERA}/chunk_index": number // CHUNK,
                f"videos/{CAMERA}/file_index": number % CHUNK,
                f"videos/{CAMERA}/from_timestamp": 0.0,
                f"videos/{CAMERA}/to_timestamp": length / info.fps,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
                **{f"stats/{key}/{name}": x for key, found in statistics.items() for name, x in found.items()},
            })  # fmt: skip
            start += length
        joined = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
        _write_tables(out, joined, episodes, tasks)
        statistics = {
            CAMERA: _of_pixels(np.concatenate(pictures)),
            **{key: _statistics(x) for key, x in joined.items()},
        }
        write_json(out / STATS, statistics, indent=4)
        whole = info.fps == int(info.fps)
        write_json(out / INFO, {
            "codebase_version": VERSION,
            "robot_type": None,
            "total_episodes": len(episodes),
            "total_frames": start,
            "total_tasks": len(tasks),
            "chunks_size": CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": int(info.fps) if whole else info.fps,
            "splits": ranges,
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": _features(joined, size, space, info.fps),
            "cdit": asdict(info),
        }, indent=4)  # fmt: skip
    return len(episodes)


def _numbers(trajectory: "TrajectorySource", space: "ActionSpace | None", has_poses: bool) -> dict[str, np.ndarray]:
    """State and action of every frame; the last frame's action, which leads nowhere, is 0 or repeated."""
    found = {}
    if has_poses:
        state = np.column_stack((trajectory.position, trajectory.yaw))
        found[STATE] = np.asarray(state, np.float64)  # float32 would round poses in a large world
    if space is not None and space.kind == "motion":
        last = len(trajectory) - 1
        times = np.arange(len(trajectory))
        found["action"] = space.between(trajectory, times, np.minimum(times + 1, last)).astype(np.float32)
    elif space is not None:
        found["action"] = np.asarray(trajectory.actions, np.float32)
    return found


def _features(
    columns: dict[str, np.ndarray], size: tuple[int, int], space: "ActionSpace | None", fps: float
) -> dict[str, Any]:
    height, width = size
    video = {
        "video.height": height, "video.width": width, "video.codec": "h264", "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False, "video.fps": fps, "video.channels": 3, "has_audio": False,
    }  # fmt: skip
    features: dict[str, Any] = {
        CAMERA: {
            "dtype": "video", "shape": [height, width, 3], "names": ["height", "width", "channels"], "info": video
        }
    }  # fmt: skip
    named = {STATE: (POSE, ["m", "m", "rad"]), "action": (space.names, space.units) if space else None}
    for key, values in columns.items():
        shape = list(values.shape[1:]) or [1]
        features[key] = {"dtype": str(values.dtype), "shape": shape, "names": None}
        if named.get(key):
            features[key] |= dict(zip(("names", "units"), named[key], strict=True))
    return features


def _write_video(path: Path, trajectory: "TrajectorySource", fps: float) -> np.ndarray:
    """Writes the frames as H.264; returns about 16 of them, (N, H, W, 3) uint8."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    every, kept = max(1, len(trajectory) // 16), []
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "16", "g": "2", "bf": "0"}  # seeks are short
        for time, frame in enumerate(_frames(trajectory)):
            height, width = frame.shape[:2]
            if height % 2 or width % 2:
                raise DataError(f"{trajectory.name}: frames of {height}×{width}, expected even numbers of pixels")
            if time == 0:
                stream.height, stream.width = height, width
            if (height, width) != (stream.height, stream.width):
                raise DataError(f"{trajectory.name}: frames of different sizes")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            if time % every == 0:
                kept.append(frame)
        container.mux(stream.encode())
    return np.stack(kept)


def _frames(trajectory: "TrajectorySource") -> Iterator[np.ndarray]:
    for start in range(0, len(trajectory), BATCH):
        times = range(start, min(start + BATCH, len(trajectory)))
        yield from np.ascontiguousarray(trajectory.frames(times).permute(0, 2, 3, 1).numpy())


def _statistics(values: np.ndarray) -> dict[str, Any]:
    """Of each of the numbers (N,) or (N, K)."""
    x = np.asarray(values, np.float64).reshape(len(values), -1)
    found = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
    found |= {name: np.quantile(x, q, axis=0) for name, q in QUANTILES.items()}
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(x)]}


def _of_pixels(frames: np.ndarray) -> dict[str, Any]:
    """Of each channel, in [0, 1], as lists (3, 1, 1); the count is that of frames."""
    found = _statistics(frames.reshape(-1, 3) / 255)
    lists = {name: [[[x]] for x in value] for name, value in found.items() if name != "count"}
    return lists | {"count": [len(frames)]}


def _write_tables(
    out: Path, columns: dict[str, np.ndarray], episodes: list[dict[str, Any]], tasks: dict[str, int]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column(values: np.ndarray) -> "pa.Array":
        if values.ndim == 1:
            return pa.array(values)
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])

    first = {"chunk_index": 0, "file_index": 0}
    tables = {
        DATA_PATH.format(**first): pa.table({key: column(values) for key, values in columns.items()}),
        f"{EPISODES}/chunk-000/file-000.parquet": pa.Table.from_pylist(episodes),
    }
    # LeRobot reads the tasks with pandas: rows by task.
    index = "__index_level_0__"
    described = [
        {"name": name, "field_name": field, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, field, kind, numpy in (
            ("task_index", "task_index", "int64", "int64"), (None, index, "unicode", "object"),
        )
    ]  # fmt: skip
    pandas = {"index_columns": [index], "column_indexes": [], "columns": described, "pandas_version": "2.0.0"}
    table = pa.table({"task_index": pa.array(list(tasks.values())), index: pa.array(list(tasks))})
    tables[TASKS] = table.replace_schema_metadata({"pandas": json.dumps(pandas)})
    for path, table in tables.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, out / path)


def main() -> None:
    """The command line."""
    config = parse_config(ToLeRobotConfig, __doc__, positional=True)
    count = to_lerobot(config, Path(config.out), names(config.split), config.task)
    print(f"{config.out}: {count} episodes")


if __name__ == "__main__":
    run(main)
