"""Everything a run needs to be continued: <run>/checkpoints/.

step_00001000/              one checkpoint, complete: until it is, its name is .step_00001000.partial
    manifest.json           size and SHA-256 of every other file, written last
    state.json              `RunState`
    config.yaml             the run's config
    model.safetensors       the weights; sharded ones in model-00001-of-00008.safetensors …, a part each; those of
                            further networks of the objective in objective.<name>.safetensors
    average.safetensors     their running average, likewise
    optimizer.safetensors   `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`, likewise
    process_00000.json      random states of each process
latest                      the name of the newest one
step_00000500.damaged/      one that was found damaged, kept to be looked at
"""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from cdit.common.cli import load_yaml, parser_instance
from cdit.common.errors import UserError
from cdit.common.files import flush, read_json, read_text, write_whole
from cdit.training.config import TrainConfig, flat
from cdit.training.durable import manifest
from cdit.training.durable.random_state import random_state, restore_random_state
from cdit.training.durable.tensors import SavedTensors, file_name, fill, part, run_tensors
from cdit.training.ema import EMA

STATE = "state.json"
CONFIG = "config.yaml"
LATEST = "latest"
MAY_DIFFER = re.compile(
    r"(name|output|resume|allow_changes|steps|stop_at|micro_batch_size|compile|mixed_precision|activation_checkpointing"
    r"|deterministic|timeout_minutes|data\.(folder|prepare|splits|follow_links|workers|cache_gb|shard_cache(_gb)?|latents"
    r"|on_error)"
    r"|(validation|probe|checkpoint|tracking|sampler)\..*|optimizer\.max_bad_steps)"
)
"""Fields that a continued run may have other values of than the run had that it continues."""
FREE = ("objective_options.", "model.extra_conditioners.")
"""Fields whose names are a user's own."""
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
    data: str = ""
    """Fingerprint of the training set (see `WindowDataset`)."""
    best_loss: float | None = None
    """Smallest validation loss so far."""
    tracker_id: str | None = None
    """Identity of the run at the tracker."""
    rows: int = 0
    """Rows of metrics.jsonl that were written."""
    losses: list[float | None] = field(default_factory=list)
    """Of the steps since the last row of training metrics, which the next one is to tell of, too."""
    bad_steps: int = 0
    """Steps that were skipped because their gradient was not finite."""
    bad_in_a_row: int = 0
    """The last so many of them one after the other."""
    skipped_samples: int = 0
    """Samples that could not be read and counted for nothing."""


