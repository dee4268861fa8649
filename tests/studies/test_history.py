"""The log of a run, and how long its steps took, in closed form."""

import json
from pathlib import Path

import pytest
import yaml

from cdit.common.errors import UserError
from cdit.studies.history import History

SAMPLES = 8 * 4  # of a step


def log(run: Path, rows: list[dict], log_every: int = 10) -> History:
    run.mkdir(parents=True, exist_ok=True)
    config = {"batch_size": 8, "data": {"goals": 4}, "log_every": log_every}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return History(run)


def timed(*rows: tuple[int, float]) -> list[dict]:
    """Rows of training at steps with so many steps a second."""
    return [{"step": step, "train/samples_per_second": rate * SAMPLES} for step, rate in rows]


def test_seconds_add_up_over_rows_of_different_rates(tmp_path: Path):
    history = log(tmp_path, timed((10, 1.0), (20, 2.0), (30, 4.0), (35, 2.0)))
    assert [history.seconds(step) for step in (10, 20, 30, 35)] == [10.0, 15.0, 17.5, 20.0]
    assert history.steps_per_second == 2.0
    assert history.seconds(24) == 15.0 + 4 / 2.0  # a probe between two rows: at the median rate
    assert not history.is_finished


def test_a_branch_counts_the_steps_before_it(tmp_path: Path):
    history = log(tmp_path, timed((1010, 2.0), (1020, 2.0)))
    assert history.seconds(1020) == pytest.approx(1020 / 2.0)


def test_values_and_the_last_of_them(tmp_path: Path):
    rows = [*timed((10, 1.0)), {"step": 10, "x": 3.0}, {"step": 20, "x": None}, {"step": 30, "x": 1.5}]
    history = log(tmp_path, rows)
    assert history.values("x") == [(10, 3.0), (30, 1.5)]
    assert history.last("x") == 1.5
    with pytest.raises(UserError, match="no y yet"):
        history.last("y")


def test_a_folder_without_a_run(tmp_path: Path):
    with pytest.raises(UserError, match="expected a training run"):
        History(tmp_path)
    with pytest.raises(UserError, match="no row of training"):
        log(tmp_path, [{"step": 1, "x": 1.0}])
