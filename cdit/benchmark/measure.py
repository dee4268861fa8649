"""Times, ratios and memory of calls that run in turn, and tables of them."""

import ctypes
import gc
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cdit.common.tables import markdown_table

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median and interquartile range over rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        """Of the values (rounds,)."""
        return cls(*(float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))))

    def __str__(self) -> str:
        low, median, high = (f"{value:.3g}" for value in (self.low, self.median, self.high))
        return f"{median} ({low}–{high})"


Cell = str | float | int | Spread | None
Row = dict[str, Cell]


@dataclass
class Table:
    """Rows of named cells, all with the columns of the first."""

    title: str
    rows: list[Row]
    note: str = ""

    def __str__(self) -> str:
        columns = list(self.rows[0])
        table = markdown_table(columns, [[row[column] for column in columns] for row in self.rows])
        return f"### {self.title}\n\n{table}" + (f"\n{self.note}\n" if self.note else "")


@dataclass
class Stopwatch:
    """Times alternatives in turn, round after round, so that other load on the machine affects all of them equally."""

    device: torch.device
    rounds: int
    """Number of rounds; each times every alternative once."""
    min_seconds: float
    """Shorter calls are repeated within a round to take at least this long."""

    def times(self, alternatives: Mapping[str, Call]) -> dict[str, np.ndarray]:
        """Seconds of one call of each alternative, (rounds,)."""
        repeats = {}
        for name, call in alternatives.items():
            first = self._seconds(call, 1)  # allocations, compilation
            if first < 100 * self.min_seconds:
                first = min(self._seconds(call, 1) for _ in range(2))
            repeats[name] = 1 + int(self.min_seconds / first)
        seconds: dict[str, list[float]] = {name: [] for name in alternatives}
        names = list(alternatives)
        for i in range(self.rounds):  # a different one first each time: a call inherits the caches of its predecessor
            for name in names[i % len(names) :] + names[: i % len(names)]:
                seconds[name].append(self._seconds(alternatives[name], repeats[name]))
        return {name: np.array(values) for name, values in seconds.items()}

    def _seconds(self, call: Call, repeats: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self._wait()
        return (time.perf_counter() - start) / repeats

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def median(values: np.ndarray) -> float:
    """As a float of Python."""
    return float(np.median(values))


def product(device: torch.device, dtype: torch.dtype) -> tuple[Call, int]:
    """A product of two large square matrices, which comes close to the device's peak rate, and its FLOPs."""
    side = 2048 if device.type == "cpu" else 8192
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 2 * side**3


def peak_bytes(device: torch.device, call: Call) -> int | None:
    """Peak memory during a call minus that before it; None if it cannot be measured.

    On a GPU, memory that torch allocates. On a CPU under Linux, pages of the process, after releasing free ones.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (OSError, AttributeError, TypeError):  # no glibc, or no /proc
        return None
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def machine(device: torch.device) -> str:
    """The processor's name, its threads, and torch's version."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor() or platform.machine()
        name += f", {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"
