"""Options that mean the same in every command, for its dataclass to inherit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cdit.common.errors import UserError
from cdit.common.files import check_writable
from cdit.common.limits import Positive
from cdit.worlds import resolve, shipped


@dataclass(kw_only=True)
class CheckpointOptions:
    """A trained model, and where it runs."""

    checkpoint: str
    """Folder of a training run, of one of its checkpoints (whose averaged weights are read) or of a world model, or the
    name of a world that ships with the package (maze)."""
    device: str = "auto"
    """Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, …"""


@dataclass(kw_only=True)
class DataOptions:
    """A dataset."""

    data: str
    """The dataset folder."""
    split: str = "test"
    """Split of the dataset."""
    splits: str | None = None
    """Folder with <split>/traj_names.txt; by default <data>/splits."""
    follow_links: bool = False
    """Whether symbolic links in the dataset folder may point outside it."""
    source: str = "auto"
    """How the dataset is stored: frames in a folder or shards, whichever is there (auto), video files (video), a
    LeRobot dataset (lerobot), or a source of your own, `my_module:Class`."""
    camera: str | None = None
    """The feature with the frames, for datasets with several (lerobot); by default the first camera."""
    action_key: str = "action"
    """The feature with the actions (lerobot)."""
    spacing: Positive[float] | None = None
    """Metres between consecutive frames, required by models trained on several datasets; by default the value in
    dataset.json."""


@dataclass(kw_only=True)
class TextOptions:
    """The text that a model trained with texts is conditioned on."""

    text: str | None = None
    """Text that describes what is done, for models trained with texts. By default sample.py and open-loop plans use
    that of the dataset, if it has one; elsewhere there is none."""


@dataclass(kw_only=True)
class OutputOptions:
    """Where results go."""

    out: str
    """Folder for the results. Files with the same names are replaced; others are kept."""


@dataclass(kw_only=True)
class TrackingOptions:
    """Where results are logged, in addition to the files."""

    tracking: Literal["none", "wandb"] = "none"
    """Whether to log to Weights & Biases too (offline if you are not logged in)."""
    project: str = "cdit"
    """Name of the Weights & Biases project."""


def names(text: str | None) -> list[str] | None:
    """Names separated by commas."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def check_options(options: object) -> None:
    """Finds typos in paths before torch is imported and anything is loaded.

    Raises:
        UserError: the checkpoint or a folder does not exist, or results cannot be written; the message names the
            option.
    """
    for name in ("checkpoint", "data", "splits"):
        path = getattr(options, name, None)
        if path is None or "://" in path or (name == "data" and ":" in getattr(options, "source", "")):
            continue  # a source of your own may need no folder
        if not (resolve(path) if name == "checkpoint" else Path(path)).exists():
            worlds = f" (worlds that ship with cdit: {', '.join(shipped())})" if name == "checkpoint" else ""
            raise UserError(f"{name} is {path}, which does not exist{worlds}")
    if isinstance(options, OutputOptions):
        check_writable(Path(options.out), f"out is {options.out}")
