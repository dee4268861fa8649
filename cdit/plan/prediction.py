"""Predictions of a world model for many candidates: the past is encoded once and shared by all of them.

Suffixes: B contexts, S candidates of each, H steps of a candidate, K numbers of an action, L predicted
frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cdit.batch import Condition
from cdit.diffusion.config import SamplerConfig
from cdit.plan.actions import composed, since
from cdit.world_model import WorldModel, WorldState


@dataclass
class Predictor:
    """Predicts frames along candidates.

    All candidates start from the same noise, so that their frames differ by their actions only. The scheduler ddpm
    draws further noise at every step, for each candidate its own, from a seed that the first noise determines.
    """

    world: WorldModel
    frames: Sequence[int]
    """Frames to predict, counted from the last seen one, in ascending order."""
    stride: int | None = None
    """Frames per predicted step; each prediction joins the past of the next. None: every frame in one jump."""
    sampler: SamplerConfig | None = None
    """By default that of the world."""
    chunk: int = 256
    """Largest number of frames predicted at once; halved when out of memory."""

    def begin(
        self,
        context: Tensor,
        mask: Tensor | None = None,
        spacing: Tensor | float | None = None,
        text: Tensor | None = None,
    ) -> WorldState:
        """Encodes past frames (B, T, 3, H, W); see `WorldModel.begin`."""
        return self.world.begin(context, mask, spacing, self.world.description.fps / (self.stride or 1), text)

    @torch.no_grad()
    def predict(self, state: WorldState, actions: Tensor, noise: Tensor) -> Tensor:
        """The latents (B, S, L, C, h, w) of the frames along candidates.

        Args:
            state: from `begin`.
            actions: (B, S, H, K) of each step, in the units of the world's actions.
            noise: (N, C, h, w) to start from, one for each predicted frame or step.
        """
        parts, start = [], 0
        random = torch.Generator(noise.device).manual_seed(int(noise.flatten()[:1].float().view(torch.int32)))
        while start < actions.shape[1]:
            goals = 1 if self.stride else len(self.frames)
            chosen = actions[:, start : start + max(1, self.chunk // (goals * len(actions)))]
            try:
                parts.append((self._jumps if self.stride is None else self._steps)(state, chosen, noise, random))
            except torch.OutOfMemoryError:
                if chosen.shape[1] == 1:
                    raise
                self.chunk = chosen.shape[1] * goals * len(actions) // 2
                continue
            start += chosen.shape[1]
        return torch.cat(parts, dim=1)

    @property
    def calls(self) -> int:
        """Frames that the network predicts for a candidate."""
        return self.frames[-1] // self.stride if self.stride else len(self.frames)

    def draw_noise(self, generator: torch.Generator) -> Tensor:
        """Noise for `predict`."""
        return torch.randn(self.calls, *self.world.latent_shape, generator=generator, device=generator.device)

    def _jumps(self, state: WorldState, actions: Tensor, noise: Tensor, random: torch.Generator) -> Tensor:
        whole = composed(actions, self.world.description.actions)[:, :, [t - 1 for t in self.frames]]  # (B, S, L, K)
        seconds = torch.tensor(self.frames, device=whole.device) / self.world.description.fps
        condition = Condition(seconds.expand(whole.shape[:3]).flatten(1), whole.flatten(1, 2))
        noise = noise.repeat(actions.shape[1], 1, 1, 1)
        sampled = self.world.sample(state, condition, self.sampler, random, noise=noise)
        return sampled.unflatten(1, whole.shape[1:3])

    def _steps(self, state: WorldState, actions: Tensor, noise: Tensor, random: torch.Generator) -> Tensor:
        space = self.world.description.actions
        path = composed(actions, space)[:, :, self.stride - 1 : self.frames[-1] : self.stride]
        before = torch.cat((torch.zeros_like(path[:, :, :1]), path[:, :, :-1]), dim=2)
        action, found = since(before, path, space), {}
        sampler = replace(self.sampler or self.world.description.sampler, hold=1)  # the stride says what joins the past
        state = state.fork(actions.shape[1])
        for i in range(action.shape[2]):
            sampled = self.world.sample(state, Condition(action=action[:, :, i]), self.sampler, random, noise=noise[i])
            found[(i + 1) * self.stride] = sampled
            if i + 1 < action.shape[2]:
                state = self.world.advance(state, sampled, sampler=sampler)
        return torch.stack([found[t] for t in self.frames], dim=2)
