"""The network: CDiT, its blocks and embeddings, presets, and `python -m cdit.model describe`."""

from cdit.common.lazy import lazy_names
from cdit.model.config import PRESETS, ModelConfig

__all__ = ["PRESETS", "CDiT", "ContextCache", "ModelConfig"]
__getattr__ = lazy_names(__name__, cdit="CDiT ContextCache")
