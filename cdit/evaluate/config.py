"""The whole configuration of an evaluation."""

from dataclasses import dataclass, field
from typing import Literal

from cdit.common.errors import UserError
from cdit.diffusion.config import SamplerOptions


@dataclass
class TimeConfig:
    """Each horizon in one jump."""

    seconds: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0, 8.0, 16.0])
    """The horizons."""
    samples: int = 256
    """How many contexts, spread over the split."""
    index: str | None = None
    """In place of samples, an index file of NWM (time.pkl): a pickled list of (trajectory, time, min_offset,
    max_offset). Nothing in it is run."""


@dataclass
class RolloutConfig:
    """Frame by frame, each prediction joining the past frames."""

    seconds: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0, 8.0, 16.0])
    """The horizons that are measured; rollouts end with the last."""
    fps: list[float] = field(default_factory=lambda: [1.0, 4.0])
    """Steps a second, a rollout for each; they divide the model's frames a second."""
    samples: int = 64
    """How many contexts, spread over the split."""
    index: str | None = None
    """In place of samples, an index file of NWM (rollout.pkl)."""


@dataclass
class EvaluateConfig:
    """What is evaluated, on what, and how."""

    checkpoint: str
    """A training run's folder, or a world model's."""
    data: str
    """The dataset folder."""
    out: str
    """Folder for the results; seen by all processes."""
    split: str = "test"
    """Split of the dataset."""
    splits: str | None = None
    """Folder with <split>/traj_names.txt, where that is not <data>/splits."""
    follow_links: bool = False
    """Whether links within the dataset's folder may lead out of it."""
    spacing: float | None = None
    """Metres between consecutive frames, the unit of normalised actions of models trained on several datasets; by
    default what dataset.json says."""
    protocols: list[Literal["time", "rollout"]] = field(default_factory=lambda: ["time", "rollout"])
    """Which."""
    time: TimeConfig = field(default_factory=TimeConfig)
    """Each horizon in one jump."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Frame by frame."""
    nwm_compat: bool = False
    """The conventions of the NWM release: actions of rollouts from differences of normalised way points, which are not
    those of its training; predictions of rollouts that join the past as frames, encoded again; and predictions
    truncated to 8 bits. By default actions are as in training, predicted latents join the past as they are, and
    predictions are rounded. Either way 8-bit pictures are measured."""
    metrics: list[Literal["psnr", "ssim", "lpips", "dreamsim", "fid", "fvd"]] = field(
        default_factory=lambda: ["psnr", "ssim", "lpips"]
    )
    """Which; dreamsim, fid and fvd (of rollouts) need `pip install cdit[dreamsim]`, `cdit[fid]`, `cdit[fvd]`."""
    fid_network: str = "inception"
    """Network of fid: inception, or MODULE:FUNCTION that returns an nn.Module from frames (N, 3, H, W) in [-1, 1] to
    features (N, F)."""
    fvd_network: str = "i3d"
    """Network of fvd: i3d, or MODULE:FUNCTION that returns an nn.Module from films (N, T, 3, H, W) in [-1, 1] to
    features (N, F)."""
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    """How frames are sampled."""
    batch_size: int = 16
    """Contexts predicted at a time; processes share batches. The noise depends on it."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast precision of predictions; NWM evaluates in bf16."""
    pictures: int = 6
    """Cases of each protocol that are drawn."""
    seed: int = 0
    """Of the noise and of the bootstrap."""
    overwrite: bool = False
    """Whether to compute anew what OUT/parts holds, even of another evaluation."""
    tracking: Literal["wandb", "none"] = "wandb"
    """Weights & Biases (offline when nobody is logged in), or nothing."""
    project: str = "cdit"
    """Project name there."""

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is out of its range; the message names the field.
        """
        for name, values in {
            "protocols": self.protocols,
            "metrics": self.metrics,
            "time.seconds": self.time.seconds,
            "rollout.seconds": self.rollout.seconds,
            "rollout.fps": self.rollout.fps,
        }.items():
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} is {values}, expected at least one, each of them once")
        for name, rates in (("time.seconds", self.time.seconds), ("rollout.seconds", self.rollout.seconds)):
            if min(rates) <= 0:
                raise UserError(f"{name} is {rates}, expected more than 0")
        if min(self.rollout.fps) <= 0:
            raise UserError(f"rollout.fps is {self.rollout.fps}, expected more than 0")
        for name, count, least in (
            ("time.samples", self.time.samples, 1),
            ("rollout.samples", self.rollout.samples, 1),
            ("batch_size", self.batch_size, 1),
            ("pictures", self.pictures, 0),
        ):
            if count < least:
                raise UserError(f"{name} is {count}, expected at least {least}")
