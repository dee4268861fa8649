"""How alike two frames are: PSNR, SSIM and LPIPS, one number for each frame.

Every metric takes predictions and truths (N, 3, H, W) in [-1, 1] and returns (N,) float32 on their device.
"""

import os
import socket
import sys
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.functional.image.lpips import _NoTrainLpips
from torchvision.models import AlexNet_Weights

from cdit.errors import UserError

Metric = Callable[[Tensor, Tensor], Tensor]

BACKBONE_VARIABLE = "CDIT_LPIPS_BACKBONE"
MAX_PSNR = 100.0
"""What identical frames score, in dB, so that means stay finite; half a step of 8 bits everywhere scores 54."""

MIN_SIDE = {"ssim": 6, "lpips": 32}
"""How many pixels a side of a frame must have."""

HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "lpips": False}


def psnr(prediction: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10·log10(2² / MSE), at most `MAX_PSNR`; higher is better."""
    value = peak_signal_noise_ratio(prediction.float(), truth.float(), data_range=2.0, reduction="none", dim=(1, 2, 3))
    return value.clamp(max=MAX_PSNR)


def ssim(prediction: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) in [-1, 1], 1 for identical frames; higher is better.

    Window (Gaussian, 11 pixels, σ 1.5) and constants of the paper on intensities in [0, 1], averaged over channels and
    the whole frame, its border mirrored (torchmetrics'; others leave the border out). At least 6 pixels a side.
    """
    # Its luminance term compares means, so that intensities have to begin at 0.
    prediction, truth = (prediction.float() + 1) / 2, (truth.float() + 1) / 2
    with torch.autocast(prediction.device.type, enabled=False):  # variances come out of differences of its convolutions
        return structural_similarity_index_measure(prediction, truth, data_range=1.0, reduction="none").reshape(-1)


class Lpips(nn.Module):
    """LPIPS v0.1 on AlexNet (Zhang et al. 2018, arXiv 1801.03924): perceptual distance from 0; lower is better.

    Frames have at least 32 pixels a side.

    Args:
        backbone: the weights of torchvision's AlexNet (`features.0.weight` …; others are not looked at).
    """

    def __init__(self, backbone: dict[str, Tensor]):
        super().__init__()
        self.net = _NoTrainLpips(net="alex", pnet_rand=True)  # its linear heads ship with torchmetrics
        # Its AlexNet is cut into slices, which keep the numbers of the layers: slice2.3.weight is features.3.weight.
        names = {key: f"features.{key.partition('.')[2]}" for key in self.net.net.state_dict()}
        self.net.net.load_state_dict({key: backbone[name] for key, name in names.items()})
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Distances (N,) of frames (N, 3, H, W) in [-1, 1]."""
        with torch.autocast(prediction.device.type, enabled=False):
            return self.net(prediction.float().clamp(-1, 1), truth.float().clamp(-1, 1)).reshape(-1)


def load_lpips(device: torch.device | str = "cpu", timeout: float = 10.0) -> Lpips | None:
    """LPIPS, or None after one line on stderr that says how to get its AlexNet weights.

    They come from the safetensors file that the environment variable `CDIT_LPIPS_BACKBONE` names, else from
    torchvision's download, which torch keeps in its cache.

    Args:
        device: where to compute.
        timeout: how long the download's server may stay silent, in seconds.

    Raises:
        UserError: `CDIT_LPIPS_BACKBONE` is set, but not to a file with these weights.
    """
    file = os.environ.get(BACKBONE_VARIABLE)
    if file:
        try:
            return Lpips(safetensors.torch.load_file(Path(file))).to(device)
        except Exception as error:  # safetensors has errors of its own
            raise UserError(
                f"{BACKBONE_VARIABLE}={file}: expected a safetensors file with torchvision's AlexNet weights "
                f"features.0.weight … features.10.bias ({str(error).splitlines()[0]})"
            ) from error
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    try:
        weights = AlexNet_Weights.DEFAULT.get_state_dict(progress=False, check_hash=True, weights_only=True)
        return Lpips(weights).to(device)
    except (OSError, RuntimeError, HTTPException) as error:  # not reached, not whole, cut short
        print(
            f"LPIPS is left out: AlexNet could not be downloaded ({error}). Connect once, or set {BACKBONE_VARIABLE} "
            "to a safetensors file with torchvision's features.0.weight … features.10.bias.",
            file=sys.stderr,
        )
        return None
    finally:
        socket.setdefaulttimeout(before)


def load_metrics(device: torch.device | str = "cpu", image_size: tuple[int, int] | None = None) -> dict[str, Metric]:
    """The metrics by name: psnr, ssim and, where its weights are to be had, lpips.

    Args:
        device: where to compute.
        image_size: height and width of the frames; what they are too small for is left out with one line on stderr.
    """
    too_small = [name for name, side in MIN_SIDE.items() if image_size and min(image_size) < side]
    if too_small:
        needs = ", ".join(f"{name.upper()} needs {MIN_SIDE[name]}" for name in too_small)
        print(f"left out for frames of {image_size[0]}×{image_size[1]} pixels: {needs} a side", file=sys.stderr)
    lpips = None if "lpips" in too_small else load_lpips(device)
    found = {"psnr": psnr, "ssim": ssim, "lpips": lpips}
    return {name: metric for name, metric in found.items() if metric is not None and name not in too_small}
