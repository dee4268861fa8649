"""A cluster wants its machine back: the step is finished and saved, and the run ends with 75, soon."""

import signal
from pathlib import Path

import pytest
from harness import Table, Trainer, survive

SOON_S = 60.0  # a few seconds where the machine has nothing else to do, as the table says
"""From the signal to the end of the process: a step of the config takes milliseconds, the rest is the interpreter's."""
ALL = pytest.mark.faults("all")
SIGNALS = [signal.SIGTERM, *(pytest.param(s, marks=ALL) for s in (signal.SIGINT, signal.SIGUSR1))]
PHASES = [("step", 5), *(pytest.param(*p, marks=ALL) for p in [("write", 2), ("evaluation", 2), ("logging", 3)])]
LAUNCHER = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
LAUNCHER += ["--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("phase", "entry"), PHASES)
def test_a_signal(trainer: Trainer, table: Table, tmp_path: Path, number: int, phase: str, entry: int):
    name = signal.Signals(number).name
    fault = {"act": "send", "argument": number, "phase": phase, "entry": entry}
    ended = survive(trainer, table, f"{name} to the process", tmp_path, faults=[fault], code=75, within_s=SOON_S)
    assert "--resume auto" in ended.message
    assert f"{name}: stopping after this step" in ended.printed


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step(trainer: Trainer, table: Table, tmp_path: Path, number: int):
    fault = {"act": "send", "argument": number, "phase": "opening of a dataset"}
    survive(trainer, table, "signal before the first step", tmp_path, faults=[fault], code=75, within_s=SOON_S)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_the_group(trainer: Trainer, table: Table, tmp_path: Path, number: int):
    """Its loader workers get it, too."""
    name = f"{signal.Signals(number).name} to the group with loader workers"
    fault = {"act": "send_group", "argument": number, "phase": "step", "entry": 5}
    workers = ("--data.workers", "2")
    survive(trainer, table, name, tmp_path, *workers, faults=[fault], code=75, within_s=SOON_S)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal(trainer: Trainer, table: Table, tmp_path: Path, number: int):
    """At once; its loader workers notice within seconds."""
    fault = {"act": "send_twice", "argument": number, "phase": "step", "entry": 5}
    survive(
        trainer, table, "a second signal", tmp_path, *("--data.workers", "2"),
        faults=[fault], code=128 + number, within_s=SOON_S,
    )  # fmt: skip


@ALL
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("act", ["send", "send_parent", "send_parent_group"])
def test_a_signal_under_accelerate(trainer: Trainer, table: Table, tmp_path: Path, act: str, number: int):
    """To the training process, to the launcher, or to the group of both. The launcher's code is 1, or the signal's; 0
    where it was slower than the rest of the run.
    """
    to = {"send": "the process", "send_parent": "the launcher", "send_parent_group": "their group"}[act]
    name = f"{signal.Signals(number).name} to {to}, accelerate launch"
    fault = {"act": act, "argument": number, "phase": "step", "entry": 5}
    codes = (0, 1, 75, 130, 143, -number, 128 + number)
    ended = survive(
        trainer, table, name, tmp_path, faults=[fault], code=codes, launcher=LAUNCHER, again={}, within_s=2 * SOON_S
    )
    assert "done: " in ended.printed or ("stopped: " in ended.printed and ended.code)


@ALL
@pytest.mark.parametrize("processes", [None, 2])
def test_the_launcher_is_killed(trainer: Trainer, table: Table, tmp_path: Path, processes: int | None):
    """Nothing of the run is left over."""
    name = "launcher killed: " + ("torch.distributed.run, 2 processes" if processes else "accelerate launch")
    fault = {"act": "kill_parent", "phase": "step", "entry": 5}
    how = {"processes": processes} if processes else {"launcher": LAUNCHER}
    reference = trainer.reference(**({"processes": processes} if processes else {}))
    ended = survive(
        trainer, table, name, tmp_path, faults=[fault], code=-signal.SIGKILL, reference=reference,
        again=how if processes else {}, **how,
    )  # fmt: skip
    assert "SIGTERM: stopping after this step" in ended.printed
