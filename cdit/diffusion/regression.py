"""Regression of clean latents, with the network of a flow: no noise, one call."""

import torch
from torch import Tensor

from cdit.batch import KeyedDraws
from cdit.diffusion.config import SCHEDULERS, TIMESTEPS, SamplerConfig
from cdit.diffusion.objective import DenoisingObjective
from cdit.diffusion.sampling import Predict


class Regression(DenoisingObjective):
    """Predicts the mean of the clean latents, by squared error, from zeros at the timestep of pure noise."""

    schedulers = tuple(SCHEDULERS["regression"])

    def draw_time(self, draws: KeyedDraws, *shape: int) -> Tensor:
        """1 everywhere; the loss does not depend on the time."""
        return draws.rand(*shape).fill_(1)

    def timestep(self, time: Tensor) -> Tensor:
        """That of pure noise, at any time."""
        return torch.full_like(time, TIMESTEPS)

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(clean)

    def error(self, prediction: Tensor, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Squared error, averaged over each frame: (…), in float32."""
        return (prediction.float() - clean).square().mean(dim=(-3, -2, -1))

    @torch.no_grad()
    def sample(
        self,
        predict: Predict,
        noise: Tensor,
        config: SamplerConfig,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """The prediction; the noise gives its shape only."""
        return predict(torch.zeros_like(noise), noise.new_tensor(TIMESTEPS))

    def guide(self, unknown: Tensor, known: Tensor, scale: float) -> Tensor:
        """Extrapolates the prediction."""
        return unknown + scale * (known - unknown)
