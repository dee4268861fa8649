"""Motion between poses, as the model's actions express it: x forward, y left, yaw counter-clockwise."""

import numpy as np


def wrap_angle(angle: np.ndarray) -> np.ndarray:
    """Wraps angles in radians to [-π, π)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def local_motion(position: np.ndarray, yaw: np.ndarray, next_position: np.ndarray, next_yaw: np.ndarray) -> np.ndarray:
    """The motion from one pose to another, in the local frame of the first.

    Args:
        position: (..., 2) in metres, world coordinates.
        yaw: (...) in radians, counter-clockwise.
        next_position: (..., 2).
        next_yaw: (...).

    Returns:
        (..., 3): dx forward and dy left in metres, dyaw in radians in [-π, π).
    """
    dx, dy = np.moveaxis(next_position - position, -1, 0)
    forward = np.cos(yaw) * dx + np.sin(yaw) * dy
    left = np.cos(yaw) * dy - np.sin(yaw) * dx
    return np.stack([forward, left, wrap_angle(next_yaw - yaw)], axis=-1)


def compose(actions: np.ndarray) -> np.ndarray:
    """Composes steps, each in its own local frame, into motions from the start to the end of each step.

    Args:
        actions: (L, 3) dx, dy, dyaw of each step, in metres and radians.

    Returns:
        (L, 3) float32; the yaw is in [-π, π).
    """
    steps = np.asarray(actions, np.float64)
    yaw = np.cumsum(steps[:, 2])
    before = yaw - steps[:, 2]
    x = np.cumsum(np.cos(before) * steps[:, 0] - np.sin(before) * steps[:, 1])
    y = np.cumsum(np.sin(before) * steps[:, 0] + np.cos(before) * steps[:, 1])
    return np.stack((x, y, wrap_angle(yaw)), axis=1).astype(np.float32)
