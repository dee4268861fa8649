"""Makes a features codec: a backbone, with the statistics of its features on a dataset."""

import math
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cdit.codec.config import MeasureConfig
from cdit.codec.features import CHUNK, FeaturesCodec, FeaturesDescription, build_backbone
from cdit.codec.recorded import RecordedFrames
from cdit.common.errors import writing
from cdit.common.frames import to_float

SMALLEST_STD = 1e-6
"""Channels that vary less are left unscaled."""


def measure(config: MeasureConfig, device: torch.device) -> FeaturesCodec:
    """Builds the codec, measures it on frames of the training split, and writes it.

    Raises:
        UserError: the backbone is not available, or the frames do not fit it.
    """
    torch.manual_seed(config.seed)  # of random weights
    frames = RecordedFrames(config.data, config.data.train_split)
    backbone = build_backbone(config.backbone, config.layer, not config.random_weights)
    layer = config.layer % len(backbone.feature_info)
    about = backbone.pretrained_cfg
    description = FeaturesDescription(
        backbone=about.get("architecture") or config.backbone,
        weights="random" if config.random_weights else config.backbone,
        layer=layer,
        downscale=config.downscale or backbone.feature_info[layer]["reduction"],
        pixel_mean=tuple(about["mean"]),
        pixel_std=tuple(about["std"]),
        trained_size=getattr(getattr(backbone, "patch_embed", None), "img_size", None),
    )
    gallery = frames.spread(config.gallery)
    codec = FeaturesCodec(backbone, description, (len(gallery), *config.data.image_size))
    shape = codec.latent_shape(config.data.image_size)
    codec.gallery.copy_(gallery)
    codec.to(device)
    parts = frames.spread(config.frames).split(CHUNK)
    mean, std = channel_statistics(codec.moments(to_float(part.to(device)))[:, 0] for part in tqdm(parts, "measuring"))
    codec.mean.copy_(mean)
    codec.std.copy_(torch.where(std < SMALLEST_STD, 1.0, std))
    with writing(Path(config.out)):
        codec.save(Path(config.out))
    if config.random_weights:
        print(f"the weights of {config.backbone} are random", file=sys.stderr)
    shift = math.sqrt(math.prod(shape) / 4096)
    print(
        f"{config.out}: features {shape[0]} × {shape[1]} × {shape[2]} of frames {config.data.image_size[0]} × "
        f"{config.data.image_size[1]}; train with --codec.kind features --codec.name {config.out} and, as in RAE, "
        f"--flow.shift {shift:.2f} --sampler.shift {shift:.2f}"
    )
    return codec


def channel_statistics(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C, 1, 1) of features (N, C, h, w) that come in parts, summed in float64."""
    count, total, squares = 0, 0.0, 0.0
    for part in parts:
        part = part.cpu().double()
        count += part[:, 0].numel()
        total = total + part.sum(dim=(0, 2, 3))
        squares = squares + part.square().sum(dim=(0, 2, 3))
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return mean[:, None, None], std[:, None, None]
