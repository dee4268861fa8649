"""DDPM with learned-range variance (Ho et al. 2020, arXiv 2006.11239; Nichol & Dhariwal 2021, arXiv 2102.09672).

1000 linear betas from 1e-4 to 0.02; a noisy frame is x_t = √ᾱ_t·x0 + √(1 - ᾱ_t)·ε; the network predicts ε and, in
further channels, the position of the logarithm of the reverse step's variance between log β̃_t and log β_t. This is the
objective of DiT and of Navigation World Models. Tensors are (…, C, H, W) with diffusion times (…) in [0, 1), time t
standing for the index ⌊1000·t⌋ that the network is conditioned on.
"""

import math

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

from cdit.batch import KeyedDraws
from cdit.diffusion.config import BETAS, SCHEDULERS, TIMESTEPS, DDPMConfig, SamplerConfig
from cdit.diffusion.objective import DenoisingObjective
from cdit.diffusion.sampling import Predict, denoise, spread


class Chain:
    """The coefficients of a chain of N noising steps, each (N,) float64, from its cumulated products ᾱ (N,) float64."""

    def __init__(self, alpha_bar: Tensor):
        before = torch.cat((alpha_bar.new_ones(1), alpha_bar[:-1]))
        beta = 1 - alpha_bar / before
        variance = beta * (1 - before) / (1 - alpha_bar)  # β̃, of the posterior q(x_{i-1} | x_i, x0)
        self._copies: dict[tuple, Tensor] = {}
        self.alpha_bar = alpha_bar
        self.signal, self.noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        self.noise_over_signal = (1 / alpha_bar - 1).sqrt()
        self.log_beta = beta.log()
        # β̃ of the first step is 0 and its logarithm would not be finite.
        self.log_variance = torch.cat((variance[1:2], variance[1:])).log()
        self.clean_weight = before.sqrt() * beta / (1 - alpha_bar)  # the posterior's mean is this times x0 …
        self.noisy_weight = (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar)  # … plus this times x_i

    def noisy(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """x_i = √ᾱ_i·x0 + √(1 - ᾱ_i)·ε."""
        return self.at("signal", index, clean) * clean + self.at("noise", index, clean) * noise

    def clean(self, noise: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """The clean frame implied by a noise (predicted or true), not clipped."""
        return noisy / self.at("signal", index, noisy) - self.at("noise_over_signal", index, noisy) * noise

    def mean(self, clean: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """Mean of q(x_{i-1} | x_i, x0)."""
        return self.at("clean_weight", index, noisy) * clean + self.at("noisy_weight", index, noisy) * noisy

    def log_range(self, position: Tensor | None, noisy: Tensor, index: Tensor) -> Tensor:
        """Logarithm of a reverse step's variance: log β̃ at position -1, log β at 1, linear beyond; log β̃ for None."""
        low = self.at("log_variance", index, noisy)
        if position is None:
            return low
        return torch.lerp(low, self.at("log_beta", index, noisy), (position + 1) / 2)

    def at(self, name: str, index: Tensor, frames: Tensor) -> Tensor:
        """A coefficient at each frame's index, in the frames' type and on their device, shaped to multiply them."""
        key = (name, frames.device, frames.dtype)
        if key not in self._copies:  # copied once: a copy at every training step would synchronise with the device
            self._copies[key] = getattr(self, name).to(frames.dtype).to(frames.device)
        return spread(self._copies[key][index], frames)


class DDPM(DenoisingObjective):
    """The noise-prediction objective."""

    schedulers = tuple(SCHEDULERS["ddpm"])

    def __init__(self, config: DDPMConfig):
        super().__init__()
        self.learn_variance = config.learn_variance
        self.outputs = 2 if config.learn_variance else 1
        self.chain = Chain((1 - torch.linspace(*BETAS, TIMESTEPS, dtype=torch.float64)).cumprod(0))

    def draw_time(self, draws: KeyedDraws, *shape: int) -> Tensor:
        """Diffusion times in [0, 1), uniform."""
        return draws.rand(*shape)

    def timestep(self, time: Tensor) -> Tensor:
        """⌊1000·t⌋, at most 999."""
        return (time * TIMESTEPS).floor().clamp(max=TIMESTEPS - 1)

    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t = √ᾱ_t·x0 + √(1 - ᾱ_t)·ε."""
        return self.chain.noisy(clean, noise, self._index(time))

    def error(self, prediction: Tensor, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Mean squared error of the noise, plus the variational bound in bits per dimension, of each frame: (…).

        The bound, L_vlb of Nichol & Dhariwal taken at one t, trains the variance only: the noise is detached in it.
        For t > 0 it is the divergence of the reverse step from the posterior, for t = 0 the negative log-likelihood of
        the clean frame in bins of width 2/255. Computed in the type of the noise.
        """
        prediction = prediction.to(noise.dtype)
        if not self.learn_variance:
            return (prediction - noise).square().mean(dim=(-3, -2, -1))
        predicted, position = prediction.chunk(2, dim=-3)
        index = self._index(time)
        noisy = self.add_noise(clean, noise, time)
        mean = self.chain.mean(self.chain.clean(predicted.detach(), noisy, index), noisy, index)
        log_variance = self.chain.log_range(position, noisy, index)
        true_mean = self.chain.mean(clean, noisy, index)
        true_log_variance = self.chain.log_range(None, noisy, index)
        bound = torch.where(
            spread(index == 0, noisy),
            -discretized_log_likelihood(clean, mean, log_variance / 2),
            divergence(true_mean, true_log_variance, mean, log_variance),
        )
        return ((predicted - noise).square() + bound / math.log(2)).mean(dim=(-3, -2, -1))

    def guide(self, unknown: Tensor, known: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022) on the noise; the variance is that of the known action."""
        if not self.learn_variance:
            return torch.lerp(unknown, known, scale)
        noise, position = known.chunk(2, dim=-3)
        return torch.cat((torch.lerp(unknown.chunk(2, dim=-3)[0], noise, scale), position), dim=-3)

    @torch.no_grad()
    def sample(
        self,
        predict: Predict,
        noise: Tensor,
        config: SamplerConfig,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """From noise to a clean frame; nothing is clipped on the way.

        Args:
            predict: the network's prediction for a noisy sample at a scalar timestep (0 to 999).
            noise: (…, C, H, W), standard normal.
            config: scheduler and number of steps.
            generator: of the noise that ancestral sampling adds at each step.
            progress: whether to show a progress bar over the steps.
        """
        if config.scheduler == "ddpm":
            return self._ancestral(predict, noise, config.steps, generator, progress)

        def epsilon(noisy: Tensor, timestep: Tensor, sigma: Tensor) -> Tensor:
            prediction = predict(noisy, timestep).to(noisy.dtype)
            return prediction.chunk(2, dim=-3)[0] if self.learn_variance else prediction

        return denoise(make_scheduler(config), epsilon, noise, progress)

    def _ancestral(
        self, predict: Predict, noise: Tensor, steps: int, generator: torch.Generator | None, progress: bool
    ) -> Tensor:
        """Ancestral sampling over evenly spaced timesteps of the chain, all coefficients those of the shorter chain.

        Not diffusers' DDPMScheduler, whose learned range takes β from the chain of all 1000 steps.
        """
        visited = torch.linspace(0, TIMESTEPS - 1, steps, dtype=torch.float64).round().long()
        if steps == 1:
            visited += TIMESTEPS - 1  # where the noise is
        chain = Chain(self.chain.alpha_bar[visited])
        x = noise
        for i in tqdm(reversed(range(steps)), total=steps, desc="denoising", disable=not progress, leave=False):
            prediction = predict(x, visited[i].to(x.device)).to(x.dtype)
            predicted, position = prediction.chunk(2, dim=-3) if self.learn_variance else (prediction, None)
            index = torch.tensor(i, device=x.device)
            fresh = torch.randn(x.shape, generator=generator, device=generator.device if generator else x.device)
            deviation = (chain.log_range(position, x, index) / 2).exp() if i else 0.0
            x = chain.mean(chain.clean(predicted, x, index), x, index) + deviation * fresh.to(x.device)
        return x

    def _index(self, time: Tensor) -> Tensor:
        return self.timestep(time).long()


def make_scheduler(config: SamplerConfig) -> diffusers.SchedulerMixin:
    """The diffusers scheduler of that name, its timesteps set; all of them take noise predictions."""
    kind, arguments = SCHEDULERS["ddpm"][config.scheduler]
    scheduler = getattr(diffusers, kind)(TIMESTEPS, **arguments)
    scheduler.set_timesteps(config.steps)
    return scheduler


def divergence(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Kullback–Leibler divergence of the second normal distribution from the first, in nats, of each element."""
    ratio = log_variance - other_log_variance
    return 0.5 * (ratio.exp() - 1 - ratio + (mean - other_mean).square() * (-other_log_variance).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Logarithm of a normal distribution's mass in the bin [x - 1/255, x + 1/255], in nats, of each element.

    The bins at the ends, of |x| > 0.999, are open. The distribution function is approximated by
    ½(1 + tanh(√(2/π)(z + 0.044715 z³))) (Page 1977), and masses are at least 1e-12.
    """
    low, high = (_normal_cdf((x - mean + side / 255) * (-log_scale).exp()) for side in (-1, 1))
    mass = torch.where(x < -0.999, high, torch.where(x > 0.999, 1 - low, high - low))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
