"""summary.md: what the heads do, in words and small tables."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cdit.common.statistics import Estimate
from cdit.heads.findings import BestHead
from cdit.heads.glossary import type_sentences
from cdit.heads.statistics import HeadRow, type_counts
from cdit.heads.truth import SCORES


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(estimate: Estimate, digits: int = 3) -> str:
    """A mean with its interval."""
    if not np.isfinite(estimate.mean):
        return "–"
    text = f"{estimate.mean:.{digits}g}"
    if estimate.low is None:
        return text
    return f"{text} ({estimate.low:.{digits}g} … {estimate.high:.{digits}g})"


def about_samples(trajectories: Sequence[str], goals: int, times: Sequence[float]) -> str:
    """What the numbers are of."""
    count, names = len(trajectories), len(set(trajectories))
    text = f"{_number(count, 'sample', 'samples')} of {_number(names, 'trajectory', 'trajectories')}, "
    text += f"{_number(goals, 'goal', 'goals')} each, diffusion times {', '.join(f'{time:g}' for time in times)}. "
    if names > 1:
        return text + "In brackets: 95 % intervals, by bootstrap over trajectories."
    return text + "With one trajectory there are no intervals."


def types_section(title: str, rows: Sequence[HeadRow]) -> str:
    """How many heads of each layer are of each type, at each diffusion time, and what these types are."""
    times, layers = (sorted({getattr(row, name) for row in rows}) for name in ("time", "layer"))
    counts = type_counts(rows)

    def cell(layer: int, time: float) -> str:
        return ", ".join(f"{count} {name}" for name, count in counts[layer, time].most_common())

    lines = [[str(layer), *(cell(layer, time) for time in times)] for layer in layers]
    found = {row.type.name for row in rows}
    meanings = [f"- *{name}*: {sentence}" for name, sentence in type_sentences().items() if name in found]
    table = markdown(["layer", *(f"t = {time:g}" for time in times)], lines)
    return "\n".join([f"## Types of heads, {title}", "", table, "", *meanings])


def best_section(title: str, found: Sequence[BestHead], choosing: np.ndarray) -> str:
    """The best head at each thing."""
    lines = [
        [one.question, f"layer {one.layer}, head {one.head}, t = {one.time:g}", one.measure,
         f"{one.best.chosen_at:.3g}", shown(one.best.estimate)]
        for one in found
    ]  # fmt: skip
    note = (
        f"Chosen among all heads and times on {int(choosing.sum())} samples, reported on the {int((~choosing).sum())} "
        "others: what counts is the last column, the one before has the winner's luck in it."
    )
    header = ["which head …", "head", "measure", "where it was chosen", "on the other half"]
    return "\n".join([f"## Best heads, {title}", "", note, "", markdown(header, lines)])


def correspondence_section(scores: Mapping[str, Mapping[str, Estimate]], reported: int) -> str:
    """`SCORES` of heads and baselines by name, of the half of the samples that reports."""
    lines = [[name, *(shown(values[score]) for score in SCORES)] for name, values in scores.items()]
    note = (
        "For each target patch the true place of what it shows in each past frame is known from poses and map. Lift: "
        "attention there (neighbours included) over an even spread within each frame, 1 is chance. Share: attention "
        "there, over all past frames. Accuracy: how often the largest weight is there. Best heads are chosen by their "
        f"lift on the one half; all numbers are of the other half, {reported} samples."
    )
    header = ["", *(score.removeprefix("correspondence ") for score in SCORES)]
    return "\n".join(["## Do heads look where the same surface was?", "", note, "", markdown(header, lines)])


def _number(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"
