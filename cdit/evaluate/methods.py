"""What is compared: the model, and what it has to beat or cannot beat."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cdit.codec import Codec
from cdit.common.pictures import to_float
from cdit.diffusion import SamplerConfig
from cdit.world_model import WorldModel

METHODS = {
    "model": "model",
    "copy_last": "last context frame",
    "shuffled_actions": "model, another's actions",
    "shuffled_contexts": "model, another's context",
    "reconstruction": "truth through the codec",
}
"""The methods compared, and what tables call them."""

DIFFERENCES = {
    "model-copy_last": "model − last context frame",
    "model-shuffled_actions": "model − with another's actions",
}
"""Differences of two methods sample by sample, and what tables call them."""

Predict = Callable[[str, dict[str, Tensor]], Tensor]
"""From a method's name and the batch as it sees it, frames (B, G, 3, H, W) in [-1, 1]."""


def predictions(batch: dict[str, Tensor], predict: Predict, codec: Codec | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every method's frames for the targets of a batch, method after method.

    What the model loses by another's actions is what it knows of its own; the same for contexts (the time shift stays
    its own). Through the codec the truth loses what no prediction can have.

    Args:
        batch: collated items: context (B, T, 3, H, W) uint8, target (B, G, 3, H, W) uint8, and what `predict` takes.
            Where it has other_action and other_action_mask, or other_context and other_context_mask, the model is asked
            with these, too.
        predict: asks the model.
        codec: in which the truth is encoded and decoded, unless it changes nothing.

    Yields:
        A key of `METHODS`, and frames (B, G, 3, H, W) in [-1, 1].
    """
    yield "model", predict("model", batch)
    yield "copy_last", to_float(batch["context"][:, -1:]).expand(*batch["target"].shape)
    for method, key in (("shuffled_actions", "action"), ("shuffled_contexts", "context")):
        if f"other_{key}" in batch:
            swapped = {name: batch[f"other_{name}"] for name in (key, f"{key}_mask")}
            yield method, predict(method, batch | swapped)
    if codec is not None and codec.kind != "pixels":
        frames = to_float(batch["target"]).unbind(1)  # one goal at a time, for memory
        yield "reconstruction", torch.stack([codec.decode(codec.encode(frame)) for frame in frames], dim=1)


def predict_goals(
    world: WorldModel, batch: dict[str, Tensor], sampler: SamplerConfig | None, noise: torch.Generator
) -> Tensor:
    """The model's frames (B, G, 3, H, W) in [-1, 1] for the goals of collated items of `WindowDataset.window`."""
    return world.predict(
        to_float(batch["context"]),
        batch["action"],
        batch["time_shift"],
        context_mask=batch["context_mask"],
        action_mask=batch["action_mask"],
        spacing=batch["spacing"],
        sampler=sampler,
        generator=noise,
    )
