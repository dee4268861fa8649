"""WorldModel: a codec, a CDiT and a sampler that predict future frames, in physical units."""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from cdit.batch import Batch, Condition, EncodedBatch, Following, KeyedDraws, hide
from cdit.codec.codec import Codec, load_codec
from cdit.codec.config import CodecConfig
from cdit.common.cli import parser_instance
from cdit.common.errors import UserError, writing
from cdit.common.files import read_json, write_json
from cdit.common.frames import to_float
from cdit.common.limits import Positive, within
from cdit.common.randomness import seed_of
from cdit.common.weights import weight_shapes
from cdit.data.action_space import ActionSpace
from cdit.data.config import MAX_PIXELS, Crop
from cdit.data.text import encode_texts
from cdit.diffusion.config import (
    DDPMConfig,
    FewStepConfig,
    FlowConfig,
    SamplerConfig,
    SelfRolloutConfig,
    check_sampler,
)
from cdit.diffusion.objective import make_objective
from cdit.model.attention import side_by_side
from cdit.model.cdit import CDiT, ContextCache
from cdit.worlds import resolve

DESCRIPTION = "world_model.json"
VERSION = 1
RECOMPILE_LIMIT = 64


@dataclass
class Units:
    """Normalisation of physical actions and times for the network.

    The first two numbers of motion, dx and dy, are divided by the spacing; then all numbers are multiplied by a scale,
    and an offset is added. The spacing of other actions is 1.
    """

    action_scale: tuple[float, ...] = (1.0, 1.0, 1.0)
    """For each number: dx, dy (per spacing) and dyaw (per radian)."""
    action_offset: tuple[float, ...] = (0.0, 0.0, 0.0)
    """For each number."""
    time_scale: float = 1.0
    """Per second."""
    spacing: float | None = 1.0
    """Metres between consecutive frames. None: the model was trained on datasets of different spacings, each in its
    own units, and needs the spacing of the current one."""

    def normalize(self, action: Tensor, spacing: Tensor | float | None = None) -> Tensor:
        """Actions (B, G, K) in physical units to normalised numbers.

        Args:
            action: such as dx, dy, dyaw.
            spacing: (B,) or one number, metres; used only if the units have none.

        Raises:
            UserError: neither the units nor the call give a spacing.
        """
        scale, offset = action.new_tensor(self.action_scale), action.new_tensor(self.action_offset)
        return self.in_spacings(action, spacing) * scale + offset

    def in_spacings(self, action: Tensor, spacing: Tensor | float | None = None) -> Tensor:
        """Actions (B, G, K) in metres and radians to spacings and radians; see `normalize`."""
        spacing = spacing if self.spacing is None else self.spacing
        if spacing is None:
            raise UserError("the model was trained on datasets of different spacings: pass the spacing of this dataset")
        unit = action.new_ones(len(action), 1, action.shape[-1])
        unit[..., :2] = torch.as_tensor(spacing, dtype=action.dtype, device=action.device).reshape(-1, 1, 1)
        return action / unit


