"""The configuration of an evaluation. Imports no torch."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from cdit.common.errors import UserError
from cdit.common.limits import Distinct, Limit, NotNegative, Positive
from cdit.common.options import CheckpointOptions, DataOptions, OutputOptions, TrackingOptions
from cdit.diffusion.config import SamplerOptions

Metric = Literal["psnr", "ssim", "lpips", "lpips_vgg", "dreamsim", "sharpness", "latents", "rank", "fid", "fvd"]


@dataclass
class TimeConfig:
    """Each horizon in one jump."""

    seconds: Distinct[list[Positive[float]]] = field(default_factory=lambda: [1.0, 2.0, 4.0, 8.0, 16.0])
    """The horizons."""
    samples: Positive[int] = 256
    """Number of contexts, evenly spread over the split."""
    index: str | None = None
    """An index file of NWM (time.pkl) that lists the contexts: a pickled list of (trajectory, time, min_offset,
    max_offset), from which no code is run."""


@dataclass
class RolloutConfig:
    """Frame by frame, each prediction joining the past frames."""

    seconds: Distinct[list[Positive[float]]] = field(default_factory=lambda: [1.0, 2.0, 4.0, 8.0, 16.0])
    """The horizons that are measured; rollouts end with the last one."""
    fps: Distinct[list[Positive[float]]] = field(default_factory=lambda: [1.0, 4.0])
    """Steps per second, one rollout for each; they must divide the model's frames per second."""
    curves: bool = False
    """Also measure every second up to the last horizon, sharpness, jumps on the same cases, how well the model still
    follows commanded turns, and whether it returns after a turn; and plot all of these as curves (docs/rollouts.md)."""
    turn: Annotated[float, Limit("more than 0 and at most 90", lambda x: 0 < x <= 90)] = 15.0
    """Commanded turn of the curves, in degrees within one step."""
    samples: Positive[int] = 64
    """Number of contexts, evenly spread over the split."""
    index: str | None = None
    """An index file of NWM (rollout.pkl) that lists the contexts."""


@dataclass(kw_only=True)
class EvaluateConfig(TrackingOptions, OutputOptions, DataOptions, CheckpointOptions):
    """What is evaluated, on what, and how."""

    protocols: Distinct[list[Literal["time", "rollout"]]] = field(default_factory=lambda: ["time", "rollout"])
    """Protocols to run."""
    time: TimeConfig = field(default_factory=TimeConfig)
    """Each horizon in one jump."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Frame by frame."""
    metrics: Distinct[list[Metric]] = field(default_factory=lambda: ["psnr", "ssim", "lpips"])
    """lpips uses AlexNet, lpips_vgg VGG16. sharpness is the gradient energy of the prediction over that of the truth,
    best at 1. latents is the mean squared error of what the model denoises, rank (of features) the share of recorded
    frames that are further from the prediction than the truth, by the cosine of features, 0.5 by chance; these two are
    also available for a codec without a decoder. dreamsim, fid and fvd (of rollouts) need `pip install cdit[dreamsim]`,
    `cdit[fid]`, `cdit[fvd]`."""
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
    bits. By default actions are those of training, predicted latents join the past unchanged, and predictions are
    rounded to 8 bits."""
    batch_size: Positive[int] = 16
    """Contexts per batch. The noise depends on it."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast precision of predictions; NWM evaluates in bf16."""
    pictures: NotNegative[int] = 6
    """Number of cases of each protocol that are drawn."""
    seed: NotNegative[int] = 0
    """Seed of the noise and of the bootstrap."""
    overwrite: bool = False
    """Delete what OUT/parts holds of these protocols, even of another evaluation, and start over."""
    timeout_minutes: Positive[float] = 30.0
    """Minutes that processes wait for one another before all stop; must exceed the time of one batch."""

    def validate(self) -> None:
        """Checks what the fields' types cannot express.

        Raises:
            UserError: options contradict each other.
        """
        if self.rollout.curves and "rollout" not in self.protocols:
            raise UserError("rollout.curves needs protocols with rollout")
