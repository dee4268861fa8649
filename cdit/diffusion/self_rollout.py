"""Training on a world's own rollouts, so that they stay stable.

In training, past frames are recorded ones; in a rollout, they are the world's own predictions. Self Forcing (Huang et
al. 2025, arXiv 2506.08009) closes this gap by rolling out in training; MWM (2603.07799) does so for navigation, with
the recorded frame as the target.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cdit.batch import EncodedBatch, KeyedDraws
from cdit.common.errors import UserError
from cdit.diffusion.config import TIMESTEPS, SamplerConfig, SelfRolloutConfig
from cdit.diffusion.flow import Flow
from cdit.diffusion.objective import Objective

Inputs = tuple[Tensor, Tensor, dict[str, Tensor], Tensor, Tensor | None, Tensor | None]
"""The arguments of `CDiT.forward`."""


class SelfRollout(Objective):
    """The loss of a flow, plus the error of frames that are predicted from the world's own.

    Frames are sampled one after the other, without gradients, by the world's sampler. At one of the sampler's network
    calls for each frame, drawn at random, the network is called once more with gradients, and the clean frame that its
    prediction implies is compared with the recorded one: by squared error, and by the flow's perceptual loss if it has
    one.

    Args:
        base: the flow, which also samples.
        config: weight of the error.
        sampler: by which the world is rolled out.
    """

    def __init__(self, base: Objective, config: SelfRolloutConfig, sampler: SamplerConfig):
        super().__init__()
        if not isinstance(base, Flow):
            raise UserError(
                f"self_rollout.base is {config.base}, expected a flow, whose predictions imply clean frames"
            )
        self.base, self.weight, self.sampler = base, config.weight, sampler
        self.schedulers, self.conditioners, self.outputs = base.schedulers, base.conditioners, base.outputs
        self.networks = base.networks

    def attach(self, cdit: nn.Module, decode: Callable[[Tensor], Tensor]) -> None:
        """See the base."""
        self.base.attach(cdit, decode)

    def after_step(self, cdit: nn.Module) -> None:
        """See the base."""
        self.base.after_step(cdit)

    def sample(self, *args: Any, **options: Any) -> Tensor:
        """As the base does."""
        return self.base.sample(*args, **options)

    def guide(self, unknown: Tensor, known: Tensor, scale: float) -> Tensor:
        """As the base does."""
        return self.base.guide(unknown, known, scale)

    def loss(self, network: nn.Module, batch: EncodedBatch, draws: KeyedDraws, time: Tensor | None = None) -> Tensor:
        """The flow's loss of each goal plus, if frames follow the context, the mean error of its rollout; see
        `Objective.loss`.
        """
        if batch.following is None:
            return self.base.loss(network, batch, draws, time)
        inputs, truth = self.roll_out(network, batch, draws)
        direct = self.base.loss(network, batch, draws, time)
        prediction = network(*inputs).float()
        noisy, time = inputs[0], inputs[1] / TIMESTEPS
        clean = self.base.convert(prediction, self.base.config.prediction, "clean", noisy, time)
        error = (clean - truth).square().mean(dim=(-3, -2, -1))  # (N·B, 1)
        error = self.base.add_perceptual(error, prediction, truth, noisy, time)
        return direct + self.weight * error.view(-1, len(direct)).mean(dim=0)[:, None]

    @torch.no_grad()
    def roll_out(self, network: nn.Module, batch: EncodedBatch, draws: KeyedDraws) -> tuple[Inputs, Tensor]:
        """For each of N frames of B rollouts, the inputs of one of the network's calls: N·B contexts of one goal.

        Also the recorded frames, (N·B, 1, C, h, w).
        """
        following, frames, mask, level = batch.following, batch.context, batch.mask, batch.noise_level
        count = following.frames.shape[1]
        noise, drawn = draws.randn(*following.frames.shape[1:]), draws.rand(count)
        if level is None and self.sampler.context_noise:
            level = frames.new_zeros(frames.shape[:2])
        found: list[Inputs] = []
        for i in range(count):
            condition = {name: value[:, i, None] for name, value in following.condition.items()}
            calls: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
            past = (frames, mask, level)
            sampled = self.base.sample(_recorded(network, condition, past, calls), noise[:, i, None], self.sampler)
            found.append((*_chosen(calls, drawn[:, i]), *past))
            frames = torch.cat((frames, batch.as_past(sampled)), dim=1)[:, 1:]
            mask = None if mask is None else torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)[:, 1:]
            if level is not None:
                own = level.new_full((len(level), 1), self.sampler.context_noise)
                level = torch.cat((level, own), dim=1)[:, 1:]
        return tuple(_joined(each) for each in zip(*found, strict=True)), _joined(following.frames.split(1, dim=1))


def _recorded(
    network: nn.Module, condition: Mapping[str, Tensor], past: tuple[Tensor | None, ...], calls: list
) -> Callable[..., Tensor]:
    """The network as a sampler calls it, which keeps noisy frames, timesteps and conditions of each call."""

    def predict(noisy: Tensor, timestep: Tensor, **further: Tensor) -> Tensor:
        each = noisy.shape[:2]
        calls.append((noisy, timestep.expand(each), condition | {name: x.expand(each) for name, x in further.items()}))
        return network(*calls[-1], *past)

    return predict


def _chosen(calls: list[tuple[Tensor, Tensor, dict[str, Tensor]]], drawn: Tensor) -> Any:
    """Of each sample the inputs of one call, all equally likely, by uniform numbers (B,)."""
    index = (drawn * len(calls)).long()

    def choose(values: tuple) -> Any:
        if isinstance(values[0], dict):
            return {name: choose(tuple(value[name] for value in values)) for name in values[0]}
        return torch.stack(values)[index, torch.arange(len(index), device=index.device)]

    return [choose(values) for values in zip(*calls, strict=True)]


def _joined(values: tuple) -> Any:
    """Tensors, or dictionaries of them, one after the other; None where there are none."""
    first = values[0]
    if isinstance(first, dict):
        return {name: _joined(tuple(value[name] for value in values)) for name in first}
    return None if first is None else torch.cat(values)
