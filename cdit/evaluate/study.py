"""The engine: computes one protocol on its cases, batch by batch, for every method and metric."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cdit.batch import Batch, Condition
from cdit.codec import Codec
from cdit.common.frames import to_float, to_uint8
from cdit.common.randomness import generator
from cdit.data.windows import WindowDataset
from cdit.diffusion import SamplerConfig
from cdit.evaluate.cases import Case, others
from cdit.evaluate.frechet import Features
from cdit.evaluate.methods import predictions
from cdit.evaluate.metrics import Metric, score
from cdit.evaluate.protocols import Protocol, Rollout, moved
from cdit.loading import spread
from cdit.world_model import WorldModel


@dataclass(frozen=True)
class Judge:
    """What is measured. Frames are rounded to 8 bits first, as in files and on screens."""

    metrics: Mapping[str, Metric]
    images: Features | None = None
    videos: Features | None = None
    latents: bool = False
    """Whether the mean squared difference of predicted and true latents is measured, too."""
    rank: bool = False
    """With latents: whether the share of recorded frames is measured that are further away than the truth."""
    truncate: bool = False
    """Whether predictions become 8-bit pictures by truncation (the NWM release), not by rounding."""

    @property
    def names(self) -> list[str]:
        """Names of all metrics."""
        latents = ["latents"] if self.latents else []
        rank = ["rank"] if self.rank else []
        return [*self.metrics, *latents, *rank, *(["fid"] if self.images else []), *(["fvd"] if self.videos else [])]

    @classmethod
    def without_decoder(cls, codec: Codec) -> "Judge":
        """For a codec without a decoder, whose pictures are not measured."""
        return cls({}, latents=True, rank=codec.rank is not None)

    def eight_bits(self, frames: Tensor) -> Tensor:
        """Frames in [-1, 1] as uint8."""
        if not self.truncate:
            return to_uint8(frames)
        # Tolerates the rounding errors of floats, so that 8-bit values stay what they are.
        return ((frames.float() + 1) * 127.5 + 1e-3).floor().clamp(0, 255).byte()

    def sees(self, protocol: Protocol) -> bool:
        """Whether a protocol predicts videos that are long enough for the network of fvd."""
        return isinstance(protocol, Rollout) and len(protocol.offsets) >= self.videos.min_frames

    def features(self, frames: Tensor, protocol: Protocol) -> dict[str, Tensor]:
        """Features of frames (B, G, 3, H, W) in [-1, 1]: fid (B, S, F) of each horizon, fvd (B, F) of rollouts."""
        found = {}
        if self.images:
            chosen = frames[:, protocol.measured]
            found["fid"] = self.images(chosen.flatten(0, 1)).unflatten(0, chosen.shape[:2])
        if self.videos and self.sees(protocol):
            found["fvd"] = self.videos(frames)
        return found


@dataclass(frozen=True)
class Study:
    """One protocol on its cases."""

    protocol: Protocol
    cases: Sequence[Case]
    batch_size: int
    """Cases per batch. The noise of a batch depends on its index only, not on the process."""
    pictures: int
    """Number of cases that are shown, evenly spread over all."""
    seed: int
    """Seed of the noise, which is the same for every method."""
    methods: Sequence[str] = ("model", "copy_last", "shuffled_actions", "reconstruction")
    """Keys of `METHODS`. A method that cannot be computed is left out: nothing is shuffled in a single case."""

    @property
    def batches(self) -> list[range]:
        """The cases of each batch."""
        count = len(self.cases)
        return [range(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]

    @torch.no_grad()
    def compute(
        self, batch: int, world: WorldModel, dataset: WindowDataset, judge: Judge, sampler: SamplerConfig | None = None
    ) -> dict[str, Tensor]:
        """The results of a batch of B cases, by name, on the CPU.

        Returns:
            `<method>/<metric>` (B, S) for S horizons; `<method>/fid` (B, S, F) and `<method>/fvd` (B, F), features,
            also of the method "truth". If cases of the batch are shown, `shown/context` (N, T, 3, H, W),
            `shown/truth` and `shown/model` (N, G, 3, H, W), uint8, and `shown/context_mask` (N, T).
        """
        indices, protocol = self.batches[batch], self.protocol
        items = Batch.collate([protocol.window(dataset, self.cases[i]) for i in indices]).to(world.device)
        another, shuffled = others(self.cases), {}
        theirs = [self.cases[another[i]] for i in indices] if len(self.cases) > 1 else []
        recorded = (dataset.info.actions.recorded(dataset.trajectories[case.trajectory]) for case in self.cases)
        known = world.description.has_actions and any(recorded)  # of the whole study, so that every batch has it
        if theirs and known and "shuffled_actions" in self.methods:
            motion = Condition.collate([protocol.motion(dataset, case) for case in theirs]).to(world.device)
            shuffled["shuffled_actions"] = moved(items, motion)
        if theirs and "shuffled_contexts" in self.methods:
            past = Batch.collate([dataset.window(case.window, []) for case in theirs]).to(world.device)
            shuffled["shuffled_contexts"] = replace(items, context=past.context, mask=past.mask)

        sampled: list[Tensor] = []

        def predict(seen: Batch) -> Tensor:
            noise = generator(self.seed, zlib.crc32(protocol.name.encode()), batch)
            if not judge.latents:
                return protocol.predict(world, seen, sampler, noise)
            sampled.append(protocol.predict(world, seen, sampler, noise, latents=True))
            return each_goal(world.decode, sampled[-1])

        truth = to_float(items.target)
        found = {f"truth/{name}": value for name, value in judge.features(truth, protocol).items()}
        shown = [i - indices.start for i in spread(list(range(len(self.cases))), self.pictures) if i in indices]
        codec = world.codec if "reconstruction" in self.methods else None
        true_latents = each_goal(world.codec.encode, truth) if judge.latents else None
        for method, frames in predictions(items, shuffled, predict, codec):
            latents = sampled.pop() if sampled else None
            if method not in self.methods:
                continue
            if judge.latents and latents is None:
                latents = each_goal(world.codec.encode, frames)
            measured = judge.eight_bits(frames)
            frames = to_float(measured)
            scores = score(judge.metrics, frames[:, protocol.measured], truth[:, protocol.measured])
            scores |= judge.features(frames, protocol)
            if judge.latents:
                error = (latents - true_latents).square().mean(dim=(-3, -2, -1))
                scores["latents"] = error[:, protocol.measured].float().cpu()
            if judge.rank:
                ranks = world.codec.rank(latents.flatten(0, 1), true_latents.flatten(0, 1))
                scores["rank"] = ranks.unflatten(0, latents.shape[:2])[:, protocol.measured].cpu()
            found |= {f"{method}/{name}": value for name, value in scores.items()}
            if method == "model" and shown:
                found["shown/model"] = measured[shown].cpu()
        if shown:
            kept = {"truth": items.target, "context": items.context, "context_mask": items.mask}
            found |= {f"shown/{name}": tensor[shown].cpu() for name, tensor in kept.items()}
        return found


def each_goal(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """A codec's `encode` or `decode` of values (B, G, …), one goal at a time, to bound memory."""
    return torch.stack([function(value) for value in values.unbind(1)], dim=1)


def joined(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The results of all batches, one after the other, by name."""
    names = dict.fromkeys(name for batch in batches for name in batch)
    return {name: torch.cat([batch[name] for batch in batches if name in batch]) for name in names}
