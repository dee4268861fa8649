"""A world stepped by actions, with a history: going back is exact, and attention can be watched while a frame forms."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cdit.batch import Condition
from cdit.common.frames import to_float, to_uint8
from cdit.common.randomness import generator
from cdit.diffusion.config import SamplerConfig
from cdit.heads.head_statistics import HeadRow, HeadStatistics
from cdit.heads.importance import Head, ablate_heads
from cdit.heads.measures import Layout, edge_patches, gradient_magnitude
from cdit.heads.record import LayerAttention, watch_attention
from cdit.world_model import WorldModel, WorldState

KEPT_STATES = 32
"""Interval in steps at which the state is kept; states in between are recomputed from the sampled latents when going
back."""


@dataclass
class Moment:
    """One step of a dream, with everything that is needed to repeat it."""

    action: tuple[float, ...]
    sampled: Tensor
    """(1, 1, C, h, w) latents."""
    frame: Tensor
    """(3, H, W) uint8 on the CPU."""
    noise: Tensor
    """State of the generator before the step."""
    sampler: SamplerConfig
    off: frozenset[Head]
    """The heads that were ablated."""
    calls: int
    """Calls of the network."""
    held: int
    """Number of frames between its past and it, see `SamplerConfig.hold`."""
    state: WorldState | None
    """The state after the step; None if it is recomputed when needed."""


class Look(NamedTuple):
    """What some heads attended to while a frame was denoised."""

    weights: dict[int, Tensor]
    """By layer, (H, N, M[+1]) float32 on the CPU, as `cdit.heads.record.record_attention` records them."""
    rows: list[HeadRow]
    """Types and measures of these layers' heads in this one frame."""


