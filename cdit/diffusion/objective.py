"""Choosing an objective, and what goes with it."""

from typing import Literal

from cdit.diffusion.ddpm import DDPM, DDPMConfig
from cdit.diffusion.flow import Flow, FlowConfig
from cdit.errors import UserError

ObjectiveName = Literal["flow", "ddpm"]
Objective = Flow | DDPM


def make_objective(name: ObjectiveName, flow: FlowConfig, ddpm: DDPMConfig) -> Objective:
    """The objective of that name, with its config of the two."""
    return Flow(flow) if name == "flow" else DDPM(ddpm)


def check_scheduler(objective: ObjectiveName, scheduler: str) -> None:
    """Checks that frames of an objective can be sampled so.

    Raises:
        UserError: they cannot; the message names those that can.
    """
    possible = {"flow": Flow, "ddpm": DDPM}[objective].schedulers
    if scheduler not in possible:
        raise UserError(f"sampler.scheduler is {scheduler}, expected one of {', '.join(possible)} for a {objective}")
