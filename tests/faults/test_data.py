"""Frames that go missing or bad while a run trains, and loader workers that are killed."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from harness import Table, Trainer, differing_bits, survive

NO_CACHE = ("--data.cache_gb", "0")
FRAME = "b/9.jpg"


@pytest.fixture
def data(trainer: Trainer, tmp_path: Path) -> Path:
    """The dataset, to be spoilt."""
    folder = yaml.safe_load(trainer.config.read_text())["data"]["folder"]
    return shutil.copytree(folder, tmp_path / "data")


def spoil(how: str) -> Callable[[Path], str]:
    commands = {
        "deleted": "rm {0}",
        "cut short": "truncate -s 100 {0}",
        "overwritten": "head -c 600 /dev/zero > {0}",
    }
    return lambda frame: commands[how].format(frame)


@pytest.mark.parametrize(
    ("how", "workers"),
    [
        ("deleted", 0),
        pytest.param("cut short", 2, marks=pytest.mark.faults("all")),
        pytest.param("overwritten", 0, marks=pytest.mark.faults("all")),
        pytest.param("deleted", 2, marks=pytest.mark.faults("all")),
    ],
)
def test_the_run_stops_at_a_bad_frame(
    trainer: Trainer, table: Table, data: Path, tmp_path: Path, how: str, workers: int
):
    frame, kept = data / FRAME, tmp_path / "kept.jpg"
    shutil.copy(frame, kept)
    survive(
        trainer,
        table,
        f"frame {how}: stop",
        tmp_path,
        *("--data.folder", data, *NO_CACHE, "--data.workers", workers),
        faults=[{"act": "shell", "argument": spoil(how)(frame), "phase": "step", "entry": 2}],
        code=2,
        says=str(frame),
        repair=lambda: shutil.copy(kept, frame),
    )


@pytest.mark.parametrize("how", ["cut short", pytest.param("deleted", marks=pytest.mark.faults("all"))])
def test_the_run_leaves_out_a_bad_frame(trainer: Trainer, table: Table, data: Path, tmp_path: Path, how: str):
    """Counted and named; a run that is killed and resumed equals an uninterrupted one that skips the same samples."""
    frame = data / FRAME
    arguments = ("--data.folder", data, *NO_CACHE, "--data.on_error", "skip")
    fault = {"act": "shell", "argument": spoil(how)(frame), "phase": "step", "entry": 4}
    kill = {"act": "kill", "phase": "step", "entry": 9}
    sound = tmp_path / "kept.jpg"
    shutil.copy(frame, sound)
    undisturbed = trainer.run(tmp_path / "whole", *arguments, faults=[fault])
    assert undisturbed.code == 0, undisturbed.printed
    shutil.copy(sound, frame)
    name = f"frame {how}: skip, and killed"
    table.injected(name)
    ended = trainer.run(tmp_path, *arguments, faults=[fault, kill])
    assert ended.code < 0
    resumed = trainer.run(tmp_path, *arguments)
    assert resumed.code == 0, resumed.printed
    bits = differing_bits(tmp_path / "run", tmp_path / "whole" / "run")
    table.recovered(name, bits, note="SIGKILL")
    assert bits == 0
    counts = [line.count("skipped: ") for line in (undisturbed.printed, ended.printed, resumed.printed)]
    assert counts[0] > 1
    assert counts[2] >= 1
    assert str(frame) in undisturbed.printed
    last_row = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    counted = [yaml.safe_load(row)["train/skipped_samples"] for row in last_row if "train/loss" in row]
    assert counted[-1] == counts[0]
    assert counted[0] == 0
    assert differing_bits(tmp_path / "run", trainer.reference()) > 0


@pytest.mark.parametrize("entry", [5, *(pytest.param(e, marks=pytest.mark.faults("all")) for e in (1, 2, 3, 4, 6, 7))])
def test_a_killed_worker(trainer: Trainer, table: Table, tmp_path: Path, entry: int):
    """Batches of it may be on their way."""
    survive(
        trainer,
        table,
        "loader worker killed",
        tmp_path,
        *("--data.workers", "2"),
        faults=[{"act": "kill_worker", "phase": "step", "entry": entry}],
        code=75,
        says="a loader worker was killed",
    )


@pytest.mark.faults("all")
def test_a_killed_run_takes_its_workers_along(trainer: Trainer, table: Table, tmp_path: Path):
    survive(
        trainer,
        table,
        "kill -9 with loader workers",
        tmp_path,
        *("--data.workers", "2"),
        faults=[{"act": "kill", "phase": "step", "entry": 5}],
        code=-9,
    )


def test_spoiling_spoils(tmp_path: Path, data: Path):
    subprocess.run(spoil("cut short")(data / FRAME), shell=True, check=True)
    assert (data / FRAME).stat().st_size == 100
