"""Training for a given time."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

BUDGET = ("--train_seconds", "12", "--probe.attention.samples", "0", "--probe.rollouts", "0")


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock takes a quarter of a second."""
    ticks = itertools.count(1000.0, 0.25)
    monkeypatch.setattr("cdit.training.durable.run.time", SimpleNamespace(perf_counter=lambda: next(ticks)))


def state(run: Path) -> dict:
    latest = (run / "checkpoints/latest").read_text().strip()
    return json.loads((run / "checkpoints" / latest / "state.json").read_text())


def test_a_run_ends_with_its_time_and_its_schedule_with_it(
    train: Callable[..., Path], rows: Callable[..., list[dict[str, float]]], tmp_path: Path
):
    """Whether it takes more steps than `steps`, which is 6, or fewer; in slices or at once."""
    options = (*BUDGET, "--optimizer.warmup_steps", "0", "--log_every", "1")
    whole = train(tmp_path / "whole", *options)
    assert 12 <= state(whole)["seconds"] < 13
    assert state(whole)["step"] > 6
    for slice_ends in (4, 8):
        pieces = train(tmp_path / "pieces", *options, "--resume", "auto", "--stop_at_seconds", str(slice_ends))
        assert slice_ends <= state(pieces)["seconds"] < slice_ends + 1
    train(tmp_path / "pieces", *options, "--resume", "auto")
    assert 12 <= state(pieces)["seconds"] < 13
    assert abs(state(pieces)["step"] - state(whole)["step"]) <= 3  # a step of each slice may be longer
    assert (pieces / "last/world_model.json").is_file()
    for run in (whole, pieces):
        rates = [row["train/learning_rate"] for row in rows(run, "train/learning_rate")]
        assert len(rates) == state(run)["step"]
        assert rates == sorted(rates, reverse=True)
        assert rates[0] > 0.9 * max(rates)
        assert rates[-1] < 0.1 * max(rates)
        middle = rates[len(rates) // 2]
        assert middle == pytest.approx(max(rates) / 2, rel=0.4)  # a cosine


def test_time_does_not_count_where_steps_do(train: Callable[..., Path], tmp_path: Path):
    run = train(tmp_path, "--stop_at", "1", "--probe.attention.samples", "0", "--probe.rollouts", "0")
    assert (state(run)["step"], state(run)["seconds"]) == (1, 0.0)
