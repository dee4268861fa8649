"""Contenders: our networks as this package trains and samples them, and plain implementations of peers.

Every contender trains and samples in latents, which are random. Batches are `EncodedBatch`es of B contexts of T frames
with G goals each.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from cdit.batch import Condition, EncodedBatch, KeyedDraws
from cdit.benchmark.config import BenchmarkConfig, ContenderName, Precision
from cdit.benchmark.peers import ConcatDiT, PublishedCDiT
from cdit.codec import Codec, KLCodec, PixelCodec
from cdit.diffusion import DDPM, DDPMConfig, Flow, FlowConfig, SamplerConfig
from cdit.model import CDiT, ContextCache
from cdit.training.config import EMAConfig, OptimizerConfig
from cdit.training.ema import EMA
from cdit.training.setup import build_optimizer
from cdit.world_model import WorldDescription, WorldModel

PIXELS = PixelCodec()
"""Treats latents as frames."""
PUBLISHED = SamplerConfig("ddpm", 250)
NWM = {"position": "learned", "context_modulation": True, "extra_kv": True, "init": "published"}
"""Options that turn our network into the published one."""


def random_batch(
    config: BenchmarkConfig,
    device: torch.device,
    contexts: int | None = None,
    goals: int | None = None,
    past: int | None = None,
) -> EncodedBatch:
    """A random batch, by default with the config's numbers of contexts, goals and past frames."""
    contexts, goals, past = contexts or config.batch_size, goals or config.goals, past or config.context_frames
    frame = (config.channels, *config.image_size)

    def randn(*shape: int) -> Tensor:
        return torch.randn(contexts, *shape, device=device)

    context, clean, action, time_shift = randn(past, *frame), randn(goals, *frame), randn(goals, 3), randn(goals)
    known = torch.ones(contexts, goals, dtype=torch.bool, device=device)
    return EncodedBatch(context, None, clean, {"time_shift": time_shift, "action": action, "action_known": known})


def random_codec(config: BenchmarkConfig) -> KLCodec:
    """An autoencoder of Stable Diffusion's architecture on the CPU; its cost does not depend on its weights."""
    blocks = config.codec.blocks
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        block_out_channels=blocks,
        layers_per_block=2,
        latent_channels=config.channels,
    )
    return KLCodec(autoencoder)


