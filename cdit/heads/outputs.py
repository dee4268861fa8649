"""What heads put out: their mean, and how much of the branch's output comes from each.

Shape suffixes: B contexts, or targets where keys follow the condition; H heads, N queries, K width of a head, D width.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cdit.heads.ablate import Site, watch_outputs
from cdit.heads.denoising import encoded_batches, evaluating
from cdit.model.attention import MultiHeadAttention
from cdit.world_model import WorldModel


@dataclass
class HeadOutputs:
    """What heads put out over a probe batch of S samples."""

    means: dict[Site, Tensor]
    """(H, K) before W_O: means over samples, diffusion times, goals and patches."""
    contributions: dict[Site, np.ndarray]
    """(S, H) root mean square over times, goals and patches of ‖W_O^h · out_h‖, over that of all heads together (W_O's
    bias is no head's). 1 for the only head of a layer; the sum may be more than 1, as heads can cancel."""


def head_outputs(
    world: WorldModel,
    batch: dict[str, Tensor],
    sites: Sequence[Site],
    times: Sequence[float],
    batch_size: int,
    seed: int,
) -> HeadOutputs:
    """Looks at what heads put out while the batch's targets are denoised.

    Args:
        world: the model, bare or with a wrapped network.
        batch: stacked items of a `WindowDataset`.
        sites: which attentions.
        times: diffusion times.
        batch_size: samples in a forward pass.
        seed: of the noise.

    Raises:
        UserError: a layer that the model does not have.
    """
    means: dict[Site, Tensor | float] = defaultdict(float)
    squares: dict[Site, Tensor] = {}

    def note(site: Site, attention: MultiHeadAttention, out_BHNK: Tensor) -> None:
        weight = encoded.cache.rows / (len(batch["target"]) * len(times))
        means[site] = means[site] + weight * out_BHNK.float().mean((0, 2)).cpu()
        # Whether goals are folded into the queries or into the batch, those of a context are together.
        found = contribution_squares(attention, out_BHNK).unflatten(0, (encoded.cache.rows, -1)).sum(1).cpu()
        squares[site] = squares[site] + found if site in squares else found

    gathered: dict[Site, list[Tensor]] = defaultdict(list)
    with evaluating(world), watch_outputs(world.cdit, sites, note):
        for _, encoded in encoded_batches(world, batch, batch_size, seed):
            for time in times:
                encoded.loss(world, time)
            for site in sites:
                gathered[site].append(squares.pop(site))
    totals = {site: torch.cat(found).double() for site, found in gathered.items()}
    return HeadOutputs(
        dict(means), {site: (total[:, :-1] / total[:, -1:]).sqrt().numpy() for site, total in totals.items()}
    )


def contribution_squares(attention: MultiHeadAttention, out_BHNK: Tensor) -> Tensor:
    """Sum over queries of ‖W_O^h · out_h‖² of each head, and last of that of all together: (B, H + 1)."""
    weight_DHK = attention.out.weight.float().unflatten(1, (attention.heads, -1))
    total_BND, squares = 0.0, []
    for head, out_BNK in enumerate(out_BHNK.float().unbind(1)):
        added_BND = out_BNK @ weight_DHK[:, head].T
        squares.append(added_BND.square().sum((1, 2)))
        total_BND = total_BND + added_BND
    return torch.stack([*squares, total_BND.square().sum((1, 2))], dim=1)
