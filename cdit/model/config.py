"""The size and the dialect of a CDiT, as a person writes them in a YAML file."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

PRESETS = {
    "tiny": {"hidden_size": 192, "depth": 6, "num_heads": 6},
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}


@dataclass
class ModelConfig:
    """A preset of the DiT family, with any field of it overridden."""

    preset: Literal["tiny", "S", "B", "L", "XL"] = "S"
    """Gives hidden_size, depth and num_heads where they are not given."""
    hidden_size: int | None = None
    """Width of a token."""
    depth: int | None = None
    """Number of blocks."""
    num_heads: int | None = None
    """Heads of each attention; must divide hidden_size."""
    patch_size: int = 2
    """Side of a patch, in pixels (pixel codec) or latent cells."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over hidden_size."""
    context_depth: int = 0
    """Encoder blocks over each past frame, paid once per frame and not per denoising step."""
    context_modulation: bool = False
    """Whether keys and values follow diffusion time and action (as published); they can then not be reused."""
    position: Literal["rotary", "learned"] = "rotary"
    """Axial rotary positions in both attentions, or a learned table with one entry per frame slot and patch."""
    steered_queries: bool = False
    """Whether the condition moves and scales the rotary coordinates at which each head of cross-attention looks."""
    context_norm: Literal["both", "keys", "none"] = "both"
    """What of the past frames' tokens is normalised before it is projected: keys and values, keys alone, or neither."""
    extra_kv: bool = False
    """Whether cross-attention has one learned extra key and value, a sink for patches with nothing to find."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head."""
    norm: Literal["pre", "post"] = "pre"
    """Norm before each branch, or after it (residual post-norm of Swin V2)."""
    output_channels: int = 0
    """Channels per pixel (or latent cell) of three 3×3 convolutions that follow the last linear map; 0: none."""
    dropout: float = 0.0
    """Share of each branch's output zeroed in training."""
    use_action: bool = True
    """Whether the model is conditioned on the action."""
    use_time_shift: bool = True
    """Whether the model is conditioned on how far ahead (or back) the target is."""
    extra_conditioners: dict[str, str] = field(default_factory=dict)
    """Further conditioners by name: each a registered one, or `my_module:Class` (see docs/extending.md)."""
    embedding_scale: float = 30.0
    """Factor on normalised action and time shift before their sinusoidal features (1 in the published network)."""
    init: Literal["native", "published"] = "native"
    """Initial weights; published: those of the NWM release, with small embeddings of diffusion time, action and time
    shift, and narrower queries, keys and values."""

    def arguments(self) -> dict[str, Any]:
        """The arguments of `CDiT` that this config settles: all but the frame's size and the context's length."""
        arguments = asdict(self)
        preset = PRESETS[arguments.pop("preset")]
        return arguments | {key: value if arguments[key] is None else arguments[key] for key, value in preset.items()}
