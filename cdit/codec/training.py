"""Trains an autoencoder of diffusers, or a decoder for features, on the frames of a dataset."""

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from cdit.codec.autoencoder import KLCodec, TinyCodec
from cdit.codec.codec import Codec, shape_of_latents
from cdit.codec.config import CodecTrainConfig
from cdit.codec.features import FeaturesCodec
from cdit.codec.recorded import RecordedFrames, StepSampler
from cdit.common.errors import UserError, writing
from cdit.common.files import write_whole
from cdit.common.frames import to_float, to_uint8
from cdit.common.lpips import Lpips, WeightsNotAvailable, load_lpips
from cdit.common.pictures import sheet, to_image
from cdit.common.randomness import generator
from cdit.data.loader import Reporting, WindowLoader

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"
WARMUP_STEPS, DECAY_SHARE, MAX_GRAD_NORM = 100, 0.2, 1.0
MEASURED = 256
"""Training frames on which the scale of an autoencoder's latents is measured."""
CHUNK = 32
FREE = ("out", "device", "resume", "stop_at", "every", "samples", "pictures")
"""Options that may change when a training continues."""
DATA = ("folder", "mix", "splits", "train_split", "test_split", "image_size", "crop", "fps", "source", "camera")
"""Options of `data` that may not."""


