"""Frames as numbers: 8-bit RGB and floats in [-1, 1]."""

import torch
from torch import Tensor


def to_float(frames: Tensor) -> Tensor:
    """Frames of uint8 (0…255) as float32 in [-1, 1], of the same shape."""
    return frames.float() / 127.5 - 1


def to_uint8(frames: Tensor) -> Tensor:
    """Frames in [-1, 1] as uint8, rounded and clipped, of the same shape; uint8 is returned unchanged."""
    if frames.dtype == torch.uint8:
        return frames
    return ((frames.detach().float() + 1) * 127.5).round().clamp(0, 255).byte()
