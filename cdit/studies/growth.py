"""How heads learn to find where the same surface was: their correspondence at several checkpoints of a run."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

from cdit.common.errors import UserError
from cdit.common.output import finished_folder
from cdit.common.statistics import Estimate
from cdit.common.tables import markdown_table
from cdit.heads.choose import best_scores, mean_scores, split_halves
from cdit.heads.correspondence import SCORES, true_tokens
from cdit.heads.head_statistics import measure_heads
from cdit.heads.inspection import initial
from cdit.heads.measures import Layout
from cdit.heads.report import shown
from cdit.heads.sources import windows_source
from cdit.loading import load_world, spread, windows_for
from cdit.studies.config import GrowthConfig
from cdit.world_model import WorldModel


class Stage(NamedTuple):
    """The heads at one checkpoint."""

    step: int
    head: str
    """The best one, by its lift on one half of the samples."""
    best: list[Estimate]
    """Its `SCORES` on the other half."""
    mean: list[Estimate]
    """Those of all heads and diffusion times."""


def measure_growth(config: GrowthConfig) -> None:
    """Measures the initial weights and the checkpoints, and writes growth.md and growth.png.

    Raises:
        UserError: the run has no checkpoints, or the data no true places.
    """
    folders = checkpoints_of(Path(config.checkpoint))
    folders = [folders[i] for i in spread(list(range(len(folders))), config.checkpoints)]
    world = load_world(str(folders[-1]), config.device)
    named = f"split {config.split!r} of {config.data}"
    source = windows_source(windows_for(world, config), world.cdit.grid, config.offsets, config.samples, named)
    choosing = split_halves(source.trajectories, config.seed)
    if source.places is None or choosing is None:
        raise UserError(f"data is {config.data}: {source.unknown or 'too few samples to choose and report'}")
    truth = true_tokens(source.places, Layout(source.batch.context.shape[1], *world.cdit.grid))

    def stage(step: int, world: WorldModel) -> Stage:
        with torch.no_grad():
            statistics = measure_heads(
                world, source.batch, source.trajectories, config.times, config.seed, truth=truth, progress=True
            )
        best = best_scores(statistics, choosing)
        if best is None:
            raise UserError(f"data is {config.data}: nothing that the targets show is visible in the past frames")
        return Stage(step, best.head, best.scores, mean_scores(statistics, choosing))

    stages = [stage(0, initial(world, config.seed))]
    stages += [stage(step_of(folder), load_world(str(folder), config.device)) for folder in folders]
    text = report(stages, config.checkpoint, int((~choosing).sum()))
    with finished_folder(Path(config.out)) as out:
        (out / "growth.md").write_text(text)
        picture(stages).savefig(out / "growth.png")
    print(f"{text}\ndone: {Path(config.out) / 'growth.png'} and growth.md")


def checkpoints_of(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first.

    Raises:
        UserError: there are none.
    """
    found = [path for path in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{8}", path.name)]
    if not found:
        raise UserError(f"checkpoint is {run}, expected a training run with checkpoints (see checkpoint.keep_every)")
    return sorted(found)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def report(stages: Sequence[Stage], run: str, samples: int) -> str:
    """A table of the stages."""
    names = [score.removeprefix("correspondence ") for score in SCORES]
    columns = ["step", "best head", *names, f"{names[-1]}, mean of all heads"]
    lines = [[str(stage.step), stage.head, *map(shown, stage.best), shown(stage.mean[-1])] for stage in stages]
    return (
        f"# Heads of {run} over training\n\nThe best head is chosen at each step, by its lift on one half of the "
        f"samples; numbers are of the other half, {samples} samples, with 95 % intervals over trajectories. Lift, "
        f"share and accuracy are defined in docs/attention.md.\n\n{markdown_table(columns, lines, left=2)}"
    )


def picture(stages: Sequence[Stage]) -> Figure:
    """Accuracy of the best head, with its interval, and of all heads over the steps."""
    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    axes, steps = figure.subplots(), [stage.step for stage in stages]
    for name, colour in (("best", "#0969da"), ("mean", "#6e7781")):
        accuracy = [getattr(stage, name)[-1] for stage in stages]
        label = {"best": "best head", "mean": "mean of all heads"}[name]
        axes.plot(steps, [one.mean for one in accuracy], "o-", color=colour, markersize=4, label=label)
        if accuracy[0].low is not None:
            low, high = [one.low for one in accuracy], [one.high for one in accuracy]
            axes.fill_between(steps, low, high, color=colour, alpha=0.15)
    axes.set(xlabel="training step", ylabel="correspondence accuracy", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
