"""The complete configuration of a training run. Sections that describe a room are defined in that room."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from cdit.codec.config import KINDS, CodecConfig
from cdit.common.errors import UserError
from cdit.common.files import check_writable, write_whole
from cdit.common.limits import Limit, NotNegative, Offsets, Positive, Share, within
from cdit.data.config import DataConfig
from cdit.diffusion.config import (
    SCHEDULERS,
    DDPMConfig,
    FewStepConfig,
    FlowConfig,
    SamplerConfig,
    SelfRolloutConfig,
    check_sampler,
    sampled_as,
)
from cdit.heads.config import AttentionConfig
from cdit.model.config import ModelConfig


@dataclass
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the matrices of the blocks and AdamW for everything else."""
    learning_rate: Positive[float] = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After the warm-up: a cosine to zero at the last step, constant, or constant until the last `decay_share` of the
    steps and then linear to zero (wsd: warm-up, stable, decay; Hägele et al. 2024, arXiv 2405.18392)."""
    decay_share: Annotated[float, Limit("more than 0 and at most 1", lambda x: 0 < x <= 1)] = 0.2
    """Share of the run's steps over which wsd decays."""
    warmup_steps: NotNegative[int] = 100
    """Steps of linear warm-up."""
    betas: tuple[Share, Share] = (0.9, 0.99)
    """Decay rates of AdamW's moments."""
    momentum: Share = 0.95
    """Decay rate of Muon's momentum."""
    weight_decay: NotNegative[float] = 0.01
    """Decoupled weight decay, on matrices only."""
    only: str | None = None
    """A regular expression: only parameters whose names it matches are trained, such as ada_ln, the modulation."""
    max_grad_norm: Positive[float] = 1.0
    """Global gradient norm is clipped to this."""
    max_bad_steps: Positive[int] = 10
    """Steps whose gradient norm is not finite are skipped and counted, and their batch is saved to <run>/bad_steps/;
    after this many in a row training stops."""


@dataclass
class EMAConfig:
    """The running average of the weights that validation, probes and saved models use."""

    decay: Annotated[float, within(0, 1)] = 0.9999
    """Largest decay per step."""
    warmup_power: NotNegative[float] = 0.75
    """The decay grows as 1 - (1 + step)^-power up to its largest value, starting from a copy after the first step, so
    that the initial weights leave no trace; 0 for a fixed decay from the initial weights on (the NWM release)."""


@dataclass
class ValidationConfig:
    """Loss on held-out windows, with the running average of the weights."""

    every: Positive[int] = 500
    """Steps between validations; also validated at the end."""
    samples: Positive[int] = 256
    """Number of windows, drawn once for the whole run."""
    time_bins: Positive[int] = 5
    """Number of equal bins of diffusion time for which the loss is reported."""


@dataclass
class ProbeConfig:
    """What is sampled, measured and drawn during training, always from the same windows."""

    every: NotNegative[int] = 1000
    """Steps between probes; 0: only at the end."""
    samples: Positive[int] = 32
    """Windows measured at each probe."""
    final_samples: Positive[int] = 256
    """Windows measured after the last step."""
    offsets: Offsets = field(default_factory=lambda: [1, 2, 4, 8])
    """Frames ahead to predict directly."""
    rows: Positive[int] = 6
    """Samples shown in each picture."""
    rollouts: NotNegative[int] = 2
    """Autoregressive rollout videos."""
    rollout_frames: NotNegative[int] = 16
    """Their length in frames; 0 for none."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Attention maps."""


@dataclass
class CheckpointConfig:
    """Checkpoints, from which a run can continue."""

    every: Positive[int] = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep: Positive[int] = 2
    """How many of the newest checkpoints are kept."""
    keep_every: NotNegative[int] = 0
    """Checkpoints whose step is a multiple of this are also kept; 0: none."""
    background: bool = True
    """Whether a thread writes them from a copy in memory while training continues."""


