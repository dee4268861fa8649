"""The codec section of a config. Imports no torch."""

from dataclasses import dataclass

DEFAULT_WEIGHTS = {"kl": "stabilityai/sd-vae-ft-ema", "tiny": "madebyollin/taesd"}


@dataclass
class CodecConfig:
    """What the network denoises."""

    kind: str = "pixels"
    """Raw pixels (pixels); the latents of diffusers' AutoencoderKL (kl) or AutoencoderTiny (tiny); or a codec of your
    own, `my_module:Class` (see docs/extending.md)."""
    name: str | None = None
    """Hub name or local folder of the codec's weights; by default stabilityai/sd-vae-ft-ema for kl and
    madebyollin/taesd for tiny."""

    @property
    def weights(self) -> str:
        """The name, or that of the kind's default weights."""
        return self.name or DEFAULT_WEIGHTS.get(self.kind, "")
