"""Two processes: resumed to the same bits, and what becomes of both when one is gone."""

import signal
from pathlib import Path

import numpy as np
import pytest
from harness import Table, Trainer, contents, survive

pytestmark = pytest.mark.faults("all")
TWO = {"processes": 2}
BOUND_S = 45.0
"""In which both processes are gone when one of them is; timeout_minutes of the config is 0.5."""


@pytest.fixture(scope="module")
def together(trainer: Trainer) -> Path:
    return trainer.reference(**TWO)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("phase", "entry"), [("step", 5), ("write", 2), ("evaluation", 2)])
def test_one_of_two_is_killed(
    trainer: Trainer, table: Table, together: Path, tmp_path: Path, rank: int, phase: str, entry: int
):
    fault = {"act": "kill_and_tell", "phase": phase, "entry": entry, "rank": rank}
    survive(
        trainer, table, f"rank {rank} of 2 killed: {phase}", tmp_path, faults=[fault], code=1, reference=together,
        within_s=BOUND_S, **TWO,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_hangs(trainer: Trainer, table: Table, together: Path, tmp_path: Path, rank: int):
    """The other does not wait for longer than it was told to."""
    fault = {"act": "hang", "phase": "step", "entry": 5, "rank": rank}
    ended = survive(
        trainer, table, f"rank {rank} of 2 hangs", tmp_path, faults=[fault], code=1, reference=together,
        within_s=BOUND_S + 30, **TWO,
    )  # fmt: skip
    assert "another process is gone or does not respond" in ended.printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_of_two(trainer: Trainer, table: Table, together: Path, tmp_path: Path, number: int, rank: int):
    """Both finish the same step."""
    fault = {"act": "send", "argument": number, "phase": "step", "entry": 5, "rank": rank}
    name = f"{signal.Signals(number).name} to one of 2 processes"
    ended = survive(trainer, table, name, tmp_path, faults=[fault], code=1, reference=together, within_s=BOUND_S, **TWO)
    assert "stopped: at step 5, which is saved" in ended.printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_of_two(trainer: Trainer, table: Table, together: Path, tmp_path: Path, number: int):
    fault = {"act": "send_parent_group", "argument": number, "phase": "step", "entry": 5}
    name = f"{signal.Signals(number).name} to the launcher of 2 processes"
    codes = (1, -number, 128 + number)
    survive(trainer, table, name, tmp_path, faults=[fault], code=codes, reference=together, within_s=BOUND_S, **TWO)


def test_processes_come_and_go(trainer: Trainer, table: Table, tmp_path: Path):
    """Two processes, then one, then two: the run of one process, to rounding. Dropout draws by process: without it."""
    exact = ("--model.dropout", "0")
    name = "2 processes, then 1, then 2"
    table.injected(name, 2)
    for stop_at, processes in ((3, 2), (6, None), (None, 2)):
        ended = trainer.run(tmp_path, *exact, *(("--stop_at", stop_at) if stop_at else ()), processes=processes)
        assert ended.code == 0, ended.printed
    run = tmp_path / "run"
    distance = largest_distance(run, trainer.reference(*exact))
    table.recovered(name, 0, times=2, note=f"weights within {distance:.0e} of those of 1 process")
    assert distance < 1e-3


def largest_distance(run: Path, reference: Path) -> float:
    """Largest relative distance of a tensor of the last models."""
    a, b = (
        {name: np.frombuffer(data, np.float32) for name, data in contents(folder).items() if name.startswith("cdit/")}
        for folder in (run, reference)
    )
    assert a.keys() == b.keys()
    return max(float(np.linalg.norm(a[name] - b[name]) / np.linalg.norm(b[name])) for name in b)
