"""LPIPS (Zhang et al. 2018, arXiv 1801.03924), as a metric and as a loss."""

import os
import socket
import sys
from contextlib import redirect_stdout
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _NoTrainLpips
from torchvision.models import AlexNet_Weights, VGG16_Weights

from cdit.common.errors import UserError

Backbone = Literal["alex", "vgg"]

WEIGHTS = {"alex": AlexNet_Weights.DEFAULT, "vgg": VGG16_Weights.DEFAULT}
VARIABLES = {"alex": "CDIT_LPIPS_BACKBONE", "vgg": "CDIT_LPIPS_VGG_BACKBONE"}
LAST_LAYER = {"alex": "features.10", "vgg": "features.28"}
TIMEOUT = 10.0
"""Seconds without a response after which a download is aborted."""


class WeightsNotAvailable(UserError):
    """The weights of a backbone are not on this machine and could not be downloaded."""


class Lpips(nn.Module):
    """LPIPS v0.1: perceptual distance from 0, differentiable; lower is better. Its weights are frozen.

    Frames have at least 32 pixels a side for AlexNet, 16 for VGG16.

    Args:
        weights: those of torchvision's AlexNet or VGG16 (`features.0.weight` …; others are ignored).
        backbone: which of the two.
    """

    def __init__(self, weights: dict[str, Tensor], backbone: Backbone = "alex"):
        super().__init__()
        self.net = _NoTrainLpips(net=backbone, pnet_rand=True)  # its linear heads ship with torchmetrics
        # Its backbone is cut into slices, which keep the numbers of the layers: slice2.3.weight is features.3.weight.
        names = {key: f"features.{key.partition('.')[2]}" for key in self.net.net.state_dict()}
        self.net.net.load_state_dict({key: weights[name] for key, name in names.items()})
        self.requires_grad_(False)

    def forward(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Distances (N,) of frames (N, 3, H, W), which are clipped to [-1, 1], in the precision of the weights."""
        dtype = self.net.lin0.model[-1].weight.dtype
        first, second = (frames.to(dtype).clamp(-1, 1) for frames in (prediction, truth))
        with torch.autocast(first.device.type, enabled=False):
            return self.net(first, second).reshape(-1)


def load_lpips(backbone: Backbone = "alex") -> Lpips:
    """LPIPS on the CPU.

    The backbone's weights are read from the safetensors file that the environment variable `CDIT_LPIPS_BACKBONE`
    (AlexNet) or `CDIT_LPIPS_VGG_BACKBONE` (VGG16) names, by default from torch's cache, to which torchvision downloads
    them.

    Args:
        backbone: AlexNet or VGG16.

    Raises:
        UserError: the variable does not name a file with these weights.
        WeightsNotAvailable: the weights could not be downloaded.
    """
    variable, architecture = VARIABLES[backbone], WEIGHTS[backbone]
    name = type(architecture).__name__.removesuffix("_Weights")
    layers = f"features.0.weight … {LAST_LAYER[backbone]}.bias"
    file = os.environ.get(variable)
    if file:
        try:
            return Lpips(load_file(Path(file)), backbone)
        except Exception as error:  # safetensors has its own exceptions
            raise UserError(
                f"{variable}={file}: expected a safetensors file with torchvision's {name} weights {layers} "
                f"({str(error).splitlines()[0]})"
            ) from error
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with redirect_stdout(sys.stderr):  # torch.hub prints there that it downloads
            weights = architecture.get_state_dict(progress=False, check_hash=True, weights_only=True)
        return Lpips(weights, backbone)
    except (OSError, RuntimeError, HTTPException) as error:  # not reachable, damaged, incomplete
        raise WeightsNotAvailable(
            f"{name} could not be downloaded ({error}); connect to the internet once, or set {variable} "
            f"to a safetensors file with torchvision's {layers}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
