"""The running average of the weights, with diffusers' EMAModel."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from cdit.training.config import EMAConfig


class EMA:
    """The average of a network's weights."""

    def __init__(self, network: nn.Module, config: EMAConfig):
        self.network = network
        self._ahead = 0 if config.warmup_power else 1  # diffusers copies the weights at the first step of all
        self.average = EMAModel(
            network.parameters(),
            decay=config.decay,
            min_decay=0.0 if config.warmup_power else config.decay,
            use_ema_warmup=config.warmup_power > 0,
            power=config.warmup_power,
        )
        self.average.optimization_step = self._ahead

    def step(self) -> None:
        """Takes in the weights after an optimizer step."""
        self.average.step(self.network.parameters())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network holds the averaged weights, in evaluation mode, inside the `with`."""
        self.average.store(self.network.parameters())
        self.average.copy_to(self.network.parameters())
        training = self.network.training
        self.network.eval()
        try:
            yield
        finally:
            self.average.restore(self.network.parameters())
            self.network.train(training)

    def save(self, path: Path) -> None:
        """Writes the average as safetensors, under the network's parameter names."""
        names = [name for name, _ in self.network.named_parameters()]
        shadows = (shadow.contiguous() for shadow in self.average.shadow_params)
        save_file(dict(zip(names, shadows, strict=True)), path)

    def load(self, path: Path, step: int) -> None:
        """Reads what `save` wrote after that many steps."""
        tensors = load_file(path)
        for (name, _), shadow in zip(self.network.named_parameters(), self.average.shadow_params, strict=True):
            shadow.copy_(tensors[name])
        self.average.optimization_step = step + self._ahead
