"""Everything needed to continue a run: <run>/checkpoints/.

step_00001000/              one complete checkpoint; until complete, its name is .step_00001000.partial
    manifest.json           size and SHA-256 of every other file, written last
    state.json              `RunState`
    config.yaml             the run's config
    model.safetensors       the weights; if sharded, one part in each model-00001-of-00008.safetensors …; those of
                            further networks of the objective in objective.<name>.safetensors
    average.safetensors     their running average, likewise
    optimizer.safetensors   `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`, likewise
    process_00000.json      random states of each process
latest                      the name of the newest one
step_00000500.damaged/      a damaged one, kept for inspection
"""

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
from cdit.common.files import flush, read_json, read_text, to_json, write_json, write_whole
from cdit.data.config import Source
from cdit.training.config import TrainConfig, flat
from cdit.training.durable import manifest
from cdit.training.durable.random_state import random_state, restore_random_state
from cdit.training.durable.tensors import SavedTensors, file_name, fill, part, run_tensors
from cdit.training.ema import EMA

STATE = "state.json"
CONFIG = "config.yaml"
LATEST = "latest"
MAY_DIFFER = (
    r"(name|output|resume|allow_changes|steps|stop_at|train_seconds|stop_at_seconds|micro_batch_size|compile"
    r"|mixed_precision|activation_checkpointing|tracking|project|log_every|deterministic|timeout_minutes"
    r"|data\.(mix\.\d+\.)?(folder|prepare|splits|follow_links|source|workers|cache_gb|shard_cache(_gb)?|latents"
    r"|on_error)"
    r"|(validation|probe|checkpoint|sampler)\..*|optimizer\.(max_bad_steps|decay_share))"
)
"""Fields that may change when a run is continued."""
FREE = ("objective_options.", "model.extra_conditioners.", "data.mix.")
"""Fields that may be missing from one of two configs."""
POLL_S = 0.05


@dataclass
class RunState:
    """The state of a run besides weights and optimizer. Random draws are keyed by the step and need no state."""

    step: int = 0
    seconds: float = 0.0
    """Seconds of training, if the config has train_seconds or stop_at_seconds."""
    schedule: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the gradient scaler; empty without one."""
    data: str = ""
    """Fingerprint of the training set (see `WindowDataset`)."""
    units: dict[str, Any] = field(default_factory=dict)
    """Units of the world model; empty in older checkpoints."""
    best_loss: float | None = None
    """Smallest validation loss so far."""
    tracker_id: str | None = None
    """Id of the run at the tracker."""
    rows: int = 0
    losses: list[float | None] = field(default_factory=list)
    """Losses of the steps since the last row of training metrics, which the next row includes."""
    bad_steps: int = 0
    """Number of steps skipped because their gradient was not finite."""
    bad_in_a_row: int = 0
    """How many of them were the latest consecutive steps."""
    skipped_samples: int = 0
    """Number of samples that could not be read and got weight zero."""


class Checkpoints:
    """Writes the checkpoints of a run in a thread while training continues; every process has one.

    A context manager: a regular exit waits for the last write; an exception aborts waiting for other processes.
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
        """Starts writing a checkpoint of the current state, atomically. Every process must call it.

        Raises:
            UserError: this or the previous one cannot be written.
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
        texts = {f"process_{index:05d}.json": to_json(random_state())}
        if self.accelerator.is_main_process:
            texts[STATE] = to_json(asdict(state), indent=2) + "\n"
            texts[CONFIG] = yaml.safe_dump(self.config.plain(), sort_keys=False)
        tensors = {file: copies for file, copies in tensors.items() if copies}
        self._writing = self._writer.submit(self._write, partial, tensors, texts)
        self.saved_step = state.step
        if not self.config.checkpoint.background:
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint that `save` started is written.

        Raises:
            UserError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def check(self) -> None:
        """Raises the error of a write that has failed by now."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def load(self, folder: Path, data: str = "") -> RunState:
        """Restores weights, optimizer, average and random states from a checkpoint.

        A checkpoint of another run starts a new run: with a new id at the tracker and no best loss yet.

        Args:
            folder: the checkpoint.
            data: fingerprint of the training set; as with the config, `allow_changes` allows it to differ.

        Raises:
            UserError: the folder is not a checkpoint, or belongs to another network or to a run on other data.
        """
        try:
            state = parser_instance(RunState, read_json(folder / STATE))
            for kind, named in self._tensors().items():
                with SavedTensors(folder, kind) as saved:
                    for name, tensor in named.items():
                        fill(tensor, saved.read(name))
            own = folder / f"process_{self.accelerator.process_index:05d}.json"
            if own.is_file():  # otherwise there are more processes than before
                restore_random_state(read_json(own))
            if self.accelerator.scaler is not None and state.scaler:
                self.accelerator.scaler.load_state_dict(state.scaler)
        except Exception as error:  # missing files, foreign weights: each library has its own exceptions
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(f"resume: {folder} cannot be continued from: {reason}") from error
        if state.data != data:
            change = "the trajectories of data.train_split, or their arrangement in shards, have changed"
            if not self.config.allow_changes:
                raise UserError(
                    f"resume: {folder} cannot be continued: {change} (pass --allow_changes to continue anyway)"
                )
            if self.accelerator.is_main_process:
                print(f"resume: changed from here on: {change}", file=sys.stderr)
            state.data, state.best_loss = data, None
        if _changes(self.config, folder, rf"(?!validation\.samples){MAY_DIFFER}"):  # losses of another kind
            state.best_loss = None
        self.ema.resume(state.step)
        if self.config.folder.resolve() not in folder.resolve().parents:
            state.tracker_id, state.best_loss, state.rows = None, None, 0
        elif self.config.folder.resolve() == folder.resolve().parents[1]:
            self.saved_step = state.step
        return state

    def _copy(self, kind: str, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """A copy of this process's part of the tensors, in memory that the next copy reuses."""
        copies = {}
        for name, tensor in named.items():
            mine = part(tensor, self.accelerator.is_main_process)
            if mine is not None:
                if (kind, name) not in self._copies:
                    self._copies[kind, name] = torch.empty(mine.shape, dtype=mine.dtype, pin_memory=mine.is_cuda)
                copies[name] = self._copies[kind, name].copy_(mine, non_blocking=mine.is_cuda)
        return copies

    def _write(self, partial: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, str]) -> None:
        """Writes this process's files; the main process waits for all others and publishes the checkpoint."""
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
                write_json(partial / f"{index:05d}.receipt", entries)
                return
            entries |= self._others(partial, processes - 1)
            manifest.write_manifest(partial, dict(sorted(entries.items())))
            self._publish(partial)

    def _others(self, partial: Path, count: int) -> dict[str, manifest.Entry]:
        """The files of the other processes, once all have written theirs."""
        until = time.monotonic() + 60 * self.config.timeout_minutes
        while len(receipts := list(partial.glob("*.receipt"))) < count:
            if self._broken_off or time.monotonic() > until:
                raise UserError(f"{partial}: {count - len(receipts)} other processes have not written their part")
            time.sleep(POLL_S)
        entries = {}
        for receipt in receipts:
            entries |= read_json(receipt)
            receipt.unlink()
        return entries

    def _publish(self, partial: Path) -> None:
        """Renames a finished checkpoint to its final name, points `latest` to it, and deletes old ones."""
        final = self.folder / partial.name.removeprefix(".").removesuffix(".partial")
        if final.exists():
            final.rename(partial.with_suffix(".old"))
        partial.rename(final)
        write_whole(self.folder / LATEST, final.name + "\n")  # which also flushes the checkpoint's name to disk
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
    """The step of a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step_"))


def find_resume(config: TrainConfig) -> Path | None:
    """The checkpoint to continue, after checking it and its config; None to start from the beginning.

    With `auto`, damaged checkpoints are reported on stderr and renamed, so that they are kept but not tried again.

    Raises:
        UserError: a run would be overwritten; the checkpoint is missing or damaged, or all are; or it was made with
            another config, or is beyond the config's steps.
    """
    folder = _named(config.resume, config.folder)
    if folder is not None:
        check_config(config, folder)
        step = read_json(folder / STATE)["step"]
        if config.train_seconds is None and step > config.steps:
            raise UserError(f"steps is {config.steps}, but {folder} is of step {step}")
    return folder


def _named(resume: str, run: Path) -> Path | None:
    """The valid checkpoint that the config's `resume` refers to."""
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
        shutil.rmtree(kept, ignore_errors=True)  # left from an earlier attempt at the same step
        folder.rename(kept)
        print(f"{folder} is damaged: {problem}; kept as {kept.name}", file=sys.stderr)
    if list(run.glob("checkpoints/step_*.damaged")):
        raise UserError(f"resume: all checkpoints of {run} are damaged; choose another --name, or delete the run")
    return None


