"""Checkpoints of the published Navigation World Models: read as a CDiT, written back, `python -m cdit.nwm`."""

from cdit.nwm.checkpoint import load_checkpoint, save_checkpoint
from cdit.nwm.normalization import normalization
from cdit.nwm.world import published_world

__all__ = ["load_checkpoint", "normalization", "published_world", "save_checkpoint"]
