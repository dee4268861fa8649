"""Starts train.py with faults, sees that nothing of it is left over, and counts the bits in which two runs differ."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from cdit.training.durable.checkpoints import checkpoints
from cdit.training.durable.manifest import problem

LAUNCH = Path(__file__).with_name("launch.py")
SIGKILLED = -9
ENDS_S = 15.0
"""Until then processes that a dead run has started notice that it is dead (torch's loader workers look every 5 s)."""


@dataclass
class Ended:
    """A run that has ended."""

    code: int
    """Its exit code; negative: the signal that ended it."""
    printed: str
    """What it wrote to stdout and stderr, without progress bars."""
    after_signal_s: float | None
    """How long after the last signal that it sent itself."""

    @property
    def message(self) -> str:
        """The last line, which says why a run ended."""
        return (self.printed.strip().splitlines() or [""])[-1]


@dataclass
class Trainer:
    """Runs train.py on a small config, every time under the eyes of `launch.py`.

    Args:
        folder: for logs; the working folder of the runs.
        config: config file of all runs.
        environment: variables of all runs.
    """

    folder: Path
    config: Path
    environment: dict[str, str]
    references: dict[str, Path] = field(default_factory=dict)
    _count: int = 0

    def __enter__(self) -> "Trainer":
        # `launch.py --serve` has imported what train.py needs.
        self._server = subprocess.Popen(
            [sys.executable, str(LAUNCH), "--serve"],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait()

    def run(
        self,
        output: Path,
        *arguments: object,
        faults: Sequence[dict[str, Any]] = (),
        processes: int | None = None,
        launcher: Sequence[str] | None = None,
        environment: dict[str, str] | None = None,
        while_it_runs: Callable[[], None] = lambda: None,
        timeout_s: float = 240,
    ) -> Ended:
        """Trains with `--resume auto` in <output>/run until it ends, by itself or by a fault.

        Args:
            output: folder of the run's folder.
            arguments: of train.py, after the config.
            faults: as `launch.py` takes them.
            processes: how many, under torch.distributed.run; None for one without launcher.
            launcher: the command line before the script, in place of torch.distributed.run.
            environment: more variables.
            while_it_runs: called again and again.
            timeout_s: a run that takes longer is a failure.
        """
        self._count += 1
        log, mark = self.folder / f"{self._count:04d}.log", f"{os.getpid()}.{self._count}"
        log.touch()
        arguments = ["--config", self.config, "--output", output, "--name", "run", "--resume", "auto", *arguments]
        variables = {**self.environment, **(environment or {}), "FAULTS": json.dumps(list(faults)), "FAULTS_RUN": mark}
        if processes:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        if launcher:
            command = [sys.executable, *launcher, str(LAUNCH), *map(str, arguments)]
            with log.open("a") as file:
                process = subprocess.Popen(
                    command, cwd=self.folder, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                    start_new_session=True,
                )  # fmt: skip
            pid, look = process.pid, process.poll
        else:
            request = {"arguments": [*map(str, arguments)], "environment": variables}
            pid = self._ask({**request, "folder": str(self.folder), "output": str(log)})
            look = lambda: self._ask({"look": pid})  # noqa: E731
        until = time.monotonic() + timeout_s
        while (code := look()) is None:
            assert time.monotonic() < until, f"still running:\n{log.read_text()[-3000:]}"
            while_it_runs()
            time.sleep(0.01)
        assert_nothing_is_left(pid, mark)
        ended = time.time()
        printed = [
            line.rpartition("\r")[2] for line in log.read_text(errors="replace").replace("\x1b[A", "").split("\n")
        ]
        sent = [float(line.rpartition(" ")[2]) for line in printed if "signal sent at" in line]
        return Ended(code, "\n".join(printed), ended - sent[-1] if sent else None)

    def reference(
        self, *arguments: object, processes: int | None = None, environment: dict[str, str] | None = None
    ) -> Path:
        """Folder of the run with these arguments that nothing disturbs; it is run once."""
        key = repr((arguments, processes, environment))
        if key not in self.references:
            output = self.folder / f"reference_{len(self.references)}"
            ended = self.run(output, *arguments, processes=processes, environment=environment)
            assert ended.code == 0, ended.printed
            self.references[key] = output / "run"
        return self.references[key]

    def _ask(self, request: dict[str, Any]) -> Any:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def assert_nothing_is_left(session: int, mark: str) -> None:
    """No process of that session, or that has the run's mark in its environment, lives on for long."""
    until = time.monotonic() + ENDS_S
    while left := _processes(session, mark):
        assert time.monotonic() < until, f"left over: {left}"
        time.sleep(0.05)


def _processes(session: int, mark: str) -> dict[int, str]:
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its_session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            marked = f"FAULTS_RUN={mark}\0".encode() in (process / "environ").read_bytes()
            if state != "Z" and (int(its_session) == session or marked):
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


# Comparing.


def contents(run: Path) -> dict[str, bytes]:
    """What a finished run leaves behind, by name: every tensor, row of metrics and picture, as bytes.

    The tensors are those of the models and of the last checkpoint: weights, their average, optimizer. The speed, which
    is no result, is left out of the rows.
    """
    found = {}
    newest = checkpoints(run)[-1]
    for path in [
        *run.glob("best/cdit/*.safetensors"),
        *run.glob("last/cdit/*.safetensors"),
        *newest.glob("*.safetensors"),
    ]:
        for name, tensor in load_file(path).items():
            found[f"{path.parent.name}/{path.name}/{name}"] = tensor.tobytes()
    state = json.loads((newest / "state.json").read_text())
    found["state.json"] = json.dumps({**state, "tracker_id": None}).encode()
    for i, line in enumerate((run / "metrics.jsonl").read_text().splitlines()):
        row = json.loads(line)
        row.pop("train/samples_per_second", None)
        found[f"row {i}"] = json.dumps(row).encode()
    for path in run.glob("probes/*/*.png"):
        found[str(path.relative_to(run))] = np.asarray(Image.open(path)).tobytes()
    return found


def differing_bits(run: Path, reference: Path) -> int:
    """In how many bits two finished runs differ; what only one of them has differs in all its bits."""
    a, b = contents(run), contents(reference)
    assert len(b) > 40
    differing = {name: _bits(a.get(name, b""), b.get(name, b"")) for name in a.keys() | b.keys()}
    differing = {name: bits for name, bits in sorted(differing.items()) if bits}
    if differing:
        print(f"{run} differs from {reference}: {differing}")
    return sum(differing.values())


def _bits(a: bytes, b: bytes) -> int:
    shared = min(len(a), len(b))
    different = np.frombuffer(a[:shared], np.uint8) ^ np.frombuffer(b[:shared], np.uint8)
    return int(np.unpackbits(different).sum()) + 8 * (len(a) + len(b) - 2 * shared)


# The table.


def survive(
    trainer: Trainer,
    table: "Table",
    fault: str,
    output: Path,
    *arguments: object,
    code: int | Sequence[int],
    faults: Sequence[dict[str, Any]] = (),
    says: str = "",
    repair: Callable[[], object] = lambda: None,
    reference: Path | None = None,
    again: dict[str, Any] | None = None,
    within_s: float | None = None,
    **options: Any,
) -> Ended:
    """Injects a fault into a run, resumes it, compares it with the undisturbed run, and says so in the table.

    Args:
        trainer: runs it.
        table: takes it.
        fault: its name there.
        output: where the run is.
        arguments: of train.py.
        code: with what the disturbed run has to end, or one of several.
        faults: what is to go wrong.
        says: what has to stand in its last line.
        repair: called before it is resumed.
        reference: the undisturbed run, by default the one of the config itself.
        again: options of the resumed run, where they are others.
        within_s: the longest time from the signal, that the fault is, to the end.
        options: of `Trainer.run`.
    """
    table.injected(fault)
    ended = trainer.run(output, *arguments, faults=faults, **options)
    codes = [code] if isinstance(code, int) else code
    assert ended.code in codes, (ended.code, ended.printed)
    if ended.code in (2, 75) and not options:
        assert ended.message.startswith("error: " if ended.code == 2 else "stopped: "), ended.printed
        assert "Traceback" not in ended.printed, ended.printed
    assert says in ended.message, ended.printed
    sound = [problem(folder) for folder in checkpoints(output / "run")]
    assert not any(sound), sound
    repair()
    resumed = trainer.run(output, *arguments, **(options if again is None else again))
    assert resumed.code == 0, resumed.printed
    bits = differing_bits(output / "run", reference or trainer.reference())
    note = f"exit {ended.code}"
    if ended.after_signal_s is not None:
        table.took(fault, ended.after_signal_s)
        assert within_s is None or ended.after_signal_s < within_s
    table.recovered(fault, bits, note=note)
    assert bits == 0
    return ended


@dataclass
class Row:
    """What became of a kind of fault."""

    injected: int = 0
    recovered: int = 0
    bits: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """The longest time from the fault to the end of the run, where it was measured."""


class Table:
    """Fault, times injected, runs recovered, differing bits."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def injected(self, fault: str, times: int = 1) -> None:
        """A fault was injected."""
        self.rows.setdefault(fault, Row()).injected += times

    def recovered(self, fault: str, bits: int, times: int = 1, note: str = "") -> None:
        """The run went on after it, and differs from the undisturbed one in so many bits."""
        row = self.rows[fault]
        row.recovered, row.bits = row.recovered + times, row.bits + bits
        if note and note not in row.notes:
            row.notes.append(note)

    def took(self, fault: str, seconds: float) -> None:
        """So long from the fault to the end of the run."""
        self.rows[fault].seconds = max(self.rows[fault].seconds, seconds)

    def text(self) -> str:
        """The table in Markdown."""
        lines = ["| fault | injected | recovered | differing bits | how the run ended |", "|---|---:|---:|---:|---|"]
        for fault, row in self.rows.items():
            how = "; ".join([*row.notes, *([f"{row.seconds:.1f} s" if row.seconds else ""])])
            lines.append(f"| {fault} | {row.injected} | {row.recovered} | {row.bits} | {how.strip('; ')} |")
        total = [sum(getattr(row, name) for row in self.rows.values()) for name in ("injected", "recovered", "bits")]
        return "\n".join([*lines, f"| **all** | {total[0]} | {total[1]} | {total[2]} | |"])