class Checkpoints:
    """Writes the checkpoints of a run, by a thread, while the training goes on; every process has one.

    Used as a context manager: a regular end waits for the last write, an exception breaks off what waits for others.

    Args:
        accelerator: the processes; its gradient scaler is saved, too.
        config: of the run.
        networks: the bare networks by name; the CDiT as `model`.
        optimizer: theirs.
        ema: its running average.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        networks: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        ema: EMA,
    ):
        self.accelerator, self.config, self.ema = accelerator, config, ema
        self.folder = config.folder / "checkpoints"
        self.saved_step: int | None = None
        self._tensors: Callable[[], dict[str, dict[str, Tensor]]] = lambda: run_tensors(networks, optimizer, ema)
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
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        tensors = {
            file_name(kind, named, index, processes): self._copy(kind, named) for kind, named in self._tensors().items()
        }
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        texts = {f"process_{index:05d}.json": json.dumps(random_state())}
        if self.accelerator.is_main_process:
            texts[STATE] = json.dumps(asdict(state), indent=2, allow_nan=False) + "\n"
            texts[CONFIG] = yaml.safe_dump(self.config.plain(), sort_keys=False)
        tensors = {file: copies for file, copies in tensors.items() if copies}
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

    def load(self, folder: Path, data: str = "") -> RunState:
        """Restores weights, optimizer, average and random states from a checkpoint.

        Where it is not one of this run, the run becomes one of its own: another at the tracker, its best still to come.

        Args:
            folder: the checkpoint.
            data: fingerprint of the training set; as with the config, `allow_changes` admits another.

        Raises:
            UserError: the folder is no checkpoint, or one of another network, or of a run on other data.
        """
        try:
            state = parser_instance(RunState, read_json(folder / STATE))
            for kind, named in self._tensors().items():
                with SavedTensors(folder, kind) as saved:
                    for name, tensor in named.items():
                        fill(tensor, saved.read(name))
            own = folder / f"process_{self.accelerator.process_index:05d}.json"
            if own.is_file():  # else there are more processes than there were
                restore_random_state(read_json(own))
            if self.accelerator.scaler is not None and state.scaler:
                self.accelerator.scaler.load_state_dict(state.scaler)
        except Exception as error:  # missing files, foreign weights: each library has its own exceptions
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(f"resume: {folder} cannot be continued from: {reason}") from error
        if state.data != data:
            said = "the trajectories of data.train_split, or how they lie in shards, are others than they were"
            if not self.config.allow_changes:
                raise UserError(
                    f"resume: {folder} cannot be continued: {said} (--allow_changes true to do it all the same)"
                )
            if self.accelerator.is_main_process:
                print(f"resume: changed from here on: {said}", file=sys.stderr)
            state.data = data
        self.ema.resume(state.step)
        if self.config.folder.resolve() not in folder.resolve().parents:
            state.tracker_id, state.best_loss, state.rows = None, None, 0
        elif self.config.folder.resolve() == folder.resolve().parents[1]:
            self.saved_step = state.step
        return state

    def _copy(self, kind: str, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of the tensors as they are now, in memory that the next copy uses again."""
        copies = {}
        for name, tensor in named.items():
            mine = part(tensor, self.accelerator.is_main_process)
            if mine is not None:
                if (kind, name) not in self._copies:
                    self._copies[kind, name] = torch.empty(mine.shape, dtype=mine.dtype, pin_memory=mine.is_cuda)
                copies[name] = self._copies[kind, name].copy_(mine, non_blocking=mine.is_cuda)
        return copies

    def _write(self, partial: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, str]) -> None:
        """Writes this process's files; the main process waits for the others' and makes a checkpoint of them."""
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        with _disk_errors(partial):
            for file, named in tensors.items():
                save_file(named, partial / file)
            for file, text in texts.items():
                (partial / file).write_text(text)
            files = [partial / file for file in (*tensors, *texts)]
            flush(files)
            entries = {path.name: manifest.entry(path) for path in files}
            if not self.accelerator.is_main_process:
                write_whole(partial / f"{index:05d}.receipt", json.dumps(entries))
                return
            entries |= self._others(partial, processes - 1)
            manifest.write_manifest(partial, dict(sorted(entries.items())))
            self._publish(partial)

    def _others(self, partial: Path, count: int) -> dict[str, manifest.Entry]:
        """What the other processes have written, when all have."""
        until = time.monotonic() + 60 * self.config.timeout_minutes
        while len(receipts := list(partial.glob("*.receipt"))) < count:
            if self._broken_off or time.monotonic() > until:
                raise UserError(f"{partial}: {count - len(receipts)} other processes have not written their part")
            time.sleep(POLL_S)
        entries = {}
        for receipt in receipts:
            entries |= json.loads(receipt.read_text())
            receipt.unlink()
        return entries

    def _publish(self, partial: Path) -> None:
        """Gives a finished checkpoint its name, points `latest` to it, and deletes those not to be kept."""
        final = self.folder / partial.name.removeprefix(".").removesuffix(".partial")
        if final.exists():
            final.rename(partial.with_suffix(".old"))
        partial.rename(final)
        write_whole(self.folder / LATEST, final.name + "\n")  # which has the disk take the checkpoint's name, too
        keep, keep_every = self.config.checkpoint.keep, self.config.checkpoint.keep_every
        for old in checkpoints(self.config.folder)[:-keep]:
            if not keep_every or step_of(old) % keep_every:
                old.rename(old.with_name(f".{old.name}.old"))
        for old in self.folder.glob(".step_*.old"):
            shutil.rmtree(old)


def checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first; they may have been damaged since."""
    found = (run / "checkpoints").glob("step_*")
    return sorted(p for p in found if re.fullmatch(r"step_\d{8}", p.name) and p.is_dir())


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint was made at, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def find_resume(config: TrainConfig) -> Path | None:
    """The checkpoint to continue, found sound and to go with the config; None to start afresh.

    With `auto`, damaged ones are named on stderr, and renamed so that they are kept and not looked at again.

    Raises:
        UserError: the run would be overwritten, or the checkpoint is not there or damaged, or all are, or it was made
            with another config.
    """
    folder = _named(config.resume, config.folder)
    if folder is not None:
        check_config(config, folder)
    return folder


def _named(resume: str, run: Path) -> Path | None:
    """The sound checkpoint that the config's `resume` means."""
    existing = checkpoints(run)
    if resume == "no":
        if existing:
            raise UserError(
                f"{run} already holds checkpoints: continue with --resume auto, choose another --name, or delete it"
            )
        return None
    if resume == "auto":
        return _newest_sound(run)
    folder = Path(resume)
    if not folder.is_dir():
        raise UserError(f"resume is {resume!r}, expected no, auto, or a checkpoint folder (with {manifest.MANIFEST})")
    if existing and existing[-1].resolve() != folder.resolve():
        raise UserError(
            f"resume is {resume!r}, but {run} already holds checkpoints up to {existing[-1].name}: "
            "continue with --resume auto, choose another --name, or delete them"
        )
    if problem := manifest.problem(folder):
        raise UserError(f"resume: {folder} cannot be continued from: {problem}")
    return folder


def _newest_sound(run: Path) -> Path | None:
    for folder in reversed(checkpoints(run)):
        problem = manifest.problem(folder)
        if problem is None:
            return folder
        kept = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(kept, ignore_errors=True)  # of an earlier time at the same step
        folder.rename(kept)
        print(f"{folder} is damaged: {problem}; kept as {kept.name}", file=sys.stderr)
    if list(run.glob("checkpoints/step_*.damaged")):
        raise UserError(f"resume: all checkpoints of {run} are damaged; choose another --name, or delete the run")
    return None


def check_config(config: TrainConfig, folder: Path) -> None:
    """Compares the config with the one that the checkpoint was made with.

    With `allow_changes`, what changed is only said on stderr.

    Raises:
        UserError: something differs that cannot change on the way; the message names field, old and new value.
    """
    try:
        saved = flat(load_yaml(read_text(folder / CONFIG)))
    except (UserError, AttributeError, yaml.YAMLError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"resume: {folder} cannot be continued from: its {CONFIG}: {reason}") from error
    before = {**flat(TrainConfig().plain()), **saved}  # what was not a field yet was as it is by default
    now = flat(config.plain())
    free = dict.fromkeys(name for name in before if name.startswith(FREE))  # which the config may lack now
    changed = [
        f"{name} is {now.get(name)}, was {before.get(name)}"
        for name in {**now, **free}
        if not MAY_DIFFER.fullmatch(name) and now.get(name) != before.get(name)
    ]
    if changed and not config.allow_changes:
        raise UserError(
            f"resume: {folder} cannot be continued with another config: {'; '.join(changed)} "
            "(--allow_changes true to do it all the same)"
        )
    if changed:
        print(f"resume: changed from here on: {'; '.join(changed)}", file=sys.stderr)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """A disk that takes no more, as a `UserError`; nothing of the checkpoint stays there then."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(f"{folder}: the checkpoint cannot be written ({reason})") from error
