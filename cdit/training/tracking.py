"""Logs the numbers and pictures of a run to its folder and to Weights & Biases."""

import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cdit.common.errors import writing
from cdit.common.files import to_json, write_whole
from cdit.common.wandb_run import WandbRun
from cdit.training.config import TrainConfig
from cdit.training.durable.checkpoints import RunState

METRICS = "metrics.jsonl"


class Tracker:
    """Writes metrics.jsonl, and logs the same numbers and media to W&B. Only the main process writes.

    A resumed run keeps the rows up to its checkpoint, and sends those to W&B that it lacks.

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
        if config.tracking == "wandb":
            state.tracker_id = state.tracker_id or secrets.token_hex(4)
            about = {"project": config.project, "name": config.name, "config": asdict(config)}
            self.wandb = WandbRun(config.folder, state.tracker_id, **about)
            for line in lines:
                with suppress(ValueError, KeyError):  # a row that was edited
                    row = json.loads(line)
                    step = row.pop("step")
                    self.show(partial(_known, row), step)

    def print(self, text: str) -> None:
        """Prints a line above the progress bar."""
        self.accelerator.print(text)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Logs the numbers of a step to metrics.jsonl (null if not finite, as required by JSON) and W&B.

        Raises:
            UserError: the file cannot be written. A resumed run removes a partial row.
        """
        if self.accelerator.is_main_process:
            _append(self.path, to_json({"step": step, **metrics}))
            self.rows += 1
        self.show(lambda: metrics, step)

    def show(self, media: Callable[[], dict[str, Any]], step: int) -> None:
        """Logs images, videos and tables of a step to W&B. `media` is called only if W&B is used."""
        if self.wandb:
            self.wandb.log(media, step)

    def finish(self) -> None:
        """Ends the W&B run and the process group."""
        if self.wandb:
            self.wandb.finish()
        self.accelerator.end_training()


def _known(row: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in row.items() if value is not None}


def _append(path: Path, line: str) -> None:
    """Appends a line and flushes it to disk, because the next checkpoint relies on it."""
    with writing(path), path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _keep_lines(path: Path, count: int) -> list[str]:
    """Truncates a file to its first `count` lines, since a resumed run writes later ones again; returns them."""
    lines = path.read_text(errors="replace").splitlines()[:count] if path.is_file() else []
    with writing(path):
        write_whole(path, "".join(line + "\n" for line in lines))
    return lines