def check_config(config: TrainConfig, folder: Path) -> None:
    """Compares the config with that of the checkpoint.

    With `allow_changes`, differences are only printed on stderr.

    Raises:
        UserError: a field differs that must not change; the message names field, old and new value.
    """
    may_differ = MAY_DIFFER
    if config.objective == "self_rollout":  # which trains on what the sampler samples
        may_differ = rf"(?!sampler\.){may_differ}"
    changed = _changes(config, folder, may_differ)
    if any(text.startswith("units is") for text in changed):  # which are those of the checkpoint
        raise UserError(f"resume: {folder} cannot be continued with other units: {'; '.join(changed)}")
    if changed and not config.allow_changes:
        raise UserError(
            f"resume: {folder} cannot be continued with another config: {'; '.join(changed)} "
            "(pass --allow_changes to continue anyway)"
        )
    if changed:
        print(f"resume: changed from here on: {'; '.join(changed)}", file=sys.stderr)


def _changes(config: TrainConfig, folder: Path, may_differ: str) -> list[str]:
    """The fields, with new and old value, that differ from the checkpoint's and do not match a regular expression."""
    try:
        saved = _fields(load_yaml(read_text(folder / CONFIG)))
    except (UserError, AttributeError, yaml.YAMLError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"resume: {folder} cannot be continued from: its {CONFIG}: {reason}") from error
    before = {**flat(TrainConfig().plain()), **saved}  # fields that did not exist yet had the default value
    now = _fields(config.plain())
    free = dict.fromkeys(name for name in before if name.startswith(FREE))  # may be missing from the current config
    return [
        f"{name} is {now.get(name)}, was {before.get(name)}"
        for name in {**now, **free}
        if not re.fullmatch(may_differ, name) and now.get(name) != before.get(name)
    ]


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """All fields by name, also those of each dataset of data.mix, with their defaults."""
    found = flat(values)
    for number, source in enumerate(found.pop("data.mix", None) or []):
        fields = {**asdict(Source(folder="")), **source}
        found |= {f"data.mix.{number}.{name}": value for name, value in fields.items()}
    return found


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns disk errors into a `UserError` and removes the partial checkpoint."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(f"{folder}: the checkpoint cannot be written ({reason})") from error
