"""What measures and types mean, a sentence each, for the page and for summaries."""

from collections.abc import Iterable, Mapping

from cdit.heads.head_types import TypeThresholds

MEASURES: Mapping[str, str] = {
    "entropy": "How spread out a patch's attention is, in nats; 0 where it is on one token.",
    "effective tokens": "As many tokens, looked at evenly, would have this entropy.",
    "effective share": "Effective tokens over the tokens that can be seen: 1 is an even spread.",
    "score range": "Largest less smallest score before the softmax, in nats; growing on and on, it is a bad sign.",
    "distance": "Mean distance on the grid between a patch and what it looks at, in patches.",
    "same place": "Share of attention on the patch's own place in the frames it looks at.",
    "edge lift": "Attention on places with edges now, over what such places get by habit: 1 is chance.",
    "mass extra": "Share of attention on the extra key, which shows nothing: a sink.",
    "correspondence lift": "Attention on the true place of what the patch shows (and its 8 neighbours), over an even "
    "spread within each frame: 1 is chance.",
    "correspondence share": "Share of attention on true places and neighbours, of patches that a past frame shows.",
    "correspondence accuracy": "How often the largest weight is on a true place or its neighbours.",
    "offset rows": "Rows down of the offset, from the patch to what it looks at, that gets most attention.",
    "offset columns": "Columns right of the offset that gets most attention.",
    "offset share": "Share of attention on the past frames that this one offset gets.",
    "turning slope": "Columns by which the gaze in the newest frame moves per radian that the camera turns left.",
    "turning correlation": "How well turns explain it; -1 where the gaze moves against each turn, as the picture did.",
    "walking slope": "Expansion of the gaze in the newest frame per metre that the camera walks forward.",
    "walking correlation": "How well steps explain it; -1 where the gaze closes in with each, as the picture did.",
    "loss rise": "How much the denoising loss rises without this head.",
    "contribution": "Size of what the head adds over the size of what all heads of the layer add together.",
    "LPIPS rise": "How much farther, by LPIPS, sampled frames are from the true ones without this head.",
}
"""By name, but for `mass frame …` and what begins with `moved`."""


def explain(measures: Iterable[str], types: Iterable[str]) -> dict[str, str]:
    """Sentences by name of types and measures, types first."""
    found = {name: sentence for name, sentence in type_sentences().items() if name in set(types)}
    moved = False
    for name in measures:
        if name.startswith("moved "):
            moved = True
        elif name.startswith("mass frame "):
            found[name] = "Share of attention on this past frame; 0 is the newest."
        else:
            found[name] = MEASURES[name]
    if moved:
        found["moved …"] = (
            "The same measure with each weight multiplied by the length of what is moved (the value through the "
            "output matrix): a head may look at what it then adds nothing of."
        )
    return found


def type_sentences(thresholds: TypeThresholds | None = None) -> dict[str, str]:
    """What each type of `head_type` says of a head, with its threshold."""
    limits = thresholds or TypeThresholds()
    return {
        "sink": f"At least {limits.sink:g} of its attention rests on the extra key, which shows nothing.",
        "same place": f"It looks straight back: at least {limits.same_place:g} at its own place.",
        "fixed offset": f"It always looks to the same side: at least {limits.fixed_offset:g} at one offset.",
        "copy": f"It finds what the patch shows wherever it was: at least {limits.copy:g} times chance.",
        "turning": f"Its gaze moves with turns as the picture does: correlation at least {limits.turning:g}.",
        "walking": f"Its gaze closes in with steps forward as the picture: correlation at least {limits.walking:g}.",
        "edge": f"It looks at edges: at least {limits.edge:g} times what their places get by habit.",
        "newest frame": f"At least {limits.one_frame:g} of its attention is on the newest frame.",
        "oldest frame": f"At least {limits.one_frame:g} of its attention is on the oldest frame.",
        "one frame": f"At least {limits.one_frame:g} of its attention is on one frame between these two.",
        "broad": f"It averages: over at least {limits.broad:g} of the tokens that can be seen.",
        "mixed": "None of the thresholds of the other types is reached.",
    }
