"""FID and FVD: the distance between the distributions of predicted and true frames, or videos.

A network turns frames or videos into features; the Fréchet distance compares normal distributions fitted to them. It
is one number for all samples, depends on how many there are, and means little with fewer than several times the number
of features (2048 for the Inception network).

The default networks are those of the literature. Their packages download the weights at first use to torch's hub folder
($TORCH_HOME/hub/checkpoints), where they can be placed by hand too. `MODULE:FUNCTION` names any other network: a
function without arguments that returns an nn.Module, whose attribute `min_frames` is the shortest video it takes.
"""

import importlib
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from cdit.common.errors import UserError
from cdit.common.frames import to_uint8
from cdit.evaluate.metrics import require


class Inception(nn.Module):
    """Inception v3, with which FID was defined (Heusel et al. 2017, arXiv 1706.08500), by torch-fidelity.

    Frames (N, 3, H, W) in [-1, 1] to features (N, 2048).
    """

    def __init__(self) -> None:
        super().__init__()
        module = require("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
        self.net = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])

    def forward(self, frames: Tensor) -> Tensor:
        """The features of the last pooling."""
        return self.net(to_uint8(frames))[0]


class I3D(nn.Module):
    """I3D trained on Kinetics-400, with which FVD was defined (Unterthiner et al. 2018, arXiv 1812.01717), by cd-fvd.

    Videos (N, T, 3, H, W) in [-1, 1] to its logits (N, 400).
    """

    min_frames = 9

    def __init__(self) -> None:
        super().__init__()
        module = require("cdfvd.third_party.i3d.utils", "cd-fvd")
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        self.net = module.load_i3d_model("cpu", str(folder / "i3d_pretrained_400.pt"))

    def forward(self, videos: Tensor) -> Tensor:
        """The logits."""
        frames = F.interpolate(videos.flatten(0, 1), (224, 224), mode="bilinear")
        return self.net(frames.unflatten(0, videos.shape[:2]).transpose(1, 2))


NETWORKS = {"inception": Inception, "i3d": I3D}


class Features(nn.Module):
    """A frozen network in full precision, by name: a key of `NETWORKS`, or `MODULE:FUNCTION`.

    Raises:
        UserError: the network, its package or its weights do not exist.
    """

    def __init__(self, name: str, field: str):
        super().__init__()
        self.field = field
        try:
            with redirect_stdout(sys.stderr):
                self.net = self._find(name)()
        except OSError as error:  # not reachable, incomplete
            where = Path(torch.hub.get_dir()) / "checkpoints"
            raise UserError(
                f"{field}: no weights for {name} ({error}); connect to the internet once, or place them in {where}"
            ) from error
        if not isinstance(self.net, nn.Module):
            raise UserError(f"{field}: {name} returns a {type(self.net).__name__}, expected an nn.Module")
        self.min_frames: int = getattr(self.net, "min_frames", 1)
        self.eval().requires_grad_(False)

    def _find(self, name: str):
        if name in NETWORKS:
            return NETWORKS[name]
        module, _, function = name.partition(":")
        try:
            return getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"{self.field} is {name!r}, expected MODULE:FUNCTION or one of {', '.join(NETWORKS)} ({error})"
            ) from error

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """Features (N, F) on the CPU of N frames or videos.

        Raises:
            UserError: the network returned another shape.
        """
        with torch.autocast(frames.device.type, enabled=False):
            features = self.net(frames.float())
        if features.shape[:-1] != frames.shape[:1]:
            shapes = f"{tuple(frames.shape)} became {tuple(features.shape)}"
            raise UserError(f"{self.field}: {shapes}, expected ({len(frames)}, number of features)")
        return features.float().cpu()


def frechet_distance(truth: Tensor, prediction: Tensor) -> float:
    """The Fréchet distance between normal distributions fitted to features (N, F); at least two of each."""
    metric = FrechetInceptionDistance(feature=_Given(truth.shape[1]))
    metric.update(truth.double(), real=True)
    metric.update(prediction.double(), real=False)
    return metric.compute().item()


class _Given(nn.Module):
    """Returns features unchanged."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
