"""Rectified flow (Liu et al. 2022, arXiv 2209.03003; Esser et al. 2024, arXiv 2403.03206).

A noisy frame at time t in [0, 1] is x_t = (1 - t)·x0 + t·ε; its velocity is v = ε - x0. The network is conditioned on
t·1000. Tensors are (…, C, H, W) with times (…): any leading dimensions.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from cdit.batch import KeyedDraws
from cdit.diffusion.config import SCHEDULERS, TIMESTEPS, FlowConfig, Quantity, SamplerConfig
from cdit.diffusion.objective import DenoisingObjective
from cdit.diffusion.sampling import Predict, denoise, spread

if TYPE_CHECKING:
    from cdit.diffusion.perceptual import PerceptualLoss


class Flow(DenoisingObjective):
    """The rectified-flow objective."""

    schedulers = tuple(SCHEDULERS["flow"])

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.perceptual: PerceptualLoss | None = None

    def attach(self, cdit: nn.Module, decode: Callable[[Tensor], Tensor]) -> None:
        """Loads the perceptual loss, if the config has one; without this call the loss is that of the flow alone.

        Raises:
            UserError: the weights of its backbone are not available.
        """
        if self.config.perceptual.weight:
            from cdit.diffusion.perceptual import PerceptualLoss  # imports torchvision

            self.perceptual = PerceptualLoss(self.config.perceptual, decode)

    def draw_time(self, draws: KeyedDraws, *shape: int) -> Tensor:
        """Diffusion times in (0, 1), uniform or logit-normal, shifted."""
        if self.config.time_distribution == "uniform":
            time = draws.rand(*shape)
        else:
            # Sample by sample: vectorised, the last bit of a sigmoid would depend on its position in the batch.
            logits = draws.randn(*shape) * self.config.time_std + self.config.time_mean
            time = torch.stack([logit.sigmoid() for logit in logits])
        return shifted(time, self.config.shift)

    def timestep(self, time: Tensor) -> Tensor:
        """1000·t."""
        return time * TIMESTEPS

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t = (1 - t)·x0 + t·ε."""
        t = spread(time, clean)
        return (1 - t) * clean + t * noise

    def convert(self, value: Tensor, source: Quantity, target: Quantity, noisy: Tensor, time: Tensor) -> Tensor:
        """Turns a prediction of one quantity into another, given x_t and t; exact for min_time ≤ t ≤ 1 - min_time.

        The velocity of a clean frame or noise is a quotient by t or 1 - t, which are clamped below at min_time.
        """
        if source == target:
            return value
        t = spread(time, value)
        if source == "clean":
            velocity = (noisy - value) / t.clamp(min=self.config.min_time)
        elif source == "noise":
            velocity = (value - noisy) / (1 - t).clamp(min=self.config.min_time)
        else:
            velocity = value
        return {"clean": noisy - t * velocity, "velocity": velocity, "noise": noisy + (1 - t) * velocity}[target]

    def error(self, prediction: Tensor, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Squared error of the chosen quantity, averaged over each frame, plus the perceptual loss: (…), in float32."""
        error = self.squared_error(prediction, clean, noise, time)
        return self.add_perceptual(error, prediction, clean, self.add_noise(clean, noise, time), time)

    def squared_error(self, prediction: Tensor, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Squared error of the chosen quantity, averaged over each frame: (…), in float32.

        Prediction and truth go through the same conversion, so the clamp only weights their difference.
        """
        noisy = self.add_noise(clean, noise, time)
        truth = {"clean": clean, "velocity": noise - clean, "noise": noise}[self.config.prediction]
        error = self.convert(prediction.float(), self.config.prediction, self.config.loss, noisy, time) - self.convert(
            truth, self.config.prediction, self.config.loss, noisy, time
        )
        return error.square().mean(dim=(-3, -2, -1))

    def add_perceptual(self, error: Tensor, prediction: Tensor, clean: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """The error plus the perceptual loss of the clean frame that is predicted, if there is one."""
        if self.perceptual is None:
            return error
        predicted = self.convert(prediction.float(), self.config.prediction, "clean", noisy, time)
        return error + self.perceptual(predicted, clean, time)

    def velocity(self, prediction: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """The velocity implied by the network's prediction, for sampling, where t > 0.

        Not clamped for a clean frame: the last step has to end at the predicted frame, however small its t.
        """
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        if self.config.prediction == "clean":
            return (noisy - prediction) / spread(time, noisy)
        return self.convert(prediction, self.config.prediction, "velocity", noisy, time)

    def guide(self, unknown: Tensor, known: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022): extrapolates from the prediction without the action beyond the
        one with it."""
        return torch.lerp(unknown, known, scale)

    @torch.no_grad()
    def sample(
        self,
        predict: Predict,
        noise: Tensor,
        config: SamplerConfig,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Follows the flow from noise to a clean frame.

        Args:
            predict: the network's prediction for a noisy sample at a scalar timestep (0 to 1000).
            noise: (…, C, H, W), standard normal.
            config: scheduler and number of steps.
            generator: not used; the flow is deterministic.
            progress: whether to show a progress bar over the steps.
        """

        def velocity(noisy: Tensor, timestep: Tensor, sigma: Tensor) -> Tensor:
            # A scheduler's timesteps may be rounded to integers; its sigmas are the flow's times exactly.
            return self.velocity(predict(noisy, sigma * TIMESTEPS), noisy, sigma.expand(noisy.shape[:-3]))

        return denoise(make_scheduler(config), velocity, noise, progress)


def make_scheduler(config: SamplerConfig) -> diffusers.SchedulerMixin:
    """The diffusers scheduler of that name, its timesteps set; all of them take velocities."""
    kind, arguments = SCHEDULERS["flow"][config.scheduler]
    shift = "shift" if kind.startswith("FlowMatch") else "flow_shift"
    scheduler = getattr(diffusers, kind)(TIMESTEPS, **arguments, **{shift: config.shift})
    # Evenly spaced sigmas; those of the flow-matching schedulers end at 1/1000, a wasted step when there are few.
    if config.scheduler == "euler":
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / config.steps, config.steps))
        return scheduler
    if config.scheduler == "heun":
        scheduler.sigma_min = 1.0 / config.steps
    scheduler.set_timesteps(config.steps)
    return scheduler


def shifted(time: Tensor, shift: float) -> Tensor:
    """Diffusion times moved towards noise (Esser et al. 2024, section 5.3.2); 0 and 1 stay."""
    return shift * time / (1 + (shift - 1) * time)
