"""Choosing an objective."""

from cdit.diffusion.config import DDPMConfig, FlowConfig, ObjectiveName
from cdit.diffusion.ddpm import DDPM
from cdit.diffusion.flow import Flow

Objective = Flow | DDPM


def make_objective(name: ObjectiveName, flow: FlowConfig, ddpm: DDPMConfig) -> Objective:
    """The objective of that name, with its config of the two."""
    return Flow(flow) if name == "flow" else DDPM(ddpm)
