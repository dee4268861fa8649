"""The size and the dialect of a CDiT, as a section of a YAML config. Imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cdit.common.limits import NotNegative, Positive, Share

PRESETS = {
    "tiny": {"hidden_size": 192, "depth": 6, "num_heads": 6},
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}


@dataclass
class ModelConfig:
    """A preset of the DiT family, any field of which can be overridden."""

    preset: Literal["tiny", "S", "B", "L", "XL"] = "S"
    """Sets hidden_size, depth and num_heads unless they are given."""
    hidden_size: Positive[int] | None = None
    """Width of a token."""
    depth: Positive[int] | None = None
    """Number of blocks."""
    num_heads: Positive[int] | None = None
    """Heads of each attention; must divide hidden_size."""
    patch_size: Positive[int] = 2
    """Side of a patch, in pixels (pixel codec) or latent cells."""
    mlp_ratio: Positive[float] = 4.0
    """Hidden width of the MLP over hidden_size."""
    context_depth: NotNegative[int] = 0
    """Number of encoder blocks over each past frame, computed once per frame, not at each denoising step."""
    context_modulation: bool = False
    """Whether keys and values depend on diffusion time and action (as published), so that they cannot be reused."""
    position: Literal["rotary", "learned"] = "rotary"
    """Axial rotary positions in both attentions, or a learned table with one entry per frame slot and patch."""
    steered_queries: bool = False
    """Whether the condition shifts and scales the rotary coordinates at which each head of cross-attention attends."""
    context_norm: Literal["both", "keys", "none"] = "both"
    """Whether tokens of past frames are normalised before projection: for keys and values, keys only, or neither."""
    context_noise: NotNegative[float] = 0.0
    """Largest standard deviation of the noise that is added to past frames in training. Each frame gets a level up to
    it, on which the network is conditioned. Rollouts can then treat their own frames as slightly noisy (see
    sampler.context_noise); 0: off. About 0.3 for pixels, 0.7 for latents."""
    extra_kv: bool = False
    """Whether cross-attention has one learned extra key and value, a sink for patches that match nothing."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head."""
    norm: Literal["pre", "post"] = "pre"
    """Norm before each branch, or after it (residual post-norm of Swin V2)."""
    output_channels: NotNegative[int] = 0
    """Channels per pixel (or latent cell) of three 3×3 convolutions after the last linear map; 0: none."""
    wide_head_depth: NotNegative[int] = 0
    """Number of blocks of a wide head, which predicts the output from the noisy frame and the tokens of the network, so
    that a narrow network can denoise tokens of many channels; 0: none."""
    wide_head_width: Positive[int] = 2048
    """Width of a token in the wide head, whose attention heads are as wide as those of the network."""
    place_embedding: bool = False
    """Whether tokens of all frames get a learned embedding of their patch, because rotary positions encode only
    differences."""
    reprojection: bool = False
    """Whether the network also predicts the inverse depth of each pixel, reprojects the last past frame to the target's
    pose with it, and blends it with what it generates. Needs output_channels, clean predictions, actions, and the
    camera of the dataset."""
    resampling: Literal["bilinear", "bicubic"] = "bicubic"
    """How reprojection interpolates the past frame. Rollouts resample at every frame, where bicubic stays sharper."""
    dropout: Share = 0.0
    """Probability of zeroing an output of a branch in training."""
    use_action: bool = True
    """Whether the model is conditioned on the action."""
    use_time_shift: bool = True
    """Whether the model is conditioned on the time shift to the target."""
    extra_conditioners: dict[str, str] = field(default_factory=dict)
    """Further conditioners by name: each a registered one, or `my_module:Class` (see docs/extending.md)."""
    embedding_scale: float = 30.0
    """Factor on normalised action and time shift before their sinusoidal features (1 in the published network)."""
    init: Literal["native", "published"] = "native"
    """Initial weights; published: those of the NWM release, with small embeddings of diffusion time, action and time
    shift, and narrower queries, keys and values."""

    def arguments(self, conditioners: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The arguments of `CDiT` that this config determines: all but frame size, channels and context length.

        Args:
            conditioners: further ones that the objective needs.
        """
        arguments = asdict(self)
        arguments["extra_conditioners"] |= conditioners or {}
        preset = PRESETS[arguments.pop("preset")]
        return arguments | {key: value if arguments[key] is None else arguments[key] for key, value in preset.items()}
