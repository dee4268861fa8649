"""Everything a run needs to be continued: <run>/checkpoints/.

    step_00001000/              one checkpoint, complete: until it is, its name is .step_00001000.partial
        manifest.json           size and SHA-256 of every other file, written last
        state.json              `RunState`
        config.yaml             the run's config
        model.safetensors       the weights; where they are sharded, model-00001-of-00008.safetensors … hold each process's part
        average.safetensors     their running average, likewise
        optimizer.safetensors   `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`, likewise
        process_00000.json      random states of each process
    latest                      link to the newest one
    step_00000500.damaged/      one that was found damaged, kept to be looked at
"""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from cdit.errors import UserError
from cdit.training import manifest
from cdit.training.config import TrainConfig, flat
from cdit.training.ema import EMA
from cdit.training.random_state import random_state, restore_random_state
from cdit.training.tensors import SavedTensors, fill, part, run_tensors

STATE = "state.json"
CONFIG = "config.yaml"
LATEST = "latest"
MAY_DIFFER = re.compile(
    r"(name|output|resume|allow_changes|steps|stop_at|micro_batch_size|compile|mixed_precision|activation_checkpointing"
    r"|deterministic|timeout_minutes|data\.(folder|prepare|splits|workers|cache_gb|shard_cache_gb|latents|on_error)"
    r"|(validation|probe|checkpoint|tracking|sampler)\..*|optimizer\.max_bad_steps)"
)
"""Fields that a continued run may have other values of than the run had that it continues."""
POLL_S = 0.05


@dataclass
class RunState:
    """What of a run is neither weights nor optimizer state. Random draws are keyed by the step and need no state."""

    step: int = 0
    """Steps done."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """State of the learning-rate schedule."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the gradient scaler; empty without one."""
    best_loss: float = float("inf")
    """Smallest validation loss so far."""
    tracker_id: str | None = None
    """Identity of the run at the tracker."""
    rows: int = 0
    """Rows of metrics.jsonl that were written."""
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last row of training metrics, which the next one is to tell of, too."""
    bad_steps: int = 0
    """Steps that were skipped because their gradient was not finite."""
    bad_in_a_row: int = 0
    """The last so many of them one after the other."""


class Checkpoints:
    """Writes the checkpoints of a run, by a thread, while the training goes on; every process has one.

    Used as a context manager: a regular end waits for the last write, an exception breaks off what waits for others.

    Args:
        accelerator: the processes; its gradient scaler is saved, too.
        config: of the run.
        cdit: the bare network.
        optimizer: its AdamW.
        ema: its running average.
    """

    def __init__(
        self, accelerator: Accelerator, config: TrainConfig, cdit: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA
    ):
        self.accelerator, self.config, self.ema = accelerator, config, ema
        self.folder = config.folder / "checkpoints"
        self.saved_step: int | None = None
        self._tensors: Callable[[], dict[str, dict[str, Tensor]]] = lambda: run_tensors(cdit, optimizer, ema)
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        self._broken_off = False

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._broken_off = kind is not None
        try:
            if kind is None:
                self.wait()
        finally:
            self._writer.shutdown()

    def save(self, state: RunState) -> None:
        """Starts to write a checkpoint of this moment, whole or not at all. Every process must call it.

        Raises:
            UserError: this or the last one cannot be written.
        """
        self.wait()
        partial = self.folder / f".step_{state.step:08d}.partial"
        if self.accelerator.is_main_process:
            with _disk_errors(partial):
                for leftover in self.folder.glob(".step_*"):
                    shutil.rmtree(leftover)
                partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.scaler is not None:
            state.scaler = self.accelerator.scaler.state_dict()
        tensors = {kind: self._copy(kind, named) for kind, named in self._tensors().items()}
        texts = {f"process_{self.accelerator.process_index:05d}.json": json.dumps(random_state())}
        if self.accelerator.is_main_process:
            texts[STATE] = json.dumps(asdict(state), indent=2) + "\n"
            texts[CONFIG] = yaml.safe_dump(self.config.plain(), sort_keys=False)
        self._writing = self._writer.submit(self._write, partial, tensors, texts)
        self.saved_step = state.step
        if not self.config.checkpoint.background:
            self.wait()

    def wait(self) -> None:
        """Waits until what `save` began is written.

        Raises:
            UserError: it could not be.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def check(self) -> None:
        """Raises what went wrong in writing, if it is known by now."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def load(self, folder: Path) -> RunState:
        """Restores weights, optimizer, average and random states from a checkpoint.

        Where it is not one of this run, the run becomes one of its own: another at the tracker, its best still to come.

        Raises:
            UserError: the folder is no checkpoint, or one of another network.
        """
        try:
            state = RunState(**json.loads((folder / STATE).read_text()))
            for kind, named in self._tensors().items():
                with SavedTensors(folder, kind) as saved:
                    for name, tensor in named.items():
                        fill(tensor, saved.read(name))
            own = folder / f"process_{self.accelerator.process_index:05d}.json"
            if own.is_file():  # else there are more processes than there were
                restore_random_state(json.loads(own.read_text()))
            if self.accelerator.scaler is not None and state.scaler:
                self.accelerator.scaler.load_state_dict(state.scaler)
        except Exception as error:  # missing files, foreign weights, broken archives: each library has its own exceptions
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(f"resume: {folder} cannot be continued from: {reason}") from error
        self.ema.resume(state.step)
        if self.config.folder.resolve() not in folder.resolve().parents:
            state.tracker_id, state.best_loss, state.rows = None, float("inf"), 0
        elif self.config.folder.resolve() == folder.resolve().parents[1]:
            self.saved_step = state.step
        return state

    def _copy(self, kind: str, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of the tensors as they are now, in memory that the next copy uses again."""
        copies = {}
        for name, tensor in named.items():
            mine = part(tensor)
            if mine is None:
                continue
            if (kind, name) not in self._copies:
                self._copies[kind, name] = torch.empty_like(mine, device="cpu", pin_memory=mine.is_cuda)
            copies[name] = self._copies[kind, name].copy_(mine, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _write(self, partial: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, str]) -> None:
        """Writes this process's files, and on the main process, when all have, the manifest."""
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        sharded = any(part.is_sharded for part in ())  # replaced below
        with _disk_errors(partial):
            files = []
            for name, text in texts.items():
                manifest.write_through(partial / name, text)
                files.append(name)
            receipt = {name: manifest.entry(partial / name) for name in files}
