"""The options of the benchmark. Imports no torch."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from cdit.common.errors import UserError
from cdit.common.limits import Distinct, Limit, Positive
from cdit.model import ModelConfig

ModeName = Literal[
    "train", "sample", "rollout", "plan", "data", "scale", "profile", "attention", "context", "probes", "frames",
    "latents",
]  # fmt: skip
ContenderName = Literal["ours", "ours-nwm", "NWM-as-published", "DiT-concat"]
Precision = Literal["no", "bf16"]


@dataclass
class PlanConfig:
    """Planning: many action sequences from one context."""

    candidates: Positive[int] = 120
    """Action sequences."""
    horizon: Positive[int] = 8
    """Frames predicted for each candidate."""
    measured: Positive[int] | None = None
    """Candidates to run; the cost of all is extrapolated. By default all on a GPU, 4 on a CPU."""


@dataclass
class ScaleConfig:
    """Sizes at which a denoising step is timed."""

    past_frames: Distinct[list[Positive[int]]] = field(default_factory=lambda: [1, 2, 4, 6, 8, 12, 16])
    """Numbers of past frames."""
    sides: Distinct[list[Positive[int]]] = field(default_factory=lambda: [16, 24, 32, 40])
    """Heights and widths of what is denoised."""
    batches: Distinct[list[Positive[int]]] = field(default_factory=lambda: [1, 2, 4, 8])
    """Numbers of contexts, with one goal each."""
    candidates: Distinct[list[Positive[int]]] = field(default_factory=lambda: [1, 4, 16])
    """Numbers of goals of one context."""


@dataclass
class CodecSize:
    """An autoencoder like Stable Diffusion's, with random weights."""

    blocks: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    """Channels of its blocks; all but the first halve the size."""


@dataclass
class DataSize:
    """A random dataset for the loader."""

    recorded_size: tuple[int, int] = (480, 640)
    """Height and width of the frames on disk, JPEGs."""
    frames: Positive[int] = 64
    """Number of frames."""
    batches: Positive[int] = 32
    """Batches read per measurement."""
    workers: list[int] = field(default_factory=lambda: [0, 2])
    """Numbers of loader processes to compare."""


@dataclass
class BenchmarkConfig:
    """What to measure; by default CDiT-S/2 on the latents of 224-pixel frames."""

    modes: list[ModeName] = field(default_factory=lambda: ["train", "sample"])
    """What to measure, in this order."""
    out: str | None = None
    """Folder for results.json, tables.md and plots."""
    device: str = "auto"
    """Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, …"""
    rounds: Positive[int] = 5
    """Rounds, in each of which all alternatives are timed in turn."""
    min_seconds: float = 0.02
    """Shorter calls are repeated within a round to take at least this many seconds."""
    contenders: Distinct[list[ContenderName]] = field(
        default_factory=lambda: ["ours", "ours-nwm", "NWM-as-published", "DiT-concat"]
    )
    """Contenders; all are in memory at the same time, and ratios are relative to the first."""
    mixed_precision: Precision = "bf16"
    """Autocast precision; weights are float32."""
    compile: bool = False
    """Also time our networks compiled; the peers run as published."""
    image_size: tuple[Positive[int], Positive[int]] = (28, 28)
    """Height and width of what is denoised."""
    channels: Positive[int] = 4
    """Channels of what is denoised."""
    context_frames: Positive[int] = 4
    """Past frames."""
    batch_size: Positive[int] = 2
    """Contexts of a training step."""
    goals: Positive[int] = 4
    """Goals of each context."""
    steps: Distinct[list[Positive[int]]] = field(default_factory=lambda: [1, 4, 8, 25, 50, 250])
    """Numbers of denoising steps at which sampling is timed."""
    measured_steps: Annotated[int, Limit("at least 2", lambda x: x >= 2)] | None = None
    """Largest number of denoising steps to run; longer samplings are extrapolated. By default unlimited on a GPU, 8 on
    a CPU."""
    rollout_length: Positive[int] = 2
    """Frames of a rollout."""
    probe_every: Positive[int] = 1000
    """Training steps between two probes of attention (probe.every), whose share of the training time is measured."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network; the peers have its width, depth, heads and patches."""
    codec: CodecSize = field(default_factory=CodecSize)
    """The autoencoder of the modes rollout, plan, data and latents."""
    data: DataSize = field(default_factory=DataSize)
    """The dataset of the modes data and latents."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """The mode plan."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """The mode scale."""

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is out of its range; the message names the field.
        """
        if len(set(self.scale.past_frames)) < 3:
            raise UserError(f"scale.past_frames is {self.scale.past_frames}, expected three or more for a parabola")
