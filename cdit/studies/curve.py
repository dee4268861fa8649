"""Quality against training time, of several recipes, and how much less time one needs for the quality of another.

The numbers are those of the probes that train.py logs; nothing is computed again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from cdit.common.errors import UserError
from cdit.common.output import finished_folder
from cdit.common.tables import markdown_table
from cdit.evaluate.metrics import HIGHER_IS_BETTER
from cdit.studies.config import CurveConfig
from cdit.studies.history import History

COLOURS = ("#6e7781", "#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989")


class Point(NamedTuple):
    """A number of one probe."""

    seconds: float
    """Training time."""
    value: float


class Reached(NamedTuple):
    """When a curve first reaches a level."""

    seconds: float
    at_most: bool
    """Whether its first point is already as good."""


Curves = dict[str, list[Point]]


def draw_curves(config: CurveConfig) -> None:
    """Writes curve.png and curve.md, and prints the latter.

    Raises:
        UserError: a folder holds no run, or the runs have no probes in common.
    """
    if len(config.curves) < 1 or not all(config.curves.values()):
        raise UserError(f"curves is {config.curves}, expected a name with one or more runs for each curve")
    reference = config.reference or next(iter(config.curves))
    if reference not in config.curves:
        raise UserError(f"reference is {reference!r}, expected one of {', '.join(config.curves)}")
    histories = {name: [History(run) for run in runs] for name, runs in config.curves.items()}
    offsets = [set(history.config["probe"]["offsets"]) for runs in histories.values() for history in runs]
    frames = config.frames or sorted(set.intersection(*offsets))
    if not frames:
        raise UserError("curves: the runs have no probe.offsets in common")
    found: dict[tuple[str, int], Curves] = {}
    last_frame: dict[tuple[str, int], float] = {}
    for metric in config.metrics:
        for ahead in frames:
            found[metric, ahead] = {
                name: points_of(runs, f"probe/{metric}/model/{ahead}_frames", config.points)
                for name, runs in histories.items()
            }
            name = f"probe/{metric}/copy_last/{ahead}_frames"
            last_frame[metric, ahead] = points_of(histories[reference][-1:], name, config.points)[-1].value
    text = report(found, last_frame, reference)
    with finished_folder(Path(config.out)) as folder:
        (folder / "curve.md").write_text(text)
        picture(found, last_frame).savefig(folder / "curve.png")
    print(f"{text}\ndone: {Path(config.out) / 'curve.png'} and curve.md")


def points_of(runs: Sequence[History], name: str, which: str) -> list[Point]:
    """The points of a curve by training time, from all its runs.

    Args:
        runs: of one recipe.
        name: of the number in metrics.jsonl.
        which: all probes, or only the final one of each run.

    Raises:
        UserError: a run has none.
    """
    points = []
    for run in runs:
        run.last(name)
        values = run.values(name)
        probe = run.config["probe"]
        if which == "final":
            values = values[-1:]
        elif run.is_finished and len(values) > 1 and probe["samples"] != probe["final_samples"]:
            values = values[:-1]  # of other windows than the rest
        points += [Point(run.seconds(step), value) for step, value in values]
    return sorted(points)


def reach(points: Sequence[Point], level: float, higher: bool) -> Reached | None:
    """When a curve first reaches a level, by linear interpolation between its points; None if it does not.

    Args:
        points: by time.
        level: of the metric.
        higher: whether higher is better.
    """
    sign = 1 if higher else -1
    for i, (seconds, value) in enumerate(points):
        if sign * value >= sign * level:
            if i == 0:
                return Reached(seconds, at_most=True)
            before = points[i - 1]
            share = (level - before.value) / (value - before.value)
            return Reached(before.seconds + share * (seconds - before.seconds), at_most=False)
    return None


def common_level(first: Sequence[Point], second: Sequence[Point], higher: bool) -> float:
    """The best level that both curves reach."""
    best, worst = (max, min) if higher else (min, max)
    return worst(best(point.value for point in points) for points in (first, second))


def report(found: Mapping[tuple[str, int], Curves], last_frame: Mapping[tuple[str, int], float], reference: str) -> str:
    """For each metric and horizon when each curve reaches the best level that it shares with the reference."""
    lines = []
    for (metric, ahead), curves in found.items():
        for name, points in curves.items():
            if name == reference:
                continue
            higher, digits = HIGHER_IS_BETTER[metric], 2 if metric == "psnr" else 3
            level = common_level(curves[reference], points, higher)
            theirs, ours = (reach(some, level, higher) for some in (curves[reference], points))
            # Only a bound on one of the times bounds the factor.
            bound = "" if theirs.at_most == ours.at_most else "at least " if ours.at_most else "at most "
            factor = "–" if theirs.at_most and ours.at_most else f"{bound}{theirs.seconds / ours.seconds:.1f}"
            times = [f"{'≤ ' if one.at_most else ''}{one.seconds / 60:.1f} min" for one in (theirs, ours)]
            shown = [f"{value:.{digits}f}" for value in (last_frame[metric, ahead], level)]
            lines.append([_title(metric, ahead), *shown, name, *times, factor])
    columns = ["", "last frame", "level", "recipe", reference, "recipe's time", "factor"]
    return (
        f"# Quality against training time\n\nTraining time that {reference} and each other recipe need for the best "
        f"level that both reach, interpolated between probes.\n\n{markdown_table(columns, lines)}"
    )


def picture(found: Mapping[tuple[str, int], Curves], last_frame: Mapping[tuple[str, int], float]) -> Figure:
    """Metrics down, horizons across; a line for each recipe, and one for the last frame as the prediction."""
    frames, metrics = sorted({ahead for _, ahead in found}), list(dict.fromkeys(metric for metric, _ in found))
    figure = Figure(figsize=(3.2 * len(frames) + 1.5, 3 * len(metrics)), dpi=100, layout="constrained")
    grid = figure.subplots(len(metrics), len(frames), squeeze=False)
    for row, metric in zip(grid, metrics, strict=True):
        for axes, ahead in zip(row, frames, strict=True):
            for colour, (name, points) in zip(COLOURS * len(found), found[metric, ahead].items(), strict=False):
                minutes = [point.seconds / 60 for point in points]
                axes.plot(minutes, [point.value for point in points], "o-", color=colour, markersize=3, label=name)
            axes.axhline(last_frame[metric, ahead], color="#1c1c22", linestyle=":", label="last context frame")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set(title=_title(metric, ahead), xlabel="training time (minutes)")
            axes.grid(alpha=0.3, which="both")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _title(metric: str, ahead: int) -> str:
    name = {"latents": "Latent MSE", "rank": "Rank of the truth"}.get(metric, metric.upper())
    return f"{name}, {ahead} frame{'' if ahead == 1 else 's'} ahead"
