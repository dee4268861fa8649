"""The running average of the weights, with diffusers' EMAModel."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from cdit.training.config import EMAConfig


class EMA:
    """The average of a network's weights."""

    def __init__(self, network: nn.Module, config: EMAConfig):
        self.network = network
        self._ahead = 0 if config.warmup_power else 1  # diffusers copies the weights at the very first step
        self.average = EMAModel(
            network.parameters(),
            decay=config.decay,
            min_decay=0.0 if config.warmup_power else config.decay,
            use_ema_warmup=config.warmup_power > 0,
            power=config.warmup_power,
        )
        self.average.optimization_step = self._ahead

    @torch.no_grad()
    def step(self) -> None:
        """Updates the average after an optimizer step."""
        self.average.optimization_step += 1
        decay = self.average.get_decay(self.average.optimization_step)
        # In one pass over memory, and one kernel on a GPU; EMAModel.step takes three for each parameter.
        torch._foreach_lerp_(self.average.shadow_params, list(self.network.parameters()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the averaged weights into the network, in evaluation mode, inside the `with`."""
        training = self.network.training
        self._swap()
        self.network.eval()
        try:
            yield
        finally:
            self._swap()
            self.network.train(training)

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchanges average and weights in place, one parameter at a time, so that memory for one more is enough."""
        for weight, average in zip(self.network.parameters(), self.average.shadow_params, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """The average itself, under the network's parameter names."""
        names = [name for name, _ in self.network.named_parameters()]
        return dict(zip(names, self.average.shadow_params, strict=True))

    def resume(self, step: int) -> None:
        """Continues as if that many steps had been made."""
        self.average.optimization_step = step + self._ahead
