"""Trains the goal network on pairs of frames of one walk, some predicted by a world, and on pairs of two walks.

Half of the pairs show nearby places, in either order of recording: a cost must distinguish frames short of the goal,
beside it and past it, and walks rarely lead backwards.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cdit.batch import Batch
from cdit.common.errors import UserError
from cdit.common.frames import to_float, to_uint8
from cdit.common.randomness import generator, seed_of
from cdit.data.motion import local_motion
from cdit.data.windows import WindowDataset
from cdit.loading import load_world, spread, windows_for
from cdit.plan.candidates import recorded_actions
from cdit.plan.config import FARTHEST_JUMP, LearnConfig
from cdit.plan.goal_network import FAR_EDGES, FARTHEST, TURN_EDGES, GoalDescription, GoalNetwork, class_of
from cdit.world_model import WorldModel

OTHERS, CLOSE = 0.15, 0.5
"""Fractions of pairs of two walks, and of pairs of nearby places."""
REMEMBERED = 4096
"""Number of recent goals that are searched for other places that look alike."""
WITHIN = 4, 3
"""Two places are close within these multiples of the success radius and angle."""
UNORDERED = -1
SMALLEST_SCALE = 1e-6
"""Lower bound of the standard deviations that scale motion and actions, for walks without some component."""


@dataclass
class Pairs:
    """N pairs of frames and their targets."""

    frames: Tensor
    """(N, 3, H, W) uint8."""
    goals: Tensor
    """(N, 3, H, W) uint8."""
    steps: Tensor
    """(N,) int64 from the frame to the goal; more than `FARTHEST` for frames of two walks, `UNORDERED` for pairs that
    were chosen for their places."""
    motion: Tensor
    """(N, 3) float32 in metres and radians; NaN for frames of two walks without shared coordinates."""
    actions: Tensor
    """(N, H, 3) float32: the recorded actions from the frame on; zeros unless the goal was recorded later."""


def learn(config: LearnConfig) -> None:
    """Trains a goal network and writes it to `config.out`.

    Raises:
        UserError: checkpoint, data or options are incompatible.
    """
    config.validate()
    world = load_world(config.checkpoint, config.device, moving=True)
    dataset = windows_for(world, config)
    if not dataset.info.has_actions:
        raise UserError(f"{config.data}: has no poses to train the goal network on")
    sampler = Sampler(dataset, config)
    predicted = predict_frames(world, dataset, config) if config.predicted else {}
    scale = sampler.draw(2048)
    same = scale.steps <= FARTHEST
    network = GoalNetwork(
        GoalDescription(
            config.horizon,
            tuple(recorded_actions(dataset.trajectories, 1).flatten(0, 1).std(0).clamp(min=SMALLEST_SCALE).tolist()),
            tuple(scale.motion[same].std(0).clamp(min=SMALLEST_SCALE).tolist()),
            config.radius,
            np.radians(config.degrees).item(),
        )
    ).to(world.device)
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=0.01)
    length = max(3, config.steps)
    warm_up = max(0.05, 2 / length)  # OneCycleLR divides by the number of warm-up steps less one
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, length, pct_start=warm_up)
    average, bar = {}, tqdm(range(config.steps), desc="goal network", unit="step")
    for step in bar:
        pairs = sampler.draw(config.batch_size, predicted)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            losses = loss_of(network, pairs, generator(config.seed, step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for name, value in losses.items():
            average[name] = 0.98 * average.get(name, value.item()) + 0.02 * value.item()
        if step % 20 == 0:
            bar.set_postfix({name: f"{value:.3f}" for name, value in average.items()}, refresh=False)
    network.eval().save(Path(config.out))
    print(f"done: {config.out} ({', '.join(f'{name} {value:.3f}' for name, value in average.items())})")


class Sampler:
    """Draws pairs of frames.

    Args:
        dataset: walks with poses.
        config: the horizon, what counts as reached, and the seed.
    """

    def __init__(self, dataset: WindowDataset, config: LearnConfig):
        self.dataset, self.horizon = dataset, config.horizon
        self.within = WITHIN[0] * config.radius, WITHIN[1] * np.radians(config.degrees)
        self.random = np.random.default_rng(seed_of(config.seed, 1))
        self.lengths = np.array([len(trajectory) for trajectory in dataset.trajectories])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.position = np.concatenate([trajectory.position for trajectory in dataset.trajectories])
        self.yaw = np.concatenate([trajectory.yaw for trajectory in dataset.trajectories])
        self.shared, self.by_x = config.shared_coordinates, np.argsort(self.position[:, 0])
        self.sorted_x = self.position[self.by_x, 0]
        self.looks, self.looked_at, self.count = torch.zeros(REMEMBERED, 192), np.zeros(REMEMBERED, int), 0

    def draw(self, count: int, predicted: dict[tuple[int, int], Tensor] | None = None) -> Pairs:
        """Pairs of one walk, of nearby places or a log-uniform time apart, and some of two walks.

        Args:
            count: N.
            predicted: by trajectory and time, frames (3, H, W) that a world predicted; half of the pairs start at one.
        """
        known = list(predicted or ())
        return Pairs(
            *(torch.stack(parts) for parts in zip(*(self._pair(predicted, known) for _ in range(count)), strict=True))
        )

    def _pair(self, predicted: dict[tuple[int, int], Tensor] | None, known: list) -> tuple[Tensor, ...]:
        random, kind = self.random, self.random.random()
        from_prediction = known and random.random() < 0.5
        if from_prediction:
            index, now = known[random.integers(len(known))]
        else:
            index, now = self._place(random.integers(len(self.yaw)))
        start, steps, actions = self.starts[index] + now, UNORDERED, np.zeros((self.horizon, 3))
        frame = predicted[index, now] if from_prediction else self._frame(start)
        if kind < OTHERS and len(self.lengths) > 1:
            goal = self._elsewhere(index, start, frame)
            if not (self.shared and self._close(self._motion(start, goal))):
                steps = FARTHEST + 1
        elif kind < OTHERS + CLOSE:
            goal = random.choice(self._neighbours(index, start, random.random()))
        else:
            left = self.lengths[index] - 1 - now
            steps = min(left, int(2 ** random.uniform(0, np.log2(FARTHEST + 2)) - 1))
            goal = start + steps
            times = np.minimum(np.arange(start, start + self.horizon + 1), goal)  # stands still at the goal
            actions = self._motion(times[:-1], times[1:])
        located = self.shared or steps <= FARTHEST
        motion = self._motion(start, goal) if located else np.full(3, np.nan)
        shown = self._frame(goal)
        slot, self.count = self.count % REMEMBERED, self.count + 1
        self.looks[slot], self.looked_at[slot] = _look(shown), goal
        return frame, shown, torch.tensor(steps), *(torch.tensor(x).float() for x in (motion, actions))

    def _elsewhere(self, index: int, start: int, frame: Tensor) -> int:
        """A frame of another walk; with shared coordinates, half of the time the most similar one of another place."""
        if self.shared and self.random.random() < 0.5:
            frames = self.looked_at[: self.count]
            apart = np.flatnonzero((self._walk(frames) != index) & ~self._close(self._motion(start, frames)))
            if len(apart):
                return frames[apart[(self.looks[apart] - _look(frame)).square().sum(1).argmin()]]
        other = (index + self.random.integers(1, len(self.lengths))) % len(self.lengths)
        return self.starts[other] + self.random.integers(self.lengths[other])

    def _place(self, frame: int) -> tuple[int, int]:
        """Trajectory and time of a frame, by its number in the dataset."""
        index = int(self._walk(frame))
        return index, int(frame - self.starts[index])

    def _walk(self, frames: int | np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, frames, side="right") - 1

    def _frame(self, frame: int) -> Tensor:
        index, time = self._place(frame)
        return self.dataset.frames.read(index, [time])[0]

    def _motion(self, start: int | np.ndarray, goal: int | np.ndarray) -> np.ndarray:
        return local_motion(self.position[start], self.yaw[start], self.position[goal], self.yaw[goal])

    def _close(self, motion: np.ndarray, scale: float = 1.0) -> np.ndarray:
        metres, radians = np.linalg.norm(motion[..., :2], axis=-1), np.abs(motion[..., 2])
        return (metres <= scale * self.within[0]) & (radians <= scale * self.within[1])

    def _neighbours(self, index: int, start: int, scale: float) -> np.ndarray:
        """Frames close to one of walk `index`, itself included: of this walk, or of all with shared coordinates."""
        if self.shared:
            (x, y), reach = self.position[start], scale * self.within[0] + 1e-6
            frames = self.by_x[slice(*np.searchsorted(self.sorted_x, (x - reach, x + reach)))]
            frames = frames[np.abs(self.position[frames, 1] - y) <= reach]
        else:
            frames = self.starts[index] + np.arange(self.lengths[index])
        return frames[self._close(self._motion(start, frames), scale)]


def loss_of(network: GoalNetwork, pairs: Pairs, random: torch.Generator) -> dict[str, Tensor]:
    """The losses by name: cross entropies, and negative log likelihoods of motion and actions."""
    device, description = network.head.weight.device, network.description
    frames, goals = (_augmented(to_float(x), random).to(device) for x in (pairs.frames, pairs.goals))
    steps, motion, actions = (x.to(device) for x in (pairs.steps, pairs.motion, pairs.actions))
    found = network(frames, goals)
    same, ordered, located = steps <= FARTHEST, steps != UNORDERED, motion.isfinite().all(1)
    motion = motion.nan_to_num()
    metres, radians = motion[:, :2].norm(dim=1) / description.radius, motion[:, 2].abs() / description.angle
    far = torch.where(located, metres, torch.inf)
    return {
        "steps": _mean(F.cross_entropy(found.classes, class_of(steps), reduction="none"), ordered),
        "distance": F.cross_entropy(found.far, class_of(far, FAR_EDGES)),
        "turn": _mean(F.cross_entropy(found.turned, class_of(radians, TURN_EDGES), reduction="none"), located),
        "arrived": F.binary_cross_entropy_with_logits(found.arrived, (same & (metres < 1) & (radians < 1)).float()),
        "motion": _mean(_likelihood(found.motion, motion / network.motion_scale), same),
        "actions": _mean(_likelihood(found.actions, actions / network.action_scale), same & ordered),
    }


@torch.no_grad()
def predict_frames(world: WorldModel, dataset: WindowDataset, config: LearnConfig) -> dict[tuple[int, int], Tensor]:
    """Frames that the world predicts, uint8 (3, H, W), by trajectory and time, each in one jump of up to
    `FARTHEST_JUMP` frames."""
    random, found = np.random.default_rng(seed_of(config.seed, 2)), {}
    windows = spread(dataset.windows_with([FARTHEST_JUMP]), config.predicted // config.jumps)
    noise, size = generator(config.seed, 2, device=world.device), 8
    sampler = config.sampler.over(world.description)
    for start in tqdm(range(0, len(windows), size), desc="predicting frames", unit="batch"):
        chosen = windows[start : start + size]
        offsets = [random.choice(FARTHEST_JUMP, config.jumps, replace=False) + 1 for _ in chosen]
        batch = Batch.collate([dataset.window(i, o.tolist()) for i, o in zip(chosen, offsets, strict=True)])
        batch = batch.to(world.device)
        frames = world.predict(to_float(batch.context), batch.condition, batch.mask, sampler, noise)
        for row, window, ahead in zip(to_uint8(frames).cpu(), chosen, offsets, strict=True):
            index, now = dataset.locate(window)
            found |= {(index, now + int(offset)): frame for offset, frame in zip(ahead, row, strict=True)}
    return found


def _look(frame: Tensor) -> Tensor:
    """A frame (3, H, W) at 8 × 8 pixels: (192,)."""
    return F.adaptive_avg_pool2d(frame.float(), 8).flatten()


def _augmented(frames: Tensor, random: torch.Generator) -> Tensor:
    """Blurs some frames, as predicted ones are, and changes their brightness."""
    blurred = F.interpolate(F.avg_pool2d(frames, 2), frames.shape[-2:], mode="bilinear")
    chosen = torch.rand(len(frames), 1, 1, 1, generator=random) < 0.25
    shift = 0.05 * torch.randn(len(frames), 1, 1, 1, generator=random)
    return torch.where(chosen, blurred, frames) + shift


def _likelihood(gaussian: tuple[Tensor, Tensor], truth: Tensor) -> Tensor:
    """Negative log likelihood, averaged over all but the first dimension."""
    mean, log_std = gaussian
    return (log_std + ((truth - mean) / log_std.exp()).square() / 2).clamp(max=50).flatten(1).mean(1)


def _mean(losses: Tensor, mask: Tensor) -> Tensor:
    return losses[mask].sum() / mask.sum().clamp(min=1)
