"""Objectives (rectified flow, DDPM) and how frames are sampled with them."""

from cdit.diffusion.ddpm import DDPM, DDPMConfig
from cdit.diffusion.flow import Flow, FlowConfig
from cdit.diffusion.objective import Objective, ObjectiveName, check_sampler, make_objective
from cdit.diffusion.sampling import TIMESTEPS, SamplerConfig

__all__ = [
    "DDPM",
    "TIMESTEPS",
    "DDPMConfig",
    "Flow",
    "FlowConfig",
    "Objective",
    "ObjectiveName",
    "SamplerConfig",
    "check_sampler",
    "make_objective",
]
