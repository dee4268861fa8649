"""Small networks of every dialect, and numbers to feed them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cdit.model import CDiT

BASE = {
    "image_size": (4, 6),
    "in_channels": 2,
    "max_context": 3,
    "patch_size": 2,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
}
DIALECTS: dict[str, dict[str, Any]] = {
    "native": {},
    "encoder": {"context_depth": 2, "qk_norm": True, "extra_kv": True},
    "post": {"norm": "post", "mlp_ratio": 2.5},
    "nwm": {
        "position": "learned",
        "context_modulation": True,
        "extra_kv": True,
        "learn_variance": True,
        "embedding_scale": 1.0,
    },
    "modulated_rotary": {"context_modulation": True, "context_depth": 1},
    "learned_cached": {"position": "learned", "context_depth": 1, "norm": "post"},
    "time_only": {"use_action": False, "qk_norm": True},
    "action_only": {"use_time_shift": False},
    "steered": {"steered_queries": True},
    "steered_sink": {"steered_queries": True, "extra_kv": True, "qk_norm": True},
    "keys_norm": {"context_norm": "keys", "context_depth": 1},
    "no_norm": {"context_norm": "none"},
    "noisy": {"context_noise": 0.5, "context_depth": 1, "extra_kv": True},
    "convolutions": {"output_channels": 5, "learn_variance": True},
    "levers": {"steered_queries": True, "context_norm": "keys", "output_channels": 5, "extra_kv": True, "norm": "post"},
    "wide": {"wide_head_depth": 2, "wide_head_width": 48, "output_channels": 3, "qk_norm": True},
    "bilinear": {"output_channels": 3, "reprojection": True, "resampling": "bilinear"},
    "reprojection": {"output_channels": 5, "reprojection": True, "place_embedding": True, "focal": (1.3, 0.8)},
    "modulated_levers": {
        "steered_queries": True,
        "context_norm": "none",
        "output_channels": 5,
        "context_modulation": True,
    },
}


def build(dialect: str, seed: int = 0, **changes: Any) -> CDiT:
    """A network with every parameter random, those that start at zero too, which would hide mistakes."""
    torch.manual_seed(seed)
    model = CDiT(**(BASE | DIALECTS[dialect] | changes)).eval()
    for p in model.parameters():
        nn.init.normal_(p, mean=1.0 if p.ndim == 1 and (p == 1).all() else 0.0, std=0.15)
    return model


def call(network: Callable[..., Tensor], action_mask: Tensor | None = None, **inputs: Any) -> Tensor:
    """The network's output for inputs as `batch` and `masks` make them; conditions that are None are left out."""
    action = inputs.pop("action")
    condition = {
        "action": action,
        "motion": action,
        "action_known": action_mask,
        "time_shift": inputs.pop("time_shift"),
    }
    return network(**inputs, condition={name: x for name, x in condition.items() if x is not None})


def batch(
    contexts: int = 2, goals: int = 3, frames: int = 3, dtype: torch.dtype = torch.float32, seed: int = 1
) -> dict[str, Tensor]:
    """Arguments of `call`; times are kept small so that sines of them are precise in float32."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "sample": draw(contexts, goals, 2, 4, 6),
        "timestep": 10 * draw(contexts, goals).abs(),
        "action": draw(contexts, goals, 3),
        "time_shift": 0.3 * draw(contexts, goals),
        "context": draw(contexts, frames, 2, 4, 6),
    }


def masks(contexts: int = 2, goals: int = 3, frames: int = 3) -> dict[str, Tensor]:
    """Every second context lacks its oldest frames but the last; every third goal's action is unknown."""
    context_mask = torch.ones(contexts, frames, dtype=torch.bool)
    context_mask[1::2, :-1] = False
    action_mask = (torch.arange(contexts * goals) % 3 != 1).view(contexts, goals)
    return {"context_mask": context_mask, "action_mask": action_mask}
