"""How the published recipe normalises actions and time shifts."""

from cdit.world_model import Units

FARTHEST = 128
"""Time shift in frames that the network sees as 1."""
LOWEST, HIGHEST = (-2.5, -4.0), (5.0, 4.0)
"""Displacements forward and to the left, in spacings, that map to -1 and 1. Nothing is clipped."""


def normalization(fps: float = 4.0, spacing: float | None = None) -> Units:
    """The published units: displacements mapped from `LOWEST`…`HIGHEST` spacings to -1…1, yaw in radians unchanged.

    Standing still is -1/3 forward, not 0.

    Args:
        fps: frames per second; 4 in the published recipe.
        spacing: metres between frames; None for a model of several datasets, each in its own units.
    """
    widths = [high - low for low, high in zip(LOWEST, HIGHEST, strict=True)]
    return Units(
        action_scale=(2 / widths[0], 2 / widths[1], 1.0),
        action_offset=(-2 * LOWEST[0] / widths[0] - 1, -2 * LOWEST[1] / widths[1] - 1, 0.0),
        time_scale=fps / FARTHEST,
        spacing=spacing,
    )
