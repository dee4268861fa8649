"""The interface of objectives: how the network is trained, and how frames are sampled with it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cdit.batch import EncodedBatch, KeyedDraws
from cdit.common.errors import UserError
from cdit.common.registry import Registry
from cdit.diffusion.config import (
    DDPMConfig,
    FewStepConfig,
    FlowConfig,
    SamplerConfig,
    SelfRolloutConfig,
    check_sampler,
)
from cdit.diffusion.sampling import Predict


class Settings(Protocol):
    """The settings of an objective: fields of a `TrainConfig` or a `WorldDescription`."""

    objective: str
    flow: FlowConfig
    few_step: FewStepConfig
    ddpm: DDPMConfig
    self_rollout: SelfRolloutConfig
    sampler: SamplerConfig
    objective_options: dict[str, Any]


class Objective(ABC):
    """How the network is trained, and how frames are sampled with it.

    A subclass is built from `Settings`, and registered in `OBJECTIVES` or named by its import path.
    """

    schedulers: Collection[str]
    """Names of the schedulers that frames can be sampled with."""
    conditioners: Mapping[str, str] = {}
    """Further conditioners that the network needs, as in `model.extra_conditioners`."""
    outputs: int = 1
    """Output channels of the network for each channel of a frame."""

    def __init__(self) -> None:
        self.networks: dict[str, nn.Module] = {}
        """Further networks by name, such as a teacher or an average. They are prepared, sharded and checkpointed with
        the model, and their parameters that require gradients are trained with it."""

    def attach(self, cdit: nn.Module, decode: Callable[[Tensor], Tensor]) -> None:  # noqa: B027 (a hook)
        """Prepares for training, for example builds `networks`; by default nothing.

        Args:
            cdit: the network with its initial weights, not sharded yet.
            decode: the codec's: latents (…, C, h, w) to frames (…, 3, H, W) in [-1, 1], differentiable.
        """

    @abstractmethod
    def loss(self, network: nn.Module, batch: EncodedBatch, draws: KeyedDraws, time: Tensor | None = None) -> Tensor:
        """The loss of each goal, (B, G) in float32.

        Args:
            network: the CDiT in training (or its average in validation), wrapped for distributed training. It may be
                called any number of times.
            batch: B contexts with G goals each.
            draws: the samples' random numbers.
            time: (B, G) diffusion times in [0, 1] to use instead of random ones, in validation.
        """

    def after_step(self, cdit: nn.Module) -> None:  # noqa: B027
        """Called after each optimizer step with the bare network, for example to update an average of it."""

    @abstractmethod
    def sample(
        self,
        predict: Predict,
        noise: Tensor,
        config: SamplerConfig,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Samples clean latents.

        Args:
            predict: the network's prediction for a noisy sample at a scalar timestep, 0 (clean) to 1000.
            noise: (…, C, h, w), standard normal.
            config: scheduler and number of steps.
            generator: of further random numbers.
            progress: whether to show a progress bar over the steps.
        """

    @abstractmethod
    def guide(self, unknown: Tensor, known: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance: extrapolates from the prediction without the action to that with it."""


class DenoisingObjective(Objective):
    """Adds noise to the goals at random diffusion times, and compares the network's prediction with its target."""

    def loss(self, network: nn.Module, batch: EncodedBatch, draws: KeyedDraws, time: Tensor | None = None) -> Tensor:
        """The error of one prediction of each goal; see `Objective.loss`."""
        drawn = self.draw_time(draws, batch.clean.shape[1])
        time = drawn if time is None else time
        condition = batch.dropped(draws)
        noise = draws.randn(*batch.clean.shape[1:])
        noisy = self.add_noise(batch.clean, noise, time)
        prediction = network(noisy, self.timestep(time), condition, *batch.past)
        return self.error(prediction, batch.clean, noise, time)

    @abstractmethod
    def draw_time(self, draws: KeyedDraws, *shape: int) -> Tensor:
        """(B, *shape) diffusion times in [0, 1]."""

    @abstractmethod
    def timestep(self, time: Tensor) -> Tensor:
        """The timestep, 0 to 1000, that the network is conditioned on at a diffusion time."""

    @abstractmethod
    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The noisy sample at a time."""

    @abstractmethod
    def error(self, prediction: Tensor, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The loss of a prediction, averaged over each frame: (…)."""


OBJECTIVES: Registry[Callable[[Settings], Objective]] = Registry("objective", Objective)
"""Objectives by name: classes, or functions that build one, of `Settings`."""


@OBJECTIVES.register("flow")
def _flow(settings: Settings) -> Objective:
    from cdit.diffusion.flow import Flow

    return Flow(settings.flow)


@OBJECTIVES.register("shortcut")
def _shortcut(settings: Settings) -> Objective:
    from cdit.diffusion.few_step import Shortcut

    return Shortcut(settings.flow, settings.few_step)


@OBJECTIVES.register("mean_flow")
def _mean_flow(settings: Settings) -> Objective:
    from cdit.diffusion.few_step import MeanFlow

    return MeanFlow(settings.flow, settings.few_step)


@OBJECTIVES.register("ddpm")
def _ddpm(settings: Settings) -> Objective:
    from cdit.diffusion.ddpm import DDPM

    return DDPM(settings.ddpm)


@OBJECTIVES.register("regression")
def _regression(settings: Settings) -> Objective:
    from cdit.diffusion.regression import Regression

    return Regression()


@OBJECTIVES.register("self_rollout")
def _self_rollout(settings: Settings) -> Objective:
    from cdit.diffusion.self_rollout import SelfRollout

    config = settings.self_rollout
    check_sampler(config.base, settings.sampler)
    if config.base == "self_rollout":
        raise UserError("self_rollout.base is self_rollout, expected a flow")
    return SelfRollout(OBJECTIVES.get(config.base)(settings), config, settings.sampler)


def make_objective(settings: Settings) -> Objective:
    """The objective of a config or a world's description.

    Raises:
        UserError: its name is unknown.
    """
    return OBJECTIVES.get(settings.objective)(settings)
