"""The data section of a config: datasets and their windows. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from cdit.common.errors import UserError

Crop = Literal["aspect", "4:3", "none"]
Precision = Literal["float16", "float32"]
"""Type of latents on disk."""
Content = Literal["frames", "latents", "both"]
"""What shards hold."""
MAX_PIXELS = 2**26
"""Most pixels of an image: twice an 8K frame."""


@dataclass
class Source:
    """One dataset of a mix."""

    folder: str
    """The dataset: a folder, or the URL of shards."""
    splits: str | None = None
    """Folder with <split>/traj_names.txt, where that is not <folder>/splits."""
    fps: float | None = None
    """Frames a second; by default what dataset.json says, or 4 where there is none."""
    spacing: float | None = None
    """Metres between consecutive frames; by default what dataset.json says, or 1."""
    follow_links: bool = False
    """Whether links within the folder may lead out of it."""
    source: str = "auto"
    """How the dataset is stored: frames in a folder or shards, whichever is there (auto), video files (video), or a
    source of your own, `my_module:function`."""


@dataclass
class DataConfig:
    """Which dataset, and what a training sample is made of."""

    folder: str | None = None
    """The dataset folder (layout in cdit/data/layout.py); or a folder of shards (cdit/data/shards.py), or their URL."""
    mix: list[Source] = field(default_factory=list)
    """In place of folder, several datasets, each with folder, splits, fps and spacing: all their windows are equally
    likely. Those without poses teach the model by the time shift alone."""
    prepare: str | None = None
    """Command line that makes the dataset, run once when the folder is missing."""
    splits: str | None = None
    """Folder with <split>/traj_names.txt, where that is not <folder>/splits."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str = "test"
    """Split to evaluate on."""
    image_size: tuple[int, int] = (64, 64)
    """Height and width of the frames given to the model."""
    crop: Crop = "aspect"
    """Centre crop before the resize: to the aspect ratio of image_size; to 4:3, then squeezed (the NWM release); or
    none, only squeezed."""
    context_frames: int = 4
    """Past frames given to the model, the current one included."""
    min_history: int = 1
    """Windows start where at least this many context frames exist (1 to context_frames); the others are masked."""
    goals: int = 4
    """Goals per context."""
    min_offset: int = 1
    """Smallest goal offset in frames; negative goals lie in the past."""
    max_offset: int = 8
    """Largest goal offset in frames, included."""
    min_future: int = 0
    """Windows end where at least this many frames follow the current one (the NWM release: 64)."""
    fps: float | None = None
    """Frames a second; by default what dataset.json says, or 4 where there is none."""
    spacing: float | None = None
    """Metres between consecutive frames, the unit of normalised actions; by default what dataset.json says, or 1."""
    follow_links: bool = False
    """Whether links within the folder may lead out of it; the folder may be a link in any case."""
    source: str = "auto"
    """How the dataset is stored: frames in a folder or shards, whichever is there (auto), video files (video), or a
    source of your own, `my_module:function` (see docs/data.md)."""
    cache_gb: float = 4.0
    """Memory for decoded frames in GB, for each process and split; taken as it fills."""
    workers: int = 2
    """Loader processes; 0 loads in the main process."""
    lanes: int = 64
    """From how many places of the dataset at once shards are read: a multiple of the number of processes, of the most
    that will ever train this run. It goes into the order of windows."""
    shuffle_shards: int = 2
    """Over how many shards the windows of a lane are mixed: a lane needs that many and one more at a time."""
    shard_cache: str | None = None
    """Folder for shards fetched from a URL, shared by the processes of a machine; by default
    $XDG_CACHE_HOME/cdit/shards."""
    shard_cache_gb: float = 64.0
    """Most that folder holds, in GB: at least this machine's share of lanes × (shuffle_shards + 1) shards, or shards
    are fetched over and over."""
    on_error: Literal["stop", "skip"] = "stop"
    """What becomes of a training sample whose frames cannot be read: the run stops with an error, or leaves the sample
    out, weights the others of its batch accordingly, and counts it."""
    latents: Literal["auto", "no"] = "auto"
    """With a codec of latents: train on those that `python -m cdit.data.encode` left in the dataset's folder, where
    there are any (auto), or encode the images at each step (no)."""

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is out of its range; the message names the field.
        """
        requirements = {
            "image_size": (min(self.image_size) >= 1, "two positive numbers"),
            "context_frames": (self.context_frames >= 1, "at least 1"),
            "min_history": (1 <= self.min_history <= self.context_frames, "between 1 and context_frames"),
            "goals": (self.goals >= 1, "at least 1"),
            "max_offset": (self.max_offset >= self.min_offset, "at least min_offset"),
            "min_future": (self.min_future >= 0, "at least 0"),
            "fps": (self.fps is None or self.fps > 0, "positive"),
            "spacing": (self.spacing is None or self.spacing > 0, "positive"),
            "cache_gb": (self.cache_gb >= 0, "at least 0"),
            "workers": (self.workers >= 0, "at least 0"),
            "lanes": (self.lanes >= 1, "at least 1"),
            "shuffle_shards": (self.shuffle_shards >= 1, "at least 1"),
            "shard_cache_gb": (self.shard_cache_gb > 0, "positive"),
        }
        for name, (holds, expected) in requirements.items():
            if not holds:
                raise UserError(f"data.{name} is {getattr(self, name)}, expected {expected}")
        if (self.folder is None) == (not self.mix):
            raise UserError("give either data.folder, a dataset folder, or data.mix, several")
        names = ("prepare", "splits", "fps", "spacing", "follow_links", "source")
        alone = [name for name in names if getattr(self, name) != getattr(DataConfig, name)]
        if self.mix and alone:
            raise UserError(f"data.{alone[0]} belongs to data.folder; in a data.mix, set it for each dataset")

    @property
    def sources(self) -> list[Source]:
        """The datasets: those of the mix, or the one."""
        return self.mix or [Source(self.folder, self.splits, self.fps, self.spacing, self.follow_links, self.source)]
