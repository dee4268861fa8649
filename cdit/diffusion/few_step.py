"""Flows whose average velocity is trained, so that few steps are enough: shortcut models and MeanFlow.

The average velocity u(x_t, t, d) over an interval d leads from time t to t - d along the flow in one step,
x_{t-d} = x_t - d·u; for d = 0 it is the velocity itself. The network is that of a flow, further conditioned on d. Most
goals of a batch train the flow, d = 0; the others train intervals, towards a target that the network, or a running
average of it, provides without gradients.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from cdit.batch import EncodedBatch, KeyedDraws
from cdit.common.errors import UserError
from cdit.diffusion.config import SCHEDULERS, SMALLEST_SHORTCUT, TIMESTEPS, FewStepConfig, FlowConfig, SamplerConfig
from cdit.diffusion.flow import Flow, shifted
from cdit.diffusion.sampling import Predict, spread

Average = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The average velocity (B, G, C, h, w) at noisy samples, times (B, G) and intervals (B, G)."""


class FewStep(Flow):
    """A flow that also trains intervals. Its schedulers are those of a flow, which take d as 0, and `average`.

    Raises:
        UserError: the prediction is the noise, which implies no velocity at t = 1, or a number is out of range.
    """

    schedulers = tuple(SCHEDULERS["mean_flow"])
    conditioners: Mapping[str, str] = {"interval": "interval"}

    def __init__(self, flow: FlowConfig, config: FewStepConfig):
        super().__init__(flow)
        if flow.prediction == "noise":
            raise UserError("flow.prediction is noise, expected clean or velocity to train intervals")
        for name in ("share", "teacher_decay"):
            if not 0 <= getattr(config, name) <= 1:
                raise UserError(f"few_step.{name} is {getattr(config, name)}, expected between 0 and 1")
        self.few_step = config

    def attach(self, cdit: nn.Module, decode: Callable[[Tensor], Tensor]) -> None:
        """Makes the teacher, unless its decay is 0; see `Flow.attach`."""
        super().attach(cdit, decode)
        if self.few_step.teacher_decay:
            self.networks["teacher"] = deepcopy(cdit).eval().requires_grad_(False)

    @torch.no_grad()
    def after_step(self, cdit: nn.Module) -> None:
        """Updates the teacher."""
        if "teacher" in self.networks:
            averages = list(self.networks["teacher"].parameters())
            torch._foreach_lerp_(averages, list(cdit.parameters()), 1 - self.few_step.teacher_decay)

    def loss(self, network: nn.Module, batch: EncodedBatch, draws: KeyedDraws, time: Tensor | None = None) -> Tensor:
        """The error of the velocity of most goals, and of the average velocity of the others; see `Objective.loss`.

        With `time`, intervals end there too, except that those of a shortcut end at the next multiple of their length.
        """
        drawn = self.draw_time(draws, batch.clean.shape[1])
        time = (drawn if time is None else time).clone()
        condition, noise = batch.dropped(draws), draws.randn(*batch.clean.shape[1:])
        # Only the first goals may train an interval, so that all calls have the same shapes in every process.
        share = self.few_step.share * time.shape[1]
        few = slice(math.ceil(share))
        chosen = draws.rand(few.stop) < share / max(few.stop, 1)
        end, length = self.draw_interval(draws, time[:, few])
        interval = torch.zeros_like(time)
        time[:, few], interval[:, few] = torch.where(chosen, end, time[:, few]), torch.where(chosen, length, 0.0)
        clean, noisy = batch.clean.clone(), self.add_noise(batch.clean, noise, time)

        if few.stop:
            known = {name: value[:, few] for name, value in condition.items()}

            def average(network: nn.Module, x: Tensor, t: Tensor, d: Tensor) -> Tensor:
                prediction = network(x, self.timestep(t), known | {"interval": d}, *batch.past)
                return self.velocity(prediction, x, t.clamp(min=1 / TIMESTEPS))  # a quotient by t

            # Before the call with gradients: one network may be both, and DDP expects its backward pass next.
            with torch.no_grad():
                teacher = self.networks.get("teacher", network)
                velocity = (noise - clean)[:, few]
                target = self.target(
                    partial(average, network),
                    partial(average, teacher),
                    noisy[:, few],
                    time[:, few],
                    interval[:, few],
                    velocity,
                )
            # Clean frame and noise for which the noisy frame is the same, and the velocity is the target.
            change = torch.where(spread(chosen, velocity), target - velocity, 0.0)
            t = spread(time[:, few], velocity)
            clean[:, few] -= t * change
            noise[:, few] += (1 - t) * change
        prediction = network(noisy, self.timestep(time), condition | {"interval": interval}, *batch.past)
        error = self.squared_error(prediction, clean, noise, time)
        return self.add_perceptual(error, prediction, batch.clean, noisy, time)

    @abstractmethod
    def draw_interval(self, draws: KeyedDraws, time: Tensor) -> tuple[Tensor, Tensor]:
        """Where intervals start and how long they are, each (B, G), from times (B, G) that a flow would be trained at.

        The start may be moved, since an interval must not be longer than it.
        """

    @abstractmethod
    def target(
        self, average: Average, teacher: Average, noisy: Tensor, time: Tensor, interval: Tensor, velocity: Tensor
    ) -> Tensor:
        """What the average velocity should be.

        Args:
            average: of the network.
            teacher: the average velocity of the teacher, or of the network if there is none.
            noisy: (B, G, C, h, w).
            time: (B, G), where the interval starts.
            interval: (B, G), its length.
            velocity: the true one, of this clean frame and noise.
        """

    @torch.no_grad()
    def sample(
        self,
        predict: Predict,
        noise: Tensor,
        config: SamplerConfig,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Steps of average velocity with the scheduler `average`; otherwise as a flow, see `Flow.sample`."""
        if config.scheduler != "average":
            return super().sample(predict, noise, config, generator, progress)
        times = shifted(torch.linspace(1, 0, config.steps + 1, device=noise.device), config.shift)
        x = noise
        for start, end in tqdm(
            pairwise(times), total=config.steps, desc="denoising", disable=not progress, leave=False
        ):
            prediction = predict(x, start * TIMESTEPS, interval=self.conditioned(start - end))
            x = x - (start - end) * self.velocity(prediction, x, start.expand(x.shape[:-3]))
        return x

    def conditioned(self, interval: Tensor) -> Tensor:
        """The interval that the network is conditioned on for a step of that length."""
        return interval


class MeanFlow(FewStep):
    """MeanFlow (Geng et al. 2025, arXiv 2505.13447) with the loss of its improved form.

    The identity u = v - d·du/dt, of the derivative along the flow with t - d fixed, is the target. As in improved
    MeanFlow (2512.02012) the derivative follows the predicted velocity, and as in pixel MeanFlow (2601.22158) the
    network may predict clean frames, from which the velocity follows.
    """

    def attach(self, cdit: nn.Module, decode: Callable[[Tensor], Tensor]) -> None:
        """See `FewStep.attach`.

        Raises:
            UserError: the network has no derivative in forward mode.
        """
        if self.few_step.derivative == "forward" and cdit.config.reprojection:
            raise UserError("few_step.derivative is forward, expected difference for a network with reprojection")
        super().attach(cdit, decode)

    def draw_interval(self, draws: KeyedDraws, time: Tensor) -> tuple[Tensor, Tensor]:
        """Intervals of a uniform share of the time."""
        return time, time * draws.rand(time.shape[1])

    def target(
        self, average: Average, teacher: Average, noisy: Tensor, time: Tensor, interval: Tensor, velocity: Tensor
    ) -> Tensor:
        """v - d·du/dt."""
        end = time - interval

        def along(x: Tensor, t: Tensor) -> Tensor:
            return average(x, t, t - end)

        direction = teacher(noisy, time, torch.zeros_like(time))
        if self.few_step.derivative == "forward":
            change = forward_derivative(along, noisy, time, direction)
        else:
            # Both ends lie within the interval and at most at the noise, where the network is trained.
            after = (time + self.few_step.difference).clamp(max=1)
            before = torch.maximum(time - self.few_step.difference, end)
            change = difference_quotient(along, noisy, time, direction, before, after)
        return velocity - spread(interval, velocity) * change


class Shortcut(FewStep):
    """Shortcut models (Frans et al. 2024, arXiv 2410.12557).

    Intervals are 1, 1/2, …, 1/64, from multiples of themselves. The target is the average of two steps of half the
    length; halves of 1/128 are steps of the flow itself.
    """

    def draw_interval(self, draws: KeyedDraws, time: Tensor) -> tuple[Tensor, Tensor]:
        """Intervals of any length with equal probability, from the next multiple above the time."""
        lengths = int(math.log2(1 / SMALLEST_SHORTCUT))
        interval = 1 / 2 ** (draws.rand(time.shape[1]) * lengths).long()  # exact
        return ((time / interval).floor() * interval + interval).clamp(max=1), interval

    def target(
        self, average: Average, teacher: Average, noisy: Tensor, time: Tensor, interval: Tensor, velocity: Tensor
    ) -> Tensor:
        """The average of two steps of half the length by the teacher."""
        half = interval / 2
        conditioned = self.conditioned(half)
        first = teacher(noisy, time, conditioned)
        second = teacher(noisy - spread(half, noisy) * first, time - half, conditioned)
        return (first + second) / 2

    def conditioned(self, interval: Tensor) -> Tensor:
        """0 for the shortest steps, which are those of the flow."""
        return torch.where(interval > SMALLEST_SHORTCUT, interval, 0.0)


def forward_derivative(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, time: Tensor, direction: Tensor
) -> Tensor:
    """d/dt of a function of (x, t) as x moves in a direction, by forward-mode differentiation.

    Fused kernels of attention do not support it, nor does compiled code: both are avoided.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        return torch.func.jvp(function, (x, time), (direction.to(x.dtype), torch.ones_like(time)))[1]


def difference_quotient(
    function: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    time: Tensor,
    direction: Tensor,
    before: Tensor,
    after: Tensor,
) -> Tensor:
    """As `forward_derivative`, from the values at two times (B, G), between which `time` lies."""
    values = [function(x + spread(t - time, x) * direction, t) for t in (before, after)]
    return (values[1] - values[0]) / spread((after - before).clamp(min=torch.finfo(time.dtype).tiny), x)
