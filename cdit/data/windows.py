"""Windows over trajectories: past frames, goals before or after them, and the motion and time from one to the other."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cdit.common.errors import UserError
from cdit.common.randomness import seed_of
from cdit.data.frames import Crop, FrameStore
from cdit.data.latent_store import LatentStore, open_latents
from cdit.data.latents import Encoding
from cdit.data.motion import local_motion
from cdit.data.order import laned, shuffled
from cdit.data.shard_cache import ShardCache
from cdit.data.shards import ShardTrajectory
from cdit.data.sources import Source, read_sources


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
        alone = [name for name in ("prepare", "splits", "fps", "spacing", "follow_links") if getattr(self, name)]
        if self.mix and alone:
            raise UserError(f"data.{alone[0]} goes with data.folder; with data.mix give it there, for each dataset")

    @property
    def sources(self) -> list[Source]:
        """The datasets: those of the mix, or the one."""
        return self.mix or [Source(self.folder, self.splits, self.fps, self.spacing, self.follow_links)]


class WindowKey(NamedTuple):
    """Which window, and the key of its random draws."""

    window: int
    """Index of the window in the dataset."""
    step: int
    """Training step."""
    sample: int
    """Index of the sample in the step's global batch."""
    weight: float = 1.0
    """How much the sample counts: 0 for one that only fills a batch up."""


