"""What an objective makes of a batch: the arguments of the network's call, and what its prediction is compared with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cdit.batch import Batch, EncodedBatch, KeyedDraws
from cdit.world_model import WorldModel


@dataclass
class Noised:
    """One batch of a `DenoisingObjective`."""

    batch: EncodedBatch
    sample: Tensor
    timestep: Tensor
    condition: dict[str, Tensor]
    context: Tensor
    mask: Tensor | None
    clean: Tensor
    noise: Tensor
    time: Tensor


def noised(world: WorldModel, windows: Batch, action_dropout: float = 0.0, time: Tensor | None = None) -> Noised:
    """Computes a loss with a network that only looks."""
    calls, compared = [], []

    def network(*arguments: Tensor) -> Tensor:
        calls.append(arguments)
        return torch.zeros_like(arguments[0])

    def error(prediction: Tensor, *truth: Tensor) -> Tensor:
        compared.append(truth)
        return prediction.mean(dim=(-3, -2, -1))

    batch = world.encode(windows, action_dropout)
    world.objective.error = error
    try:
        world.objective.loss(network, batch, KeyedDraws(windows.key, world.device), time)
    finally:
        del world.objective.error
    ((sample, timestep, condition, context, mask),) = calls
    return Noised(batch, sample, timestep, condition, context, mask, *compared[0])
