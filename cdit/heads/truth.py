"""True places of a probe set's target patches, where the dataset knows them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cdit.common.statistics import Estimate
from cdit.data.windows import WindowDataset
from cdit.doom.correspondence import WindowCorrespondence
from cdit.heads.correspondence import correspondence_score, even_weights, same_place_weights, true_tokens
from cdit.heads.intervals import mean_estimates
from cdit.heads.measures import Layout

SCORES = ("correspondence lift", "correspondence share", "correspondence accuracy")


def true_places(
    dataset: WindowDataset, grid: tuple[int, int], windows: Sequence[int], offsets: Sequence[int]
) -> Tensor:
    """Where what each target patch shows was in each past frame: (S, G, N, T, 2) float32.

    Row and column in patches, the patch (r, c) being [r, r + 1) × [c, c + 1); NaN where the frame does not show it.

    Args:
        dataset: recorded in Doom, with its camera and maps.
        grid: rows and columns of patches.
        windows: S indices.
        offsets: of the G goals, in frames.

    Raises:
        UserError: the dataset does not know them; the message says why.
    """
    known = WindowCorrespondence(dataset, grid)
    found = [[known(window, offset) for offset in offsets] for window in windows]
    places = [[np.where(one.visible[..., None], one.place, np.nan) for one in row] for row in found]
    return torch.from_numpy(np.array(places, np.float32))


def tokens_at(places: Tensor, layout: Layout) -> Tensor:
    """Which past tokens show what each target patch shows, `true_places` (…, N, T, 2) to (…, N, M) bool."""
    return true_tokens(places, places[..., 0].isfinite(), layout)


def baseline_scores(
    truth: Tensor, layout: Layout, trajectories: Sequence[str], seed: int
) -> dict[str, dict[str, Estimate]]:
    """What needs no network scores: by baseline, `SCORES` with intervals over trajectories.

    Args:
        truth: (S, G, N, M) of `tokens_at`, all past frames being there.
        layout: of the past frames.
        trajectories: S names.
        seed: of the resamples.
    """
    found = {}
    for name, weights in {"same place": same_place_weights(layout), "uniform": even_weights(layout)}.items():
        score = correspondence_score(weights, truth, layout)  # (S, G)
        mass, even, hits, patches = (x.sum(1) for x in (score.mass, score.even, score.hits, score.patches))
        values = torch.stack((mass / even, mass / patches, hits / patches), dim=1).double().numpy()
        found[name] = dict(zip(SCORES, mean_estimates(values, trajectories, seed), strict=True))
    return found
