"""Objectives (rectified flow, DDPM) and how frames are sampled with them."""

from cdit.common.lazy import lazy_names
from cdit.diffusion.config import TIMESTEPS, DDPMConfig, FlowConfig, ObjectiveName, SamplerConfig, check_sampler

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
__getattr__ = lazy_names(__name__, flow="Flow", ddpm="DDPM", objective="Objective make_objective")
