"""A disk that is full, or turns read-only: a line that names the file, nothing lost, and the run goes on afterwards."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Table, Trainer, survive

PLACES = [("write", 2), ("logging", 3), ("model", 2), ("evaluation", 2), ("start-up", 1)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6M", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system of its own needs root ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", folder], check=True)


def remount(folder: Path, how: str) -> Callable[[], object]:
    return lambda: subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


@pytest.mark.parametrize(
    ("phase", "entry"), [PLACES[0], *(pytest.param(*p, marks=pytest.mark.faults("all")) for p in PLACES[1:])]
)
def test_full_disk(trainer: Trainer, table: Table, disk: Path, phase: str, entry: int):
    survive(
        trainer,
        table,
        f"disk full: {phase}",
        disk,
        faults=[{"act": "fill", "argument": str(disk), "phase": phase, "entry": entry}],
        code=2,
        says=str(disk / "run"),
        repair=(disk / "filler").unlink,
    )


@pytest.mark.parametrize("room", [20, pytest.param(0, marks=pytest.mark.faults("all"))])
def test_a_row_that_does_not_fit(trainer: Trainer, table: Table, tmp_path: Path, room: int):
    """As with a quota: a row is cut short, or has no room at all."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    fault = {"act": "limit_file", "argument": [str(metrics), room], "phase": "logging", "entry": 4}
    survive(trainer, table, "file too large: a row of metrics", tmp_path, faults=[fault], code=2, says=str(metrics))


@pytest.mark.faults("all")
@pytest.mark.parametrize("background", ["true", "false"])
def test_a_checkpoint_that_does_not_fit(trainer: Trainer, table: Table, tmp_path: Path, background: str):
    fault = {"act": "limit_file", "argument": [os.devnull, 50_000], "phase": "write", "entry": 2}
    checkpoint = str(tmp_path / "run" / "checkpoints")
    survive(
        trainer,
        table,
        "file too large: checkpoint",
        tmp_path,
        *("--checkpoint.background", background),
        faults=[fault],
        code=2,
        says=checkpoint,
    )


@pytest.mark.parametrize(
    ("phase", "entry"), [("step", 5), *(pytest.param(*p, marks=pytest.mark.faults("all")) for p in PLACES)]
)
def test_read_only_on_the_way(trainer: Trainer, table: Table, disk: Path, phase: str, entry: int):
    survive(
        trainer,
        table,
        f"disk turns read-only: {phase}",
        disk,
        faults=[{"act": "shell", "argument": f"mount -o remount,ro {disk}", "phase": phase, "entry": entry}],
        code=2,
        says=str(disk),
        repair=remount(disk, "rw"),
    )


def test_read_only_from_the_start(trainer: Trainer, table: Table, disk: Path):
    remount(disk, "ro")()
    survive(trainer, table, "read-only output folder", disk, code=2, says="is not writable", repair=remount(disk, "rw"))
