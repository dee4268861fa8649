"""Options of attention reports. Free of torch, so that `--help` and configs of training load fast."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cdit.common.errors import UserError
from cdit.common.limits import Between, Distinct, NotNegative, Offsets, Positive, check_limits
from cdit.common.options import CheckpointOptions, DataOptions, OutputOptions, TrackingOptions, check_options
from cdit.diffusion.config import SamplerOptions

if TYPE_CHECKING:
    from cdit.model import CDiT

Kind = Literal["cross", "self"]
"""Cross-attention to the past frames, or self-attention within the target."""

Mode = Literal["zero", "mean"]
"""What replaces the output of a head: zeros, or the head's mean output."""


@dataclass
class AttentionConfig:
    """Which attention is inspected."""

    kinds: Distinct[list[Kind]] = field(default_factory=lambda: ["cross"])
    """cross (to the past frames), self (within the target), or both. The page shows cross-attention."""
    layers: Distinct[list[int]] | None = None
    """Blocks, counted from 0; all by default. Figures show the first, the middle and the last of them."""
    times: Distinct[list[Between]] = field(default_factory=lambda: [0.25, 0.75])
    """Diffusion times between 0 (clean) and 1 (noise)."""
    samples: NotNegative[int] = 8
    """Number of samples to measure, each with all its goals; 0 turns the report off."""
    drawn: NotNegative[int] = 1
    """Number of samples to draw: their first and last goal on the page, their first goal in figures."""
    patch: tuple[int, int] | None = None
    """Row and column of the target patch whose attention figures show, from 0 at the top left; the centre by
    default."""

    def resolve(self, cdit: "CDiT", field: str = "attention") -> tuple[list[int], tuple[int, int]]:
        """The layers and the patch to inspect in a network; `field` is the prefix of names in messages.

        Raises:
            UserError: the network has no such layer or patch, or a value is out of range; the message names the field.
        """
        prefix = f"{field}." if field else ""
        check_limits(self, prefix)
        depth, (rows, columns) = len(cdit.blocks), cdit.grid
        layers = list(range(depth)) if self.layers is None else sorted(set(self.layers))
        row, column = (rows // 2, columns // 2) if self.patch is None else self.patch
        requirements = {
            "layers": (layers and all(0 <= layer < depth for layer in layers), f"numbers from 0 to {depth - 1}"),
            "patch": (0 <= row < rows and 0 <= column < columns, f"one of the {rows} × {columns} patches of a frame"),
        }
        for name, (holds, expected) in requirements.items():
            if not holds:
                raise UserError(f"{prefix}{name} is {getattr(self, name)}, expected {expected}")
        return layers, (row, column)


@dataclass
class ImportanceConfig:
    """How the importance of heads is measured."""

    layers: Distinct[list[int]] | None = None
    """Blocks, counted from 0; all by default."""
    kinds: Distinct[list[Kind]] = field(default_factory=lambda: ["cross", "self"])
    """Which attentions."""
    mode: Mode = "zero"
    """What replaces a head's output: zeros, or its mean over the samples."""
    times: Distinct[list[Between]] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    """Diffusion times over which the loss is averaged."""
    batch_size: Positive[int] = 8
    """Samples per forward pass."""


@dataclass(kw_only=True)
class HeadsConfig(TrackingOptions, AttentionConfig, OutputOptions, DataOptions, CheckpointOptions):
    """Options of `python -m cdit.heads`."""

    checkpoint: str
    """Folder of a training run or of a world model, or a published NWM checkpoint (*.pth.tar)."""
    data: str | None = None
    """Dataset folder. Datasets recorded in Doom also provide the true places that heads are scored against."""
    frames: str | None = None
    """Instead of data: a folder of images, sorted by name, that serve as past frames and targets."""
    actions: str | None = None
    """With frames, the motion from each image to the next, as in sample.py: words such as forward*8,turn_left*4 or a
    file. Unknown by default."""
    kinds: Distinct[list[Kind]] = field(default_factory=lambda: ["cross", "self"])
    """cross (to the past frames), self (within the target), or both. The page shows cross-attention."""
    samples: Positive[int] = 32
    """Number of samples to measure, each with all its goals."""
    drawn: NotNegative[int] = 4
    """Number of samples to draw: their first and last goal on the page, their first goal in figures."""
    offsets: Offsets | None = None
    """Goals, in frames ahead; 1, 4 and 8 by default, with frames 1."""
    importance: Literal["no", "loss", "lpips"] = "no"
    """Also ablate each head by itself and more and more heads at once, and measure the denoising loss (loss) and how
    sampled frames change (lpips; samples all targets once per head)."""
    ablation: Mode = "zero"
    """What replaces the output of ablated heads: zeros, or the head's mean output."""
    untrained: bool = True
    """Whether to score the same network with initial weights against true places, for comparison."""
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    """Sampling of the predicted frames on the page."""
    codec: str | None = None
    """For a published checkpoint: hub name or local folder of its AutoencoderKL, by default that of the release."""
    weights: Literal["ema", "model"] | None = None
    """For a published checkpoint: the averaged weights (ema, the default), or the trained ones."""
    num_heads: int | None = None
    """For a published checkpoint: heads per attention; by default those of the published network of that size."""
    seed: NotNegative[int] = 0
    """Of the noise, of the halves and of the bootstrap."""

    def check(self) -> None:
        """Finds mistakes before anything is loaded.

        Raises:
            UserError: naming the field.
        """
        check_options(self)
        if (self.data is None) == (self.frames is None):
            raise UserError("give either data, a dataset folder, or frames, a folder of images")
        if self.actions is not None and self.frames is None:
            raise UserError("actions can only be given with frames; a dataset has its own")
        for name in ("codec", "weights", "num_heads"):
            if getattr(self, name) is not None and not Path(self.checkpoint).is_file():
                raise UserError(f"{name} can only be given with a published checkpoint (*.pth.tar)")
        if self.ablation != "zero" and self.importance == "no":
            raise UserError("ablation can only be given with importance")
