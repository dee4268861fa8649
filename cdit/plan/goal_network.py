"""A network that compares a frame with a goal image: distance, steps to go, actions, probability of having arrived.

It is trained on pairs of frames of the same walks as the world (`cdit.plan.learn`), and needs no pretrained weights.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cdit.common.cli import parser_instance
from cdit.common.errors import UserError
from cdit.common.files import read_json, write_json, write_whole
from cdit.plan.noise import coloured_noise
from cdit.worlds import resolve

WEIGHTS, DESCRIPTION = "goal_network.safetensors", "goal_network.json"
SIDE, PLACES = 64, 16
"""Frames are resized to SIDE × SIDE, and have features at PLACES × PLACES."""
FARTHEST = 64
"""More steps than this, and frames of other walks, share one class."""
EDGES = (0, 1, 2, 4, 8, 16, 32, FARTHEST)
"""Largest number of steps in each class but the last."""
MIDDLES = (0.0, 1.0, 2.0, 3.5, 6.5, 12.5, 24.5, 48.5, 96.0)
"""Number of steps that each class stands for."""
FAR_EDGES = (0.2, 0.4, 0.6, 0.9, 1.2, 1.6, 2.0, 2.6, 3.4, 4.4, 6.0, 9.0)
"""Largest distance in each class but the last, in multiples of the success radius."""
FAR_MIDDLES = (0.1, 0.3, 0.5, 0.75, 1.05, 1.4, 1.8, 2.3, 3.0, 3.9, 5.2, 7.5, 12.0)
"""Distance that each class stands for."""
TURN_EDGES = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.4, 2.0, 3.0, 4.5)
"""Largest heading difference in each class but the last, in multiples of the success angle."""
TURN_MIDDLES = (0.05, 0.15, 0.27, 0.42, 0.62, 0.87, 1.2, 1.7, 2.5, 3.7, 5.2)
"""Difference that each class stands for."""
TURN_WEIGHT, TURN_REACH = 0.5, 4.0
"""Weight of an angle at the goal, in radii, and the distance in radii beyond which it no longer counts."""
LOG_STD = (-5.0, 2.0)


@dataclass
class GoalDescription:
    """What a goal network was trained for."""

    horizon: int
    """Number of steps that it proposes."""
    action_scale: tuple[float, float, float]
    """Standard deviation of dx, dy (metres) and dyaw (radians) of a step in the data."""
    motion_scale: tuple[float, float, float]
    """Standard deviation of the motion to a goal."""
    radius: float
    """Metres within which a goal is reached."""
    angle: float
    """Radians within which a goal is reached."""
    width: int = 24
    """Channels of the first convolution."""


@dataclass
class Compared:
    """The outputs for N pairs."""

    classes: Tensor
    """(N, 9) logits of the number of steps, see `EDGES`."""
    far: Tensor
    """(N, 13) logits of the distance, see `FAR_EDGES`."""
    turned: Tensor
    """(N, 11) logits of the heading difference, see `TURN_EDGES`."""
    arrived: Tensor
    """(N,) logits of being at the goal."""
    motion: tuple[Tensor, Tensor]
    """Mean and log standard deviation of the motion to the goal (dx, dy, dyaw), (N, 3) each, in `motion_scale`; an
    auxiliary task of the training."""
    actions: tuple[Tensor, Tensor]
    """Mean and log standard deviation of the next steps, (N, H, 3) each, in `action_scale`."""

    def steps(self) -> Tensor:
        """Expected steps to go (N,): 2^E - 1, where E is the expected log₂(1 + steps)."""
        return _expected(self.classes, MIDDLES)

    def metres(self) -> Tensor:
        """Expected distance (N,), in multiples of the radius, averaged as `steps` are."""
        return _expected(self.far, FAR_MIDDLES)

    def turn(self) -> Tensor:
        """Expected heading difference (N,), in multiples of the angle, averaged as `steps` are."""
        return _expected(self.turned, TURN_MIDDLES)

    def apart(self) -> Tensor:
        """How different the poses are (N,): the sum of `metres` and `turn`."""
        return self.metres() + self.turn()

    def distance(self) -> Tensor:
        """Remaining distance to the goal (N,), in radii; close to the goal it includes the heading (`TURN_WEIGHT`).

        Farther away the heading does not count, because the path may first turn away from it.
        """
        metres = self.metres()
        return metres + TURN_WEIGHT * self.turn() * (1 - metres / TURN_REACH).clamp(min=0)


class GoalNetwork(nn.Module):
    """Correlates every place of a frame with every place of a goal; convolutions and linear layers follow.

    The correlation of all pairs is that of RAFT (Teed and Deng 2020): which places match shows how the camera moved.
    """

    def __init__(self, description: GoalDescription):
        super().__init__()
        self.description = description
        w, h = description.width, description.horizon
        self.encoder = nn.Sequential(
            *_convolution(3, w), *_convolution(w, 2 * w), nn.Conv2d(2 * w, 2 * w, 3, padding=1)
        )
        self.trunk = nn.Sequential(
            nn.Conv2d(PLACES**2 + 4 * w, 64, 1),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            *_convolution(64, 96),
            *_convolution(96, 128),
            nn.Flatten(),
            nn.Linear(128 * (PLACES // 4) ** 2, 256),
            nn.GELU(),
        )
        self.sizes = (len(MIDDLES), len(FAR_MIDDLES), len(TURN_MIDDLES), 1, 6, 6 * h)
        self.head = nn.Linear(256, sum(self.sizes))
        self.register_buffer("action_scale", torch.tensor(description.action_scale), persistent=False)
        self.register_buffer("motion_scale", torch.tensor(description.motion_scale), persistent=False)

    def forward(self, frames: Tensor, goals: Tensor) -> Compared:
        """Compares frames (N, 3, H, W) with goals of the same shape, in [-1, 1]."""
        pair = torch.cat((frames, goals), dim=1).clamp(-1, 1)
        if pair.shape[-2:] != (SIDE, SIDE):
            pair = F.interpolate(pair, (SIDE, SIDE), mode="bilinear", antialias=True)
        found = self.head(self.trunk(self._correlated(*pair.split(3, dim=1)))).float()
        *logits, arrived, motion, actions = found.split(self.sizes, dim=1)
        return Compared(*logits, arrived[:, 0], _gaussian(motion), _gaussian(actions.unflatten(1, (-1, 6))))

    def _correlated(self, frames: Tensor, goals: Tensor) -> Tensor:
        """At each place of a frame its correlation with every place of the goal, and the features of both."""
        here, there = self.encoder(torch.cat((frames, goals))).chunk(2)
        similar = F.normalize(there.flatten(2), dim=1).transpose(1, 2) @ F.normalize(here.flatten(2), dim=1)
        return torch.cat((4 * similar.unflatten(2, (PLACES, PLACES)), here, there), dim=1)

    @torch.no_grad()
    def steps(self, frames: Tensor, goals: Tensor) -> Tensor:
        """See `Compared.steps`."""
        return self(frames, goals).steps()

    @torch.no_grad()
    def distance(self, frames: Tensor, goals: Tensor) -> Tensor:
        """See `Compared.distance`."""
        return self(frames, goals).distance()

    @torch.no_grad()
    def propose(self, frames: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the next steps towards the goal, (N, H, 3) each, in metres and radians."""
        mean, log_std = self(frames, goals).actions
        return mean * self.action_scale, log_std.exp() * self.action_scale

    def proposals(self, frames: Tensor, goals: Tensor, count: int, random: torch.Generator) -> Tensor:
        """Steps towards the goal, (N, count, H, 3): the mean, then draws with red noise (1/f²) along the steps."""
        mean, std = self.propose(frames, goals)
        noise = coloured_noise((len(mean), count, 3, mean.shape[1]), 2.0, random).transpose(-1, -2).to(mean)
        noise[:, 0] = 0
        return mean[:, None] + std[:, None] * noise

    @torch.no_grad()
    def arrival(self, frames: Tensor, goals: Tensor) -> Tensor:
        """Probability (N,) that the goal is within the radius and angle of the description."""
        return self(frames, goals).arrived.sigmoid()

    def save(self, folder: Path) -> None:
        """Writes what `load_goal_network` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / WEIGHTS, save({name: x.contiguous() for name, x in self.state_dict().items()}))
        write_json(folder / DESCRIPTION, asdict(self.description))


def load_goal_network(folder: str | Path, device: torch.device | str = "cpu") -> GoalNetwork:
    """The goal network in a folder, or the one that ships with a world (`cdit.worlds`), in evaluation mode.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        path = resolve(folder)
        network = GoalNetwork(parser_instance(GoalDescription, read_json(path / DESCRIPTION)))
        network.load_state_dict(load_file(path / WEIGHTS))
    except Exception as error:  # safetensors, torch and jsonargparse raise many types
        raise UserError(
            f"{folder}: no readable goal network of this version, as written by python -m cdit.plan learn "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    return network.to(device).eval()


def class_of(values: Tensor, edges: tuple[float, ...] = EDGES) -> Tensor:
    """The class of each number of steps, or of each distance with `FAR_EDGES`."""
    return torch.bucketize(values, torch.tensor(edges, device=values.device))


def _expected(logits: Tensor, middles: tuple[float, ...]) -> Tensor:
    return 2 ** (logits.softmax(1) * (1 + torch.tensor(middles, device=logits.device)).log2()).sum(1) - 1


def _convolution(before: int, after: int) -> list[nn.Module]:
    """Halves the resolution."""
    return [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU()]


def _gaussian(numbers: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_std = numbers.chunk(2, dim=-1)
    return mean, log_std.clamp(*LOG_STD)
