"""The diffusion sections of a config, and the schedulers of each objective. Imports no torch."""

from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from cdit.common.errors import UserError
from cdit.common.limits import NotNegative, Positive, within

TIMESTEPS = 1000
BETAS = (1e-4, 0.02)
"""First and last noise variance of a DDPM's linear chain."""

SMALLEST_SHORTCUT = 1 / 128
"""The shortest step of a shortcut model."""

Quantity = Literal["clean", "velocity", "noise"]


class Scheduler(NamedTuple):
    """How a scheduler of diffusers is built."""

    kind: str
    """Name of its class."""
    arguments: dict[str, Any]


_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
_DDPM = {"beta_start": BETAS[0], "beta_end": BETAS[1], "prediction_type": "epsilon"}

_FLOW_SCHEDULERS: dict[str, Scheduler | None] = {
    "euler": Scheduler("FlowMatchEulerDiscreteScheduler", {}),
    "heun": Scheduler("FlowMatchHeunDiscreteScheduler", {}),
    "dpm": Scheduler("DPMSolverMultistepScheduler", _FLOW),
    "unipc": Scheduler("UniPCMultistepScheduler", _FLOW),
}

# DDIM (Song et al. 2020) is DPM-Solver++ of first order; diffusers' own DDIMScheduler steps to t - ⌊1000 / steps⌋,
# which differs from its next timestep unless the number of steps divides 1000.
SCHEDULERS: dict[str, dict[str, Scheduler | None]] = {
    "flow": _FLOW_SCHEDULERS,
    "shortcut": {**_FLOW_SCHEDULERS, "average": None},
    "mean_flow": {**_FLOW_SCHEDULERS, "average": None},
    "ddpm": {
        "ddpm": None,
        "ddim": Scheduler("DPMSolverMultistepScheduler", {**_DDPM, "solver_order": 1}),
        "dpm": Scheduler("DPMSolverMultistepScheduler", {**_DDPM, "solver_order": 2}),
        "unipc": Scheduler("UniPCMultistepScheduler", _DDPM),
    },
    "regression": {"direct": None},
}
"""Schedulers by objective and name; None: implemented by the objective itself."""


@dataclass
class SamplerConfig:
    """How frames are sampled."""

    scheduler: str = "euler"
    """For a flow euler, heun (two network calls a step), dpm (DPM-Solver++ 2M) or unipc; for a shortcut or mean_flow
    also average, its own few-step sampler; for a DDPM ddpm (ancestral sampling), ddim, dpm or unipc; for a regression
    direct."""
    steps: Annotated[int, within(1, 100_000)] = 8
    """Number of denoising steps."""
    shift: Positive[float] = 1.0
    """Moves the steps of a flow towards noise: t becomes shift·t / (1 + (shift - 1)·t)."""
    guidance: float = 1.0
    """Scale of classifier-free guidance on action and text; 1: off. Needs training with action_dropout."""
    context_noise: NotNegative[float] = 0.0
    """Noise level on which the network is conditioned for a rollout's own frames, to which no noise is added; 0: as
    clean as recorded frames. At most model.context_noise."""
    hold: Positive[int] = 1
    """Frames of a rollout that are predicted from the same past, each in one jump and from the same noise, before the
    last of them become the past; fewer at lower frame rates. 1: every frame joins the past at once."""


class Trained(Protocol):
    """What `SamplerOptions` needs to know about a model: part of a `WorldDescription`."""

    objective: str
    action_dropout: float
    sampler: SamplerConfig
    self_rollout: "SelfRolloutConfig"


@dataclass
class SamplerOptions:
    """How frames are sampled; by default as in the model's config."""

    scheduler: str | None = None
    """For a flow euler, heun (two network calls a step), dpm (DPM-Solver++ 2M) or unipc; for a shortcut or mean_flow
    also average, its own few-step sampler; for a DDPM ddpm (ancestral sampling), ddim, dpm or unipc; for a regression
    direct."""
    steps: Positive[int] | None = None
    """Number of denoising steps."""
    shift: Positive[float] | None = None
    """Moves the steps of a flow towards noise: t becomes shift·t / (1 + (shift - 1)·t)."""
    guidance: float | None = None
    """Scale of classifier-free guidance on action and text; 1: off. Needs a model trained with action_dropout."""
    context_noise: NotNegative[float] | None = None
    """Noise level on which the network is conditioned for a rollout's own frames, to which no noise is added; 0: as
    clean as recorded frames. At most the model.context_noise of training."""
    hold: Positive[int] | None = None
    """Frames of a rollout that are predicted from the same past, each in one jump and from the same noise, before the
    last of them become the past; fewer at lower frame rates. 1: every frame joins the past at once."""

    def over(self, description: Trained) -> SamplerConfig:
        """The model's sampler, with the options that are given here replaced.

        Raises:
            UserError: the model cannot be sampled like this.
        """
        if self.guidance not in (None, 1.0) and not description.action_dropout:
            raise UserError(f"sampler.guidance is {self.guidance}, but the model was trained without action_dropout")
        given = {name: value for name, value in asdict(self).items() if value is not None}
        config = replace(description.sampler, **given)
        check_sampler(sampled_as(description), config)
        return config