@dataclass
class Contender:
    """A network, its objective, and how it is trained and sampled.

    Subclasses implement `build` (network and objective), `predict` with the arguments of `CDiT.forward`, `encoded` (the
    past, encoded once for all denoising steps), `build_optimizer`, `sample` (frames at the goals of a batch) and
    `rollout` (frames (B, G, L, …) of G action sequences (B, G, L, 3) from past frames that the codec encodes).
    """

    config: BenchmarkConfig
    device: torch.device

    name: ClassVar[ContenderName]
    sampler: ClassVar[SamplerConfig]
    """How frames are sampled by default."""

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.network, self.objective = self.build()
        for p in self.network.parameters():  # closed gates would multiply by zero
            nn.init.normal_(p, std=0.02)
        self.network.to(self.device)

    @cached_property
    def optimizer(self) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
        """The result of `build_optimizer`, cached."""
        return self.build_optimizer()

    def autocast(self, precision: Precision | None = None) -> torch.autocast | nullcontext:
        """Autocast at a precision, by default the config's."""
        wanted = (precision or self.config.mixed_precision) == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if wanted else nullcontext()

    def training_step(
        self, batch: EncodedBatch, precision: Precision | None = None, network: Callable[..., Tensor] | None = None
    ) -> Callable[[], None]:
        """A step: loss of `network` (by default `predict`), gradients, their norm clipped, optimizer, average."""
        optimizer, average = self.optimizer
        network = self.predict if network is None else network
        self.network.train()

        def predict(*inputs: Tensor | Mapping[str, Tensor] | None) -> Tensor:
            with self.autocast(precision):
                return network(*inputs)

        def step() -> None:
            draws = KeyedDraws(range(len(batch.clean)), self.device)
            self.objective.loss(predict, batch, draws).mean().backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
            average()

        return step

    def inference(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call in evaluation mode, at the contender's precision."""
        self.network.eval()

        def wrapped() -> object:
            with torch.no_grad(), self.autocast():
                return call()

        return wrapped

    def denoising(self, batch: EncodedBatch) -> Callable[[], object]:
        """One denoising step of the batch's goals, excluding what can be computed from the past beforehand."""
        timestep = torch.full(batch.clean.shape[:2], 500.0, device=self.device)
        past = self.inference(lambda: self.encoded(batch.context))()
        return self.inference(lambda: self.predict(batch.clean, timestep, batch.condition, past))


class Ours(Contender):
    """CDiT as `train.py` trains it and `WorldModel` samples it."""

    name = "ours"
    sampler = SamplerConfig()
    dialect: ClassVar[dict[str, object]] = {}

    def build(self) -> tuple[nn.Module, Flow | DDPM]:
        """A CDiT of the config, and `make_objective`."""
        config, objective = self.config, self.make_objective()
        model = replace(config.model, **self.dialect).arguments()
        size, variance = tuple(config.image_size), objective.outputs == 2
        return CDiT(size, config.channels, config.context_frames, learn_variance=variance, **model), objective

    def make_objective(self) -> Flow | DDPM:
        """A flow."""
        return Flow(FlowConfig())

    def predict(self, *inputs: Tensor | Mapping[str, Tensor] | ContextCache | None) -> Tensor:
        """All goals of a context at once, with the context encoded once."""
        return self.network(*inputs)

    def encoded(self, past: Tensor) -> ContextCache:
        """Keys and values of all blocks."""
        return self.network.encode_context(past)

    @cached_property
    def compiled(self) -> nn.Module:
        """The network, compiled in one graph; its weights are the same."""
        return torch.compile(self.network, fullgraph=True)

    def build_optimizer(self) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
        """As in `train.py`."""
        optimizer, _ = build_optimizer({"model": self.network}, OptimizerConfig(warmup_steps=0), steps=1)
        return optimizer, EMA(self.network, EMAConfig()).step

    def world(self, codec: Codec) -> WorldModel:
        """A world model with the network, one for each codec; compiled if the config says so."""
        if codec not in self._worlds:
            size = tuple(side * codec.downscale for side in self.config.image_size)
            name = "flow" if isinstance(self.objective, Flow) else "ddpm"
            description = WorldDescription(size, fps=4.0, objective=name, sampler=self.sampler)
            self._worlds[codec] = WorldModel(self.network, codec, description)
            if self.config.compile:
                self._worlds[codec].compile()
        return self._worlds[codec].eval()

    @cached_property
    def _worlds(self) -> dict[Codec, WorldModel]:
        return {}

    def sample(self, batch: EncodedBatch, sampler: SamplerConfig) -> Tensor:
        """By `WorldModel.predict`."""
        condition = Condition(batch.condition["time_shift"], batch.condition["action"])
        with self.autocast():
            return self.world(PIXELS).predict(batch.context, condition, sampler=sampler)

    def rollout(self, codec: Codec, frames: Tensor, actions: Tensor, sampler: SamplerConfig) -> Tensor:
        """By `WorldModel.rollout`."""
        with self.autocast():
            return self.world(codec).rollout(frames, Condition(action=actions), sampler=sampler)


class OursNWM(Ours):
    """The published network and its DDPM in our code, which shares what the dialect allows."""

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
    kind: ClassVar[type[PublishedCDiT | ConcatDiT]] = PublishedCDiT

    def build(self) -> tuple[nn.Module, DDPM]:
        """The network with learned variance, and a DDPM."""
        config, size = self.config, self.config.model.arguments()
        widths = (size[name] for name in ("patch_size", "hidden_size", "depth", "num_heads"))
        network = self.kind(tuple(config.image_size), config.channels, config.context_frames, *widths)
        return network, DDPM(DDPMConfig())

    def predict(
        self, noisy: Tensor, timestep: Tensor, condition: Mapping[str, Tensor], past: Tensor, mask: None = None
    ) -> Tensor:
        """Every goal with a copy of its context."""
        inputs = (noisy, timestep, condition["action"], condition["time_shift"])
        flat = (x.flatten(0, 1) for x in inputs)
        return self.network(*flat, past.repeat_interleave(noisy.shape[1], 0)).unflatten(0, noisy.shape[:2])

    def encoded(self, past: Tensor) -> Tensor:
        """Nothing: the frames."""
        return past

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
    def sample(self, batch: EncodedBatch, sampler: SamplerConfig) -> Tensor:
        """The loop of the scheduler around `predict`."""
        self.network.eval()

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            return self.predict(noisy, timestep.expand(noisy.shape[:2]), batch.condition, batch.context)

        with self.autocast():
            return self.objective.sample(predict, torch.randn_like(batch.clean), sampler)

    @torch.no_grad()
    def rollout(self, codec: Codec, frames: Tensor, actions: Tensor, sampler: SamplerConfig) -> Tensor:
        """Past frames are encoded again for every candidate and at every step."""
        shape = actions.shape[:2]
        past = frames.repeat_interleave(shape[1], 0)  # (B·G, T, …): every candidate has frames of its own
        predicted = []
        for action in actions.flatten(0, 1).unbind(1):
            condition = {"action": action[:, None], "time_shift": action.new_full((len(action), 1), 0.25)}
            with self.autocast():
                context = codec.encode(past)
                batch = EncodedBatch(context, None, torch.empty_like(context[:, :1]), condition)
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
