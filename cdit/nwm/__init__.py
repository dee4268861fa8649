"""Checkpoints of the published Navigation World Models: read as a CDiT, written back, `python -m cdit.nwm`."""

from cdit.nwm.checkpoint import load_checkpoint, save_checkpoint

__all__ = ["load_checkpoint", "save_checkpoint"]