@dataclass
class WorldDescription:
    """The description of a saved world model, besides its weights."""

    image_size: tuple[int, int]
    """Height and width of a frame in pixels."""
    fps: Positive[Annotated[float, within(0, 1e6)]]
    """Frames per second of the past frames and of a rollout."""
    crop: Crop = "aspect"
    """How recorded frames were resized to it (see cdit.data.frames.crop_and_resize)."""
    has_actions: bool = True
    """Whether it was trained with actions; otherwise it is conditioned on time shifts only."""
    actions: ActionSpace = field(default_factory=ActionSpace)
    """What the actions are."""
    action_dropout: Annotated[float, within(0, 1)] = 0.0
    """Share of goals whose action and text were hidden in training; classifier-free guidance needs more than 0."""
    text_encoder: str | None = None
    """The text model of transformers, by its name on the hub or its folder, if it was trained with texts."""
    min_history: Positive[int] = 1
    """Smallest number of past frames it was trained with."""
    units: Units = field(default_factory=Units)
    """Normalisation of actions and times."""
    objective: str = "flow"
    flow: FlowConfig = field(default_factory=FlowConfig)
    few_step: FewStepConfig = field(default_factory=FewStepConfig)
    ddpm: DDPMConfig = field(default_factory=DDPMConfig)
    self_rollout: SelfRolloutConfig = field(default_factory=SelfRolloutConfig)
    objective_options: dict[str, Any] = field(default_factory=dict)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    version: int = VERSION

    def validate(self) -> None:
        """Checks what the fields' types cannot express.

        Raises:
            UserError: a value is out of its range; the message names the field.
        """
        numbers = [*self.units.action_scale, *self.units.action_offset, self.units.time_scale]
        requirements = {
            "image_size": min(self.image_size) >= 1 and math.prod(self.image_size) <= MAX_PIXELS,
            "units": all(map(math.isfinite, numbers)) and (self.units.spacing is None or 0 < self.units.spacing < 1e6),
        }
        for name, holds in requirements.items():
            if not holds:
                raise UserError(f"{name} is out of range")
        if problem := self.actions.problem():
            raise UserError(f"actions.{problem}")
        if {len(self.units.action_scale), len(self.units.action_offset)} != {len(self.actions.names)}:
            raise UserError(f"units: expected {len(self.actions.names)} numbers, one for each name in actions")
        check_sampler(self.objective, self.sampler)


@dataclass(frozen=True)
class WorldState:
    """Encoded past frames of B contexts, from which a `WorldModel` continues. Immutable: steps return new states.

    The G candidates of a context share their common past.
    """

    cache: ContextCache
    batch: int
    """B."""
    fps: float
    """Frames per second of the next steps."""
    spacing: Tensor | float | None = None
    """(B,) or one number, metres between consecutive frames, for models of several datasets (see `Units`)."""
    text: Tensor | None = None
    """(B, E) or (E,) embeddings of texts that describe what is done, for conditions without text."""
    candidates: int = 1
    """G."""
    latents: Tensor | None = None
    """(B or B·G, T, C, h, w) of the past frames, if the cache cannot be extended and is rebuilt at every step."""
    mask: Tensor | None = None
    """(B or B·G, T), True where a past frame exists, in the same case; None if all do."""
    noise_level: Tensor | None = None
    """(B or B·G, T) noise levels, in the same case; None if all are 0."""
    held: tuple[Tensor, ...] = ()
    """(B·G, C, h, w) latents of the frames since the last past one, oldest first (see `SamplerConfig.hold`)."""
    since: Condition | None = None
    """(B, G, …) motion and time since the last past frame, if frames are held."""
    noise: Tensor | None = None
    """(B, G, C, h, w) that all held frames were sampled from."""

    def fork(self, candidates: int) -> "WorldState":
        """The same past for several candidates; nothing is copied.

        Raises:
            ValueError: the state already has several candidates.
        """
        if self.candidates != 1:
            raise ValueError(f"a state of {self.candidates} candidates cannot be forked again")
        return replace(self, candidates=candidates)


