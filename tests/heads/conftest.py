from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdit.batch import Batch, Condition
from cdit.codec import Codec, PixelCodec
from cdit.common.randomness import generator
from cdit.model import CDiT
from cdit.world_model import WorldDescription, WorldModel


def randomise(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)


@pytest.fixture
def make_cdit() -> Callable[..., CDiT]:
    def make(image_size: tuple[int, int] = (16, 24), channels: int = 3, **arguments) -> CDiT:
        size = {"patch_size": 4, "hidden_size": 32, "depth": 3, "num_heads": 4} | arguments
        cdit = CDiT(image_size, channels, 3, **size).eval()
        randomise(cdit)
        return cdit

    return make


@pytest.fixture
def make_inputs() -> Callable[..., dict[str, Any]]:
    """Arguments of `CDiT.forward` for goals of contexts whose first has a missing frame."""

    def make(cdit: CDiT, contexts: int = 2, goals: int = 3, frames: int = 3) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        channels, (height, width) = cdit.config.in_channels, cdit.config.image_size
        mask = torch.ones(contexts, frames, dtype=torch.bool)
        mask[0, 0] = frames == 1
        return {
            "sample": normal(contexts, goals, channels, height, width),
            "timestep": normal(contexts, goals).sigmoid() * 1000,
            "condition": {"action": normal(contexts, goals, 3), "time_shift": normal(contexts, goals)},
            "context": normal(contexts, frames, channels, height, width),
            "context_mask": mask,
        }

    return make


@pytest.fixture
def make_world(make_cdit) -> Callable[..., WorldModel]:
    def make(codec: Codec | None = None, image_size: tuple[int, int] = (16, 24), **arguments) -> WorldModel:
        codec = codec or PixelCodec()
        latent_size = (image_size[0] // codec.downscale, image_size[1] // codec.downscale)
        cdit = make_cdit(latent_size, codec.channels, **arguments)
        return WorldModel(cdit, codec, WorldDescription(image_size, 4.0))

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Windows of random frames; the first sample lacks its oldest frame."""

    def make(image_size: tuple[int, int] = (16, 24), samples: int = 2, goals: int = 2, frames: int = 3) -> Batch:
        generator = torch.Generator().manual_seed(2)

        def pictures(count: int) -> Tensor:
            shape = (samples, count, 3, *image_size)
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

        mask = torch.ones(samples, frames, dtype=torch.bool)
        mask[0, 0] = frames == 1
        return Batch(
            context=pictures(frames),
            mask=mask,
            target=pictures(goals),
            condition=Condition(
                action=torch.randn(samples, goals, 3, generator=generator),
                known=torch.ones(samples, goals, dtype=torch.bool),
                time_shift=torch.rand(samples, goals, generator=generator) + 0.25,
                spacing=torch.ones(samples),
            ),
        )

    return make


@pytest.fixture
def denoise() -> Callable[..., Tensor]:
    """An independent forward pass over a whole batch, noised to one diffusion time: the loss, (S, G)."""

    @torch.no_grad()
    def run(world: WorldModel, batch: Batch, time: float, seed: int) -> Tensor:
        context, target = (frames.float() / 127.5 - 1 for frames in (batch.context, batch.target))
        noise = torch.stack([torch.randn(target.shape[1:], generator=generator(seed, i)) for i in range(len(target))])
        times = torch.full(target.shape[:2], time)
        noisy = world.objective.add_noise(target, noise, times)
        condition = {name: getattr(batch.condition, name) for name in ("action", "time_shift")}
        prediction = world.cdit(noisy, world.objective.timestep(times), condition, context, batch.mask)
        return world.objective.error(prediction, target, noise, times)

    return run
