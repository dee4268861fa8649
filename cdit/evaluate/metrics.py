"""Similarity of two frames: PSNR, SSIM, LPIPS, DreamSim and relative sharpness, one number for each frame.

Every metric takes predictions and truths (N, 3, H, W) in [-1, 1] and returns (N,) float32 on their device.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from cdit.common.errors import UserError
from cdit.common.lpips import Backbone, Lpips, WeightsNotAvailable, load_lpips

Metric = Callable[[Tensor, Tensor], Tensor]

MAX_PSNR = 100.0
"""Score of identical frames in dB, so that means stay finite; an error of half an 8-bit step everywhere scores 54."""

MIN_SIDE = {"ssim": 6, "lpips": 32, "lpips_vgg": 16}
"""Shortest side in pixels that a frame may have."""

HIGHER_IS_BETTER = {
    "psnr": True,
    "ssim": True,
    "lpips": False,
    "lpips_vgg": False,
    "dreamsim": False,
    "sharpness": None,
    "latents": False,
    "rank": True,
    "right_sign": True,
    "turn": None,
    "fid": False,
    "fvd": False,
}
"""Direction of each metric, in the order of tables; None: best at 1."""


def psnr(prediction: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10·log10(2² / MSE), at most `MAX_PSNR`; higher is better."""
    value = peak_signal_noise_ratio(prediction.float(), truth.float(), data_range=2.0, reduction="none", dim=(1, 2, 3))
    return value.clamp(max=MAX_PSNR)


def ssim(prediction: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) in [-1, 1], 1 for identical frames; higher is better.

    Window (Gaussian, 11 pixels, σ 1.5) and constants of the paper on intensities in [0, 1], averaged over channels and
    the whole frame with a mirrored border (as in torchmetrics; others crop the border). At least 6 pixels a side.
    """
    # The luminance term compares means, so intensities have to start at 0.
    prediction, truth = (prediction.float() + 1) / 2, (truth.float() + 1) / 2
    with torch.autocast(prediction.device.type, enabled=False):  # variances are small differences of convolutions
        return structural_similarity_index_measure(prediction, truth, data_range=1.0, reduction="none").reshape(-1)


def sharpness(prediction: Tensor, truth: Tensor) -> Tensor:
    """Gradient energy of the prediction over that of the truth: below 1 for a blurred frame, above 1 for a noisy one.

    The energy is the mean squared difference of horizontal neighbours plus that of vertical neighbours. One 8-bit step
    is added to both energies, so that a flat truth gives a finite ratio.
    """
    step = (2 / 255) ** 2
    return (_gradient_energy(prediction) + step) / (_gradient_energy(truth) + step)


def _gradient_energy(frames: Tensor) -> Tensor:
    return sum(frames.float().diff(dim=dim).square().mean(dim=(1, 2, 3)) for dim in (2, 3))


def load_metric_lpips(backbone: Backbone, device: torch.device | str) -> Lpips | None:
    """LPIPS, or None with a line on stderr on how to get the weights of its backbone.

    Raises:
        UserError: the file that the environment names does not hold these weights.
    """
    try:
        return load_lpips(backbone).to(device)
    except WeightsNotAvailable as error:
        print(f"LPIPS is left out: {error}.", file=sys.stderr)
        return None


class DreamSim(nn.Module):
    """DreamSim (Fu et al. 2023, arXiv 2306.09344), its ensemble: perceptual distance from 0; lower is better.

    The package downloads its weights at first use to `dreamsim/` in torch's hub folder.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__()
        dreamsim = require("dreamsim", "dreamsim")
        folder = Path(torch.hub.get_dir()) / "dreamsim"
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with redirect_stdout(sys.stderr):
                self.net, _ = dreamsim.dreamsim(device=str(device), cache_dir=str(folder))
        except OSError as error:  # not reachable, incomplete
            raise UserError(
                f"metrics: no weights for dreamsim ({error}); connect to the internet once, or place them in {folder}"
            ) from error

    @torch.no_grad()
    def forward(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Distances (N,) of frames (N, 3, H, W) in [-1, 1], resized to the 224×224 pixels that it was trained on."""
        first, second = (
            F.interpolate((frames.float() + 1) / 2, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
            for frames in (prediction, truth)
        )
        with torch.autocast(prediction.device.type, enabled=False):
            return self.net(first, second).reshape(-1)


def require(module: str, package: str) -> ModuleType:
    """An optional package's module.

    Raises:
        UserError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this metric needs a package ({error}): pip install {package}") from error


def load_metrics(
    device: torch.device | str = "cpu",
    image_size: tuple[int, int] | None = None,
    names: Sequence[str] = ("psnr", "ssim", "lpips"),
) -> dict[str, Metric]:
    """The metrics by name; lpips is left out if its weights are not available.

    Args:
        device: where to compute.
        image_size: height and width of the frames; metrics that need larger ones are left out, with a line on stderr.
        names: some of psnr, ssim, lpips, lpips_vgg, dreamsim and sharpness; others are ignored.

    Raises:
        UserError: a package or its weights are missing.
    """
    too_small = [name for name in names if image_size and min(image_size) < MIN_SIDE.get(name, 1)]
    if too_small:
        needs = ", ".join(f"{name.upper()} needs {MIN_SIDE[name]}" for name in too_small)
        print(f"left out for frames of {image_size[0]}×{image_size[1]} pixels: {needs} a side", file=sys.stderr)
    loaders = {
        "psnr": lambda: psnr,
        "ssim": lambda: ssim,
        "lpips": lambda: load_metric_lpips("alex", device),
        "lpips_vgg": lambda: load_metric_lpips("vgg", device),
        "dreamsim": lambda: DreamSim(device),
        "sharpness": lambda: sharpness,
    }
    found = {name: load() for name, load in loaders.items() if name in names and name not in too_small}
    return {name: metric for name, metric in found.items() if metric is not None}


def score(metrics: Mapping[str, Metric], prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Every metric of frames (B, G, 3, H, W) in [-1, 1]: (B, G) float32 on the CPU."""
    flat = prediction.flatten(0, 1), truth.flatten(0, 1)
    return {name: metric(*flat).unflatten(0, truth.shape[:2]).float().cpu() for name, metric in metrics.items()}
