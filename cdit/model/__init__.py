"""The network: CDiT, its blocks and embeddings, presets, and `python -m cdit.model describe`."""

from cdit.model.cdit import CDiT, ContextCache
from cdit.model.config import PRESETS, ModelConfig

__all__ = ["PRESETS", "CDiT", "ContextCache", "ModelConfig"]