@dataclass
class TrainConfig:
    """A training run."""

    name: str = "quickstart"
    """Name of the run; its folder is <output>/<name>."""
    output: str = "runs"
    """Folder of all runs."""
    resume: str = "no"
    """Continue an earlier run: auto (from its newest checkpoint, or from the beginning if there is none), or the path
    of a checkpoint folder. With no, start from the beginning, and fail if the folder holds checkpoints. Settings that
    the weights depend on must not change. A damaged checkpoint is reported and kept, and an older one is used."""
    init_from: str | None = None
    """Start from the weights, units and codec of a trained world model: a run, a folder, or the name of a world that
    ships with the package. The model section must describe its network. Further conditioners and context_noise may be
    added; those built into cdit have no effect at the start."""
    allow_changes: bool = False
    """Continue even if settings that the weights depend on have changed."""
    seed: NotNegative[int] = 0
    """Key of all randomness: weights, batches, goals, noise, diffusion times."""
    steps: Positive[int] = 1000
    """Optimizer steps of the whole run. If they change when resuming, the schedule follows the new number."""
    stop_at: Positive[int] | None = None
    """Stop after this step without changing schedules, to train a run in pieces (see resume)."""
    train_seconds: Positive[float] | None = None
    """Train for this many seconds instead of `steps`, not counting validation, probes and checkpoints, summed over
    resumes. The learning-rate schedule advances with the fraction of the time that has elapsed."""
    stop_at_seconds: Positive[float] | None = None
    """Stop after this many seconds of training without changing schedules, to train a run in slices."""
    batch_size: Positive[int] = 32
    """Contexts (each with data.goals goals) per step, over all processes."""
    micro_batch_size: Positive[int] | None = None
    """Contexts per process and forward pass; smaller ones accumulate gradients. None: all at once."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    """Autocast precision."""
    deterministic: bool = False
    """On a GPU, use only deterministic kernels, and fail where there is none; slower. On a CPU all kernels are
    deterministic for a fixed number of threads."""
    timeout_minutes: Positive[float] = 30.0
    """Minutes that processes wait for each other before all exit. Must be longer than a probe, which one process runs
    alone; if recording a dataset takes longer, record it beforehand."""
    compile: bool = False
    """Whether to compile the network (torch.compile); worthwhile on a GPU and in long CPU runs."""
    activation_checkpointing: bool = False
    """Whether blocks keep only their input for the backward pass and recompute the rest: the same gradients and far
    less memory for about a third more compute."""
    action_dropout: Share = 0.0
    """Share of goals whose action and text are hidden in training, for classifier-free guidance in sampling."""
    clean_context: Share = 0.5
    """With model.context_noise, the share of windows whose past frames get no noise."""
    data: DataConfig = field(default_factory=DataConfig)
    """The dataset and its windows."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    """What is denoised: pixels or latents."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    objective: str = "flow"
    """Rectified flow (flow), one whose few-step sampling is trained as well (shortcut, mean_flow; see
    docs/sampling.md), one that is also trained on its own rollouts (self_rollout; see docs/rollouts.md), the DDPM of
    DiT and NWM (ddpm), the clean frame predicted in one call without noise (regression; see docs/spaces.md), or one of
    your own, `my_module:Class` (see docs/extending.md)."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """The flow."""
    few_step: FewStepConfig = field(default_factory=FewStepConfig)
    """Average velocities of a shortcut or mean_flow."""
    ddpm: DDPMConfig = field(default_factory=DDPMConfig)
    """The DDPM."""
    self_rollout: SelfRolloutConfig = field(default_factory=SelfRolloutConfig)
    """Training on the world's own rollouts."""
    objective_options: dict[str, Any] = field(default_factory=dict)
    """Options of an objective of your own."""
    units: Literal["farthest_goal", "nwm"] = "farthest_goal"
    """How actions and time shifts are normalised: relative to the farthest goal, or as in the NWM release."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How frames are sampled, in probes and by default afterwards."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """The average of the weights."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Loss on held-out windows."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Samples, metrics and attention maps during training."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    tracking: Literal["wandb", "none"] = "wandb"
    """Whether to log to Weights & Biases (offline if you are not logged in), in addition to metrics.jsonl and pictures
    in the folder of the run."""
    project: str = "cdit"
    """Name of the Weights & Biases project."""
    log_every: Positive[int] = 20
    """Steps between logged training metrics."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output) / self.name

    def validate(self) -> None:
        """Checks what the fields' types cannot express, and imports user-defined modules that are named.

        Raises:
            UserError: a value cannot be used; the message names the field.
        """
        self.data.validate()
        self._load_plugins()
        trained = sampled_as(self)
        check_sampler(trained, self.sampler)
        if self.flow.perceptual.weight and trained in ("ddpm", "regression"):
            raise UserError(f"flow.perceptual.weight is {self.flow.perceptual.weight}, which a {trained} does not use")
        if self.objective_options and trained in SCHEDULERS:
            raise UserError(f"objective_options: expected none, because {trained} is not an objective of your own")
        is_clean = self.objective == "regression" or (self.objective != "ddpm" and self.flow.prediction == "clean")
        if self.model.reprojection and not is_clean:
            raise UserError(
                "model.reprojection needs a regression, or a flow (also shortcut, mean_flow) with flow.prediction clean"
            )
        if self.model.reprojection and not (self.model.use_action and self.model.output_channels):
            raise UserError("model.reprojection needs model.use_action and model.output_channels")
        if self.flow.perceptual.weight and min(self.data.image_size) < 32:
            raise UserError(f"data.image_size is {self.data.image_size}, expected at least 32 for flow.perceptual")
        if self.name in ("", "..") or Path(self.name).name != self.name:
            raise UserError(f"name is {self.name!r}, expected one path component")
        if self.objective == "self_rollout" and not (self.data.rollout and self.sampler.guidance == 1):
            raise UserError("self_rollout needs data.rollout, a number of frames, and sampler.guidance 1")
        if self.optimizer.only is not None:
            try:
                re.compile(self.optimizer.only)
            except re.error as error:
                raise UserError(
                    f"optimizer.only is {self.optimizer.only!r}: not a regular expression ({error})"
                ) from error
        if self.sampler.context_noise > self.model.context_noise:
            raise UserError(
                f"sampler.context_noise is {self.sampler.context_noise}, expected at most model.context_noise, "
                f"{self.model.context_noise:g}"
            )
        if self.sampler.guidance != 1 and self.action_dropout == 0:
            raise UserError(f"sampler.guidance is {self.sampler.guidance}, which needs action_dropout above 0")

    def _load_plugins(self) -> None:
        """Imports the modules of user-defined codecs, objectives and conditioners."""
        if self.codec.kind not in KINDS:
            from cdit.codec.codec import CODECS

            CODECS.load(self.codec.kind)
        for objective in {self.objective, sampled_as(self)} - SCHEDULERS.keys():
            from cdit.diffusion.objective import OBJECTIVES

            OBJECTIVES.load(objective)
        if self.model.extra_conditioners:
            from cdit.model.conditioners import CONDITIONERS

            for kind in self.model.extra_conditioners.values():
                CONDITIONERS.load(kind)

    def check_folder(self) -> None:
        """Checks that the run's folder can be created or written to.

        Raises:
            UserError: it cannot.
        """
        check_writable(self.folder, f"output is {self.output!r}")

    def plain(self) -> dict[str, Any]:
        """The config as plain values for YAML: dictionaries, lists, numbers and strings."""
        return _plain(asdict(self))

    def save(self, path: Path) -> None:
        """Writes the resolved config as YAML; `train.py --config` repeats the run from it."""
        write_whole(path, yaml.safe_dump(self.plain(), sort_keys=False))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dictionaries; names are joined by dots, as on the command line."""
    found = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _plain(value: object) -> object:
    """Tuples as lists, which YAML can represent."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