class Trained(ABC):
    """What is trained: a network with an encoder, which may be frozen, and a decoder."""

    network: nn.Module

    def to(self, device: torch.device) -> nn.Module:
        """Moves everything, and returns the network."""
        return self.network.to(device)

    @abstractmethod
    def encode(self, frames: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Latents of frames (N, 3, H, W) to decode, and a penalty if there is one."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, h, w) to frames, not clipped."""

    @abstractmethod
    def finished(self, frames: Tensor) -> Codec:
        """The codec with the current weights, to be saved; its latents are normalised on frames (N, 3, H, W)."""


class TrainedAutoencoder(Trained):
    """An AutoencoderTiny or AutoencoderKL with random weights."""

    def __init__(self, config: CodecTrainConfig):
        if config.decoder != "conv":
            raise UserError(f"decoder is {config.decoder}, expected conv for kind {config.kind}")
        levels, width = round(math.log2(config.downscale)) + 1, config.width
        if 2 ** (levels - 1) != config.downscale:
            raise UserError(f"downscale is {config.downscale}, expected a power of two")
        shape_of_latents(config.channels, config.downscale, config.data.image_size)  # which must be a multiple of it
        self.weight = config.kl
        if config.kind == "tiny":
            self.network = diffusers.AutoencoderTiny(
                encoder_block_out_channels=(width,) * levels,
                decoder_block_out_channels=(width,) * levels,
                num_encoder_blocks=(1,) + (3,) * (levels - 1),
                num_decoder_blocks=(3,) * (levels - 1) + (1,),
                latent_channels=config.channels,
            )
        else:
            self.network = diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                block_out_channels=tuple(width * min(4, 2**i) for i in range(levels)),
                layers_per_block=1,
                norm_num_groups=math.gcd(32, width),
                latent_channels=config.channels,
                shift_factor=0.0,
            )

    def encode(self, frames: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Latents, of a KL drawn from its posterior with the weighted divergence as a penalty."""
        if isinstance(self.network, diffusers.AutoencoderTiny):
            return self.network.encode(frames).latents, None
        posterior = self.network.encode(frames).latent_dist
        draw = torch.randn(posterior.mean.shape, generator=noise).to(posterior.mean)
        return posterior.mean + posterior.std * draw, self.weight * posterior.kl().mean() / posterior.mean[0].numel()

    def decode(self, latents: Tensor) -> Tensor:
        """By the decoder."""
        return self.network.decode(latents).sample

    def finished(self, frames: Tensor) -> Codec:
        """With scaling and shift to zero mean and unit variance over the frames."""
        kind = TinyCodec if isinstance(self.network, diffusers.AutoencoderTiny) else KLCodec
        flags = [parameter.requires_grad for parameter in self.network.parameters()]
        codec = kind(self.network)  # which freezes it
        means = torch.cat([codec.moments(part)[:, 0] for part in frames.split(CHUNK)])
        for parameter, flag in zip(self.network.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        codec.shift, codec.scale = means.mean().item(), 1 / max(means.std().item(), 1e-6)
        self.network.register_to_config(shift_factor=codec.shift, scaling_factor=codec.scale)
        return codec


class TrainedDecoder(Trained):
    """A decoder for a features codec."""

    def __init__(self, config: CodecTrainConfig):
        if config.features is None:
            raise UserError("features: expected the folder of a features codec for kind features")
        self.codec = FeaturesCodec.load(config.features)
        grid = self.codec.latent_shape(config.data.image_size)[1:]
        self.codec.add_decoder(config.width, *((config.depth, grid) if config.decoder == "vit" else ()))
        self.network = self.codec.decoder.requires_grad_()

    def to(self, device: torch.device) -> nn.Module:
        """Moves the codec, and returns the decoder."""
        return self.codec.to(device).decoder

    def encode(self, frames: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """The features."""
        return self.codec.encode(frames), None

    def decode(self, latents: Tensor) -> Tensor:
        """By the decoder."""
        return self.codec.decoded(latents)

    def finished(self, frames: Tensor) -> Codec:
        """The features codec with its decoder."""
        return self.codec


def train_codec(config: CodecTrainConfig, device: torch.device) -> None:
    """Trains to the end, or to `stop_at`; writes the codec, a checkpoint, metrics.jsonl and pictures to OUT.

    Raises:
        UserError: the dataset does not fit, or OUT holds a checkpoint that cannot be continued.
    """
    out, saved = Path(config.out), _checkpoint(config)
    train_set = RecordedFrames(config.data, config.data.train_split)
    shown = to_float(RecordedFrames(config.data, config.data.test_split).spread(config.samples))
    reference = to_float(train_set.spread(MEASURED)).to(device)
    torch.manual_seed(config.seed)
    trained = TrainedDecoder(config) if config.kind == "features" else TrainedAutoencoder(config)
    network, lpips = trained.to(device).train(), _lpips(config, device)
    network.to(memory_format=torch.channels_last)  # in which convolutions are faster
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99))
    start, rows = 0, []
    if saved:
        start, rows = saved["step"], saved["rows"]
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
    stop = min(config.steps, config.stop_at or config.steps)
    loader = WindowLoader(
        Reporting(train_set),
        batch_sampler=StepSampler(len(train_set), config.batch_size, config.seed, start, stop),
        num_workers=config.data.workers,
        collate_fn=_stack,
    )
    losses: list[dict[str, float]] = []
    with writing(out):
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        for step, batch in enumerate(tqdm(loader, "training", stop, initial=start), start + 1):
            noise = generator(config.seed, 1, step)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                parts = _losses(trained, to_float(batch.to(device)), noise, config, lpips)
            loss = sum(parts.values())
            if not loss.isfinite():
                raise UserError(
                    f"the loss of step {step} is not finite, try a smaller learning_rate ({out} keeps a checkpoint)"
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _rate(step, config.steps)
            optimizer.step()
            losses.append({f"train/{name}": value.item() for name, value in parts.items()})
            if step % config.every == 0 or step == stop:
                codec = trained.finished(reference)
                rebuilt = _reconstruct(codec.eval(), shown, device)
                network.train()
                means = {name: sum(row[name] for row in losses) / len(losses) for name in losses[0]}
                rows.append({"step": step, **means, **_measure(rebuilt, shown, lpips, device)})
                losses = []
                tqdm.write(", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), file=sys.stderr)
                _draw(shown, rebuilt, config.pictures).save(out / "pictures" / f"step_{step:08d}.png")
                codec.save(out)
                write_whole(out / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
                state = {"step": step, "rows": rows, "options": _options(config)}
                state |= {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, out / f".{CHECKPOINT}")
                (out / f".{CHECKPOINT}").replace(out / CHECKPOINT)
    print(
        f"done: {out}/pictures shows reconstructions; train a world with --codec.kind {config.kind} --codec.name {out}"
    )


def _losses(
    trained: Trained, frames: Tensor, noise: torch.Generator, config: CodecTrainConfig, lpips: Lpips | None
) -> dict[str, Tensor]:
    """The weighted parts of the loss of a batch (N, 3, H, W)."""
    latents, penalty = trained.encode(frames, noise)
    if config.latent_noise:
        level = config.latent_noise * torch.rand(len(latents), 1, 1, 1, generator=noise)
        draw = level * torch.randn(latents.shape, generator=noise)
        latents = latents + latents.detach().std() * draw.to(latents)
    decoded = trained.decode(latents).float()
    parts = {"l1": (decoded - frames).abs().mean()}
    if lpips is not None and config.perceptual:
        parts["lpips"] = config.perceptual * lpips(decoded, frames).mean()
    return parts if penalty is None else parts | {"kl": penalty}


def _stack(items: list[Tensor | Exception]) -> Tensor | Exception:
    return next((item for item in items if isinstance(item, Exception)), None) or torch.stack(items)


def _rate(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step from 1 to `steps`."""
    return min(1.0, step / WARMUP_STEPS, (steps - step + 1) / (DECAY_SHARE * steps))


def _lpips(config: CodecTrainConfig, device: torch.device) -> Lpips | None:
    if min(config.data.image_size) < 32:
        print("LPIPS is left out: it needs frames of at least 32 pixels a side", file=sys.stderr)
        return None
    try:
        return load_lpips().to(device)
    except WeightsNotAvailable as error:
        print(f"LPIPS is left out: {error}", file=sys.stderr)
        return None


def _options(config: CodecTrainConfig) -> dict[str, Any]:
    """The options on which the weights depend."""
    values = asdict(config)
    data = values.pop("data")
    values |= {f"data.{name}": data[name] for name in DATA}
    return {name: value for name, value in values.items() if name not in FREE}


def _checkpoint(config: CodecTrainConfig) -> Mapping[str, Any] | None:
    """The checkpoint to continue from, if there is one."""
    path = Path(config.out) / CHECKPOINT
    if not path.is_file():
        return None
    if config.resume == "no":
        raise UserError(f"{path} exists: continue with --resume auto, or choose another out")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        before = _options(CodecTrainConfig(out="")) | saved["options"]  # options may be newer than the checkpoint
        changed = [name for name, value in _options(config).items() if before[name] != value]
    except Exception as error:  # torch and pickle raise many types
        raise UserError(f"{path}: not a readable checkpoint ({error})") from error
    if changed:
        raise UserError(f"{path} was trained with another {', '.join(changed)}")
    return saved


@torch.no_grad()
def _reconstruct(codec: Codec, frames: Tensor, device: torch.device) -> Tensor:
    return torch.cat([codec.decode(codec.encode(part.to(device))).cpu() for part in frames.split(CHUNK)])


@torch.no_grad()
def _measure(rebuilt: Tensor, frames: Tensor, lpips: Lpips | None, device: torch.device) -> dict[str, float]:
    """Mean PSNR (of 8-bit frames, dB) and LPIPS."""
    rounded = to_float(to_uint8(rebuilt))
    error = (rounded - frames).square().mean(dim=(1, 2, 3)).clamp(min=4e-10)
    found = {"test/psnr": (10 * (4 / error).log10()).mean().item()}
    if lpips is not None:
        parts = zip(rounded.split(CHUNK), frames.split(CHUNK), strict=True)
        found["test/lpips"] = torch.cat([lpips(a.to(device), b.to(device)) for a, b in parts]).mean().item()
    return found


def _draw(frames: Tensor, rebuilt: Tensor, count: int) -> Image.Image:
    chosen = torch.linspace(0, len(frames) - 1, min(count, len(frames))).round().long()
    cells = [[to_image(frame) for frame in some[chosen]] for some in (frames, rebuilt)]
    return sheet("", "", [""] * len(chosen), [("recorded",), ("reconstructed",)], cells)
