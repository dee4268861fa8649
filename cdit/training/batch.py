"""From a batch of windows to what the network is trained on, every random draw keyed by its sample.

Shape suffixes: B contexts, G goals of each, T past frames.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cdit.common.pictures import to_float
from cdit.world_model import WorldModel


@dataclass
class NoisyBatch:
    """The arguments of `CDiT.forward`, and what its prediction is compared with."""

    sample: Tensor
    timestep: Tensor
    time: Tensor
    action: Tensor
    time_shift: Tensor
    context: Tensor
    context_mask: Tensor | None
    action_mask: Tensor
    clean: Tensor
    noise: Tensor
    weight: Tensor
    """(B,) 1, or 0 for what only fills the batch up."""

    def inputs(self) -> dict[str, Tensor | None]:
        """Keyword arguments of `CDiT.forward`."""
        return {
            "sample": self.sample,
            "timestep": self.timestep,
            "action": self.action,
            "time_shift": self.time_shift,
            "context": self.context,
            "context_mask": self.context_mask,
            "action_mask": self.action_mask,
        }


@torch.no_grad()
def noisy_batch(
    world: WorldModel,
    items: dict[str, Tensor],
    device: torch.device,
    action_dropout: float = 0.0,
    time: Tensor | None = None,
) -> NoisyBatch:
    """Encodes and noises a batch.

    Args:
        world: gives codec, units and objective.
        items: stacked items of a `WindowDataset`, of frames or of latents, with `seed` (B,): the key of each sample's
            draws, which are the same for both.
        device: where to.
        action_dropout: share of goals whose action is hidden.
        time: (B, G) diffusion times in [0, 1]; drawn where not given.
    """
    # Asked on the CPU, where the answer costs no synchronisation; without masks faster kernels can be used.
    context_mask = None if items["context_mask"].all() else items["context_mask"].to(device)
    goals, past = items["target"].shape[1], items["context"].shape[1]

    times, kept, noises, codec_noises = [], [], [], []
    for seed in items["seed"].tolist():
        generator = torch.Generator(device).manual_seed(seed)
        times.append(world.objective.draw_time((goals,), generator))
        kept.append(torch.rand(goals, generator=generator, device=device) >= action_dropout)
        noises.append(torch.randn(goals, *world.latent_shape, generator=generator, device=device))
        if world.codec.samples:
            codec_noises.append(torch.randn(past + goals, *world.latent_shape, generator=generator, device=device))

    recorded = torch.cat([items[name].to(device, non_blocking=True) for name in ("context", "target")], dim=1)
    codec_noise = torch.stack(codec_noises) if codec_noises else None
    if recorded.dtype == torch.uint8:
        latents = world.codec.encode(to_float(recorded), codec_noise)
    else:  # already encoded
        latents = world.codec.draw(recorded, codec_noise)
    noise, time = torch.stack(noises), torch.stack(times) if time is None else time.to(device)
    action, time_shift = world.description.units.normalize(
        items["action"].to(device), items["time_shift"].to(device), items["spacing"]
    )
    return NoisyBatch(
        sample=world.objective.add_noise(latents[:, past:], noise, time),
        timestep=world.objective.timestep(time),
        time=time,
        action=action,
        time_shift=time_shift,
        context=latents[:, :past],
        context_mask=context_mask,
        action_mask=items["action_mask"].to(device) & torch.stack(kept),
        clean=latents[:, past:],
        noise=noise,
        weight=items["weight"].to(device),
    )
