"""Do heads of a layer do the same? Jensen–Shannon distances between their attention. Shapes as in `measures`."""

import torch
from torch import Tensor


def head_distances(weights: Tensor) -> Tensor:
    """Mean over target patches of the Jensen–Shannon distance between the rows of two heads.

    √(H(½p + ½q) - ½H(p) - ½H(q)) with the entropy H in bits (Lin 1991; Endres and Schindelin 2003): a metric, 0 for
    equal rows, 1 for rows that share no token; the extra key is a token like others. Rows that saw nothing are equal.

    Args:
        weights: (…, H, N, M[+1]), rows summing to 1.

    Returns:
        (…, H, H) symmetric, zeros on the diagonal.
    """
    entropies = torch.special.entr(weights).sum(-1)
    heads = weights.shape[-3]
    distances = weights.new_zeros(*weights.shape[:-3], heads, heads)
    for first in range(heads - 1):  # one head against those after it: all pairs at once would be H times the weights
        mixed = (weights[..., first, None, :, :] + weights[..., first + 1 :, :, :]) / 2
        nats = torch.special.entr(mixed).sum(-1) - (entropies[..., first, None, :] + entropies[..., first + 1 :, :]) / 2
        distance = (nats / torch.log(nats.new_tensor(2.0))).clamp(0, 1).sqrt().mean(-1)
        distances[..., first, first + 1 :] = distances[..., first + 1 :, first] = distance
    return distances
