"""Objectives (rectified flow, DDPM) and how frames are sampled with them."""

from cdit.common.lazy import lazy_names
from cdit.diffusion.config import TIMESTEPS, DDPMConfig, FlowConfig, SamplerConfig, check_sampler

__all__ = [
    "DDPM",
    "OBJECTIVES",
    "TIMESTEPS",
    "DDPMConfig",
    "Flow",
    "FlowConfig",
    "Objective",
    "SamplerConfig",
    "check_sampler",
    "make_objective",
]
__getattr__ = lazy_names(__name__, flow="Flow", ddpm="DDPM", objective="OBJECTIVES Objective make_objective")
