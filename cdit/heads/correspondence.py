"""Does attention look where the same surface was? Weights judged by true places, as pure functions.

For target patch i and past frame t, A(i, t) are the patch of the frame that holds the true place of what i shows, and
its 8 neighbours, as far as the frame reaches; where the frame does not show it, or it is not known, A(i, t) is empty.
N patches a frame, w(i, t, j) the weight of i on patch j of frame t.

    lift      Σ w(i, t, j ∈ A(i, t))  /  Σ |A(i, t)| / N · w(i, t, all j),   sums over all i and all t that show i
    share     mean over the patches i that any frame shows of Σ w(i, t, j ∈ A(i, t))
    accuracy  share of the patches i that any frame shows whose largest weight, of all frames, lies in an A(i, t)

The lift compares with an even spread *within each frame of what the head gives this frame*: a head that looks at the
newest frame alone is judged by where it looks there, not by its choice of the frame, and what it gives to frames that
do not show the point is left out. It is 1 for even weights, whichever frames they prefer, and N / |A| at best.

Share and accuracy are of all past tokens, the share of the extra key, too: looking into a frame that does not show the
point, while another does, counts as a miss there. Weights that are equally large share the hit evenly, so that even
weights have the accuracy of chance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cdit.heads.measures import Layout

NEIGHBOURS = 1
"""How many patches beside the true one still count, in each direction."""


@dataclass(frozen=True)
class CorrespondenceScore:
    """Sums over target patches, (…) each; those of several frames are added before their ratios are taken."""

    mass: Tensor
    """Weight on true places."""
    even: Tensor
    """What the same weight on each frame would put there, spread evenly over the frame."""
    hits: Tensor
    """Target patches whose largest weight is on a true place."""
    patches: Tensor
    """Target patches that any past frame shows."""

    def __add__(self, other: "CorrespondenceScore") -> "CorrespondenceScore":
        return CorrespondenceScore(
            self.mass + other.mass, self.even + other.even, self.hits + other.hits, self.patches + other.patches
        )

    @property
    def lift(self) -> Tensor:
        """0: never there; 1: as even weights; at best N / 9, and at borders more. NaN if all is hidden."""
        return self.mass / self.even

    @property
    def share(self) -> Tensor:
        """Mean weight on true places, in [0, 1]; NaN if all is hidden."""
        return self.mass / self.patches

    @property
    def accuracy(self) -> Tensor:
        """How often the largest weight is on a true place, in [0, 1]; NaN if all is hidden."""
        return self.hits / self.patches


def true_tokens(place: Tensor, visible: Tensor, layout: Layout) -> Tensor:
    """Which past tokens show what each target patch shows, neighbours included: (…, N, M) bool.

    Args:
        place: (…, N, T, 2) row and column in patches, the patch (r, c) being [r, r+1) × [c, c+1).
        visible: (…, N, T) bool; elsewhere the place does not matter and may be NaN.
        layout: of the T past frames.
    """
    distance = (place.floor()[..., None, :] - layout.positions(place.device)).abs()  # (…, N, T, patches, 2)
    return ((distance <= NEIGHBOURS).all(-1) & visible[..., None]).flatten(-2)


def correspondence_score(weights: Tensor, truth: Tensor, layout: Layout) -> CorrespondenceScore:
    """Judges weights (…, N, M[+1]) by `true_tokens` (…, N, M), their leading dimensions broadcast."""
    past = weights[..., : layout.frames * layout.patches]
    on_truth = (past * truth).sum(-1)
    frames, true_frames = (x.unflatten(-1, (layout.frames, layout.patches)) for x in (past, truth.to(past.dtype)))
    even = (frames.sum(-1) * true_frames.mean(-1)).sum(-1)
    largest = past == past.amax(-1, keepdim=True)
    hits = (largest & truth).sum(-1) / largest.sum(-1)
    patches = truth.any(-1).expand_as(hits).sum(-1)
    return CorrespondenceScore(on_truth.sum(-1), even.sum(-1), hits.sum(-1), patches)


def even_weights(layout: Layout) -> Tensor:
    """Baseline: all past tokens alike, (N, M)."""
    tokens = layout.frames * layout.patches
    return torch.full((layout.patches, tokens), 1 / tokens)


def same_place_weights(layout: Layout) -> Tensor:
    """Baseline: the same place in each past frame, all frames alike, (N, M)."""
    return torch.eye(layout.patches).repeat(1, layout.frames) / layout.frames
