"""Checkpoints of the published Navigation World Models: read as a CDiT, written back, `python -m cdit.nwm`."""
