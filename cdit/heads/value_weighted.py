"""What attention moves: weights times the norm of what each token has to give (Kobayashi et al. 2020,
"Attention is Not Only a Weight", arXiv 2004.10102).

Head h adds Σ_j w_j · W_O^h · V_j to the branch's output. A token that gets much weight and gives next to nothing, such
as a sink, moves nothing. Shapes as in `measures`; H heads, K the width of one, D the model's.
"""

import torch
from torch import Tensor


def given_norms(values: Tensor, output_maps: Tensor) -> Tensor:
    """‖W_O^h · V_j‖ of each token and head: (…, H, M[+1]), in units of the residual stream before the gate.

    Args:
        values: (…, H, M[+1], K).
        output_maps: W_O^h, (H, D, K): the columns of W_O that a head's output meets.
    """
    # One head at a time: all tokens of all heads at the full width would be the largest tensor of an inspection.
    heads = zip(values.float().unbind(-3), output_maps.float(), strict=True)
    return torch.stack([(value @ output_map.T).norm(dim=-1) for value, output_map in heads], dim=-2)


def value_weighted(weights: Tensor, norms: Tensor) -> Tensor:
    """Where what is moved comes from: weights · norms, each row rescaled to sum to 1 as weights do.

    So every measure of weights applies to it, and the two can be compared; equal norms give the weights themselves.
    Rows that move nothing are zeros.

    Args:
        weights: (…, N, M[+1]).
        norms: (…, M[+1]), see `given_norms`.
    """
    moved = weights * norms[..., None, :]
    total = moved.sum(-1, keepdim=True)
    return torch.where(total > 0, moved / total, 0.0)
