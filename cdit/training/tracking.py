"""Where a run's numbers and pictures go: its own folder, and Weights & Biases through Accelerate's tracker."""

import json
import math
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

import wandb
from accelerate import Accelerator

from cdit.training.checkpoints import RunState
from cdit.training.config import TrainConfig
from cdit.training.manifest import write_through
from cdit.wandb_run import offline_note, start_options

METRICS = "metrics.jsonl"


class Tracker:
    """Writes metrics.jsonl, and shows the same numbers and more at the tracker. Only the main process writes."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, state: RunState):
        self.accelerator = accelerator
        self.path = config.folder / METRICS
        self.wandb = config.tracking.backend == "wandb"
        self.rows = _keep_rows(self.path, state.rows) if accelerator.is_main_process else 0
        if self.wandb:
            state.tracker_id = state.tracker_id or secrets.token_hex(4)
            self._start(config, state.tracker_id)

    def _start(self, config: TrainConfig, run_id: str) -> None:
        settings = {"name": config.name, "id": run_id, "resume": "allow", **start_options(config.folder)}
        self.accelerator.init_trackers(config.tracking.project, config=asdict(config), init_kwargs={"wandb": settings})
        if self.accelerator.is_main_process and (note := offline_note(wandb.run)):
            self.print(note)

    def print(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        self.accelerator.print(text)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Numbers of a step, to metrics.jsonl (null where not finite, which JSON cannot say) and the tracker."""
        if self.accelerator.is_main_process:
            row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
            self.rows += 1
        self.accelerator.log(metrics, step=step)

    def show(self, media: dict[str, Any], step: int) -> None:
        """Images, videos and tables (W&B objects) of a step, to the tracker."""
        if self.wandb:
            self.accelerator.log(media, step=step)

    def finish(self) -> None:
        """Ends the run at the tracker."""
        self.accelerator.end_training()


def _keep_rows(path: Path, count: int) -> int:
    """Leaves a file its first `count` lines, since a resumed run writes the later ones again; says how many it had."""
    lines = path.read_text(errors="replace").splitlines()[:count] if path.is_file() else []
    partial = path.with_name(f".{path.name}.partial")
    write_through(partial, "".join(line + "\n" for line in lines))
    partial.replace(path)
    return len(lines)
