"""Does attention find where the same surface was? Weights scored against the true places of what a patch shows.

For target patch i and past frame t, A(i, t) is the patch of the frame with the true place of what i shows, plus its 8
neighbours within the frame; it is empty if that is not visible in the frame, or unknown. N patches per frame, w(i, t,
j) the weight of i on patch j of frame t.

    lift      Σ w(i, t, j ∈ A(i, t))  /  Σ |A(i, t)| / N · w(i, t, all j),  sums over all i, t where i is visible
    share     mean of Σ w(i, t, j ∈ A(i, t)) over the patches i that are visible in any frame
    accuracy  share of the patches i, visible in any frame, whose largest weight over all frames lies in some A(i, t)

The lift compares with an even spread *within each frame of the head's mass on that frame*: a head that attends only to
the newest frame is judged by where it attends there, not by its choice of frame, and mass on frames without the content
is ignored. It is 1 for even weights, whichever frames they prefer, and N / |A| at best.

Share and accuracy are over the tokens of all past frames: attention to a frame without the content is a miss if another
frame has it. Mass on an extra key lowers the share. Equal weights share a hit evenly, so that even weights have the
accuracy of chance.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cdit.data.windows import WindowDataset
from cdit.doom.correspondence import WindowCorrespondence
from cdit.heads.measures import Layout

SCORES = ("correspondence lift", "correspondence share", "correspondence accuracy")
NEIGHBOURS = 1
"""How many patches beside the true one still count, in each direction."""


def true_places(
    dataset: WindowDataset, grid: tuple[int, int], windows: Sequence[int], offsets: Sequence[int]
) -> Tensor:
    """Where the content of each target patch was in each past frame: (S, G, N, T, 2) float32.

    Row and column in patches, the patch (r, c) being [r, r + 1) × [c, c + 1); NaN if it is not visible in the frame.

    Args:
        dataset: recorded in Doom, with its camera and maps.

    Raises:
        UserError: the dataset does not provide them; the message says why.
    """
    known = WindowCorrespondence(dataset, grid)
    found = [[known(window, offset) for offset in offsets] for window in windows]
    places = [[np.where(one.visible[..., None], one.place, np.nan) for one in row] for row in found]
    return torch.from_numpy(np.array(places, np.float32))


def true_tokens(places: Tensor, layout: Layout) -> Tensor:
    """Which past tokens show the content of each target patch, neighbours included: (…, N, M) bool."""
    distance = (places.floor()[..., None, :] - layout.positions(places.device)).abs()  # (…, N, T, patches, 2)
    return (distance <= NEIGHBOURS).all(-1).flatten(-2)  # NaN is never near


class CorrespondenceScore(NamedTuple):
    """Of each target patch, (…, N) each; to average over goals, add them before taking ratios."""

    mass: Tensor
    """Weight on true places."""
    even: Tensor
    """What the same weight per frame would put there if spread evenly over the frame."""
    hits: Tensor
    """1 if the largest weight is on a true place."""
    visible: Tensor
    """Whether any past frame shows the patch."""

    def ratios(self) -> dict[str, Tensor]:
        """`SCORES` over all target patches, (…) each; NaN if nothing is visible."""
        mass, even, hits, visible = (x.sum(-1) for x in self)
        found = (mass / even, mass / visible, hits / visible)
        return dict(zip(SCORES, found, strict=True))

    def sum(self, dim: int) -> "CorrespondenceScore":
        """Summed over a dimension, on the CPU."""
        return CorrespondenceScore(*(x.sum(dim).cpu() for x in self))


def correspondence_score(weights: Tensor, truth: Tensor, layout: Layout) -> CorrespondenceScore:
    """Scores weights (…, N, M[+1]) against `true_tokens` (…, N, M), their leading dimensions broadcast."""
    past = weights[..., : layout.frames * layout.patches]
    on_truth = (past * truth).sum(-1)
    frames, true_frames = (x.unflatten(-1, (layout.frames, layout.patches)) for x in (past, truth.to(past.dtype)))
    even = (frames.sum(-1) * true_frames.mean(-1)).sum(-1)
    largest = past == past.amax(-1, keepdim=True)
    hits = (largest & truth).sum(-1) / largest.sum(-1)
    return CorrespondenceScore(on_truth, even, hits, truth.any(-1).expand_as(hits))


def baselines(layout: Layout) -> dict[str, Tensor]:
    """Weights (N, M) that need no network: the same place in every past frame, and an even spread over all tokens."""
    tokens = layout.frames * layout.patches
    return {
        "same place": torch.eye(layout.patches).repeat(1, layout.frames) / layout.frames,
        "uniform": torch.full((layout.patches, tokens), 1 / tokens),
    }
