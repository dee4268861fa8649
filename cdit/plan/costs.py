"""Distances between predicted frames and a goal image. Lower is better; units differ.

Suffixes: B goals, S frames compared with each, L moments of a candidate.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from cdit.codec import Codec
from cdit.common.errors import UserError
from cdit.common.lpips import load_lpips
from cdit.evaluate.metrics import DreamSim
from cdit.plan.goal_network import load_goal_network
from cdit.world_model import WorldModel


@dataclass
class Predicted:
    """What a world predicts; decoded once, and only if a cost needs frames."""

    codec: Codec
    latents: Tensor
    """(B, S, L, C, h, w)."""

    @cached_property
    def frames(self) -> Tensor:
        """(B, S, L, 3, H, W)."""
        return self.codec.decode(self.latents)


class Cost(ABC):
    """A distance between frames and goals."""

    @abstractmethod
    def __call__(self, frames: Tensor, goals: Tensor) -> Tensor:
        """Distances (B, S) from frames (B, S, 3, H, W) to goals (B, 3, H, W), in [-1, 1]."""

    def of_predicted(self, predicted: Predicted, goals: Tensor) -> Tensor:
        """Distances (B, S, L) from what a world predicts to goals."""
        return self(predicted.frames.flatten(1, 2), goals).unflatten(1, predicted.latents.shape[1:3])


class Pairwise(Cost):
    """A function that returns distances (N,) between frames and goals, (N, 3, H, W) each."""

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor]):
        self.distance = distance

    def __call__(self, frames: Tensor, goals: Tensor) -> Tensor:
        """See `Cost`."""
        goals = goals[:, None].expand(frames.shape)
        return self.distance(frames.flatten(0, 1), goals.flatten(0, 1)).unflatten(0, frames.shape[:2])


class Pixels(Cost):
    """Mean squared difference."""

    def __call__(self, frames: Tensor, goals: Tensor) -> Tensor:
        """See `Cost`."""
        return (frames - goals[:, None]).square().mean((2, 3, 4))


class Latents(Cost):
    """Mean squared difference of the latents of a codec; predictions are not decoded."""

    def __init__(self, codec: Codec):
        self.codec = codec

    def __call__(self, frames: Tensor, goals: Tensor) -> Tensor:
        """See `Cost`."""
        return self.of_predicted(Predicted(self.codec, self.codec.encode(frames)[:, :, None]), goals)[:, :, 0]

    def of_predicted(self, predicted: Predicted, goals: Tensor) -> Tensor:
        """See `Cost`."""
        goal = self.codec.encode(goals)[:, None, None]
        return (self.codec.as_past(predicted.latents) - goal).square().mean((3, 4, 5))


class Features(Cost):
    """Cosine distance between the features of a timm backbone at each place, averaged over places.

    Args:
        name: in timm, such as vit_small_patch14_reg4_dinov2.lvd142m; its weights are downloaded on first use.
        device: where to compute.
        pretrained: whether to load them; otherwise features are random.

    Raises:
        UserError: there is no such backbone, or its weights are not available.
    """

    def __init__(self, name: str, device: torch.device | str, pretrained: bool = True):
        try:
            self.backbone = timm.create_model(name, pretrained=pretrained, num_classes=0).to(device).eval()
        except Exception as error:  # timm, and the hub that it downloads from, raise many types
            raise UserError(f"planner.cost: {name!r} is not available ({str(error).splitlines()[0]})") from error
        data = timm.data.resolve_model_data_config(self.backbone)
        self.size = data["input_size"][1:]
        self.mean, self.std = (torch.tensor(data[key], device=device).view(3, 1, 1) for key in ("mean", "std"))

    def __call__(self, frames: Tensor, goals: Tensor) -> Tensor:
        """See `Cost`."""
        found, goal = self._features(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]), self._features(goals)
        return (1 - (found * goal[:, None]).sum(-1)).mean(-1)

    @torch.no_grad()
    def _features(self, frames: Tensor) -> Tensor:
        """(N, places, F) of length 1."""
        frames = F.interpolate((frames + 1) / 2, self.size, mode="bicubic", antialias=True)
        features = self.backbone.forward_features((frames - self.mean) / self.std)
        places = features if features.ndim == 3 else features.flatten(2).transpose(1, 2)
        return F.normalize(places, dim=-1)


def load_cost(name: str, world: WorldModel, learned: str | None = None) -> Cost:
    """A cost by its name in `PlannerConfig.cost`, on the device of a world.

    Raises:
        UserError: its weights are not available.
    """
    kind, _, backbone = name.partition(":")
    if kind != "latents" and not world.codec.has_decoder:
        print(
            f"the codec has no decoder: {name} compares the nearest recorded frames; latents compares predictions",
            file=sys.stderr,
        )
    loaders = {
        "pixels": Pixels,
        "latents": lambda: Latents(world.codec),
        "lpips": lambda: Pairwise(load_lpips().to(world.device)),
        "dreamsim": lambda: Pairwise(DreamSim(world.device)),
        "steps": lambda: Pairwise(load_goal_network(learned, world.device).steps),
        "distance": lambda: Pairwise(load_goal_network(learned, world.device).distance),
        "features": lambda: Features(backbone, world.device),
    }
    return loaders[kind]()
