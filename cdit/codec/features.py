"""Features of a vision backbone of timm as what the network denoises."""

import hashlib
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DecoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import Self

from cdit.codec.codec import CODECS, Codec
from cdit.codec.vit_decoder import VitDecoder
from cdit.common.cli import parser_instance
from cdit.common.errors import UserError
from cdit.common.files import read_json, write_json
from cdit.common.frames import to_float
from cdit.common.limits import NotNegative, Positive
from cdit.common.weights import weight_shapes

DESCRIPTION, WEIGHTS = "config.json", "features.safetensors"
VERSION = 1
CHUNK = 64
"""Frames encoded at a time, to bound memory."""


@dataclass
class FeaturesDescription:
    """The config.json of a features codec."""

    backbone: str
    """Architecture in timm."""
    weights: str
    """Where its weights came from, or "random"."""
    layer: NotNegative[int]
    """Index of the block, or stage, whose output is used."""
    downscale: Positive[int]
    """Pixels of a frame per token, in each direction."""
    pixel_mean: tuple[float, float, float]
    """Mean of the backbone's input, of intensities in [0, 1]."""
    pixel_std: tuple[float, float, float]
    """Standard deviation of the same."""
    trained_size: tuple[Positive[int], Positive[int]] | None = None
    """Height and width that its position embedding is for, if it has one."""
    decoder_width: Positive[int] | None = None
    """Channels of the decoder's convolutions, or width of a vit decoder's tokens; None: no decoder."""
    decoder_depth: Positive[int] | None = None
    """Blocks of a vit decoder; None: the decoder is convolutional."""
    decoder_grid: tuple[Positive[int], Positive[int]] | None = None
    """Rows and columns of tokens that a vit decoder was trained on."""
    version: int = VERSION


