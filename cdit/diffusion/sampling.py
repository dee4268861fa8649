"""From noise to a frame with a scheduler of diffusers, for all objectives."""

from collections.abc import Callable
from typing import Protocol

import diffusers
from torch import Tensor
from tqdm import tqdm


class Predict(Protocol):
    """The network with its context and conditions."""

    def __call__(self, noisy: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """Its prediction for noisy samples (…, C, H, W) at a scalar timestep, 0 (clean) to 1000.

        Further scalar conditions, the same for all samples, are those of the objective's own conditioners.
        """


def denoise(
    scheduler: diffusers.SchedulerMixin,
    output: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Tensor,
    progress: bool = False,
) -> Tensor:
    """Runs a scheduler, whose timesteps are set, from noise to a clean frame.

    Args:
        scheduler: of diffusers.
        output: the model output for the scheduler, from noisy sample, scalar timestep and scalar sigma.
        noise: (…, C, H, W), standard normal.
        progress: whether to show a progress bar over the steps.
    """
    scheduler.set_begin_index(0)  # otherwise looked up by the timestep, which rounding can make ambiguous
    x = noise
    pairs = list(zip(scheduler.timesteps.to(x.device), scheduler.sigmas[:-1].to(x.device), strict=True))
    for timestep, sigma in tqdm(pairs, desc="denoising", disable=not progress, leave=False):
        x = scheduler.step(output(x, timestep, sigma), timestep, x, return_dict=False)[0]
    return x


def spread(value: Tensor, frames: Tensor) -> Tensor:
    """Reshapes one number per frame (…) to multiply frames (…, C, H, W)."""
    return value.reshape(*value.shape, *(1,) * (frames.ndim - value.ndim))
