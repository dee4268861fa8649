"""The codec section of a config, and the options of `python -m cdit.codec`. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from cdit.common.limits import NotNegative, Positive
from cdit.common.options import OutputOptions
from cdit.data.config import DataConfig

KINDS = ("pixels", "kl", "tiny", "features")
"""Codecs of this package."""
DEFAULT_WEIGHTS = {"kl": "stabilityai/sd-vae-ft-ema", "tiny": "madebyollin/taesd"}


@dataclass
class CodecConfig:
    """What the network denoises."""

    kind: str = "pixels"
    """Raw pixels (pixels); the latents of diffusers' AutoencoderKL (kl) or AutoencoderTiny (tiny); the features of a
    vision backbone (features, see docs/spaces.md); or a codec of your own, `my_module:Class` (see
    docs/extending.md)."""
    name: str | None = None
    """Hub name or local folder of the codec's weights; by default stabilityai/sd-vae-ft-ema for kl and
    madebyollin/taesd for tiny. For features a folder that `python -m cdit.codec` has written."""

    @property
    def weights(self) -> str:
        """The name, or that of the kind's default weights."""
        return self.name or DEFAULT_WEIGHTS.get(self.kind, "")


@dataclass(kw_only=True)
class CodecDataOptions(OutputOptions):
    """Frames of a dataset, and where the codec goes."""

    data: DataConfig = field(default_factory=DataConfig)
    """The dataset or mix; image_size, crop, splits, cache_gb and workers are used; the other fields describe
    windows."""
    device: str = "auto"
    """Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, …"""
    seed: NotNegative[int] = 0
    """Seed of all randomness."""


@dataclass(kw_only=True)
class MeasureConfig(CodecDataOptions):
    """A backbone, and the frames that its features are measured on."""

    backbone: str = "vit_small_patch14_reg4_dinov2.lvd142m"
    """A timm model that returns feature maps, with weights from the Hugging Face hub; hf-hub:OWNER/NAME; or a folder
    with timm's config.json and model.safetensors."""
    random_weights: bool = False
    """Random weights instead of trained ones, to try things out; backbone must name an architecture."""
    layer: int = -1
    """Block (of a vision transformer) or stage (of other networks) whose output is used; negative: from the end."""
    downscale: Positive[int] | None = None
    """Pixels of a frame per token; frames are resized so that a patch covers that many. By default the size of a
    patch."""
    frames: Positive[int] = 1024
    """Frames of the training split on which the mean and standard deviation of each channel are measured."""
    gallery: Positive[int] = 512
    """Frames of the training split kept with the codec. Without a decoder the nearest one is shown."""


@dataclass(kw_only=True)
class CodecTrainConfig(CodecDataOptions):
    """What is trained, on what, and how."""

    kind: Literal["tiny", "kl", "features"] = "tiny"
    """An AutoencoderTiny, an AutoencoderKL, or a decoder for a features codec."""
    features: str | None = None
    """For kind features, the folder that `python -m cdit.codec measure` has written."""
    decoder: Literal["conv", "vit"] = "conv"
    """For kind features, a convolutional decoder or a vision transformer."""
    width: Positive[int] = 64
    """Channels of the convolutions; for kl, at full resolution, with twice and four times as many below. For vit, the
    width of a token, a multiple of 64, such as 384."""
    depth: Positive[int] = 6
    """Blocks of a vit decoder."""
    downscale: Positive[int] = 8
    """Pixels of a frame per latent cell, a power of two; not for features."""
    channels: Positive[int] = 4
    """Channels of the latents; not for features."""
    perceptual: NotNegative[float] = 1.0
    """Weight of LPIPS in the loss, besides the mean absolute error. It is left out, with a note on stderr, if its
    weights are not available or frames have fewer than 32 pixels a side."""
    kl: NotNegative[float] = 1e-3
    """For kl, weight of the Kullback-Leibler divergence of the posterior, in nats per latent number."""
    latent_noise: NotNegative[float] = 0.0
    """Gaussian noise is added to latents before they are decoded, so that the decoder tolerates errors of a world
    model. Its standard deviation is uniform between 0 and this multiple of the latents' own (as in RAE, Zheng et al.
    2025, arXiv 2510.11690)."""
    steps: Positive[int] = 20000
    """Optimizer steps of the whole training."""
    batch_size: Positive[int] = 16
    """Frames per step."""
    learning_rate: Positive[float] = 1e-3
    """Peak learning rate of AdamW; it rises over the first 100 steps and falls to 0 over the last fifth."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast precision."""
    every: Positive[int] = 1000
    """Steps between measurements, pictures and checkpoints, which are also made at the end."""
    samples: Positive[int] = 256
    """Frames of the test split that are measured, evenly spread."""
    pictures: Positive[int] = 8
    """Of those, frames that are drawn."""
    resume: Literal["no", "auto"] = "no"
    """Continue from the checkpoint in OUT if there is one (auto), or fail if there is one (no)."""
    stop_at: Positive[int] | None = None
    """Stop after this step without changing the schedule, to train in pieces (see resume)."""
