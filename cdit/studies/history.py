"""What a training run has logged: its metrics.jsonl, and how long its steps took."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cdit.common.errors import UserError
from cdit.world_model import DESCRIPTION

METRICS = "metrics.jsonl"
RATE = "train/samples_per_second"


class History:
    """The rows of a run.

    Args:
        run: folder of the run.

    Raises:
        UserError: it holds no run, or no row of training yet.
    """

    def __init__(self, run: Path | str):
        self.run = Path(run)
        try:
            self.config: dict[str, Any] = yaml.safe_load((self.run / "config.yaml").read_text())
            self.rows = [json.loads(line) for line in (self.run / METRICS).read_text().splitlines()]
            self._samples = self.config["batch_size"] * self.config["data"]["goals"]
            self._log_every = self.config["log_every"]
        except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
            raise UserError(f"{self.run}: expected a training run with config.yaml and {METRICS} ({error})") from error
        timed = [(row["step"], row[RATE]) for row in self.rows if row.get(RATE)]
        if not timed:
            raise UserError(f"{self.run / METRICS}: no row of training yet")
        self._steps, rates = map(np.array, zip(*timed, strict=True))
        self._seconds_per_step = self._samples / rates

    @property
    def is_finished(self) -> bool:
        """Whether the run has completed its schedule, rather than being ended by stop_at or stop_at_seconds."""
        if not (self.run / "last" / DESCRIPTION).is_file():
            return False
        stop_at, seconds, stop_at_seconds = (
            self.config.get(name) for name in ("stop_at", "train_seconds", "stop_at_seconds")
        )
        if seconds is None:
            return int(self._steps[-1]) == self.config["steps"]
        return stop_at is None and (stop_at_seconds is None or stop_at_seconds >= seconds)

    @property
    def steps_per_second(self) -> float:
        """Median over the rows, so that compilation and other load on the machine have little effect."""
        return float(1 / np.median(self._seconds_per_step))

    def values(self, name: str) -> list[tuple[int, float]]:
        """Step and value of every row that has a finite one of that name."""
        return [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]

    def last(self, name: str) -> float:
        """The newest value of that name.

        Raises:
            UserError: there is none.
        """
        values = self.values(name)
        if not values:
            raise UserError(f"{self.run / METRICS}: no {name} yet")
        return values[-1][1]

    def seconds(self, step: int) -> float:
        """Seconds of training up to a step, without validation, probes and checkpoints.

        Steps that no row covers, such as those before the checkpoint from which the run was branched, count with the
        median rate.
        """
        before = np.concatenate(([0], self._steps[:-1]))
        covered = np.minimum(self._steps - before, self._log_every)
        done = self._steps <= step
        counted = float((covered * self._seconds_per_step)[done].sum())
        return counted + (step - int(covered[done].sum())) / self.steps_per_second
