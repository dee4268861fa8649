"""Heads over training: which checkpoints are measured, and what is reported."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cdit.common.errors import UserError
from cdit.common.statistics import Estimate
from cdit.studies import growth
from cdit.studies.config import GrowthConfig
from cdit.studies.growth import Stage, checkpoints_of, measure_growth, picture, report
from cdit.world_model import WorldModel


def test_only_complete_checkpoints_count(tmp_path: Path):
    for name in ("step_00000200", "step_00000100", "step_00000050.damaged", ".step_00000300.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step_00000100", "step_00000200"]
    with pytest.raises(UserError, match="with checkpoints"):
        checkpoints_of(tmp_path / "checkpoints")


def test_the_stages_are_told_step_by_step():
    def scores(*values: float) -> list[Estimate]:
        return [Estimate(value, value - 0.1, value + 0.1) for value in values]

    stages = [
        Stage(0, "L0H1", scores(1, 0.1, 0.2), scores(1, 0.1, 0.1)),
        Stage(500, "L2H0", scores(6, 0.7, 0.9), scores(3, 0.4, 0.5)),
    ]
    text = report(stages, "runs/maze", 16)
    assert "| 0 | L0H1 | 1 (0.9 … 1.1) | 0.1 (0 … 0.2) | 0.2 (0.1 … 0.3) | 0.1 (0 … 0.2) |" in text
    assert "| 500 | L2H0 | 6 (5.9 … 6.1) |" in text
    assert picture(stages).axes[0].lines[0].get_ydata() == pytest.approx([0.2, 0.9])


@pytest.mark.slow
def test_every_stage_is_measured_on_the_same_samples(
    world: Callable[..., WorldModel], walks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The walks have no map: patches are said to have stayed at their places. All checkpoints hold one network."""
    for step in (1, 2, 3, 4):
        (tmp_path / f"run/checkpoints/step_{step:08d}").mkdir(parents=True)
    found, trained = growth.windows_source, world()

    def still(dataset, grid, offsets, *others):
        source = found(dataset, grid, offsets, *others)
        corners = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])) + 0.5
        shape = (len(source.batch), len(offsets), len(corners), source.batch.context.shape[1], 2)
        return replace(source, places=corners[:, None].expand(shape))

    monkeypatch.setattr(growth, "windows_source", still)
    monkeypatch.setattr(growth, "load_world", lambda folder, device: trained)
    config = GrowthConfig(checkpoint=str(tmp_path / "run"), data=str(walks), out=str(tmp_path / "out"), checkpoints=2,
                          samples=6, offsets=[1], times=[0.5])  # fmt: skip
    measure_growth(config)
    lines = (tmp_path / "out/growth.md").read_text().splitlines()
    rows = [line.split(" | ", 1) for line in lines if line.startswith("| ")][2:]
    assert [step.strip("| ") for step, _ in rows] == ["0", "1", "3"]
    assert rows[1][1] == rows[2][1] != rows[0][1]
    assert (tmp_path / "out/growth.png").is_file()
