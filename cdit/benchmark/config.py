"""What is timed."""

from dataclasses import dataclass, field
from typing import Literal

from cdit.common.errors import UserError
from cdit.model import ModelConfig

ContenderName = Literal["ours", "ours-nwm", "NWM-as-published", "DiT-concat"]
Precision = Literal["no", "bf16"]


@dataclass
class PlanConfig:
    """The mode plan: many action sequences tried from one context."""

    candidates: int = 120
    """Action sequences."""
    horizon: int = 8
    """Frames that each of them predicts, one after the other."""
    measured: int | None = None
    """Candidates that are really run: costs grow in proportion to them. By default all on a GPU, 4 on a CPU."""


@dataclass
class ScaleConfig:
    """The mode scale: what one more costs."""

    past_frames: list[int] = field(default_factory=lambda: [1, 2, 4, 6, 8, 12, 16])
    """Numbers of past frames."""
    sides: list[int] = field(default_factory=lambda: [16, 24, 32, 40])
    """Heights and widths of what is denoised."""
    batches: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Numbers of contexts, with one goal each."""
    candidates: list[int] = field(default_factory=lambda: [1, 4, 16])
    """Numbers of goals of one context."""


@dataclass
class CodecSize:
    """An autoencoder like Stable Diffusion's, with random weights."""

    blocks: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    """Channels of its blocks; all but the first halve the size."""


@dataclass
class DataSize:
    """Frames that the loader reads, made for the purpose."""

    recorded_size: tuple[int, int] = (480, 640)
    """Height and width of the frames on disk, JPEGs."""
    frames: int = 64
    """How many."""
    batches: int = 32
    """Batches read each time."""
    workers: list[int] = field(default_factory=lambda: [0, 2])
    """Numbers of loader processes that are tried."""


@dataclass
class BenchmarkConfig:
    """What is timed: by default CDiT-S/2 on the latents of 224-pixel frames."""

    out: str | None = None
    """Folder for results.json, tables.md and plots."""
    device: str | None = None
    """cpu, cuda, cuda:1, …; by default a GPU where there is one."""
    rounds: int = 5
    """Rounds in which all alternatives are timed, in turn."""
    min_seconds: float = 0.02
    """Shorter calls are repeated within a round to take at least this long."""
    contenders: list[ContenderName] = field(
        default_factory=lambda: ["ours", "ours-nwm", "NWM-as-published", "DiT-concat"]
    )
    """Who takes part. All that do are in memory at the same time; ratios are to the first."""
    mixed_precision: Precision = "bf16"
    """What products are computed in; weights are float32."""
    compile: bool = False
    """Whether to compile our networks, which takes a while. The peers are run as published."""
    image_size: tuple[int, int] = (28, 28)
    """Height and width of what is denoised."""
    channels: int = 4
    """Channels of what is denoised."""
    context_frames: int = 4
    """Past frames."""
    batch_size: int = 2
    """Contexts of a training step."""
    goals: int = 4
    """Goals of each context."""
    steps: list[int] = field(default_factory=lambda: [1, 4, 8, 25, 50, 250])
    """Numbers of denoising steps that sampling is timed at."""
    measured_steps: int | None = None
    """Denoising steps that are really run of a longer sampling; the others, each of the same work, are added in
    proportion. By default all on a GPU, 8 on a CPU."""
    rollout_length: int = 2
    """Frames of a rollout."""
    probe_every: int = 1000
    """Training steps between the probes of attention whose share of training time is measured (probe.every)."""
    checkpoint_every: int = 20
    """Training steps between the checkpoints whose cost is measured (checkpoint.every)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network; the peers have its width, depth, heads and patches."""
    codec: CodecSize = field(default_factory=CodecSize)
    """The autoencoder, where one takes part."""
    data: DataSize = field(default_factory=DataSize)
    """The dataset, where one takes part."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """The mode plan."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """The mode scale."""

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: one is out of its range; the message names the field.
        """
        counts = {
            "rounds": self.rounds,
            "context_frames": self.context_frames,
            "batch_size": self.batch_size,
            "goals": self.goals,
            "rollout_length": self.rollout_length,
            "channels": self.channels,
            "plan.candidates": self.plan.candidates,
            "plan.horizon": self.plan.horizon,
            "data.batches": self.data.batches,
        }
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"{name} is {value}, expected at least 1")
        if self.measured_steps is not None and self.measured_steps < 2:
            raise UserError(f"measured_steps is {self.measured_steps}, expected at least 2")
        lists = {
            "contenders": [len(name) for name in self.contenders],
            "steps": self.steps,
            "scale.past_frames": self.scale.past_frames,
            "scale.sides": self.scale.sides,
            "scale.batches": self.scale.batches,
            "scale.candidates": self.scale.candidates,
        }
        for name, values in lists.items():
            if not values or min(values) < 1:
                raise UserError(f"{name} is {values}, expected numbers of at least 1")
        if len(set(self.scale.past_frames)) < 3:
            raise UserError(f"scale.past_frames is {self.scale.past_frames}, expected three or more for a parabola")
