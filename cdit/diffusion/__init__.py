"""Objectives (rectified flow, its few-step forms, DDPM) and how frames are sampled with them."""

from cdit.common.lazy import lazy_names
from cdit.diffusion.config import (
    TIMESTEPS,
    DDPMConfig,
    FewStepConfig,
    FlowConfig,
    SamplerConfig,
    SelfRolloutConfig,
    check_sampler,
)

__all__ = [
    "DDPM",
    "OBJECTIVES",
    "TIMESTEPS",
    "DDPMConfig",
    "FewStepConfig",
    "Flow",
    "FlowConfig",
    "MeanFlow",
    "Objective",
    "Regression",
    "SamplerConfig",
    "SelfRollout",
    "SelfRolloutConfig",
    "Shortcut",
    "check_sampler",
    "make_objective",
]
__getattr__ = lazy_names(
    __name__,
    flow="Flow",
    few_step="MeanFlow Shortcut",
    ddpm="DDPM",
    regression="Regression",
    self_rollout="SelfRollout",
    objective="OBJECTIVES Objective make_objective",
)
