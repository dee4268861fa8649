"""The methods compared: the model, baselines it has to beat, and bounds it cannot beat."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from cdit.batch import Batch
from cdit.codec import Codec
from cdit.common.frames import to_float

METHODS = {
    "model": "model",
    "copy_last": "last context frame",
    "shuffled_actions": "model, shuffled actions",
    "shuffled_contexts": "model, shuffled context",
    "reconstruction": "truth through the codec",
}
"""The methods compared, and their names in tables."""

DIFFERENCES = {
    "model-copy_last": "model − last context frame",
    "model-shuffled_actions": "model − shuffled actions",
}
"""Differences of two methods sample by sample, and their names in tables."""

Predict = Callable[[Batch], Tensor]
"""Maps a batch to the model's frames (B, G, 3, H, W) in [-1, 1]."""


def predictions(
    batch: Batch, shuffled: Mapping[str, Batch], predict: Predict, codec: Codec | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every method's frames for the targets of a batch, method after method.

    What the model loses with another sample's actions or context is what it gains from its own. The truth through the
    codec bounds every prediction in latents.

    Args:
        shuffled: by method, the same batch with the actions or the context of other samples.
        codec: encodes and decodes the truth, if that changes it.

    Yields:
        A key of `METHODS`, and frames (B, G, 3, H, W) in [-1, 1].
    """
    yield "model", predict(batch)
    yield "copy_last", to_float(batch.context[:, -1:]).expand(*batch.target.shape)
    for method, other in shuffled.items():
        yield method, predict(other)
    if codec is not None and not codec.lossless:
        frames = to_float(batch.target).unbind(1)  # one goal at a time, for memory
        yield "reconstruction", torch.stack([codec.decode(codec.encode(frame)) for frame in frames], dim=1)
