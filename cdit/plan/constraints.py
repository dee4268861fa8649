"""Constraints on plans: projections of the steps, and penalties on the path."""

from collections.abc import Callable

from torch import Tensor

Projection = Callable[[Tensor], Tensor]
"""Maps steps (…, H, 3) to steps that obey the constraint."""
Penalty = Callable[[Tensor], Tensor]
"""Maps a path (B, S, H, 3) in the frame at the start to an additional cost (B, S)."""

FORBIDDEN_COST = 1e3
"""Cost of each forbidden pose of a path; larger than any difference between costs."""
WALK_SHARE = 5 / 8
"""Fraction of the time spent walking if walking and turning are separate: five of eight steps, as in the NWM paper."""


def forward_first(actions: Tensor) -> Tensor:
    """Walks without turning, then turns on the spot: the other components of steps (…, H, 3) become zero."""
    walk = round(WALK_SHARE * actions.shape[-2])
    projected = actions.clone()
    projected[..., :walk, 2] = 0
    projected[..., walk:, :2] = 0
    return projected


def turn_first(actions: Tensor) -> Tensor:
    """Turns on the spot, then walks without turning."""
    turn = actions.shape[-2] - round(WALK_SHARE * actions.shape[-2])
    projected = actions.clone()
    projected[..., :turn, :2] = 0
    projected[..., turn:, 2] = 0
    return projected


PROJECTIONS: dict[str, Projection] = {"forward_first": forward_first, "turn_first": turn_first}


def staying_out(forbidden: Callable[[Tensor], Tensor]) -> Penalty:
    """A penalty on paths through forbidden places.

    Args:
        forbidden: positions (…, 2) in the frame at the start to (…) bool.
    """
    return lambda path: FORBIDDEN_COST * forbidden(path[..., :2]).to(path).sum(-1)
