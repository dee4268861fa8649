"""Where a run's numbers and pictures go: its own folder, and Weights & Biases."""

import json
import math
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cdit.common.errors import UserError
from cdit.common.files import write_whole
from cdit.common.wandb_run import WandbRun
from cdit.training.config import TrainConfig
from cdit.training.durable.checkpoints import RunState

METRICS = "metrics.jsonl"


class Tracker:
    """Writes metrics.jsonl, and shows the same numbers and more at W&B. Only the main process writes.

    A run that is continued keeps the rows that its checkpoint knows of, and tells W&B those of them that it lacks.

    Raises:
        UserError: metrics.jsonl cannot be written.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, state: RunState):
        self.accelerator = accelerator
        self.path = config.folder / METRICS
        self.rows = 0
        self.wandb: WandbRun | None = None
        if not accelerator.is_main_process:
            return
        lines = _keep_lines(self.path, state.rows)
        self.rows = len(lines)
        if config.tracking.backend == "wandb":
            state.tracker_id = state.tracker_id or secrets.token_hex(4)
            about = {"project": config.tracking.project, "name": config.name, "config": asdict(config)}
            self.wandb = WandbRun(config.folder, state.tracker_id, **about)
            for line in lines:
                with suppress(ValueError, KeyError):  # a row that somebody has changed
                    row = json.loads(line)
                    step = row.pop("step")
                    self.show(partial(_known, row), step)

    def print(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        self.accelerator.print(text)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Numbers of a step, to metrics.jsonl (null where not finite, which JSON cannot say) and W&B.

        Raises:
            UserError: the file cannot be written. What is there of the row, a run that resumes takes away.
        """
        if self.accelerator.is_main_process:
            row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            _append(self.path, json.dumps({"step": step, **row}, allow_nan=False))
            self.rows += 1
        self.show(lambda: metrics, step)

    def show(self, media: Callable[[], dict[str, Any]], step: int) -> None:
        """Images, videos and tables of a step, to W&B: what a function returns that is called if they are wanted."""
        if self.wandb:
            self.wandb.log(media, step)

    def finish(self) -> None:
        """Ends the run at W&B, and the processes' group."""
        if self.wandb:
            self.wandb.finish()
        self.accelerator.end_training()


def _known(row: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in row.items() if value is not None}


def _append(path: Path, line: str) -> None:
    """Adds a line, on disk when this returns: a checkpoint that is to come counts on it."""
    try:
        with path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def _keep_lines(path: Path, count: int) -> list[str]:
    """Leaves a file its first `count` lines, since a resumed run writes the later ones again; returns them."""
    try:
        lines = path.read_text(errors="replace").splitlines()[:count] if path.is_file() else []
        write_whole(path, "".join(line + "\n" for line in lines))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    return lines