@dataclass
class PerceptualConfig:
    """A perceptual loss on the predicted clean frame, added to the flow's."""

    weight: NotNegative[float] = 0.0
    """Weight of LPIPS in the loss; 0: off. The evaluation should then include a metric that was not trained on, such as
    lpips_vgg or dreamsim if the network is alex."""
    backbone: Literal["alex", "vgg"] = "alex"
    """Network of LPIPS. Weights are downloaded by torchvision, or read from the safetensors file that the environment
    variable CDIT_LPIPS_BACKBONE (alex) or CDIT_LPIPS_VGG_BACKBONE (vgg) names."""
    max_time: NotNegative[float] = 0.5
    """Largest diffusion time at which it applies; at higher noise levels, the predicted clean frame is a blurred
    mean."""


@dataclass
class FlowConfig:
    """What the network of a rectified flow predicts, and how it is trained."""

    prediction: Quantity = "velocity"
    """What the network predicts: the clean frame (suits pixels), the velocity (suits latents) or the noise."""
    loss: Quantity = "velocity"
    """The quantity whose squared error is the loss; the prediction is converted to it."""
    time_distribution: Literal["uniform", "logit_normal"] = "logit_normal"
    """How diffusion times are drawn in training."""
    time_mean: float = 0.0
    """Mean of the logit of the diffusion time; larger is noisier."""
    time_std: NotNegative[float] = 1.0
    """Standard deviation of the logit of the diffusion time."""
    shift: Positive[float] = 1.0
    """Moves the times that are drawn towards noise, as sampler.shift moves those of sampling: t becomes
    shift·t / (1 + (shift - 1)·t), which adds ln(shift) to the logit. RAE (Zheng et al. 2025, arXiv 2510.11690) shifts
    both by √(C·h·w / 4096) for latents of shape (C, h, w)."""
    min_time: Positive[float] = 0.05
    """Conversions never divide by a t or 1 - t smaller than this; they are exact if both are larger."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """A perceptual loss in addition."""


@dataclass
class FewStepConfig:
    """How the average velocities of a shortcut or mean_flow are trained, besides the flow."""

    share: float = 0.25
    """Share of goals that train an interval; the others train the flow."""
    teacher_decay: float = 0.999
    """Decay per step of the running average of the network that targets come from: the half steps of a shortcut, the
    velocity of a mean_flow. 1: the initial network; 0: the network itself, without an average in memory."""
    derivative: Literal["difference", "forward"] = "difference"
    """How mean_flow computes the derivative along the flow: as the difference of two predictions, which smooths the
    network's dependence on diffusion time; or exactly, by forward-mode differentiation, which runs without compilation
    or fused attention and does not support networks with reprojection."""
    difference: Positive[float] = 0.02
    """How far the times of the two predictions lie from the current one."""


@dataclass
class DDPMConfig:
    """What the network of a DDPM predicts."""

    learn_variance: bool = True
    """Whether the network also predicts the variance of a reverse step, trained by the variational bound."""


@dataclass
class SelfRolloutConfig:
    """Training on the world's own rollouts of data.rollout frames, by the sampler of the config."""

    base: str = "flow"
    """The objective that is trained in addition: a flow."""
    weight: NotNegative[float] = 1.0
    """Weight of the squared error of the clean frames of a rollout."""


def sampled_as(description: Trained) -> str:
    """The objective whose samplers a model has: that of a self_rollout is its base."""
    return description.self_rollout.base if description.objective == "self_rollout" else description.objective


def check_sampler(objective: str, sampler: SamplerConfig) -> None:
    """Checks that an objective supports this sampler.

    Raises:
        UserError: it does not; the message lists the possible values.
    """
    if objective not in SCHEDULERS:  # user-defined: `WorldModel` checks its schedulers
        return
    possible = SCHEDULERS[objective]
    if sampler.scheduler not in possible:
        expected = f"expected one of {', '.join(possible)} for a {objective}"
        raise UserError(f"sampler.scheduler is {sampler.scheduler}, {expected}")
    if objective == "shortcut" and sampler.scheduler == "average":
        if sampler.steps not in (2**i for i in range(8)):
            raise UserError(f"sampler.steps is {sampler.steps}, expected 1, 2, 4, …, 128 for a shortcut with average")
        if sampler.shift != 1:
            raise UserError(f"sampler.shift is {sampler.shift}, expected 1 for a shortcut with average")
    if objective in ("ddpm", "regression") and sampler.shift != 1:
        raise UserError(f"sampler.shift is {sampler.shift}, expected 1 for a {objective}")
    if objective == "regression" and sampler.steps != 1:
        raise UserError(f"sampler.steps is {sampler.steps}, expected 1 for a regression")
    # A DDPM has integer timesteps: a step between equal ones divides by zero. The solvers' last step goes from 1 to 0.
    most = TIMESTEPS if sampler.scheduler == "ddpm" else TIMESTEPS - 1
    if objective == "ddpm" and sampler.steps > most:
        raise UserError(f"sampler.steps is {sampler.steps}, expected at most {most} with {sampler.scheduler}")
