"""Choosing an objective, and what goes with it."""

from typing import Literal

from cdit.common.errors import UserError
from cdit.diffusion.ddpm import DDPM, DDPMConfig
from cdit.diffusion.flow import Flow, FlowConfig
from cdit.diffusion.sampling import TIMESTEPS, SamplerConfig

ObjectiveName = Literal["flow", "ddpm"]
Objective = Flow | DDPM


def make_objective(name: ObjectiveName, flow: FlowConfig, ddpm: DDPMConfig) -> Objective:
    """The objective of that name, with its config of the two."""
    return Flow(flow) if name == "flow" else DDPM(ddpm)


def check_sampler(objective: ObjectiveName, sampler: SamplerConfig) -> None:
    """Checks that frames of an objective can be sampled so.

    Raises:
        UserError: they cannot; the message names what would do.
    """
    possible = {"flow": Flow, "ddpm": DDPM}[objective].schedulers
    if sampler.scheduler not in possible:
        expected = f"expected one of {', '.join(possible)} for a {objective}"
        raise UserError(f"sampler.scheduler is {sampler.scheduler}, {expected}")
    # A DDPM knows whole timesteps: a step that stays at one divides by zero. The solvers' last step leads from 1 to 0.
    most = TIMESTEPS if sampler.scheduler == "ddpm" else TIMESTEPS - 1
    if objective == "ddpm" and sampler.steps > most:
        raise UserError(f"sampler.steps is {sampler.steps}, expected at most {most} with {sampler.scheduler}")
