"""Trajectories on disk, in the layout of GNM, NoMaD and NWM (RECON, SCAND, HuRoN, TartanDrive):

    <folder>/dataset.json                      what the dataset is; optional
    <folder>/splits/<split>/traj_names.txt     one trajectory name per line
    <folder>/<trajectory>/0.jpg, 1.jpg, …      the frames, in time order
    <folder>/<trajectory>/traj_data.pkl        dict(position (T, 2) metres, yaw (T,) radians); absent without poses
    <folder>/<trajectory>/text.txt             text description of what is done; optional

At yaw 0 the camera looks along +x; yaw grows counter-clockwise; positions are world coordinates.
"""

import os
import pickle
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from cdit.common.cli import parser_instance
from cdit.common.errors import DataError
from cdit.common.files import parse_json, read_text, write_json, write_whole
from cdit.common.limits import Limit, Positive, within
from cdit.data.action_space import ActionSpace

FORMAT_VERSION = 1
POSES = "traj_data.pkl"
TEXT = "text.txt"
DESCRIPTION = "dataset.json"
LATENTS = "latents"
"""Folder of the latent cache (see cdit.data.latents)."""


@dataclass
class Camera:
    """A pinhole camera with square pixels, as the recorded frames show it (after cropping)."""

    width: Annotated[int, within(1, 2**16)]
    height: Annotated[int, within(1, 2**16)]
    horizontal_fov: Annotated[float, Limit("between 0 and π", lambda x: 0 < x < np.pi)]
    """Full horizontal field of view in radians."""
    eye_height: Annotated[float, within(-1e6, 1e6)]
    """Height of the camera above the floor in metres."""
    pitch: Annotated[float, within(-np.pi, np.pi)] = 0.0
    """Angle of the optical axis above the horizon in radians."""

    @property
    def focal_length(self) -> float:
        """Focal length in pixels: width / 2 / tan(horizontal_fov / 2)."""
        return self.width / 2 / float(np.tan(self.horizontal_fov / 2))


@dataclass
class DatasetInfo:
    """The contents of `dataset.json`."""

    name: str
    fps: Positive[Annotated[float, within(0, 1e6)]] = 4.0
    """Recorded frames per second."""
    metric_waypoint_spacing: Positive[Annotated[float, within(0, 1e6)]] | None = None
    """Typical distance between consecutive frames in metres, the unit of normalised actions; None without poses."""
    has_actions: bool = True
    """Whether trajectories carry poses, or the numbers of `actions`."""
    actions: ActionSpace = field(default_factory=ActionSpace)
    """What actions are made of."""
    camera: Camera | None = None
    source: dict[str, Any] = field(default_factory=dict)
    """How the dataset was made: recipe options, maps, seed, engine version."""
    version: int = FORMAT_VERSION

    def save(self, folder: Path, name: str = DESCRIPTION) -> None:
        """Writes `<folder>/dataset.json` (or the file `name` there) atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, asdict(self))

    @classmethod
    def load(cls, folder: Path, name: str = DESCRIPTION) -> "DatasetInfo | None":
        """Reads `<folder>/dataset.json` (or the file `name` there); None if there is none.

        Raises:
            DataError: as of `parse`.
        """
        path = Path(folder) / name
        return cls.parse(read_text(path), path) if path.is_file() else None

    @classmethod
    def parse(cls, text: str, origin: Path | str) -> "DatasetInfo":
        """Reads the JSON of a `dataset.json`.

        Raises:
            DataError: it is not JSON, has unknown or ill-typed fields, values out of range, or a newer version.
        """
        values = parse_json(text, origin, FORMAT_VERSION)
        try:
            info = parser_instance(cls, values)
        except Exception as error:
            raise DataError(f"{origin}: not a dataset description ({error})") from error
        if problem := info.actions.problem():
            raise DataError(f"{origin}: actions.{problem}")
        return info


def missing(folder: str, source: str) -> bool:
    """Whether a local dataset does not exist; a folder of frames is complete once it has
    dataset.json or splits/."""
    place = Path(folder)
    if "://" in folder:
        return False
    if source in ("auto", "folder"):
        return not (place / DESCRIPTION).is_file() and not (place / "splits").is_dir()
    return not (place.is_dir() and any(place.iterdir()))


def write_trajectory(
    folder: Path,
    name: str,
    frames: Iterable[np.ndarray],
    position: np.ndarray | None = None,
    yaw: np.ndarray | None = None,
    quality: int = 95,
    text: str = "",
    **extra: np.ndarray,
) -> None:
    """Writes one trajectory atomically (into a hidden folder that is then renamed).

    Args:
        folder: the dataset.
        name: name of the trajectory.
        frames: T frames (H, W, 3), uint8 RGB.
        position: (T, 2) world position in metres, or None for video without poses.
        yaw: (T,) heading in radians, counter-clockwise, or None.
        quality: JPEG quality.
        text: description of what is done.
        extra: further arrays of length T, stored as `<key>.npz` beside the poses (such as depth).
    """
    import torch  # imported here, because reading a description does not need torch
    from torchvision.io import encode_jpeg

    final = folder / name
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for i, frame in enumerate(frames):
        jpeg = encode_jpeg(torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1), quality=quality)
        (partial / f"{i}.jpg").write_bytes(jpeg.numpy().tobytes())
    if position is not None:
        poses = {"position": np.asarray(position, np.float64), "yaw": np.asarray(yaw, np.float64)}
        (partial / POSES).write_bytes(pickle.dumps(poses))
    if text:
        (partial / TEXT).write_text(text)
    for key, array in extra.items():
        np.savez_compressed(partial / f"{key}.npz", array)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)


def split_file(folder: Path, split: str) -> Path:
    """The file with the trajectory names of a split."""
    return Path(folder) / "splits" / split / "traj_names.txt"


def write_split(folder: Path, split: str, names: list[str]) -> None:
    """Writes the trajectory names of a split."""
    path = split_file(folder, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{name}\n" for name in names))
