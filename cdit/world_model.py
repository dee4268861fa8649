"""WorldModel: a codec, a CDiT and a sampler that together predict future frames, in metres, radians and seconds."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cdit.codec import AutoencoderCodec, Codec, CodecConfig, PixelCodec, load_codec
from cdit.common.cli import parser_instance
from cdit.common.errors import UserError, writing
from cdit.common.files import read_json
from cdit.common.weights import weight_shapes
from cdit.data.frames import Crop
from cdit.data.image_header import MAX_PIXELS
from cdit.diffusion import DDPMConfig, FlowConfig, ObjectiveName, SamplerConfig, check_sampler, make_objective
from cdit.model import CDiT, ContextCache
from cdit.model.attention import side_by_side

DESCRIPTION = "world_model.json"
VERSION = 1
RECOMPILE_LIMIT = 64


@dataclass
class Units:
    """How physical actions and times become the normalised numbers that the network sees.

    dx and dy are divided by the spacing, then all three are multiplied by a scale, and an offset is added.
    """

    action_scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """For dx, dy (per spacing) and dyaw (per radian)."""
    action_offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """For dx, dy and dyaw."""
    time_scale: float = 1.0
    """Per second."""
    spacing: float | None = 1.0
    """Metres between consecutive frames. None: the model was trained on datasets of different spacings, each in units
    of its own, and has to be told the one at hand."""

    def normalize(
        self, action: Tensor, time_shift: Tensor, spacing: Tensor | float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Actions (B, G, 3) in metres and radians, time shifts (B, G) in seconds, to normalised numbers.

        Args:
            action: dx, dy, dyaw.
            time_shift: from the last past frame.
            spacing: (B,) or one number, metres; looked at only where the units have none of their own.

        Raises:
            UserError: neither the units nor the call have a spacing.
        """
        spacing = spacing if self.spacing is None else self.spacing
        if spacing is None:
            raise UserError("this model was trained on datasets of different spacings: give the spacing of this one")
        unit = action.new_ones(len(action), 1, 3)
        unit[..., :2] = torch.as_tensor(spacing, dtype=action.dtype, device=action.device).reshape(-1, 1, 1)
        scale, offset = action.new_tensor(self.action_scale), action.new_tensor(self.action_offset)
        return action / unit * scale + offset, time_shift * self.time_scale