class Dream:
    """A drive through one world: `begin`, then `step` by `step`, and `back`.

    The frames are those of `WorldModel.rollout` with the same actions and `generator(seed)`, bit by bit, also after
    going back.

    Args:
        world: the model.
        sampler: how frames are sampled; may be changed between steps.
        seed: of the noise.
        spacing: metres between frames, for models of several datasets.
    """

    def __init__(self, world: WorldModel, sampler: SamplerConfig, seed: int = 0, spacing: float | None = None):
        self.world, self.sampler, self.seed, self.spacing = world, sampler, seed, spacing
        self.off: frozenset[Head] = frozenset()
        self.watched: frozenset[int] = frozenset()
        """Layers whose attention is kept while a frame is sampled."""
        self.moments: list[Moment] = []

    def begin(self, context: Tensor, mask: Tensor) -> None:
        """Starts over.

        Args:
            context: (T, 3, H, W) uint8, oldest first.
            mask: (T,), True where a frame exists.
        """
        self.context, self.mask = context, mask
        with_mask = None if mask.all() else mask[None]
        self._start = self._state = self.world.begin(to_float(context)[None], with_mask, self.spacing)
        self._noise = generator(self.seed)
        self.moments.clear()
        self._attention: dict[tuple[int, int], LayerAttention] = {}

    @property
    def state(self) -> WorldState:
        """The world after the newest frame."""
        return self._state

    @property
    def frame(self) -> Tensor:
        """The newest frame, (3, H, W) uint8."""
        return self.moments[-1].frame if self.moments else self.context[-1]

    def step(self, action: Sequence[float]) -> Tensor:
        """Advances by one frame.

        Args:
            action: during the step, in the units of the world's actions: dx, dy (metres), dyaw (radians) in the local
                frame at its start, or other numbers.

        Returns:
            The frame, (3, H, W) uint8.
        """
        before, noise = self._state, self._noise.get_state()
        sampled, calls = self._sample(before, action, self._noise, self.sampler, self.off)
        frame = to_uint8(self.world.decode(sampled)[0, 0]).cpu()
        held = len(before.held)
        self.moments.append(Moment(tuple(action), sampled, frame, noise, self.sampler, self.off, calls, held, None))
        self._state = self._advanced(before, self.moments[-1])
        if len(self.moments) % KEPT_STATES == 0:
            self.moments[-1].state = self._state
        return frame

    def back(self) -> None:
        """Undoes the last step, if there is one."""
        if self.moments:
            self._noise.set_state(self.moments.pop().noise)
            self._state = self._after(len(self.moments))
            self._attention.clear()

    def look(self, layers: Iterable[int], call: int = -1) -> Look | None:
        """Attention of all heads of some layers while the newest frame was sampled; None before the first step.

        If the layers were not `watched`, the frame is sampled again, with the same noise.

        Args:
            layers: blocks, from 0.
            call: of the network; the last is the least noisy.
        """
        if not self.moments:
            return None
        layers, last = sorted(set(layers)), self.moments[-1]
        call = range(last.calls)[max(-last.calls, min(call, last.calls - 1))]
        if any((call, layer) not in self._attention for layer in layers):
            noise = torch.Generator(self._noise.device)
            noise.set_state(last.noise)
            before, self.watched = self.watched, frozenset(layers)
            self._sample(self._after(len(self.moments) - 1), last.action, noise, last.sampler, last.off)
            self.watched = before
        found = {layer: self._attention[call, layer] for layer in layers}
        frames, masks = self._past()
        layout = Layout(len(frames), *self.world.cdit.grid)
        edges = edge_patches(gradient_magnitude(to_float(frames), layout)) * masks[:, None]
        statistics = HeadStatistics("cross", layout, ["drive"], edges[None])
        for attention in found.values():
            statistics.add(0, 0.0, attention)
        return Look({layer: a.weights()[0, 0].cpu() for layer, a in found.items()}, statistics.rows())

    def past(self) -> Tensor:
        """The frames that the newest one was predicted from, (T, 3, H, W) uint8, oldest first."""
        return self._past()[0]

    def ends(self, action: Sequence[float], samples: int) -> Tensor:
        """Predicted frames (samples, 3, H, W) uint8, one second ahead if this action continues, from different noise,
        each in one jump.

        The dream's own noise is not affected.
        """
        steps = max(1, round(self.world.description.fps))
        whole = torch.from_numpy(self.world.description.actions.compose(np.tile(np.float32(action), (steps, 1)))[-1])
        condition = Condition(
            time_shift=torch.full((1, samples), steps / self.world.description.fps),
            action=whole.expand(1, samples, -1),
        )
        noise = generator(self.seed, 1, len(self.moments))
        with ablate_heads(self.world.cdit, self.off):
            sampled = self.world.sample(self._state, condition, self.sampler, noise)
        return to_uint8(self.world.decode(sampled)[0]).cpu()

    def _sample(
        self,
        state: WorldState,
        action: Sequence[float],
        noise: torch.Generator,
        sampler: SamplerConfig,
        off: frozenset[Head],
    ) -> tuple[Tensor, int]:
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        def note(attention: LayerAttention) -> None:
            self._attention[calls - 1, attention.layer] = attention

        self._attention.clear()
        counted = self.world.cdit.register_forward_pre_hook(count)
        try:
            with ablate_heads(self.world.cdit, off), watch_attention(self.world.cdit, self.watched, "cross", note):
                condition = _condition(action)
                drawn = self.world.noise(state, condition, noise)
                return self.world.sample(state, condition, sampler, noise, noise=drawn), calls
        finally:
            counted.remove()

    def _after(self, steps: int) -> WorldState:
        """The state after this many steps."""
        kept = steps
        while kept and self.moments[kept - 1].state is None:
            kept -= 1
        state = self.moments[kept - 1].state if kept else self._start
        for moment in self.moments[kept:steps]:
            state = self._advanced(state, moment)
        return state

    def _advanced(self, state: WorldState, moment: Moment) -> WorldState:
        condition, before = _condition(moment.action), torch.Generator(self._noise.device)
        before.set_state(moment.noise)
        noise = self.world.noise(state, condition, before)
        return self.world.advance(state, moment.sampled, condition, noise, sampler=moment.sampler)

    def _past(self) -> tuple[Tensor, Tensor]:
        longest, joined = self.world.cdit.config.max_context, len(self.moments) - 1 - self.moments[-1].held
        before = [moment.frame for moment in self.moments[max(0, joined - longest) : joined]]
        frames = torch.stack([*self.context, *before])[-longest:]
        masks = torch.cat((self.mask, self.mask.new_ones(len(before))))[-longest:]
        return frames, masks


def _condition(action: Sequence[float]) -> Condition:
    return Condition(action=torch.tensor(action, dtype=torch.float32)[None, None])


def step_bytes(world: WorldModel) -> float:
    """Memory that a step of a dream takes, on average."""
    config, shape = world.cdit.config, torch.Size(world.latent_shape)
    patches = world.cdit.grid[0] * world.cdit.grid[1]
    state = 8 * config.max_context * patches * config.hidden_size * len(world.cdit.blocks) / KEPT_STATES
    height, width = world.description.image_size
    return 4 * shape.numel() + 3 * height * width + 6000 + state


def with_heads(heads: Iterable[tuple[int, int]]) -> frozenset[Head]:
    """Heads of cross-attention from (layer, number)."""
    return frozenset(Head(layer, "cross", number) for layer, number in heads)
