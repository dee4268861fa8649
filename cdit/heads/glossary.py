"""What measures mean, in a sentence each, and types of heads with the thresholds that define them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

MEASURES: Mapping[str, str] = {
    "entropy": "How spread out a patch's attention is, in nats; 0 if it is on one token.",
    "effective tokens": "exp(entropy): the number of tokens that, with equal weights, would have this entropy.",
    "effective share": "Effective tokens divided by the number of visible tokens; 1 is an even spread.",
    "score range": "Largest minus smallest score before the softmax, in nats. Steady growth is a bad sign.",
    "distance": "Mean distance on the grid between a patch and the tokens it attends to, in patches.",
    "same place": "Share of attention on the patch's own place in the past frames.",
    "edge lift": "Attention on places that show edges, relative to what those places get on average: 1 is chance.",
    "mass extra": "Share of attention on the extra key, which shows nothing: an attention sink.",
    "correspondence lift": "Attention on the true place of what the patch shows (and its 8 neighbours), relative to an "
    "even spread within each frame: 1 is chance.",
    "correspondence share": "Share of attention on true places and their neighbours, over patches visible in the past.",
    "correspondence accuracy": "How often the largest weight is on a true place or a neighbour of it.",
    "offset rows": "Rows (down) of the offset from the patch that gets the most attention.",
    "offset columns": "Columns (right) of the offset from the patch that gets the most attention.",
    "offset share": "Share of the attention on past frames that this offset gets.",
    "turning slope": "Columns by which attention in the newest frame moves per radian that the camera turns left.",
    "turning correlation": "How well turns explain these moves; -1 if attention moves exactly as the picture does.",
    "walking slope": "Expansion of attention in the newest frame per metre that the camera moves forward.",
    "walking correlation": "How well steps explain this expansion; -1 if attention contracts as the picture does.",
    "loss rise": "Increase of the denoising loss without this head.",
    "contribution": "Norm of the head's output divided by the norm of the output of all heads of the layer.",
    "LPIPS rise": "Increase of the LPIPS between sampled and true frames without this head.",
}
"""By name, except `mass frame …` and names that begin with `moved`."""


class Rule(NamedTuple):
    """A type of heads: those with `sign` · `measure` ≥ `threshold`."""

    name: str
    measure: str
    sign: int
    threshold: float
    meaning: str


RULES = (
    Rule("sink", "mass extra", 1, 0.5, "At least {:g} of its attention is on the extra key, which shows nothing."),
    Rule("same place", "offset share", 1, 0.5, "At least {:g} of its attention is on the patch's own place."),
    Rule("fixed offset", "offset share", 1, 0.5, "At least {:g} of its attention is at one offset from the patch."),
    Rule("copy", "correspondence lift", 1, 4, "It finds what the patch shows wherever it was: at least {:g} × chance."),
    Rule("turning", "turning correlation", -1, 0.5,
         "Its attention moves with turns as the picture does: correlation -{:g} or below."),
    Rule("walking", "walking correlation", -1, 0.5,
         "Its attention contracts with steps forward as the picture does: correlation -{:g} or below."),
    Rule("edge", "edge lift", 1, 1.5, "It attends to edges: at least {:g} × what their places get on average."),
    Rule("newest frame", "mass frame", 1, 0.8, "At least {:g} of its attention is on the newest frame."),
    Rule("oldest frame", "mass frame", 1, 0.8, "At least {:g} of its attention is on the oldest frame."),
    Rule("one frame", "mass frame", 1, 0.8, "At least {:g} of its attention is on one frame between these two."),
    Rule("broad", "effective share", 1, 0.5, "It averages over at least {:g} of the visible tokens."),
)  # fmt: skip
"""In this order; the first type that applies is the head's. `mass frame` is the largest mass on a past frame."""

MIXED = "mixed"
"""The type of a head to which no rule applies."""


@dataclass(frozen=True)
class HeadType:
    """A head's type, and the measure that decided it, such as `mass extra 0.62 ≥ 0.5`."""

    name: str
    reason: str


def head_type(measures: Mapping[str, float]) -> HeadType:
    """The type of a head with these measures.

    A rule does not apply if its measure is missing or NaN. With fewer than two past frames, as in self-attention, the
    types of frames do not apply.
    """
    frames = [name for name in measures if name.startswith("mass frame ")]  # oldest first
    frame = max(frames, key=measures.__getitem__) if len(frames) > 1 else ""
    frame_type = {frames[0]: "oldest frame", frames[-1]: "newest frame"}.get(frame, "one frame") if frames else ""
    own_place = (measures.get("offset rows"), measures.get("offset columns")) == (0, 0)
    excluded = {"fixed offset" if own_place else "same place", "newest frame", "oldest frame", "one frame"}
    for name, measure, sign, threshold, _ in RULES:
        if name in excluded - {frame_type}:
            continue
        measure = frame if measure == "mass frame" else measure
        value = measures.get(measure)
        if value is not None and sign * value >= threshold:
            return HeadType(name, f"{measure} {value:.2f} {'≥' if sign > 0 else '≤'} {sign * threshold:g}")
    return HeadType(MIXED, "no threshold reached")


def explain_types(types: Iterable[str]) -> dict[str, str]:
    """A sentence for each of these types."""
    known = {rule.name: rule.meaning.format(rule.threshold) for rule in RULES}
    known[MIXED] = "No other type applies."
    found = set(types)
    return {name: sentence for name, sentence in known.items() if name in found}


def explain_measures(measures: Iterable[str]) -> dict[str, str]:
    """A sentence for each of these measures; one for all that are value-weighted, under `moved …`."""
    found, moved = {}, False
    for name in measures:
        if name.startswith("moved "):
            moved = True
        elif name.startswith("mass frame "):
            found[name] = "Share of attention on this past frame; 0 is the newest."
        else:
            found[name] = MEASURES[name]
    if moved:
        found["moved …"] = (
            "The same measure with each weight multiplied by the norm of its token's value after the output matrix: a "
            "head can attend to tokens from which it moves nothing."
        )
    return found
