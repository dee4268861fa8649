"""Runs the real train.py with faults: `python launch.py ARGUMENTS…`, or `--serve` to run it many times.

The variable FAULTS holds a JSON list of faults (`Fault`). A fault acts when the run enters a phase for the n-th time,
at once, some time later or at some operation on a file. To this end the functions that begin and end a phase are
replaced before train.py is run as `__main__`; train.py and the package know nothing of it.

With `--serve` the libraries are imported once. Each line on stdin is a request in JSON: to run train.py in a fork of
this process, which is answered by its process id; or to look whether it has ended, which is answered by its exit code
(negative: the signal that ended it) or null.
"""

import ctypes
import functools
import json
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TRAIN = Path(__file__).parents[2] / "train.py"
FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "shutil.rmtree")


@dataclass
class Fault:
    """What goes wrong, and when."""

    act: str
    """Name of a function below."""
    argument: Any = None
    """What it is given."""
    phase: str = "step"
    """Name of a phase."""
    entry: int = 1
    """It acts when the phase is entered for this time, counted from 1 in each process."""
    delay_s: float | None = None
    """For `kill`: it acts so much later, or when the phase ends before."""
    operation: int | None = None
    """It acts at the phase's operation on a file of this number, counted from 1, and not on entering."""
    rank: int = 0
    """The process that it befalls."""


# What can go wrong.


