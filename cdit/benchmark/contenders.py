"""Who is timed: our networks as this package trains and samples them, and the peers as plainly as published."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from cdit.benchmark.config import BenchmarkConfig, ContenderName, Precision
from cdit.benchmark.peers import ConcatDiT, PublishedCDiT
from cdit.codec import Codec, PixelCodec
from cdit.diffusion import DDPM, DDPMConfig, Flow, FlowConfig, SamplerConfig
from cdit.model import CDiT
from cdit.training.config import EMAConfig, OptimizerConfig
from cdit.training.ema import EMA
from cdit.training.setup import build_optimizer
from cdit.world_model import WorldDescription, WorldModel

PIXELS = PixelCodec()
"""Takes what is denoised for frames as they are."""
PUBLISHED = SamplerConfig("ddpm", 250)
NWM = {"position": "learned", "context_modulation": True, "extra_kv": True, "init": "published"}
"""What makes the published network of ours."""


@dataclass
class Batch:
    """What is trained on, or asked for: B contexts of T frames with G goals each."""

    context: Tensor
    """(B, T, C, H, W)."""
    clean: Tensor
    """(B, G, C, H, W), the frames at the goals."""
    action: Tensor
    """(B, G, 3)."""
    time_shift: Tensor
    """(B, G)."""

    @classmethod
    def random(cls, config: BenchmarkConfig, device: torch.device, batch: int, goals: int, past: int = 0) -> "Batch":
        """Of the config's frames, with its number of past frames if none is given."""

        def randn(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, device=device)

        frame = (config.channels, *config.image_size)
        return cls(randn(past or config.context_frames, *frame), randn(goals, *frame), randn(goals, 3), randn(goals))


