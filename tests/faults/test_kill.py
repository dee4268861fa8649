"""kill -9 at any moment: the run goes on as if nothing had been."""

import json
import random
import signal
from pathlib import Path

import pytest
from harness import SIGKILLED, Table, Trainer, differing_bits

PHASES = ["start-up", "step", "write", "rename", "logging", "evaluation", "model"]
NAMES = {"write": "checkpoint write", "model": "writing of a model"}
KILLS = 6
"""In each phase, when the whole suite is run."""


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer) -> dict[str, list[dict]]:
    """How long each phase took, every time it was entered, and how many operations on files it had."""
    log = trainer.folder / "phases.log"
    ended = trainer.run(trainer.folder / "timed", environment={"PHASES_LOG": str(log)})
    assert ended.code == 0, ended.printed
    assert differing_bits(trainer.folder / "timed" / "run", trainer.reference()) == 0
    entries: dict[str, list[dict]] = {phase: [] for phase in PHASES}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if entry["phase"] in entries:
            entries[entry["phase"]].append(entry)
    assert len(entries["step"]) == 12
    assert all(entries.values())
    return entries


def disturb(trainer: Trainer, output: Path, table: Table, faults: list[tuple[str, dict]], *arguments: str) -> None:
    """Injects one fault after the other, resuming after each, in as many runs as that takes."""
    attempt, open_faults = 0, []
    while faults or open_faults:
        name, fault = faults.pop(0) if faults else ("", None)
        run = output / f"{attempt}"
        ended = trainer.run(run, *arguments, faults=[fault] if fault else [])
        if ended.code == SIGKILLED:
            assert fault is not None
            table.injected(name)
            open_faults.append(name)
            continue
        assert ended.code == 0, ended.printed
        if fault is not None:  # the run was over before
            assert open_faults, f"never happens: {fault}"
            faults.insert(0, (name, fault))
        bits = differing_bits(run / "run", trainer.reference(*arguments))
        for name in open_faults:
            table.recovered(name, bits, note="SIGKILL")
        assert bits == 0, open_faults
        attempt, open_faults = attempt + 1, []


def test_killed_at_random_moments(
    trainer: Trainer, undisturbed: dict[str, list[dict]], table: Table, whole: bool, tmp_path: Path
):
    """Anywhere in the time that a phase takes, in runs that are killed again and again."""
    draws, faults = random.Random(0), []
    for _ in range(KILLS if whole else 1):
        for phase in draws.sample(PHASES, len(PHASES)):
            seconds = draws.choice(undisturbed[phase])["seconds"] * draws.random()
            fault = {"act": "kill", "phase": phase, "entry": draws.choice((1, 1, 2)), "delay_s": seconds}
            if phase == "start-up":
                fault["entry"] = 1
            faults.append((f"kill -9: {NAMES.get(phase, phase)}", fault))
    disturb(trainer, tmp_path, table, faults)


@pytest.mark.faults("all")
@pytest.mark.parametrize("phase", ["rename", "write", "logging", "model"])
def test_killed_before_each_operation_on_a_file(trainer: Trainer, table: Table, tmp_path: Path, phase: str):
    """Opening, renaming, linking and deleting, one after the other; of checkpoints, when there are old ones."""
    each_step = ("--checkpoint.every", "1", "--validation.every", "1", "--log_every", "1")
    log = tmp_path / "phases.log"
    trainer.run(tmp_path / "timed", *each_step, environment={"PHASES_LOG": str(log)})
    entries = [entry for entry in map(json.loads, log.read_text().splitlines()) if entry["phase"] == phase]
    name, count = f"kill -9 before a file operation: {NAMES.get(phase, phase)}", entries[2]["operations"]
    assert count
    faults = [{"act": "kill", "phase": phase, "entry": 3, "operation": number + 1} for number in range(count)]
    disturb(trainer, tmp_path, table, [(name, fault) for fault in faults], *each_step)


def test_a_kill_is_seen(trainer: Trainer, tmp_path: Path):
    """A run that is not resumed does differ: the comparison is no empty one."""
    ended = trainer.run(tmp_path, faults=[{"act": "kill", "phase": "step", "entry": 8}])
    assert ended.code == -signal.SIGKILL
    assert differing_bits(tmp_path / "run", trainer.reference()) > 1000
