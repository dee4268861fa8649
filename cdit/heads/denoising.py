"""A probe batch to be denoised again and again: encoded once, its noise always the same.

Shape suffixes as in `cdit.training.batch`: B contexts, G goals of each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from cdit.common.pictures import to_float
from cdit.common.randomness import generator
from cdit.heads.recording import unwrap
from cdit.model import ContextCache
from cdit.world_model import WorldModel


@dataclass
class EncodedBatch:
    """What the network is given, but for diffusion times."""

    cache: ContextCache
    clean: Tensor
    """(B, G, C, H, W) true targets."""
    noise: Tensor
    action: Tensor
    time_shift: Tensor
    action_mask: Tensor

    def loss(self, world: WorldModel, time: float) -> Tensor:
        """The objective's loss of each target at one diffusion time, (B, G)."""
        times = torch.full_like(self.time_shift, time)
        prediction = unwrap(world.cdit)(
            world.objective.add_noise(self.clean, self.noise, times),
            world.objective.timestep(times),
            self.action,
            self.time_shift,
            self.cache,
            action_mask=self.action_mask,
        )
        return world.objective.loss(prediction, self.clean, self.noise, times)


def encode_batch(world: WorldModel, items: dict[str, Tensor], seed: int, first: int = 0) -> EncodedBatch:
    """Encodes stacked items of a `WindowDataset`.

    Args:
        world: gives codec, units and network.
        items: of frames, on any device.
        seed: of the noise; that of a sample is keyed by its number.
        first: number of the first sample.
    """
    cdit = unwrap(world.cdit)
    device = next(cdit.parameters()).device
    items = {name: value.to(device) for name, value in items.items()}
    longest = cdit.config.max_context
    context, mask = items["context"][:, -longest:], items["context_mask"][:, -longest:]
    clean = world.codec.encode(to_float(items["target"]))
    noise = torch.stack([torch.randn(clean.shape[1:], generator=generator(seed, first + i)) for i in range(len(clean))])
    action, time_shift = world.description.units.normalize(items["action"], items["time_shift"], items["spacing"])
    return EncodedBatch(
        cdit.encode_context(world.codec.encode(to_float(context)), mask),
        clean,
        noise.to(clean),
        action,
        time_shift,
        items["action_mask"],
    )


@contextmanager
def evaluating(world: WorldModel) -> Iterator[None]:
    """The plain network in evaluation mode, without gradients; its mode is restored."""
    cdit = unwrap(world.cdit)
    training = cdit.training
    cdit.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        cdit.train(training)


def encoded_batches(
    world: WorldModel, batch: dict[str, Tensor], size: int, seed: int
) -> Iterator[tuple[slice, EncodedBatch]]:
    """A batch `size` samples at a time: which they are, and they encoded; their noise does not depend on the size."""
    for start in range(0, len(batch["target"]), size):
        rows = slice(start, start + size)
        yield rows, encode_batch(world, {name: value[rows] for name, value in batch.items()}, seed, start)
