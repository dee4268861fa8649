"""Everything a run needs to be continued: <run>/checkpoints/step_00001000/."""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from cdit.errors import UserError
from cdit.training.config import TrainConfig, flat
from cdit.training.ema import EMA

STATE = "state.json"
CONFIG = "config.yaml"
MAY_DIFFER = re.compile(
    r"(name|output|resume|steps|stop_at|micro_batch_size|compile|mixed_precision"
    r"|data\.(folder|prepare|splits|workers|cache_gb|latents)|(validation|probe|checkpoint|tracking|sampler)\..*)"
)
"""Fields that a continued run may have other values of than the run had that it continues."""


@dataclass
class RunState:
    """What of a run is neither weights nor optimizer state. Random draws are keyed by the step and need no state."""

    step: int = 0
    """Optimizer steps done."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """State of the learning-rate schedule."""
    best_loss: float = float("inf")
    """Smallest validation loss so far."""
    tracker_id: str | None = None
    """Identity of the run at the tracker."""
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last row of training metrics, which the next one is to tell of, too."""


def checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    found = (run / "checkpoints").glob("step_*")
    return sorted(p for p in found if re.fullmatch(r"step_\d{8}", p.name) and (p / STATE).is_file())


def save_checkpoint(accelerator: Accelerator, ema: EMA, state: RunState, config: TrainConfig) -> None:
    """Writes a checkpoint, whole or not at all, and deletes the oldest ones. Every process must call it."""
    final = config.folder / "checkpoints" / f"step_{state.step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        ema.save(partial / "ema.safetensors")
        config.save(partial / CONFIG)
        (partial / STATE).write_text(json.dumps(asdict(state)))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in checkpoints(config.folder)[: -config.checkpoint.keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, ema: EMA, folder: Path, run: Path) -> RunState:
    """Restores weights, optimizer and average from a checkpoint.

    Where it is not one of `run`, that run becomes one of its own: another at the tracker, its best still to come.

    Raises:
        UserError: the folder is no checkpoint, or one of another network.
    """
    try:
        state = RunState(**json.loads((folder / STATE).read_text()))
        accelerator.load_state(str(folder))
        ema.load(folder / "ema.safetensors", state.step)
    except Exception as error:  # missing files, foreign weights, broken archives: each library has its own exceptions
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"resume: {folder} cannot be continued from: {reason}") from error
    if run.resolve() not in folder.resolve().parents:
        state.tracker_id, state.best_loss = None, float("inf")
    accelerator.step = 0  # its count of micro-batches, of which a step may now have another number
    return state


def check_config(config: TrainConfig, folder: Path) -> None:
    """Compares the config with the one that the checkpoint was made with.

    Raises:
        UserError: something differs that cannot change on the way; the message names field, old and new value.
    """
    try:
        saved = flat(yaml.safe_load((folder / CONFIG).read_text()))
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"resume: {folder} cannot be continued from: its {CONFIG}: {reason}") from error
    before = {**flat(TrainConfig().plain()), **saved}  # what was not a field yet was as it is by default
    changed = [
        f"{name} is {value}, was {before[name]}"
        for name, value in flat(config.plain()).items()
        if not MAY_DIFFER.fullmatch(name) and value != before[name]
    ]
    if changed:
        raise UserError(f"resume: {folder} cannot be continued with another config: {'; '.join(changed)}")


def find_resume(resume: str, run: Path) -> Path | None:
    """The checkpoint that the config's `resume` means; None to start afresh.

    Raises:
        UserError: the run would be overwritten, or the checkpoint is not there.
    """
    existing = checkpoints(run)
    if resume == "no":
        if existing:
            raise UserError(
                f"{run} already holds checkpoints: continue with --resume auto, choose another --name, or delete it"
            )
        return None
    if resume == "auto":
        return existing[-1] if existing else None
    if not (Path(resume) / STATE).is_file():
        raise UserError(f"resume is {resume!r}, expected no, auto, or a checkpoint folder (with {STATE})")
    if existing and existing[-1].resolve() != Path(resume).resolve():
        raise UserError(
            f"resume is {resume!r}, but {run} already holds checkpoints up to {existing[-1].name}: "
            "continue with --resume auto, choose another --name, or delete them"
        )
    return Path(resume)
