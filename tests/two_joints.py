"""An arm with two numbers, of any kind, which the frame shows as two shades; and a tiny world with such actions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tiny_world import FPS, SIDE, make_world
from torch import Tensor

from cdit.data.action_space import ActionSpace
from cdit.data.layout import DatasetInfo
from cdit.data.source import DatasetSource, TrajectorySource, register_source
from cdit.model import CDiT
from cdit.world_model import WorldModel

KINDS = ("absolute", "relative", "sum")
RANGE = {"absolute": 1.0, "relative": 1.0, "sum": 0.1}


def space_of(kind: str) -> ActionSpace:
    """Ranges of different widths, of which the second is not symmetric."""
    limit = RANGE[kind]
    return ActionSpace(["lift", "grip"], ["rad", ""], [-limit, -limit], [limit, 1.5 * limit], kind)


class Arm(TrajectorySource):
    """Numbers that wander; the joints are what they were last set to, or the sum of what was added."""

    def __init__(self, seed: int, kind: str, length: int = 24):
        draws = np.random.default_rng(seed)
        self.name = f"arm_{seed}"
        added = draws.uniform(-0.1, 0.1, (length, 2))
        self.actions = added if kind == "sum" else added.cumsum(0).clip(-1, 1)
        led = np.concatenate((self.actions[:1], self.actions[:-1]))  # the numbers of a frame lead to the next one
        self.joints = np.concatenate(([[0, 0]], added.cumsum(0)[:-1])) if kind == "sum" else led

    def __len__(self) -> int:
        return len(self.actions)

    def frames(self, times: Sequence[int]) -> Tensor:
        return drawn(torch.from_numpy(self.joints[list(times)]))


def drawn(joints: Tensor) -> Tensor:
    """Joints (N, 2) as frames (N, 3, SIDE, SIDE) uint8: one shade for each half."""
    shades = (127.5 * (1 + joints)).round().clamp(0, 255).to(torch.uint8)
    return shades.repeat_interleave(SIDE // 2, dim=1)[:, None, None].expand(-1, 3, SIDE, -1)


@register_source("two_joints")
class Arms(DatasetSource):
    @staticmethod
    def open(folder: str, split: str, *, action_kind: str, **options: Any) -> tuple[list[Arm], DatasetInfo]:
        seeds = {"train": range(8), "test": range(8, 11)}[split]
        info = DatasetInfo("arms", fps=FPS, has_actions=True, actions=space_of(action_kind))
        return [Arm(seed, action_kind) for seed in seeds], info


def arm_world(kind: str) -> WorldModel:
    """With random weights."""
    model, space = make_world(), space_of(kind)
    given = {"hidden_size": 16, "depth": 1, "num_heads": 2, "action_size": 2}
    torch.manual_seed(0)
    cdit = CDiT(image_size=(SIDE, SIDE), max_context=3, in_channels=3, patch_size=8, **given)
    for parameter in cdit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.description.actions = space
    scale, offset = space.normalization(4)
    model.description.units.action_scale, model.description.units.action_offset = tuple(scale), tuple(offset)
    return WorldModel(cdit, model.codec, model.description).eval()
