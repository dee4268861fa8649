"""Attention weights in few bytes, as decode.js reads them.

A layer's weights are one zlib stream of two sections of the same form: its rows (a head's target patch each, heads
slowest) with the `top_k` largest weights on past frames each, and each head's mean over the target patches with all.
A section is a sequence of planes of bytes; each plane goes through all rows before the next one begins:

    peak, low byte; high byte   largest weight on a past frame, 16 bits on a square-root scale: w = (q / 65535)²
    mass of each past frame     T planes, w = q / 255
    mass of the extra key       only where there is one, w = q / 255
    values                      kept weights in the order of their tokens, w = peak · (q / 255)²
    gaps, low bytes; high       how much further a kept token is than the one before (the first: than -1)

The square-root scale gives small weights, of which there are many, smaller steps: decoding returns a kept weight w of
a row with the peak p up to an error of √(w·p) / 255 + p / 510² from its own rounding and √p / 65535 + 1 / 131070² from
the peak's. Masses are of the full weights, so what is not kept is known frame by frame (error 1 / 510).
"""

import zlib

import numpy as np
import torch
from torch import Tensor

from cdit.heads.measures import Layout, extra_share, frame_mass


def compress(weights: Tensor, layout: Layout, top_k: int) -> bytes:
    """Weights (H, N, M[+1]) of a layer to bytes; see the head of the file."""
    weights = weights.float().cpu()
    keys = layout.frames * layout.patches
    rows = _section(weights, layout, min(top_k, keys))
    means = _section(weights.mean(1, keepdim=True), layout, keys)
    return zlib.compress(rows + means, 9)


def affordable_top_k(layout: Layout, maps: int, size: float = 4.5e6) -> int:
    """The largest `top_k` with which a page's weights fit in `size` bytes.

    Args:
        layout: of the past frames.
        maps: samples · times · layers · heads that the page will hold.
        size: bytes of the file (base64), frames not counted. Where not even one weight a patch fits, it is 1.

    Values count 8 bits, gaps a tenth more than the entropy of the places if every choice of tokens were as likely,
    which trained heads stay below.
    """
    keys = layout.frames * layout.patches
    # Base64 writes 3 bytes as 4; a map has a row for each patch, and the mean's, which keeps all.
    row_bytes = (size * 3 / 4 / maps - keys) / (layout.patches + 1) - (layout.frames + 3)
    return max((k for k in range(1, keys + 1) if k + _gap_bytes(k, keys) <= row_bytes), default=1)


def _gap_bytes(kept: int, keys: int) -> float:
    share = np.array([kept / keys, 1 - kept / keys])
    return 1.1 / 8 * keys * -(share * np.log2(share, where=share > 0, out=np.zeros(2))).sum()


def _section(weights: Tensor, layout: Layout, kept: int) -> bytes:
    keys = layout.frames * layout.patches
    on_frames = weights[..., :keys]
    peak = on_frames.amax(-1, keepdim=True)
    place = on_frames.topk(kept).indices.sort().values
    relative = on_frames.gather(-1, place) / peak.clamp(min=torch.finfo(torch.float32).tiny)
    gap = place.diff(prepend=torch.full_like(place[..., :1], -1))
    peak = (peak.sqrt() * 65535).round().long()
    masses = [frame_mass(weights, layout)]
    if weights.shape[-1] > keys:
        masses.append(extra_share(weights, layout)[..., None])
    planes = [
        *(peak & 255, peak >> 8),
        *((mass * 255).round() for group in masses for mass in group.unbind(-1)),
        *((relative.sqrt() * 255).round(), gap & 255, gap >> 8),
    ]
    return b"".join(plane.numpy().astype(np.uint8).tobytes() for plane in planes)