class WindowDataset(Dataset):
    """The windows of a split: every (trajectory, current time t) with `min_history` frames up to t and a goal in range.

    An item is a dict of tensors (T context frames, G goals):

        context       (T, 3, H, W) uint8    RGB, oldest first; zeros where the trajectory had not begun
        context_mask  (T,) bool             True where the frame exists
        target        (G, 3, H, W) uint8    the goal frames
        action        (G, 3) float32        motion to the goal in the local frame of the last context frame: dx forward
                                            and dy left in metres, dyaw ccw in [-π, π); zeros where unknown
        action_mask   (G,) bool             True where the action is known
        time_shift    (G,) float32          seconds to the goal, negative in the past
        spacing       () float32            metres between consecutive frames of the window's dataset
        seed          () int64              seed of the sample's further draws: `seed_of(seed, step, sample)`
        weight        () float32            that of its key: how much the sample counts

    After `use_latents`, what an item holds as context and target is (T, S, C, h, w) and (G, S, C, h, w) float32 latents
    (see cdit.data.latents); `window` and `path` give frames all the same.

    Args:
        config: which dataset and windows.
        split: name of the split.
        seed: first part of the key of all random draws.

    Raises:
        UserError: a config value is out of range.
        DataError: the dataset has problems; the message lists them (`python -m cdit.data.check` decodes frames, too).
    """

    def __init__(self, config: DataConfig, split: str, seed: int = 0):
        config.validate()
        self.config = config
        self.seed = seed
        # The current times of a trajectory of length T run from `first` to T - 1 - `reserved`.
        self._first = max(config.min_history - 1, -config.max_offset)
        self._reserved = max(config.min_offset, config.min_future)
        min_frames = self._first + self._reserved + 1
        cache = ShardCache(config.shard_cache, config.shard_cache_gb)
        may_lack = config.on_error == "skip" and split == config.train_split
        self.trajectories, self._spacing, self.info = read_sources(config.sources, split, min_frames, cache, may_lack)
        self._starts = np.cumsum([0, *(len(trajectory) - min_frames + 1 for trajectory in self.trajectories)])
        self.frames = FrameStore(self.trajectories, config.image_size, config.crop, config.cache_gb)
        self._latents: LatentStore | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, key: WindowKey | int) -> dict[str, Tensor]:
        """The window with goals drawn by the key: uniform over the offsets in range that the trajectory has.

        A plain index stands for `WindowKey(index, step=0, sample=index)`.
        """
        window, step, sample, weight = key if isinstance(key, WindowKey) else WindowKey(key, 0, key)
        trajectory, now = self.locate(window)
        past, future = now, len(self.trajectories[trajectory]) - 1 - now
        low, high = max(self.config.min_offset, -past), min(self.config.max_offset, future)
        seed = seed_of(self.seed, step, sample)
        draws = np.random.default_rng(seed)
        goals = now + draws.integers(low, high, size=self.config.goals, endpoint=True)
        item = self._item(trajectory, now, goals.tolist(), [now] * len(goals), self._latents or self.frames)
        return item | {"seed": torch.tensor(seed), "weight": torch.tensor(weight, dtype=torch.float32)}

    def use_latents(self, encoding: Encoding) -> None:
        """Has items hold latents in place of frames, if there are any in the dataset's folder (in all, of a mix).

        Raises:
            DataError: they were made with another encoding, or some are missing or cut short.
        """
        self._latents = open_latents(self.trajectories, encoding)

    def order(self, epoch: int) -> np.ndarray:
        """The permutation (windows,) in which an epoch visits them, as a function of (seed, epoch).

        Of datasets in folders each permutation is equally likely; where there are shards, only few are needed at a time
        (see cdit.data.order). In a mix of both, a trajectory in a folder is a shard of its own.
        """
        if not any(isinstance(trajectory, ShardTrajectory) for trajectory in self.trajectories):
            return shuffled(len(self), self.seed, epoch)
        shards = [
            trajectory.shard if isinstance(trajectory, ShardTrajectory) else trajectory
            for trajectory in self.trajectories
        ]
        first = [i for i in range(len(shards)) if i == 0 or shards[i] is not shards[i - 1]]
        bounds = self._starts[[*first, len(shards)]]
        return laned(bounds, self.seed, epoch, self.config.lanes, self.config.shuffle_shards)

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of what the order and the units of windows depend on, beside the config.

        That is the trajectories, by name and length, how they lie in shards, frame rate and spacings; not what frames
        show, and not where the dataset is.
        """
        digest = hashlib.sha256(repr(self.info.fps).encode())
        for trajectory, spacing in zip(self.trajectories, self._spacing, strict=True):
            shard = trajectory.shard.record.file if isinstance(trajectory, ShardTrajectory) else None
            digest.update(repr((trajectory.name, len(trajectory), shard, spacing)).encode())
        return digest.hexdigest()

    def locate(self, window: int) -> tuple[int, int]:
        """Index of the window's trajectory in `trajectories`, and its current time there in frames."""
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} of {len(self)}")
        trajectory = int(np.searchsorted(self._starts, window, side="right")) - 1
        return trajectory, self._first + window - int(self._starts[trajectory])

    def window(self, index: int, offsets: Sequence[int]) -> dict[str, Tensor]:
        """The window `index` with its goals at these offsets in frames: an item without `seed` and `weight`.

        Raises:
            IndexError: an offset leads out of the trajectory.
        """
        trajectory, now = self.locate(index)
        goals = [now + offset for offset in offsets]
        return self._item(trajectory, now, goals, [now] * len(goals), self.frames)

    def windows_with(self, offsets: Sequence[int]) -> list[int]:
        """Indices of the windows that have their full context and a frame at each of these offsets."""
        earliest = max(self.config.context_frames - 1, -min([*offsets, 0]), self._first)
        indices = []
        for start, stop, trajectory in zip(self._starts[:-1], self._starts[1:], self.trajectories, strict=True):
            latest = len(trajectory) - 1 - max([*offsets, 0])
            first_window = int(start) - self._first  # the index that time 0 would have
            indices += range(first_window + earliest, min(first_window + latest + 1, int(stop)))
        return indices

    def path(self, index: int, length: int) -> dict[str, Tensor]:
        """The window's context and the `length` frames that follow it one by one, for rollouts.

        An item without `seed` and `weight`, with G = length: target i is frame t+1+i, its action the motion from frame
        t+i to t+i+1 in the local frame of t+i, its time shift 1 / fps.

        Raises:
            IndexError: the trajectory ends before.
        """
        trajectory, now = self.locate(index)
        times = list(range(now, now + length + 1))
        return self._item(trajectory, now, times[1:], times[:-1], self.frames)

    def _item(
        self, index: int, now: int, goals: list[int], origins: list[int], store: FrameStore | LatentStore
    ) -> dict[str, Tensor]:
        """The context at `now`, and the goals with the motion and time from each one's origin, in frames."""
        trajectory = self.trajectories[index]
        if not all(0 <= goal < len(trajectory) for goal in goals):
            raise IndexError(f"{trajectory.name} has frames 0 to {len(trajectory) - 1}, asked for {goals}")
        size = self.config.context_frames
        history = list(range(max(0, now - size + 1), now + 1))
        frames = store.read(index, history + goals)
        context = torch.zeros(size, *frames.shape[1:], dtype=frames.dtype)
        context[size - len(history) :] = frames[: len(history)]
        action = np.zeros((len(goals), 3))
        if trajectory.position is not None:
            position, yaw = trajectory.position, trajectory.yaw
            action = local_motion(position[origins], yaw[origins], position[goals], yaw[goals])
        return {
            "context": context,
            "context_mask": torch.arange(size) >= size - len(history),
            "target": frames[len(history) :],
            "action": torch.tensor(action, dtype=torch.float32),
            "action_mask": torch.full((len(goals),), trajectory.position is not None),
            "time_shift": torch.tensor(np.subtract(goals, origins) / self.info.fps, dtype=torch.float32),
            "spacing": torch.tensor(self._spacing[index], dtype=torch.float32),
        }
