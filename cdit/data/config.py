"""The data section of a config: datasets and their windows. Imports no torch."""

from dataclasses import dataclass, field, fields
from typing import Literal

from cdit.common.errors import UserError
from cdit.common.limits import NotNegative, Positive, check_limits
from cdit.data.action_space import ActionKind

Crop = Literal["aspect", "4:3", "none"]
Precision = Literal["float16", "float32"]
"""Type of latents on disk."""
Content = Literal["frames", "latents", "both"]
"""What shards hold."""
MAX_PIXELS = 2**26
"""Largest number of pixels of an image: twice an 8K frame."""


@dataclass
class StoredDataset:
    """A dataset, wherever it is stored."""

    folder: str
    """The dataset: a folder, or the URL of shards."""
    splits: str | None = None
    """Folder with <split>/traj_names.txt; by default <folder>/splits."""
    fps: Positive[float] | None = None
    """Frames per second; by default as in dataset.json, or 4 without one."""
    follow_links: bool = False
    """Whether symbolic links in the folder may point outside it; the folder itself may always be a link."""
    source: str = "auto"
    """How the dataset is stored: frames in a folder or shards, whichever is there (auto), video files (video), a
    LeRobot dataset (lerobot), or a source of your own, `my_module:Class` (see docs/extending.md)."""
    camera: str | None = None
    """The feature with the frames, for datasets with several (lerobot); by default the first camera."""
    action_key: str = "action"
    """The feature with the actions (lerobot)."""
    action_kind: ActionKind = "absolute"
    """How the action between two frames is computed from the numbers of each frame (lerobot): those that led to the
    goal (absolute), their difference from those that led to the start (relative), or their sum in between (sum)."""


@dataclass
class Source(StoredDataset):
    """One dataset of a mix."""

    spacing: Positive[float] | None = None
    """Metres between consecutive frames, the unit of normalised actions; by default as in dataset.json, or 1."""


@dataclass
class DataConfig(Source):
    """The dataset, and the content of a training sample."""

    folder: str | None = None
    """The dataset folder (layout in docs/data.md), or the folder or URL of shards."""
    mix: list[Source] = field(default_factory=list)
    """Instead of folder, several datasets, each with folder, splits, fps and spacing; all their windows are equally
    likely. Goals of datasets without poses are conditioned on the time shift alone."""
    prepare: str | None = None
    """Command line that creates the dataset, run once if the folder is missing."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str = "test"
    """Split to evaluate on."""
    image_size: tuple[Positive[int], Positive[int]] = (64, 64)
    """Height and width of the frames given to the model."""
    crop: Crop = "aspect"
    """Centre crop before the resize: to the aspect ratio of image_size; to 4:3, then squeezed (the NWM release); or
    none, which squeezes the whole frame."""
    context_frames: Positive[int] = 4
    """Past frames given to the model, including the current one."""
    min_history: Positive[int] = 1
    """Windows start where at least this many context frames exist (1 to context_frames); the others are masked."""
    goals: Positive[int] = 4
    """Goals per context."""
    min_offset: int = 1
    """Smallest goal offset in frames; negative goals are in the past."""
    max_offset: int = 8
    """Largest goal offset in frames, inclusive."""
    rollout: NotNegative[int] = 0
    """Number of frames right after the current one that a sample holds besides its goals, for objectives that roll
    out (self_rollout)."""
    min_future: NotNegative[int] = 0
    """Windows end where at least this many frames follow the current one (the NWM release: 64)."""
    text_encoder: str | None = None
    """For datasets with texts that describe what is done: the transformers text model, by its name on the Hugging Face
    hub or its folder, on whose embeddings the model is conditioned (docs/data.md: Text). By default, texts are not
    used."""
    cache_gb: NotNegative[float] = 4.0
    """Memory for decoded frames in GB, per process and split, allocated as it fills."""
    workers: NotNegative[int] = 2
    """Loader processes; 0 loads in the main process."""
    lanes: Positive[int] = 64
    """Number of places in the dataset from which shards are read at the same time: a multiple of the largest number of
    processes that will train this run. The order of windows depends on it."""
    shuffle_shards: Positive[int] = 2
    """Number of shards over which the windows of a lane are shuffled; a lane needs one more than that at a time."""
    shard_cache: str | None = None
    """Folder for downloaded shards, shared by the processes of a machine; by default
    $XDG_CACHE_HOME/cdit/shards."""
    shard_cache_gb: Positive[float] = 64.0
    """Capacity of that folder in GB: at least this machine's share of lanes × (shuffle_shards + 1) shards; with less,
    shards are downloaded repeatedly."""
    on_error: Literal["stop", "skip"] = "stop"
    """If frames of a training sample cannot be read: stop the run with an error (stop), or leave the sample out,
    reweight the others of its batch, and count it (skip)."""
    latents: Literal["auto", "no"] = "auto"
    """With a latent codec: train on the latents that `python -m cdit.data.encode` has written, if there are any (auto),
    or encode the images at each step (no)."""

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is out of its range; the message names the field.
        """
        check_limits(self, "data.")
        if self.min_history > self.context_frames:
            raise UserError(f"data.min_history is {self.min_history}, expected at most context_frames")
        if self.max_offset < self.min_offset:
            raise UserError(f"data.max_offset is {self.max_offset}, expected at least min_offset")
        if (self.folder is None) == (not self.mix):
            raise UserError("give either data.folder, a dataset folder, or data.mix, several")
        names = ["prepare", *(f.name for f in fields(Source) if f.name != "folder")]
        alone = [name for name in names if getattr(self, name) != getattr(DataConfig, name)]
        if self.mix and alone:
            raise UserError(f"data.{alone[0]} belongs to data.folder; in a data.mix, set it for each dataset")

    @property
    def sources(self) -> list[Source]:
        """The datasets: those of the mix, or the single one."""
        return self.mix or [Source(**{f.name: getattr(self, f.name) for f in fields(Source)})]
