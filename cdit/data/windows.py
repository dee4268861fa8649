"""Windows over trajectories: past frames, goals before or after them, and the action and time from one to the other."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from cdit.batch import Batch, Condition, Following
from cdit.common.randomness import seed_of
from cdit.data.config import DataConfig
from cdit.data.frames import FrameStore
from cdit.data.latent_store import LatentStore, open_latents
from cdit.data.latents import Encoding
from cdit.data.order import laned, shuffled
from cdit.data.shard_cache import ShardCache
from cdit.data.sources import read_sources
from cdit.data.text import encode_texts

BUILT_IN = {"time_shift", "action", "action_known", "spacing", "text"}
"""Reserved names, which further conditions cannot have."""


class WindowKey(NamedTuple):
    """A window, and the key of its random draws."""

    window: int
    step: int
    sample: int
    """Index of the sample in the step's global batch."""
    weight: float = 1.0
    """Weight of the sample: 0 for padding."""


class WindowDataset(Dataset):
    """The windows of a split: every (trajectory, current time t) with `min_history` frames up to t and a goal in range.

    An item is a `Batch` of one sample, without the dimension B. Context frames before the start of the trajectory are
    zeros; actions are float32 (see `ActionSpace`; dyaw in [-π, π)), and zeros where unknown; `key` is
    `seed_of(seed, step, sample)`; `condition.extra` has the conditions that all trajectories have, at the goal, as
    float32, int64 or bool. With `config.text_encoder`, `condition.text` is the vector of the current frame's text, if
    any trajectory has texts. With `config.rollout`, `following` has the frames of `path`.

    After `use_latents`, context and target of an item are the latents' moments (T, S, C, h, w) and (G, S, C, h, w) in
    float32 (see cdit.data.latents); `window` and `path` still return frames.

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
        self._reserved = max(config.min_offset, config.min_future, config.rollout)
        min_frames = self._first + self._reserved + 1
        cache = ShardCache(config.shard_cache, config.shard_cache_gb)
        may_lack = config.on_error == "skip" and split == config.train_split
        self.trajectories, self._spacing, self.info = read_sources(config.sources, split, min_frames, cache, may_lack)
        of_each = [{(name, x.shape[1:]) for name, x in t.conditions.items()} for t in self.trajectories]
        self._conditions = sorted({name for name, _ in set.intersection(*of_each)} - BUILT_IN)
        self._vectors: dict[str, torch.Tensor] = {}
        texts = {text for t in self.trajectories for text in set(t.texts)} - {""} if config.text_encoder else set()
        if texts:
            vectors = encode_texts(config.text_encoder, sorted(texts))
            self._vectors = {"": torch.zeros_like(vectors[0]), **dict(zip(sorted(texts), vectors, strict=True))}
        self._starts = np.cumsum([0, *(len(trajectory) - min_frames + 1 for trajectory in self.trajectories)])
        self.frames = FrameStore(self.trajectories, config.image_size, config.crop, config.cache_gb)
        self._latents: LatentStore | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def text_size(self) -> int:
        """E, the size of text embeddings; 0 without texts or `config.text_encoder`."""
        return len(self._vectors[""]) if self._vectors else 0

    def __getitem__(self, key: WindowKey | int) -> Batch:
        """The window with goals drawn by the key, uniformly over the offsets in range that the trajectory has.

        A plain index means `WindowKey(index, step=0, sample=index)`.
        """
        window, step, sample, weight = key if isinstance(key, WindowKey) else WindowKey(key, 0, key)
        trajectory, now = self.locate(window)
        past, future = now, len(self.trajectories[trajectory]) - 1 - now
        low, high = max(self.config.min_offset, -past), min(self.config.max_offset, future)
        seed = seed_of(self.seed, step, sample)
        draws = np.random.default_rng(seed)
        goals = (now + draws.integers(low, high, size=self.config.goals, endpoint=True)).tolist()
        steps, count = range(now, now + self.config.rollout), len(goals)
        origins = [now] * count + list(steps)
        item = self._item(trajectory, now, goals + [t + 1 for t in steps], origins, self._latents or self.frames)
        if steps:
            following = Following(item.target[count:], item.condition.part(slice(count, None)))
            condition = item.condition.part(slice(count))
            item = replace(item, target=item.target[:count], condition=condition, following=following)
        return replace(item, key=torch.tensor(seed), weight=torch.tensor(weight, dtype=torch.float32))

    def use_latents(self, encoding: Encoding) -> None:
        """Makes items hold latents in place of frames, if the dataset (every one of a mix) has a latent cache.

        Raises:
            DataError: the cache was made with another encoding, or latents are missing or damaged.
        """
        self._latents = open_latents(self.trajectories, encoding)

    def order(self, epoch: int) -> np.ndarray:
        """The permutation (windows,) in which an epoch visits the windows, a function of (seed, epoch).

        Without shards every permutation is equally likely; with shards, few are needed at a time (see cdit.data.order),
        and a trajectory outside any shard counts as a shard of its own.
        """
        if not any(trajectory.shard for trajectory in self.trajectories):
            return shuffled(len(self), self.seed, epoch)
        shards = [trajectory.shard or trajectory for trajectory in self.trajectories]
        first = [i for i in range(len(shards)) if i == 0 or shards[i] is not shards[i - 1]]
        bounds = self._starts[[*first, len(shards)]]
        return laned(bounds, self.seed, epoch, self.config.lanes, self.config.shuffle_shards)

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of everything besides the config that the order and the units of windows depend on.

        These are names and lengths of the trajectories, their shards, frame rate and spacings, but not the frames'
        content or the dataset's location.
        """
        digest = hashlib.sha256(repr(self.info.fps).encode())
        for trajectory, spacing in zip(self.trajectories, self._spacing, strict=True):
            shard = trajectory.shard and trajectory.shard.record.file
            digest.update(repr((trajectory.name, len(trajectory), shard, spacing)).encode())
        if self.info.actions.kind != "motion":
            digest.update(repr(self.info.actions).encode())
        return digest.hexdigest()

    def locate(self, window: int) -> tuple[int, int]:
        """Index of the window's trajectory in `trajectories`, and its current time in frames."""
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} of {len(self)}")
        trajectory = int(np.searchsorted(self._starts, window, side="right")) - 1
        return trajectory, self._first + window - int(self._starts[trajectory])

    def window(self, index: int, offsets: Sequence[int]) -> Batch:
        """The window `index` with goals at these offsets in frames: an item without key and weight.

        Raises:
            IndexError: an offset lies outside the trajectory.
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

    def path(self, index: int, length: int) -> Batch:
        """The window's context and the `length` frames after it, for rollouts.

        An item without key and weight, with G = length: target i is frame t+1+i, its action that from frame
        t+i to t+i+1, its time shift 1 / fps.

        Raises:
            IndexError: the trajectory is too short.
        """
        trajectory, now = self.locate(index)
        times = list(range(now, now + length + 1))
        return self._item(trajectory, now, times[1:], times[:-1], self.frames)

    def _item(
        self, index: int, now: int, goals: list[int], origins: list[int], store: FrameStore | LatentStore
    ) -> Batch:
        """The context at `now`, and the goals with the action and time from each one's origin, in frames."""
        trajectory = self.trajectories[index]
        if not all(0 <= goal < len(trajectory) for goal in goals):
            raise IndexError(f"{trajectory.name} has frames 0 to {len(trajectory) - 1}, but {goals} were requested")
        size = self.config.context_frames
        history = list(range(max(0, now - size + 1), now + 1))
        frames = store.read(index, history + goals)
        context = torch.zeros(size, *frames.shape[1:], dtype=frames.dtype)
        context[size - len(history) :] = frames[: len(history)]
        known = self.info.actions.recorded(trajectory)
        action = np.zeros((len(goals), len(self.info.actions.names)))
        if known:
            action = self.info.actions.between(trajectory, origins, goals)
        return Batch(
            context=context,
            mask=torch.arange(size) >= size - len(history),
            target=frames[len(history) :],
            condition=Condition(
                time_shift=torch.tensor(np.subtract(goals, origins) / self.info.fps, dtype=torch.float32),
                action=torch.tensor(action, dtype=torch.float32),
                known=torch.full((len(goals),), known),
                spacing=torch.tensor(self._spacing[index], dtype=torch.float32),
                text=self._vectors.get(trajectory.texts[now] if trajectory.texts else "") if self._vectors else None,
                extra={name: _numbers(trajectory.conditions[name][goals]) for name in self._conditions},
            ),
        )


def _numbers(values: np.ndarray) -> torch.Tensor:
    kind = {"f": np.float32, "b": np.bool_}.get(values.dtype.kind, np.int64)
    return torch.from_numpy(values.astype(kind))