@CODECS.register("features")
class FeaturesCodec(Codec):
    """Patch tokens of one layer of a frozen backbone, each channel shifted and scaled to zero mean and unit variance.

    Without a decoder, `decode` looks up the nearest frame of a gallery of recorded ones, by the cosine of features.
    Mean, standard deviation and gallery are measured once, by `python -m cdit.codec measure`, and saved with the
    weights.

    Args:
        backbone: of timm, as `build_backbone` returns it.
        description: what is saved beside the weights.
        gallery: number of recorded frames, and their height and width.
    """

    kind = "features"

    def __init__(self, backbone: nn.Module, description: FeaturesDescription, gallery: tuple[int, int, int]):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.description = description
        info = backbone.feature_info[description.layer]
        self.channels, self.patch = info["num_chs"], info["reduction"]
        self.downscale = description.downscale
        self.register_buffer("mean", torch.zeros(self.channels, 1, 1))
        self.register_buffer("std", torch.ones(self.channels, 1, 1))
        self.register_buffer("gallery", torch.zeros(gallery[0], 3, *gallery[1:], dtype=torch.uint8))
        self.decoder: nn.Module | None = None
        if description.decoder_width:
            self.add_decoder(description.decoder_width, description.decoder_depth, description.decoder_grid)
        self._gallery_latents: Tensor | None = None
        self._gallery_of: tuple[torch.device, torch.Size] | None = None

    @property
    def has_decoder(self) -> bool:
        """Whether there is one."""
        return self.decoder is not None

    def add_decoder(self, width: int, depth: int | None = None, grid: tuple[int, int] | None = None) -> None:
        """Adds a decoder with random weights: a `VitDecoder` if a depth and a grid are given, or a convolutional one.

        Raises:
            UserError: the width does not fit a `VitDecoder`.
        """
        about = self.description
        about.decoder_width, about.decoder_depth, about.decoder_grid = width, depth, grid
        if depth:
            decoder = VitDecoder(self.channels, self.downscale, width, depth, grid)
        else:
            levels = math.ceil(math.log2(self.downscale))
            decoder = DecoderTiny(self.channels, 3, (3,) * levels + (1,), (width,) * (levels + 1), 2, "relu", "nearest")
        self.decoder = decoder.requires_grad_(False)

    @torch.no_grad()
    def moments(self, frames: Tensor) -> Tensor:
        """(…, 1, C, h, w): the features as the backbone computes them, in float32."""
        parts = [self._features(part) for part in frames.flatten(0, -4).split(CHUNK)]
        return torch.cat(parts)[:, None].unflatten(0, frames.shape[:-3])

    def draw(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Standardised features from moments."""
        return (super().draw(moments) - self.mean) / self.std

    def encode(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        """Frames to standardised features."""
        return self.draw(self.moments(frames))

    def decode(self, latents: Tensor) -> Tensor:
        """Features to frames in [-1, 1], by the decoder or else from the gallery, which has no gradient."""
        flat = latents.flatten(0, -4)
        if self.has_decoder:
            frames = self.decoded(flat)
        else:
            frames = self._resized(to_float(self.gallery[self.similarity(flat).argmax(1)]), flat)
        return frames.clamp(-1, 1).unflatten(0, latents.shape[:-3])

    def decoded(self, latents: Tensor) -> Tensor:
        """Features (N, C, h, w) to frames by the decoder, not clipped."""
        return self._resized(self.decoder(latents), latents)  # if the downscaling is no power of two

    def _resized(self, frames: Tensor, latents: Tensor) -> Tensor:
        """Frames (N, 3, height, width) in the size that the latents stand for."""
        size = [side * self.downscale for side in latents.shape[-2:]]
        if list(frames.shape[-2:]) == size:
            return frames
        return F.interpolate(frames, size, mode="bilinear", antialias=True)

    @torch.no_grad()
    def similarity(self, latents: Tensor) -> Tensor:
        """(N, M) cosines of latents (N, C, h, w) and those of the gallery's frames.

        Features of some frames are far longer than those of others. By Euclidean distance, short ones would be the
        nearest to almost every prediction.
        """
        key = latents.device, latents.shape[1:]
        if self._gallery_of != key:
            frames = self._resized(to_float(self.gallery), latents)
            self._gallery_latents, self._gallery_of = F.normalize(self.encode(frames).flatten(1)), key
        with torch.autocast(latents.device.type, enabled=False):  # similar frames differ by less than bfloat16 can tell
            return F.normalize(latents.flatten(1).float()) @ self._gallery_latents.T

    @torch.no_grad()
    def rank(self, latents: Tensor, truth: Tensor) -> Tensor:
        """Shares (N,) of the gallery's frames whose cosine with latents (N, C, h, w) is below that of the truth."""
        cosine = F.cosine_similarity(latents.flatten(1).float(), truth.flatten(1).float())
        return (self.similarity(latents) < cosine[:, None]).float().mean(1)

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the backbone's weights and settings, on which `moments` depends."""
        about = self.description
        settings = (about.backbone, about.layer, about.downscale, about.pixel_mean, about.pixel_std)
        digest = hashlib.sha256(f"{self.kind} {settings}".encode())
        for name, weights in sorted(self.backbone.state_dict().items()):
            digest.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
            digest.update(weights.cpu().contiguous().numpy())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the backbone, the statistics, the gallery and the decoder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / DESCRIPTION, asdict(self.description))
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS)

    @classmethod
    def load(cls, name: str) -> Self:
        """The codec of a folder that `save` wrote; a line on stderr says if its weights are random.

        Raises:
            UserError: it holds no features codec, or its weights do not match its config.
        """
        folder = Path(name)
        if not name or not (folder / DESCRIPTION).is_file():
            raise UserError(
                f"codec.name {name!r}: no features codec in that folder; python -m cdit.codec measure makes one"
            )
        try:
            description = parser_instance(FeaturesDescription, read_json(folder / DESCRIPTION, version=VERSION))
            shapes = weight_shapes(folder)
            gallery = shapes["gallery"]
            with torch.device("meta"):  # nothing takes memory before the shapes are known to be right
                expected = cls(_rebuilt(description), description, (gallery[0], *gallery[2:]))
            if shapes != {name: tuple(value.shape) for name, value in expected.state_dict().items()}:
                raise UserError("the weights do not match config.json")
            codec = cls(_rebuilt(description), description, (1, 1, 1))
            codec.gallery = codec.gallery.new_zeros(gallery)
            codec.load_state_dict(load_file(folder / WEIGHTS))
        except Exception as error:  # timm and safetensors raise many types
            raise UserError(f"codec.name {name!r}: not a readable features codec ({error})") from error
        if description.weights == "random":
            print(f"{folder}: the weights of {description.backbone} are random", file=sys.stderr)
        return codec

    def _features(self, frames: Tensor) -> Tensor:
        about = self.description
        size = [side * self.patch // self.downscale for side in frames.shape[-2:]]
        frames = (frames + 1) / 2
        if list(frames.shape[-2:]) != size:
            frames = F.interpolate(frames, size, mode="bicubic", antialias=True)
        mean, std = (frames.new_tensor(x)[:, None, None] for x in (about.pixel_mean, about.pixel_std))
        with torch.autocast(frames.device.type, enabled=False):
            options = {"indices": [about.layer], "norm": True, "intermediates_only": True}
            return self.backbone.forward_intermediates((frames - mean) / std, **options)[-1].float()


def _rebuilt(about: FeaturesDescription) -> nn.Module:
    return build_backbone(about.backbone, about.layer, size=about.trained_size)


def build_backbone(name: str, layer: int, pretrained: bool = False, size: tuple[int, int] | None = None) -> nn.Module:
    """A backbone of timm without the blocks after `layer`, for frames of any size if it supports that.

    Args:
        name: an architecture; with `pretrained` also with a tag of weights (`vit_small_patch14_reg4_dinov2.lvd142m`),
            `hf-hub:owner/name`, or a folder with config.json and model.safetensors.
        layer: of the output; negative ones count from the end.
        pretrained: whether to load weights, from the hub or the folder.
        size: height and width of the position embedding, by default as in timm.

    Raises:
        UserError: there is no such backbone or layer, or it gives no feature maps, or its weights are not available.
    """
    if not pretrained and not timm.is_model(name):  # a saved name must not reach the hub
        raise UserError(f"backbone is {name!r}, which is not a timm model")
    path = f"local-dir:{name}" if pretrained and Path(name).is_dir() else name
    options = {} if size is None else {"img_size": size}
    try:
        try:
            backbone = timm.create_model(path, pretrained, dynamic_img_size=True, **options)
        except TypeError:  # takes frames of any size as it is
            backbone = timm.create_model(path, pretrained, **options)
    except Exception as error:  # timm's, the hub's and safetensors' own
        raise UserError(
            f"backbone is {name!r}: no weights from {'that folder' if Path(name).is_dir() else 'the Hugging Face hub'} "
            f"({str(error).splitlines()[0]}). Give a folder with timm's config.json and model.safetensors, or "
            "--random_weights to try things out"
        ) from error
    count = len(getattr(backbone, "feature_info", ()))
    if not count or not hasattr(backbone, "forward_intermediates"):
        raise UserError(f"backbone is {name!r}, which gives no feature maps")
    if not -count <= layer < count:
        raise UserError(f"layer is {layer}, expected {-count} to {count - 1} for {name}")
    backbone.prune_intermediate_layers([layer % count])
    return backbone