class WorldModel(nn.Module):
    """Predicts frames from past frames and conditions.

    Frames are (…, 3, H, W) in [-1, 1]; conditions (`cdit.batch.Condition`) are in seconds, metres and radians, or the
    units of `description.actions`. Only the world normalises them, and it drops actions if the model was trained
    without actions.

    Step by step, in latents, which can be scored without decoding:

        state = world.begin(context).fork(candidates)
        state, sampled = world.step(state, Condition(action=actions))
        frames = world.decode(sampled)
    """

    def __init__(self, cdit: CDiT, codec: Codec, description: WorldDescription):
        super().__init__()
        self.cdit, self.codec, self.description = cdit, codec, description
        self.objective = make_objective(description)
        self._check(description.sampler)
        if missing := self.objective.conditioners.keys() - cdit.conditioners.keys():
            raise UserError(f"objective {description.objective} needs a network with the conditioner {missing.pop()}")
        actions = len(description.actions.names)
        if description.has_actions and cdit.config.action_size != actions:
            raise UserError(f"actions has {actions} names, but the network has action_size {cdit.config.action_size}")
        self._compiled: Callable[..., Tensor] | None = None
        self.text: Tensor | None = None
        """(E,) embedding of a text that replaces those of all states and conditions; None: they keep theirs."""

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.cdit.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of what the network denoises."""
        return (self.cdit.config.in_channels, *self.cdit.config.image_size)

    def compile(self) -> None:
        """Compiles the network for sampling, on a GPU with CUDA graphs.

        The first calls, and the first of every new shape, take a while. `cdit` itself is unchanged, for training and
        recording.
        """
        on_cuda = self.device.type == "cuda"
        forward = torch.compile(self.cdit.forward, fullgraph=True, mode="reduce-overhead" if on_cuda else "default")

        def network(*args: Tensor | ContextCache | Mapping[str, Tensor]) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            # Shapes change in rollouts until the window is full, and with masks, guidance and numbers of goals.
            with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                return forward(*args).clone()  # the next call's graph writes to the same memory

        self._compiled = network

    @torch.no_grad()
    def begin(
        self,
        context: Tensor,
        mask: Tensor | None = None,
        spacing: Tensor | float | None = None,
        fps: float | None = None,
        text: Tensor | None = None,
    ) -> WorldState:
        """Encodes past frames, of which the last max_context are used.

        Args:
            context: (B, T, 3, H, W) consecutive frames at the model's frame rate, oldest first.
            mask: (B, T), True where a frame exists.
            spacing: (B,) or one number, metres between consecutive frames; used only by models trained on datasets
                of different spacings (see `Units`).
            fps: steps per second, by default the model's. With fewer, frames further apart join the past, as in the
                published protocol.
            text: (B, E) or (E,) embeddings of texts that describe what is done (see `encode_text`).
        """
        longest = self.cdit.config.max_context
        latents = self.codec.encode(context[:, -longest:].to(self.device))
        mask = None if mask is None else mask[:, -longest:].to(self.device)
        cache = self.cdit.encode_context(latents, mask)
        state = WorldState(cache, len(context), fps or self.description.fps, spacing, text)
        return state if self.cdit.can_push else replace(state, latents=latents, mask=mask)

    @torch.no_grad()
    def sample(
        self,
        state: WorldState,
        condition: Condition | None = None,
        sampler: SamplerConfig | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Samples the latents of G goals of each context, or of the next frame of G candidates: (B, G, C, h, w).

        Args:
            state: the past.
            condition: of each goal or candidate, (B, G, …); G is the number of candidates where it is empty.
            sampler: scheduler, steps and guidance; by default those of the description.
            generator: of the noise.
            progress: whether to show a progress bar over the denoising steps.
            noise: (B, G, C, h, w) to start from, or of a shape that expands to it: the same noise for all candidates
                makes them comparable. By default drawn.

        Raises:
            UserError: the objective has no such scheduler.
        """
        sampler = sampler or self.description.sampler
        self._check(sampler)
        known = self.network_condition(self._complete(condition or Condition(), state))
        network, goals, device = self._compiled or self.cdit, known["time_shift"].shape, self.device
        guides = [known[name] for name in ("action_known", "text") if name in known]
        guided = sampler.guidance != 1 and any(bool(x.any()) for x in guides)
        if guided:  # every goal twice, the second time without its action and text
            known = {name: x.repeat_interleave(2, 1) for name, x in known.items()}
            known = hide(known, torch.arange(2 * goals[1], device=device) % 2 == 1)

        def predict(noisy: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
            if guided:
                noisy = noisy.repeat_interleave(2, 1)
            each = noisy.shape[:2]
            conditions = known | {name: value.expand(each) for name, value in conditions.items()}
            prediction = network(noisy, timestep.expand(each), conditions, state.cache)
            if not guided:
                return prediction
            return self.objective.guide(prediction[:, 1::2], prediction[:, ::2], sampler.guidance)

        if noise is None:
            noise = self._draw(goals, generator)
        noise = noise.to(device).expand(*goals, *self.latent_shape)
        return self.objective.sample(predict, noise, sampler, generator, progress)

    @torch.no_grad()
    def step(
        self,
        state: WorldState,
        condition: Condition | None = None,
        sampler: SamplerConfig | None = None,
        generator: torch.Generator | None = None,
        reencode: bool = False,
    ) -> tuple[WorldState, Tensor]:
        """Samples the next frame of each candidate; returns the new state, and the latents (B, G, C, h, w).

        Args:
            state: the past of B contexts with G candidates.
            condition: (B, G, …); actions are the motion during the step, in the local frame at its start.
            sampler: see `sample`.
            generator: of the noise.
            reencode: whether the frame is decoded and encoded again before it joins the past, as in the published
                protocol. By default the sampled latents join it (pixels are clipped to [-1, 1]).
        """
        condition = condition or Condition()
        noise = self.noise(state, condition, generator)
        sampled = self.sample(state, condition, sampler, generator, noise=noise)
        frames = self.decode(sampled) if reencode else None
        return self.advance(state, sampled, condition, noise, frames, sampler), sampled

    def noise(self, state: WorldState, condition: Condition, generator: torch.Generator | None = None) -> Tensor:
        """What the next frame of each candidate is sampled from, (B, G, C, h, w): that of held frames, or new noise."""
        if state.noise is not None:
            return state.noise
        return self._draw(condition.shape(2) or (state.batch, state.candidates), generator)

    @torch.no_grad()
    def advance(
        self,
        state: WorldState,
        sampled: Tensor,
        condition: Condition | None = None,
        noise: Tensor | None = None,
        frames: Tensor | None = None,
        sampler: SamplerConfig | None = None,
    ) -> WorldState:
        """The state after appending the next frame of each candidate.

        Args:
            state: the past.
            sampled: (B, G, C, h, w) latents of the frames.
            condition: (B, G, …) what they were sampled with; needed if the sampler holds frames.
            noise: (B, G, C, h, w) what they were sampled from, see `noise`; needed in the same case.
            frames: (B, G, 3, H, W), to encode instead of using the latents.
            sampler: whose `context_noise` is declared as the frames' noise level. No noise is added, as when Diffusion
                Forcing (Chen et al. 2024, arXiv 2407.01392) stabilises rollouts: a frame is the mean of its noisy
                versions.

        Raises:
            UserError: the model was not trained with as much context noise.
            ValueError: the state has another number of candidates.
        """
        sampler = sampler or self.description.sampler
        self._check(sampler)
        if state.candidates != sampled.shape[1]:
            state = state.fork(sampled.shape[1])
        new = (self.codec.as_past(sampled) if frames is None else self.codec.encode(frames)).flatten(0, 1)
        held = (*state.held, new)
        if len(held) < max(1, int(sampler.hold * state.fps / self.description.fps + 1e-6)):
            return replace(state, held=held, since=self._complete(condition or Condition(), state), noise=noise)
        return self.join(replace(state, held=held), sampler)

    @torch.no_grad()
    def join(self, state: WorldState, sampler: SamplerConfig | None = None) -> WorldState:
        """The state after all held frames have joined the past, earlier than the sampler would add them."""
        held, sampler = state.held, sampler or self.description.sampler
        state = replace(state, held=(), since=None, noise=None)
        for new in held[-self.cdit.config.max_context :]:
            state = self._push(state, new, sampler.context_noise)
        return state

    def _push(self, state: WorldState, new: Tensor, context_noise: float) -> WorldState:
        """The state after a frame (B or B·G, C, h, w) has joined the past."""
        level = new.new_full((len(new),), context_noise) if context_noise else None
        if self.cdit.can_push:
            return replace(state, cache=self.cdit.push_context(state.cache, new, level))

        def slid(before: Tensor, last: Tensor) -> Tensor:
            return side_by_side((before, last[:, None]), len(new), dim=1)[:, -self.cdit.config.max_context :]

        latents = slid(state.latents, new)
        mask = None if state.mask is None else slid(state.mask, state.mask.new_ones(len(new)))
        levels = state.noise_level
        if level is not None or levels is not None:
            levels = state.latents.new_zeros(state.latents.shape[:2]) if levels is None else levels
            levels = slid(levels, new.new_zeros(len(new)) if level is None else level)
        cache = self.cdit.encode_context(latents, mask, levels)
        return replace(state, cache=cache, latents=latents, mask=mask, noise_level=levels)

    def decode(self, sampled: Tensor) -> Tensor:
        """Latents (…, C, h, w) to frames (…, 3, H, W) in [-1, 1]."""
        return self.codec.decode(sampled)

    def predict(
        self,
        context: Tensor | WorldState,
        condition: Condition,
        mask: Tensor | None = None,
        sampler: SamplerConfig | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
        latents: bool = False,
    ) -> Tensor:
        """Samples one frame per goal, each in one jump: (B, G, 3, H, W).

        Args:
            context: (B, T, 3, H, W) past frames, or a state.
            condition: (B, G, …) of each goal; actions from the last past frame to it.
            mask: (B, T), True where a past frame exists; with frames only.
            sampler: see `sample`.
            generator: of the noise.
            progress: whether to show a progress bar.
            latents: whether to return latents (B, G, C, h, w) in place of frames.

        Raises:
            ValueError: a mask is given with a state, which has its own.
        """
        if isinstance(context, WorldState) and mask is not None:
            raise ValueError("mask: expected none with a state, which has its own")
        state = context if isinstance(context, WorldState) else self.begin(context, mask)
        sampled = self.sample(state, condition, sampler, generator, progress)
        return sampled if latents else self.decode(sampled)

    def rollout(
        self,
        context: Tensor | WorldState,
        condition: Condition | None = None,
        mask: Tensor | None = None,
        length: int | None = None,
        fps: float | None = None,
        sampler: SamplerConfig | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
        reencode: bool = False,
        last_only: bool = False,
        latents: bool = False,
    ) -> Tensor:
        """Predicts frame by frame, each prediction joining the past frames: (B, G, L, 3, H, W).

        Args:
            context: (B, T, 3, H, W) past frames, or a state.
            condition: (B, G, L, …) of G candidates and L steps; the action of a step is the motion during it, in the
                local frame at its start. None: actions are unknown, and G is that of the state, or 1.
            mask: (B, T), True where a past frame exists; with frames only.
            length: L, if the condition has no steps.
            fps: steps per second, by default the model's (see `begin`); with frames only.
            sampler: see `sample`.
            generator: of the noise.
            progress: whether to show a progress bar over the L steps.
            reencode: see `step`.
            last_only: whether to decode and return only the last frames, (B, G, 1, 3, H, W), for planning.
            latents: whether to return latents (B, G, L, C, h, w) in place of frames.

        Raises:
            ValueError: there is no length; a mask or fps is given beside a state; or the state has candidates, but
                another number of them than the condition.
        """
        condition = condition or Condition()
        shape = condition.shape(3)
        if shape is None and length is None:
            raise ValueError("length: expected a number of steps, since the condition has none")
        length = shape[2] if shape else length
        if isinstance(context, WorldState):
            if mask is not None or fps is not None:
                raise ValueError("mask, fps: expected none with a state, which has its own")
            state = context
        else:
            state = self.begin(context, mask, condition.spacing, fps)
        if shape and state.candidates != shape[1]:
            state = state.fork(shape[1])
        found: list[Tensor] = []
        for i in tqdm(range(length), desc="rollout", disable=not progress, leave=False):
            step = condition.select(2, i)
            noise = self.noise(state, step, generator)
            sampled = self.sample(state, step, sampler, generator, noise=noise)
            is_kept = not last_only or i == length - 1
            frame = self.decode(sampled) if reencode or (is_kept and not latents) else None
            if is_kept:
                found.append(sampled if latents else frame)
            if i < length - 1:
                state = self.advance(state, sampled, step, noise, frame if reencode else None, sampler)
        return torch.stack(found, dim=2)

    @torch.no_grad()
    def encode(self, batch: Batch, action_dropout: float = 0.0, clean_context: float = 1.0) -> EncodedBatch:
        """A batch of windows as the network sees it, on the world's device.

        Args:
            batch: of frames or of latents' moments, with keys.
            action_dropout: share of goals whose action and text `EncodedBatch.dropped` hides.
            clean_context: share of windows whose past frames get no noise. In the others each frame gets Gaussian
                noise of its own standard deviation, uniform up to the network's `context_noise`, as in GameNGen
                (Valevski et al. 2024, arXiv 2408.14837).
        """
        # Checked on the CPU, which needs no synchronisation; without masks faster kernels can be used.
        mask = None if batch.mask.all() else batch.mask.to(self.device)
        past = batch.context.shape[1]
        goals, following = past + batch.target.shape[1], batch.following
        recorded = [batch.context, batch.target, *([following.frames] if following else [])]
        recorded = torch.cat([x.to(self.device, non_blocking=True) for x in recorded], dim=1)
        noise = None
        if self.codec.samples:
            keys = [seed_of(key, 1) for key in batch.key.tolist()]
            noise = KeyedDraws(keys, self.device).randn(recorded.shape[1], *self.latent_shape)
        if recorded.dtype == torch.uint8:
            latents = self.codec.encode(to_float(recorded), noise)
        else:  # already encoded
            latents = self.codec.draw(recorded, noise)
        condition = self.network_condition(batch.condition.to(self.device))
        context, level = latents[:, :past], None
        if self.cdit.config.context_noise and clean_context < 1:
            draws = KeyedDraws([seed_of(key, 2) for key in batch.key.tolist()], self.device)
            level = self.cdit.config.context_noise * draws.rand(past) * (draws.rand(1) >= clean_context)
            context = context + level[..., None, None, None] * draws.randn(past, *self.latent_shape)
        if following:
            following = Following(latents[:, goals:], self.network_condition(following.condition.to(self.device)))
        return EncodedBatch(
            context,
            mask,
            latents[:, past:goals],
            condition,
            action_dropout,
            noise_level=level,
            following=following,
            as_past=self.codec.as_past,
        )

    def network_condition(self, condition: Condition) -> dict[str, Tensor]:
        """Normalised conditions by name, as `CDiT.forward` takes them; without actions for a model trained without.

        Args:
            condition: with a time shift.
        """
        units = self.description.units
        named = {"time_shift": condition.time_shift * units.time_scale, **condition.extra}
        text = condition.text if self.text is None else self.text
        if text is not None and self.cdit.config.text_size:
            text = torch.atleast_2d(text.to(condition.time_shift.device))[:, None]
            named["text"] = text.expand(*condition.time_shift.shape, -1)
        if condition.action is None or not self.description.has_actions:
            return named
        known = condition.known
        if known is None:
            known = torch.ones(condition.action.shape[:-1], dtype=torch.bool, device=condition.action.device)
        action = units.normalize(condition.action, condition.spacing)
        named |= {"action": action, "action_known": known}
        if self.cdit.config.reprojection:
            named["motion"] = units.in_spacings(condition.action, condition.spacing)
        return named

    def encode_text(self, text: str) -> Tensor:
        """The embedding (E,) of a text that describes what is done; zeros for an empty text.

        Raises:
            UserError: the model was trained without texts, or its text encoder is not available.
        """
        encoder, size = self.description.text_encoder, self.cdit.config.text_size
        if encoder is None:
            raise UserError("text: the model was trained without texts (data.text_encoder)")
        vector = encode_texts(encoder, [text])[0] if text else torch.zeros(size)
        if len(vector) != size:
            raise UserError(f"text_encoder {encoder} gives {len(vector)} numbers, but the model takes {size}")
        return vector.to(self.device)

    def _draw(self, goals: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        shape, device = (*goals, *self.latent_shape), generator.device if generator else self.device
        return torch.randn(shape, generator=generator, device=device)

    def _check(self, sampler: SamplerConfig) -> None:
        possible = self.objective.schedulers
        if sampler.scheduler not in possible:
            raise UserError(f"sampler.scheduler is {sampler.scheduler}, expected one of {', '.join(possible)}")
        if sampler.hold > 1 and self.description.actions.kind != "motion":
            raise UserError(
                f"sampler.hold is {sampler.hold}, expected 1: only the motion of a camera can be summed here"
            )
        most = self.cdit.config.context_noise
        if not 0 <= sampler.context_noise <= most:
            raise UserError(
                f"sampler.context_noise is {sampler.context_noise}, expected at least 0 and at most {most:g}, the "
                "model.context_noise that the network was trained with"
            )

    def _complete(self, condition: Condition, state: WorldState) -> Condition:
        """The condition since the last past frame, with time shift and spacing from the state if it has none."""
        condition = condition.to(self.device)
        if condition.time_shift is None:
            shape = condition.shape(2) or (state.batch, state.candidates)
            shift = torch.full(shape, 1 / state.fps, dtype=next(self.cdit.parameters()).dtype, device=self.device)
            condition = replace(condition, time_shift=shift)
        if condition.spacing is None:
            condition = replace(condition, spacing=state.spacing)
        if condition.text is None:
            condition = replace(condition, text=state.text)
        return condition if state.since is None else state.since.then(condition)

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes what `from_pretrained` reads: world_model.json, cdit/ and, where the codec has weights, codec/.

        Replaces an older model in the folder once the new one is complete.

        Raises:
            UserError: the disk is full or not writable.
        """
        folder = Path(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".partial_*"):  # left by a killed process
                shutil.rmtree(leftover)
            with TemporaryDirectory(prefix=".partial_", dir=folder) as partial:
                self._write(folder, Path(partial))

    def _write(self, folder: Path, partial: Path) -> None:
        self.cdit.save_pretrained(partial / "cdit")
        self.codec.save(partial / "codec")
        description = {"codec": self.codec.kind, **asdict(self.description)}
        write_json(partial / DESCRIPTION, description)
        (folder / DESCRIPTION).unlink(missing_ok=True)  # until all is there, the folder is not a world model
        for name in ("cdit", "codec"):
            shutil.rmtree(folder / name, ignore_errors=True)
            if (partial / name).is_dir():
                (partial / name).replace(folder / name)
        (partial / DESCRIPTION).replace(folder / DESCRIPTION)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "WorldModel":
        """Reads a world model, or the best one of a training run's folder, in evaluation mode and float32.

        Args:
            folder: the world model's, the run's, that of one of the run's checkpoints, whose averaged weights are
                read, or the name of a world that ships with the package (`cdit.worlds`).

        Raises:
            UserError: the folder holds no world model, or a damaged one.
        """
        folder = resolve(folder)
        if averages := sorted(folder.glob("average*.safetensors")):
            world = cls.from_pretrained(folder.absolute().parents[1])
            _take_average(world.cdit, averages)
            return world
        candidates = [folder, folder / "best", folder / "last"]
        found = next((f for f in candidates if (f / DESCRIPTION).is_file()), None)
        if found is None:
            raise UserError(f"{folder}: no world model here (expected {DESCRIPTION}, in it or in its best/ or last/)")
        values = read_json(found / DESCRIPTION, version=VERSION)
        try:
            kind = values.pop("codec")
            description = parser_instance(WorldDescription, values)
            description.validate()
            shapes = weight_shapes(found / "cdit")
            with torch.device("meta"):
                expected = CDiT.from_config(CDiT.load_config(found / "cdit", local_files_only=True)).state_dict()
            if shapes != {name: tuple(weight.shape) for name, weight in expected.items()}:
                raise UserError("the weights in cdit/ do not match its config.json")
            options = {"low_cpu_mem_usage": False, "use_safetensors": True}
            cdit = CDiT.from_pretrained(found / "cdit", torch_dtype=torch.float32, **options)
            codec = load_codec(CodecConfig(kind, str(found / "codec")))
            return cls(cdit, codec, description).eval()
        except Exception as error:  # the libraries that read these files raise many types
            raise UserError(f"{found}: not a readable world model ({error})") from error


def _take_average(cdit: CDiT, files: list[Path]) -> None:
    """Loads the averaged weights of a training checkpoint; sharded ones are split along their first dimension."""
    try:
        parts = [load_file(file) for file in files]
        names = dict.fromkeys(name for part in parts for name in part)
        if set(names) != {name for name, _ in cdit.named_parameters()}:
            raise ValueError("the weights do not belong to the run's world model")
        found = {name: [part[name] for part in parts if name in part] for name in names}
        cdit.load_state_dict({n: torch.cat(some) if len(some) > 1 else some[0] for n, some in found.items()}, False)
    except Exception as error:  # safetensors has its own exceptions
        raise UserError(f"{files[0].parent}: not a readable checkpoint ({str(error).splitlines()[0]})") from error