class Contender(ABC):
    """A network, what it is trained for, and how it is trained and sampled.

    Args:
        config: size of the network and of what it denoises.
        device: where it lives.
    """

    name: ContenderName
    sampler: SamplerConfig
    """How frames are sampled by default."""

    def __init__(self, config: BenchmarkConfig, device: torch.device):
        self.config, self.device = config, device
        torch.manual_seed(0)
        self.network, self.objective = self.build()
        for p in self.network.parameters():  # closed gates would multiply zeros
            nn.init.normal_(p, std=0.02)
        self.network.to(device)

    @abstractmethod
    def build(self) -> tuple[nn.Module, Flow | DDPM]:
        """Network and objective."""

    @abstractmethod
    def predict(self, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """The network's output (B, G, C', H, W) for noisy frames (B, G, C, H, W) at timesteps (B, G)."""

    @abstractmethod
    def build_optimizer(self) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
        """The optimizer, and what takes its step into the average of the weights."""

    @abstractmethod
    def sample(self, batch: Batch, sampler: SamplerConfig) -> Tensor:
        """Frames at the goals, (B, G, C, H, W)."""

    @abstractmethod
    def rollout(self, codec: Codec, frames: Tensor, actions: Tensor, sampler: SamplerConfig) -> Tensor:
        """Frames (B, G, L, …) of G action sequences (B, G, L, 3), from past frames (B, T, …) that the codec encodes."""

    @cached_property
    def optimizer(self) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
        """What `build_optimizer` made, once."""
        return self.build_optimizer()

    def autocast(self, precision: Precision | None = None) -> torch.autocast | nullcontext:
        """A precision, by default the config's."""
        wanted = (precision or self.config.mixed_precision) == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if wanted else nullcontext()

    def training_step(
        self, batch: Batch, precision: Precision | None = None, predict: Callable[..., Tensor] | None = None
    ) -> Callable[[], None]:
        """A step: loss, gradients, their norm clipped, the optimizer, the average of the weights.

        Args:
            batch: what is trained on.
            precision: of products; by default the config's.
            predict: in place of `self.predict`.
        """
        optimizer, average = self.optimizer
        predict = predict or self.predict
        generator = torch.Generator(self.device).manual_seed(0)
        self.network.train()

        def step() -> None:
            noise = torch.randn_like(batch.clean)
            time = self.objective.draw_time(batch.clean.shape[:2], generator)
            with self.autocast(precision):
                noisy = self.objective.add_noise(batch.clean, noise, time)
                prediction = predict(noisy, self.objective.timestep(time), batch)
            self.objective.loss(prediction, batch.clean, noise, time).mean().backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
            average()

        return step


class Ours(Contender):
    """CDiT as `train.py` trains it and `WorldModel` samples it."""

    name = "ours"
    sampler = SamplerConfig()
    dialect: ClassVar[dict[str, object]] = {}

    def build(self) -> tuple[nn.Module, Flow | DDPM]:
        """A CDiT of the config, and `make_objective`."""
        config, objective = self.config, self.make_objective()
        cdit = CDiT(
            tuple(config.image_size),
            config.channels,
            config.context_frames,
            learn_variance=objective.learn_variance,
            **replace(config.model, **self.dialect).arguments(),
        )
        return cdit, objective

    def make_objective(self) -> Flow | DDPM:
        """A flow."""
        return Flow(FlowConfig())

    def predict(self, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """All goals of a context at once, with the context encoded once."""
        return self.network(noisy, timestep, batch.action, batch.time_shift, batch.context)

    def predict_compiled(self, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """`predict` of the compiled network."""
        return self.compiled(noisy, timestep, batch.action, batch.time_shift, batch.context)

    @cached_property
    def compiled(self) -> nn.Module:
        """The network, compiled in one graph; its weights are the same."""
        return torch.compile(self.network, fullgraph=True)

    def build_optimizer(self) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
        """As `train.py` has them."""
        optimizer, _ = build_optimizer(self.network, OptimizerConfig(warmup_steps=0), steps=1)
        return optimizer, EMA(self.network, EMAConfig()).step

    def world(self, codec: Codec) -> WorldModel:
        """The network with what makes frames of its output, one for each codec; compiled if the config says so."""
        if codec not in self._worlds:
            size = tuple(side * codec.downscale for side in self.config.image_size)
            name = "flow" if isinstance(self.objective, Flow) else "ddpm"
            world = WorldModel(self.network, codec, WorldDescription(size, fps=4.0, objective=name))
            if self.config.compile:
                world.compile()
            self._worlds[codec] = world
        return self._worlds[codec].eval()

    @cached_property
    def _worlds(self) -> dict[Codec, WorldModel]:
        return {}

    def sample(self, batch: Batch, sampler: SamplerConfig) -> Tensor:
        """By `WorldModel.predict`."""
        with self.autocast():
            return self.world(PIXELS).predict(batch.context, batch.action, batch.time_shift, sampler=sampler)

    def rollout(self, codec: Codec, frames: Tensor, actions: Tensor, sampler: SamplerConfig) -> Tensor:
        """By `WorldModel.rollout`."""
        with self.autocast():
            return self.world(codec).rollout(frames, actions, sampler=sampler)


class OursNWM(Ours):
    """The published network and its DDPM, by our code: what its dialect allows to share is shared."""

    name = "ours-nwm"
    sampler = PUBLISHED
    dialect = NWM

    def make_objective(self) -> DDPM:
        """With learned variance."""
        return DDPM(DDPMConfig())


class Published(Contender):
    """The network of Navigation World Models, run plainly: every goal, candidate and step starts from frames."""

    name = "NWM-as-published"
    sampler = PUBLISHED
    kind: type[PublishedCDiT | ConcatDiT] = PublishedCDiT

    def build(self) -> tuple[nn.Module, DDPM]:
        """The network with learned variance, and a DDPM."""
        config, size = self.config, self.config.model.arguments()
        network = self.kind(
            tuple(config.image_size),
            config.channels,
            config.context_frames,
            size["patch_size"],
            size["hidden_size"],
            size["depth"],
            size["num_heads"],
        )
        return network, DDPM(DDPMConfig())

    def predict(self, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Every goal with a copy of its context."""
        goals = noisy.shape[1]
        flat = (x.flatten(0, 1) for x in (noisy, timestep, batch.action, batch.time_shift))
        return self.network(*flat, batch.context.repeat_interleave(goals, 0)).unflatten(0, noisy.shape[:2])

    def build_optimizer(self) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
        """AdamW and an average, parameter by parameter."""
        parameters = list(self.network.parameters())
        shadow = [p.detach().clone() for p in parameters]

        @torch.no_grad()
        def average() -> None:
            for mean, p in zip(shadow, parameters, strict=True):
                mean.mul_(0.9999).add_(p, alpha=1 - 0.9999)

        return torch.optim.AdamW(parameters, 8e-5, weight_decay=0.0), average

    @torch.no_grad()
    def sample(self, batch: Batch, sampler: SamplerConfig) -> Tensor:
        """With the scheduler's loop around `predict`."""
        self.network.eval()
        with self.autocast():
            return self.objective.sample(
                lambda noisy, timestep: self.predict(noisy, timestep.expand(noisy.shape[:2]), batch),
                torch.randn_like(batch.clean),
                sampler,
            )

    @torch.no_grad()
    def rollout(self, codec: Codec, frames: Tensor, actions: Tensor, sampler: SamplerConfig) -> Tensor:
        """Past frames are encoded anew for every candidate and at every step."""
        shape = actions.shape[:2]
        past = frames.repeat_interleave(shape[1], 0)  # (B·G, T, …): every candidate has frames of its own
        predicted = []
        for action in actions.flatten(0, 1).unbind(1):
            with self.autocast():
                context = codec.encode(past)
                clean = torch.empty_like(context[:, :1])
                batch = Batch(context, clean, action[:, None], action.new_full((len(action), 1), 0.25))
                frame = codec.decode(self.sample(batch, sampler)).to(past.dtype)
            past = torch.cat((past[:, 1:], frame), dim=1)
            predicted.append(frame[:, 0])
        return torch.stack(predicted, dim=1).unflatten(0, shape)


class Concatenated(Published):
    """A DiT over past and target together, run in the same way."""

    name = "DiT-concat"
    kind = ConcatDiT


CONTENDERS: dict[ContenderName, type[Contender]] = {
    kind.name: kind for kind in (Ours, OursNWM, Published, Concatenated)
}