@dataclass
class WorldDescription:
    """What a saved world model is, beside its weights."""

    image_size: tuple[int, int]
    """Height and width of a frame in pixels."""
    fps: float
    """Frames a second of the past frames, and of a rollout."""
    crop: Crop = "aspect"
    """How recorded frames were brought to that size (see cdit.data.frames.crop_and_resize)."""
    has_actions: bool = True
    """Whether it was trained with actions; without, it knows time shifts alone."""
    action_dropout: float = 0.0
    """Share of actions hidden in training; guidance on the action needs some."""
    min_history: int = 1
    """Fewest past frames it was trained with."""
    units: Units = field(default_factory=Units)
    """Normalisation of actions and times."""
    objective: ObjectiveName = "flow"
    """What the network was trained for."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """What the network of a flow predicts."""
    ddpm: DDPMConfig = field(default_factory=DDPMConfig)
    """What the network of a DDPM predicts."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How frames are sampled where a call does not say."""
    version: int = VERSION
    """Version of this format."""

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is out of its range; the message names the field.
        """
        numbers = [*self.units.action_scale, *self.units.action_offset, self.units.time_scale]
        requirements = {
            "image_size": min(self.image_size) >= 1 and math.prod(self.image_size) <= MAX_PIXELS,
            "fps": 0 < self.fps < 1e6,
            "action_dropout": 0 <= self.action_dropout <= 1,
            "min_history": self.min_history >= 1,
            "units": all(map(math.isfinite, numbers)) and (self.units.spacing is None or 0 < self.units.spacing < 1e6),
            "sampler.steps": 1 <= self.sampler.steps <= 100_000,
        }
        for name, holds in requirements.items():
            if not holds:
                raise UserError(f"{name} is out of range")
        check_sampler(self.objective, self.sampler)


class Window(NamedTuple):
    """Latents of past frames (B, T, C, H, W), oldest first, and which of them exist, (B, T); None: all."""

    latents: Tensor
    mask: Tensor | None

    def push(self, new: Tensor, longest: int) -> "Window":
        """The window one frame later, for candidates (B·G, C, H, W); its oldest leaves when it is full."""
        latents = side_by_side((self.latents, new[:, None]), len(new), dim=1)[:, -longest:]
        if self.mask is None:
            return Window(latents, None)
        mask = side_by_side((self.mask, self.mask.new_ones(len(new), 1)), len(new), dim=1)
        return Window(latents, mask[:, -longest:])


class WorldModel(nn.Module):
    """Predicts frames from past frames, actions and time shifts.

    Frames are (…, 3, H, W) in [-1, 1]; actions (dx, dy, dyaw) in metres and radians in the local frame of the last past
    frame (x forward, y left, yaw counter-clockwise); time shifts in seconds.
    """

    def __init__(self, cdit: CDiT, codec: Codec, description: WorldDescription):
        super().__init__()
        self.cdit, self.codec, self.description = cdit, codec, description
        self.objective = make_objective(description.objective, description.flow, description.ddpm)
        self._compiled: Callable[..., Tensor] | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network denoises."""
        return (self.cdit.config.in_channels, *self.cdit.config.image_size)

    def encode_context(self, context: Tensor, context_mask: Tensor | None = None) -> ContextCache:
        """Encodes past frames (B, T, 3, H, W) for reuse over calls of `predict`; the last max_context are looked at.

        Args:
            context: consecutive frames at the model's fps, oldest first.
            context_mask: (B, T), True where a frame exists.
        """
        return self.cdit.encode_context(*self._window(context, context_mask))

    def compile(self) -> None:
        """Compiles the network for `predict` and `rollout`: on a GPU also to CUDA graphs, which save launches.

        The first calls, and the first of every new shape, take a while. `cdit` itself stays as it is, for training and
        for watching.
        """
        on_cuda = next(self.cdit.parameters()).is_cuda
        forward = torch.compile(self.cdit.forward, fullgraph=True, mode="reduce-overhead" if on_cuda else "default")

        def network(*args: Tensor | ContextCache | None, **kwargs: Tensor | None) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            # Rollouts change shapes until the window has slid, and more so with masks, guidance and other goals.
            with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                return forward(*args, **kwargs).clone()  # the next call's graph writes to the same memory

        self._compiled = network

    @torch.no_grad()
    def predict(
        self,
        context: Tensor | ContextCache,
        actions: Tensor | None,
        time_shift: Tensor,
        context_mask: Tensor | None = None,
        action_mask: Tensor | None = None,
        spacing: Tensor | float | None = None,
        sampler: SamplerConfig | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Samples one frame per goal: (B, G, 3, H, W).

        Args:
            context: (B, T, 3, H, W) past frames, or what `encode_context` made of them.
            actions: (B, G, 3) from the last past frame to each goal; G goals, or candidates, share a context. None: all
                unknown.
            time_shift: (B, G) from the last past frame to each goal.
            context_mask: (B, T), True where a past frame exists; with frames only.
            action_mask: (B, G), False where an action is unknown.
            spacing: (B,) or one number, metres between consecutive frames; looked at only by models that were trained
                on datasets of different spacings (see `Units`).
            sampler: scheduler, steps and guidance; by default those of training.
            generator: of the noise.
            progress: whether to show a progress bar.
        """
        if isinstance(context, Tensor):
            context = self.encode_context(context, context_mask)
        sampler = sampler or self.description.sampler
        conditions = self._normalized(actions, time_shift, action_mask, spacing)
        return self.codec.decode(self._sample(context, *conditions, sampler, generator, progress))

    @torch.no_grad()
    def rollout(
        self,
        context: Tensor,
        actions: Tensor | None,
        context_mask: Tensor | None = None,
        action_mask: Tensor | None = None,
        length: int | None = None,
        fps: float | None = None,
        spacing: Tensor | float | None = None,
        sampler: SamplerConfig | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
        reencode: bool = False,
        last_only: bool = False,
    ) -> Tensor:
        """Predicts frame by frame, each prediction joining the past frames: (B, G, L, 3, H, W).

        Args:
            context: (B, T, 3, H, W) past frames.
            actions: (B, G, L, 3) for G action sequences of L steps of 1 / fps seconds; the action of a step is the
                motion during it, in the local frame at its start. None: all unknown, G = 1.
            context_mask: (B, T), True where a past frame exists.
            action_mask: (B, G, L), False where an action is unknown.
            length: L, where there are no actions.
            fps: steps a second, by default the model's frames a second. At fewer, predictions that lie further apart
                join the past frames, as in the published protocol.
            spacing: see `predict`.
            sampler: scheduler, steps and guidance; by default those of training.
            generator: of the noise.
            progress: whether to show a progress bar over the L steps.
            reencode: whether predictions join the past as frames that are encoded again, as in the published protocol.
                By default what was sampled joins it as it is, unless it is pixels, which are clipped to [-1, 1].
            last_only: whether only the last frames are decoded and returned, (B, G, 1, 3, H, W), as planners want them.
        """
        batch, candidates = (len(context), 1) if actions is None else actions.shape[:2]
        length = length if actions is None else actions.shape[2]
        time_shift = context.new_full((batch, candidates), 1 / (fps or self.description.fps))
        sampler = sampler or self.description.sampler
        window = self._window(context, context_mask)
        cache = self.cdit.encode_context(*window)
        frames: list[Tensor] = []
        sampled: Tensor | None = None
        for step in tqdm(range(length), desc="rollout", disable=not progress, leave=False):
            if sampled is not None:
                new = (self.codec.encode(frames[-1]) if reencode else self.codec.as_past(sampled)).flatten(0, 1)
                if self.cdit.can_push:
                    cache = self.cdit.push_context(cache, new)
                else:
                    window = window.push(new, self.cdit.config.max_context)
                    cache = self.cdit.encode_context(*window)
            action, known = (x if x is None else x[:, :, step] for x in (actions, action_mask))
            conditions = self._normalized(action, time_shift, known, spacing)
            sampled = self._sample(cache, *conditions, sampler, generator, progress=False)
            if reencode or not last_only or step == length - 1:
                frames.append(self.codec.decode(sampled))
        return torch.stack(frames[-1:] if last_only else frames, dim=2)

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes what `from_pretrained` reads: world_model.json, cdit/ and, for an autoencoder, codec/.

        An older model in the folder is replaced when the new one is written in full.

        Raises:
            UserError: the disk is full, or cannot be written to.
        """
        folder = Path(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".partial_*"):  # of a process that was killed
                shutil.rmtree(leftover)
            with TemporaryDirectory(prefix=".partial_", dir=folder) as partial:
                self._write(folder, Path(partial))

    def _write(self, folder: Path, partial: Path) -> None:
        self.cdit.save_pretrained(partial / "cdit")
        if isinstance(self.codec, AutoencoderCodec):
            self.codec.autoencoder.save_pretrained(partial / "codec")
        description = {"codec": self.codec.kind, **asdict(self.description)}
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        (folder / DESCRIPTION).unlink(missing_ok=True)  # without it the folder is no world model, until all is there
        for name in ("cdit", "codec"):
            shutil.rmtree(folder / name, ignore_errors=True)
            if (partial / name).is_dir():
                (partial / name).replace(folder / name)
        (partial / DESCRIPTION).replace(folder / DESCRIPTION)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "WorldModel":
        """Reads a world model, or the best one of a training run's folder, in evaluation mode.

        Raises:
            UserError: the folder holds no world model, or a broken one.
        """
        folder = Path(folder)
        candidates = [folder, folder / "best", folder / "last"]
        found = next((f for f in candidates if (f / DESCRIPTION).is_file()), None)
        if found is None:
            raise UserError(f"{folder}: no world model here (expected {DESCRIPTION}, in it or in its best/ or last/)")
        try:
            values = read_json(found / DESCRIPTION)
            kind = values.pop("codec")
            description = parser_instance(WorldDescription, values)
            if description.version > VERSION:
                raise UserError(f"format version {description.version}, but this code reads up to {VERSION}")
            description.validate()
            shapes = weight_shapes(found / "cdit")
            with torch.device("meta"):
                expected = CDiT.from_config(CDiT.load_config(found / "cdit", local_files_only=True)).state_dict()
            if shapes != {name: tuple(weight.shape) for name, weight in expected.items()}:
                raise UserError("the weights in cdit/ are not those of its config.json")
            cdit = CDiT.from_pretrained(found / "cdit", low_cpu_mem_usage=False, use_safetensors=True)
            if kind != PixelCodec.kind:
                weight_shapes(found / "codec")
            codec = load_codec(CodecConfig(kind, str(found / "codec")))
        except Exception as error:  # the libraries that read these files raise as they please
            raise UserError(f"{found}: not a readable world model ({error})") from error
        return cls(cdit, codec, description).eval()

    def _window(self, context: Tensor, mask: Tensor | None) -> Window:
        """The last max_context of the frames, encoded by the codec."""
        longest = self.cdit.config.max_context
        return Window(self.codec.encode(context[:, -longest:]), None if mask is None else mask[:, -longest:])

    def _normalized(
        self,
        action: Tensor | None,
        time_shift: Tensor,
        action_mask: Tensor | None,
        spacing: Tensor | float | None,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Action, time shift and action mask as the network takes them."""
        if action is None:
            return None, time_shift * self.description.units.time_scale, None
        return *self.description.units.normalize(action, time_shift, spacing), action_mask

    def _sample(
        self,
        context: ContextCache,
        action: Tensor | None,
        time_shift: Tensor,
        action_mask: Tensor | None,
        config: SamplerConfig,
        generator: torch.Generator | None,
        progress: bool,
    ) -> Tensor:
        network, goals = self._compiled or self.cdit, time_shift.shape
        guided = config.guidance != 1 and action is not None and (action_mask is None or bool(action_mask.any()))
        if guided:  # every goal twice, the second time told no action
            known = torch.ones_like(time_shift, dtype=torch.bool) if action_mask is None else action_mask
            action_mask = torch.stack((known, torch.zeros_like(known)), dim=2).flatten(1, 2)
            action, time_shift = action.repeat_interleave(2, 1), time_shift.repeat_interleave(2, 1)

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            if guided:
                noisy = noisy.repeat_interleave(2, 1)
            timesteps = timestep.expand(noisy.shape[:2])
            prediction = network(noisy, timesteps, action, time_shift, context, action_mask=action_mask)
            if not guided:
                return prediction
            return self.objective.guide(prediction[:, 1::2], prediction[:, ::2], config.guidance)

        device = time_shift.device
        shape = (*goals, *self.latent_shape)
        noise = torch.randn(shape, generator=generator, device=generator.device if generator else device).to(device)
        return self.objective.sample(predict, noise, config, generator, progress)
