"""The configuration of an evaluation. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from cdit.common.errors import UserError
from cdit.common.options import CheckpointOptions, DataOptions, OutputOptions, TrackingOptions
from cdit.diffusion.config import SamplerOptions


@dataclass
class TimeConfig:
    """Each horizon in one jump."""

    seconds: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0, 8.0, 16.0])
    """The horizons."""
    samples: int = 256
    """Number of contexts, evenly spread over the split."""
    index: str | None = None
    """An index file of NWM (time.pkl) that lists the contexts: a pickled list of (trajectory, time, min_offset,
    max_offset), from which no code is run."""


@dataclass
class RolloutConfig:
    """Frame by frame, each prediction joining the past frames."""

    seconds: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0, 8.0, 16.0])
    """The horizons that are measured; rollouts end with the last one."""
    fps: list[float] = field(default_factory=lambda: [1.0, 4.0])
    """Steps per second, one rollout for each; they must divide the model's frames per second."""
    curves: bool = False
    """Also measure every second up to the last horizon, sharpness, jumps on the same cases, how well the model still
    turns where it is asked to, and whether it returns after a turn; and draw all that as curves (docs/rollouts.md)."""
    turn: float = 15.0
    """Degrees within one step that curves ask for."""
    samples: int = 64
    """Number of contexts, evenly spread over the split."""
    index: str | None = None
    """An index file of NWM (rollout.pkl) that lists the contexts."""


@dataclass(kw_only=True)
class EvaluateConfig(TrackingOptions, OutputOptions, DataOptions, CheckpointOptions):
    """What is evaluated, on what, and how."""

    protocols: list[Literal["time", "rollout"]] = field(default_factory=lambda: ["time", "rollout"])
    """Protocols to run."""
    time: TimeConfig = field(default_factory=TimeConfig)
    """Each horizon in one jump."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Frame by frame."""
    metrics: list[Literal["psnr", "ssim", "lpips", "lpips_vgg", "dreamsim", "sharpness", "fid", "fvd"]] = field(
        default_factory=lambda: ["psnr", "ssim", "lpips"]
    )
    """lpips is on AlexNet, lpips_vgg on VGG16. sharpness is the gradient energy of the prediction over that of the
    truth, best at 1. dreamsim, fid and fvd (of rollouts) need `pip install cdit[dreamsim]`, `cdit[fid]`,
    `cdit[fvd]`."""
    fid_network: str = "inception"
    """Network of fid: inception, or MODULE:FUNCTION that returns an nn.Module from frames (N, 3, H, W) in [-1, 1] to
    features (N, F)."""
    fvd_network: str = "i3d"
    """Network of fvd: i3d, or MODULE:FUNCTION that returns an nn.Module from videos (N, T, 3, H, W) in [-1, 1] to
    features (N, F)."""
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    """How frames are sampled."""
    nwm_compat: bool = False
    """Follow the NWM release: actions of rollouts are differences of normalised waypoints (which is not what it was
    trained with), predicted frames are encoded again before they join the past, and predictions are truncated to 8
    bits. By default actions are those of training, predicted latents join the past as they are, and predictions are
    rounded to 8 bits."""
    batch_size: int = 16
    """Contexts per batch. The noise depends on it."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast precision of predictions; NWM evaluates in bf16."""
    pictures: int = 6
    """Number of cases of each protocol that are drawn."""
    seed: int = 0
    """Seed of the noise and of the bootstrap."""
    overwrite: bool = False
    """Delete what OUT/parts holds, also of another evaluation, and start over."""
    timeout_minutes: float = 30.0
    """How long processes wait for one another before all stop. Longer than one batch takes."""

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
        if not 0 < self.rollout.turn <= 90:
            raise UserError(f"rollout.turn is {self.rollout.turn:g}, expected more than 0 and at most 90")
        if self.rollout.curves and "rollout" not in self.protocols:
            raise UserError("rollout.curves needs protocols with rollout")
        if min(self.rollout.fps) <= 0:
            raise UserError(f"rollout.fps is {self.rollout.fps}, expected more than 0")
        if self.timeout_minutes <= 0:
            raise UserError(f"timeout_minutes is {self.timeout_minutes:g}, expected more than 0")
        for name, count, least in (
            ("time.samples", self.time.samples, 1),
            ("rollout.samples", self.rollout.samples, 1),
            ("batch_size", self.batch_size, 1),
            ("pictures", self.pictures, 0),
        ):
            if count < least:
                raise UserError(f"{name} is {count}, expected at least {least}")