def kill(_: None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def send(number: int) -> None:
    """A signal to this process, the time of it on stdout."""
    print(f"signal sent at {time.time()}", flush=True)
    os.kill(os.getpid(), number)


def send_group(number: int) -> None:
    """A signal to the process group, as a terminal or a cluster sends it."""
    print(f"signal sent at {time.time()}", flush=True)
    os.killpg(0, number)


def send_twice(number: int) -> None:
    """A signal, and once more while the run is still at its step."""
    os.kill(os.getpid(), number)
    time.sleep(1.2)
    send(number)


def send_parent(number: int) -> None:
    """A signal to the launcher."""
    print(f"signal sent at {time.time()}", flush=True)
    os.kill(os.getppid(), number)


def send_parent_group(number: int) -> None:
    """A signal to the launcher's process group, as a terminal or a cluster sends it."""
    print(f"signal sent at {time.time()}", flush=True)
    os.killpg(os.getpgid(os.getppid()), number)


def kill_parent(_: None) -> None:
    """The launcher is gone."""
    print(f"signal sent at {time.time()}", flush=True)
    os.kill(os.getppid(), signal.SIGKILL)


def kill_and_tell(_: None) -> None:
    """As `kill`, the time of it on stdout."""
    print(f"signal sent at {time.time()}", flush=True)
    kill(None)


def hang(_: None) -> None:
    """Nothing more happens in this process."""
    print(f"signal sent at {time.time()}", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_worker(_: None) -> None:
    multiprocessing.active_children()[0].kill()


def kill_children(name: str) -> None:
    """Kills child processes whose command line holds `name`."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_child = f"\nPPid:\t{os.getpid()}\n" in (process / "status").read_text()
            if is_child and name in (process / "cmdline").read_text():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


def fill(folder: str) -> None:
    """Fills the disk that the folder is on."""
    with open(Path(folder) / "filler", "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def limit_file(limit: tuple[str, int]) -> None:
    """No file may grow beyond the size that this one has now, and so many bytes."""
    path, room = limit
    shown = subprocess.Popen(["cat"], stdin=subprocess.PIPE)  # so that the log, a file, too, may grow
    os.dup2(shown.stdin.fileno(), 1)
    os.dup2(shown.stdin.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.stat(path).st_size + room, resource.RLIM_INFINITY))


def limit_memory(room: int) -> None:
    """So many bytes more than now, and what the next tensor takes is more than that."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    torch.ones(2 * room, dtype=torch.uint8)


def shell(command: str) -> None:
    """Anything else."""
    subprocess.run(command, shell=True, check=True)


# When.


class Phases:
    """Counts how often each phase is entered, and has the faults act.

    Args:
        faults: those of this process.
        log: file for the duration of each phase, a line of JSON each time; None for none.
    """

    def __init__(self, faults: list[Fault], log: str | None):
        self.faults, self.log = faults, log
        self.entries: Counter[str] = Counter()
        self.since: dict[str, float] = {}
        self.threads: dict[str, int] = {}
        self.operations: Counter[str] = Counter()
        sys.addaudithook(self._audit)

    def enter(self, phase: str) -> None:
        self.entries[phase] += 1
        self.threads[phase], self.operations[phase] = threading.get_ident(), 0
        self.since[phase] = time.monotonic()
        for fault in self._due(phase):
            if fault.delay_s is not None:
                _kill_in(fault.delay_s)
            elif fault.operation is None:
                globals()[fault.act](fault.argument)

    def leave(self, phase: str) -> None:
        if phase not in self.since:
            return
        duration = time.monotonic() - self.since.pop(phase)
        if self.log:
            with open(self.log, "a") as file:
                line = {"phase": phase, "seconds": duration, "operations": self.operations[phase]}
                file.write(json.dumps(line) + "\n")
        if any(fault.delay_s is not None for fault in self._due(phase)):
            kill(None)  # sooner than it was meant to be, but in the phase

    def around(self, owner: Any, name: str, phase: str) -> None:
        """A call of this function is the phase."""
        self.at_call(owner, name, before=lambda *_, **__: self.enter(phase), after=lambda: self.leave(phase))

    def at_call(
        self, owner: Any, name: str, before: Callable[..., None] | None = None, after: Callable[[], None] | None = None
    ) -> None:
        """Calls `before` with the function's arguments when it is called, and `after` when it returns or raises."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before:
                before(*args, **kwargs)
            try:
                return original(*args, **kwargs)
            finally:
                if after:
                    after()

        setattr(owner, name, wrapped)

    def _due(self, phase: str) -> list[Fault]:
        return [fault for fault in self.faults if (fault.phase, fault.entry) == (phase, self.entries[phase])]

    def _audit(self, event: str, _: tuple) -> None:
        if event not in FILE_OPERATIONS:
            return
        for phase in [phase for phase in list(self.since) if self.threads[phase] == threading.get_ident()]:
            self.operations[phase] += 1
            for fault in self._due(phase):
                if fault.operation == self.operations[phase]:
                    globals()[fault.act](fault.argument)


def watch(phases: Phases) -> None:
    """Finds the phases of a run."""
    import cdit.common.cli
    import cdit.data.windows
    from cdit.training.durable.checkpoints import Checkpoints
    from cdit.training.durable.signals import StopSignals
    from cdit.training.ema import EMA
    from cdit.training.probes import Probes
    from cdit.training.tracking import Tracker
    from cdit.training.validation import Validation
    from cdit.world_model import WorldModel

    def begin_step(world: WorldModel, batch: Any, *action_dropout: float) -> None:
        if action_dropout:  # else validation, which hides no actions
            phases.enter("step")

    phases.around(cdit.data.windows.WindowDataset, "__init__", "opening of a dataset")
    phases.at_call(cdit.common.cli, "parse_config", before=lambda *_, **__: phases.enter("start-up"))
    phases.at_call(StopSignals, "defer", after=lambda: phases.leave("start-up"))
    phases.at_call(WorldModel, "encode", before=begin_step)
    phases.at_call(EMA, "step", after=lambda: phases.leave("step"))
    phases.at_call(Checkpoints, "_write", before=lambda *_: phases.enter("write"))
    phases.around(Checkpoints, "_publish", "rename")
    phases.at_call(Checkpoints, "_publish", before=lambda *_: phases.leave("write"))
    phases.around(Tracker, "log", "logging")
    phases.around(Validation, "run", "evaluation")
    phases.around(Probes, "run", "evaluation")
    phases.around(WorldModel, "save_pretrained", "model")


def break_losses(steps: dict[str, float]) -> None:
    """Multiplies the losses of these training steps: by NaN or infinity."""
    from cdit.common.randomness import seed_of
    from cdit.diffusion.objective import DenoisingObjective
    from cdit.world_model import WorldModel

    factors = {seed_of(0, int(step), sample): factor for step, factor in steps.items() for sample in range(100)}
    encode, loss = WorldModel.encode, DenoisingObjective.loss
    factor = [1.0]

    def noted(world: WorldModel, batch: Any, *action_dropout: float) -> Any:
        factor[0] = factors.get(int(batch.key[0]), 1.0) if action_dropout else 1.0
        return encode(world, batch, *action_dropout)

    WorldModel.encode = noted
    DenoisingObjective.loss = lambda *args: loss(*args) * factor[0] if factor[0] != 1 else loss(*args)


def _kill_in(seconds: float) -> None:
    """Has the kernel kill this process after that time, whatever it does then: `timer_create` with SIGKILL."""

    class Event(ctypes.Structure):
        _fields_ = (
            ("value", ctypes.c_void_p),
            ("signal", ctypes.c_int),
            ("how", ctypes.c_int),
            ("_", ctypes.c_byte * 48),
        )

    times = (ctypes.c_long * 4)(0, 0, int(seconds), max(1, int(seconds % 1 * 1e9)))  # interval, then the first time
    libc, timer, event = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p(), Event(None, signal.SIGKILL, 0)
    if libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
        raise OSError(ctypes.get_errno(), "timer_create")
    libc.timer_settime(timer, 0, times, None)


def train(arguments: list[str]) -> None:
    """Runs train.py as a person would, with the faults of this process."""
    os.sched_getaffinity = lambda _: {0}  # on tensors this small, several threads only wait for each other
    rank = int(os.environ.get("RANK", 0))
    faults = [Fault(**values) for values in json.loads(os.environ.get("FAULTS", "[]"))]
    phases = Phases([fault for fault in faults if fault.rank == rank], os.environ.get("PHASES_LOG"))
    if "BAD_LOSSES" in os.environ:
        break_losses(json.loads(os.environ["BAD_LOSSES"]))
    watch(phases)
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")


def serve() -> list[str]:
    """Answers requests; returns in each fork, with the arguments for train.py."""
    from wandb.sdk.data_types._private import MEDIA_TMP

    runpy.run_path(str(TRAIN), run_name="imported")
    for line in sys.stdin:
        request = json.loads(line)
        if "look" in request:
            pid, status = os.waitpid(request["look"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif answer := os.fork():
            pass
        else:
            os.setsid()
            for number, path in enumerate((os.devnull, request["output"], request["output"])):
                os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), number)
            os.environ.clear()
            os.environ.update(request["environment"])
            os.chdir(request["folder"])
            MEDIA_TMP.__init__("wandb-media")  # the folder made on import is deleted by the first fork that ends
            return request["arguments"]
        print(json.dumps(answer), flush=True)
    sys.exit()


if __name__ == "__main__":
    train(serve() if sys.argv[1:] == ["--serve"] else sys.argv[1:])
