"""The configurations of studies. Imports no torch."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from cdit.common.limits import Between, Distinct, NotNegative, Offsets, Positive
from cdit.common.options import CheckpointOptions, DataOptions, OutputOptions
from cdit.diffusion.config import SamplerOptions
from cdit.evaluate.config import EvaluateConfig, TimeConfig


@dataclass
class AblationConfig:
    """What is compared."""

    name: str
    """Name of the ablation; its folder is <output>/<name>."""
    base: str
    """Config of train.py that all variants start from."""
    variants: dict[str, dict[str, Any]]
    """Options of train.py for each variant by its name, such as {one head: {model.num_heads: 1}}."""
    reference: str
    """The variant that the others are compared with."""
    train: dict[str, Any] = field(default_factory=dict)
    """Options of train.py for all variants."""
    seeds: Distinct[list[int]] = field(default_factory=lambda: [0])
    """Each variant is trained once with each seed."""
    train_seconds: Positive[float] | None = None
    """Train each run for this many seconds instead of a number of steps (see train.py)."""
    slices: Positive[int] = 10
    """Number of slices of each run with train_seconds. The runs take turns slice by slice, so that other load affects
    all of them equally."""
    seconds: list[Positive[float]] = field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0])
    """Horizons that are measured."""
    cases: Positive[int] = 256
    """Number of contexts of the test split that are measured, the same for all variants."""
    metrics: list[str] = field(default_factory=lambda: ["psnr", "ssim", "lpips"])
    """Metrics, see `python -m cdit.evaluate --help`."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Further options of cdit.evaluate, such as {sampler.steps: 8}."""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    """Further options of cdit.evaluate by name, such as {1 call: {sampler.steps: 1}, 4 calls: {sampler.steps: 4}}: each
    run is evaluated with each. Horizons are predicted in one jump, or with {protocols: [rollout]} frame by frame."""
    launch: str | None = None
    """Command that starts train.py and cdit.evaluate, such as "accelerate launch --num_processes 4"; by default
    Accelerate's launcher without options."""
    output: str = "runs/ablations"
    """Folder of all ablations."""

    @property
    def folder(self) -> Path:
        """The ablation's folder."""
        return Path(self.output) / self.name

    @property
    def index(self) -> Path:
        """The index file of the cases."""
        return self.folder / "cases.pkl"


@dataclass
class GridConfig:
    """The settings that are tried: each scheduler with each number of steps and each shift."""

    scheduler: Distinct[list[str]] | None = None
    """By default all that the model's objective allows."""
    steps: Distinct[list[Positive[int]]] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    """Numbers of denoising steps, each one call of the network (two with heun)."""
    shift: Distinct[list[Positive[float]]] | None = None
    """Shifts of a flow's steps, by default 0.5, 1, 2 and 3."""


@dataclass
class ReferenceConfig:
    """The setting that the others should match."""

    scheduler: str | None = None
    """By default euler for a flow, ddim for a DDPM."""
    steps: Positive[int] = 250
    """Number of denoising steps."""


@dataclass(kw_only=True)
class StepsConfig(OutputOptions, DataOptions, CheckpointOptions):
    """What is sampled, and with which settings."""

    time: TimeConfig = field(default_factory=lambda: TimeConfig([0.5, 2.0], 64))
    """The cases; the numbers of a case are means over the horizons."""
    sampler: GridConfig = field(default_factory=GridConfig)
    """Settings that are tried."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """The setting that the others should match."""
    batch_size: Positive[int] = 16
    """Contexts per batch. The noise depends on it."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast precision of predictions."""
    seed: NotNegative[int] = 0
    """Seed of the noise and of the bootstrap."""
    overwrite: bool = False
    """Delete the contents of OUT/parts, even those of another study, and start over."""

    @property
    def evaluation(self) -> EvaluateConfig:
        """The evaluation whose cases and metrics these are."""
        names = {f.name for f in fields(self)} & {f.name for f in fields(EvaluateConfig)} - {"sampler"}
        shared = {name: getattr(self, name) for name in names}
        return EvaluateConfig(**shared, protocols=["time"], metrics=["psnr", "lpips"], pictures=0)


@dataclass(kw_only=True)
class TurningConfig(DataOptions, CheckpointOptions):
    """The model, and the turns it predicts."""

    contexts: Positive[int] = 128
    """Number of contexts, evenly spread over the split."""
    turns: Distinct[list[float]] = field(default_factory=lambda: [5.0, 10.0, 15.0, 20.0])
    """Turns within one frame in degrees; each is tried to the left and to the right."""
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    """How frames are sampled."""
    seed: NotNegative[int] = 0
    """Seed of the noise."""
    batch_size: Positive[int] = 16
    """Contexts per batch."""
    out: str | None = None
    """Folder that the table is written to, as turning.md."""


@dataclass(kw_only=True)
class CurveConfig(OutputOptions):
    """The runs that are compared."""

    curves: dict[str, list[str]]
    """Folders of the runs of each curve by its name, such as {old: [runs/old], new: [runs/new]}."""
    reference: str | None = None
    """The curve that the others are compared with; by default the first."""
    points: Literal["probes", "final"] = "probes"
    """Every probe of a run, or only its final one. Set probe.final_samples of the runs to the same number as
    probe.samples: otherwise the final probe measures other windows, and `probes` leaves it out. Earlier probes of a run
    are taken at a higher learning rate than its last one; `final`, with several runs of different length, compares
    finished ones."""
    frames: list[int] | None = None
    """Horizons in frames; by default all probe.offsets that the runs have in common."""
    metrics: Distinct[list[Literal["lpips", "psnr", "ssim", "latents", "rank"]]] = field(
        default_factory=lambda: ["lpips", "psnr"]
    )
    """What is plotted; latents and rank are what probes measure of worlds without a decoder."""


@dataclass(kw_only=True)
class GrowthConfig(OutputOptions, DataOptions, CheckpointOptions):
    """The run, and the samples on which its heads are measured."""

    checkpoint: str
    """Folder of a training run that keeps checkpoints (checkpoint.keep_every)."""
    checkpoints: Positive[int] = 6
    """How many of its checkpoints are measured, evenly spread."""
    samples: Positive[int] = 32
    """Number of samples, each with all goals; one half chooses the best head, the other reports."""
    offsets: Offsets = field(default_factory=lambda: [1, 4, 8])
    """Goals, in frames ahead."""
    times: Distinct[list[Between]] = field(default_factory=lambda: [0.25, 0.75])
    """Diffusion times between 0 (clean) and 1 (noise)."""
    seed: NotNegative[int] = 0
    """Of the noise, of the halves and of the bootstrap."""
