"""A user's own codec, conditioner and objective."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from cdit.batch import EncodedBatch, KeyedDraws
from cdit.codec import Codec
from cdit.diffusion import Flow
from cdit.diffusion.objective import Settings


class HalfCodec(Codec):
    """Means over 2×2 pixels times a gain, which is kept in a file that is no safetensors."""

    channels, downscale = 3, 2

    def __init__(self, gain: float = 0.5):
        super().__init__()
        self.gain = gain

    def encode(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        return F.avg_pool2d(frames.flatten(0, -4), 2).unflatten(0, frames.shape[:-3]) * self.gain

    def decode(self, latents: Tensor) -> Tensor:
        frames = (latents / self.gain).repeat_interleave(2, -2).repeat_interleave(2, -1)
        return frames.clamp(-1, 1)

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "gain.json").write_text(json.dumps(self.gain))

    @classmethod
    def load(cls, name: str) -> Self:
        path = Path(name, "gain.json")
        return cls(json.loads(path.read_text())) if name and path.is_file() else cls()


class BackwardConditioner(nn.Module):
    """Whether the goal lies in the past."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(1, width)

    def forward(self, condition: Mapping[str, Tensor]) -> Tensor:
        return self.linear((condition["time_shift"].flatten()[:, None] < 0).to(self.linear.weight.dtype))


class TaughtFlow(Flow):
    """A flow whose prediction is pulled towards that of an average of the network, at another time."""

    def __init__(self, settings: Settings):
        super().__init__(settings.flow)
        self.decay = settings.objective_options.get("decay", 0.5)

    def attach(self, cdit: nn.Module, decode: Callable[[Tensor], Tensor]) -> None:
        self.networks["average"] = copy.deepcopy(cdit).requires_grad_(False).eval()

    def loss(self, network: nn.Module, batch: EncodedBatch, draws: KeyedDraws, time: Tensor | None = None) -> Tensor:
        loss = super().loss(network, batch, draws, time)
        time = self.draw_time(draws, batch.clean.shape[1])
        noisy = self.add_noise(batch.clean, draws.randn(*batch.clean.shape[1:]), time)
        inputs = (noisy, self.timestep(time), batch.condition, *batch.past)
        with torch.no_grad():
            taught = self.networks["average"](*inputs)
        return loss + (network(*inputs) - taught).float().square().mean(dim=(-3, -2, -1))

    @torch.no_grad()
    def after_step(self, cdit: nn.Module) -> None:
        for average, weight in zip(self.networks["average"].parameters(), cdit.parameters(), strict=True):
            average.lerp_(weight, 1 - self.decay)
