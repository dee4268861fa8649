"""A name for what a head does, by stated thresholds on its measures."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TypeThresholds:
    """From where on a head gets a type's name. Types are asked in this order; the first that holds is the head's."""

    sink: float = 0.5
    """Most of the attention rests on the extra key: its share."""
    same_place: float = 0.5
    """It looks straight back: the share of offset (0, 0), where that is the preferred offset."""
    fixed_offset: float = 0.5
    """It always looks to the same side: the share of the preferred offset, where that is another."""
    copy: float = 4.0
    """It finds, wherever it has moved to, what the target patch shows: attention on true places over an even spread."""
    turning: float = 0.5
    """What it looks at moves with turns as the picture does: minus the correlation of its columns with dyaw."""
    walking: float = 0.5
    """What it looks at closes in with steps forward as the picture does: minus the correlation of its divergence with
    dx."""
    edge: float = 1.5
    """It looks at edges: its share of edge patches over chance."""
    one_frame: float = 0.8
    """It looks at one past frame: the share of that frame."""
    broad: float = 0.5
    """It averages: its effective number of tokens over those that can be seen."""


@dataclass(frozen=True)
class HeadType:
    """A head's type, and why."""

    name: str
    """The threshold's, in words; `newest frame`, `oldest frame` or `one frame`; or `mixed` where none holds."""
    reason: str
    """The measure that decided, such as `mass extra 0.62 ≥ 0.5`."""


def head_type(measures: Mapping[str, float], thresholds: TypeThresholds | None = None) -> HeadType:
    """The type of a head with these measures.

    Args:
        measures: by name, as in `HeadRow.numbers`; a type whose measure is missing or NaN does not hold. With one past
            frame only, or none as in self-attention, the types of frames do not apply.
        thresholds: by default those of `TypeThresholds`.
    """
    limits = thresholds or TypeThresholds()
    frames = [name for name in measures if name.startswith("mass frame ")]  # oldest first
    frame = max(frames, key=measures.__getitem__) if len(frames) > 1 else ""
    one_frame = {frames[0]: "oldest frame", frames[-1]: "newest frame"}.get(frame, "one frame") if frames else ""
    straight = (measures.get("offset rows"), measures.get("offset columns")) == (0, 0)
    rules = [
        ("sink", "mass extra", 1, limits.sink),
        ("same place" if straight else "fixed offset", "offset share", 1,
         limits.same_place if straight else limits.fixed_offset),
        ("copy", "correspondence lift", 1, limits.copy),
        ("turning", "turning correlation", -1, limits.turning),
        ("walking", "walking correlation", -1, limits.walking),
        ("edge", "edge lift", 1, limits.edge),
        (one_frame, frame, 1, limits.one_frame),
        ("broad", "effective share", 1, limits.broad),
    ]  # fmt: skip
    for name, measure, sign, limit in rules:
        value = measures.get(measure)
        if value is not None and sign * value >= limit:
            return HeadType(name, f"{measure} {value:.2f} {'≥' if sign > 0 else '≤'} {sign * limit:g}")
    return HeadType("mixed", "no threshold reached")
