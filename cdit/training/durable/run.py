"""A durable training run: batches, checkpoints, signals, bad steps and log behind a few calls."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from cdit.batch import Batch
from cdit.common.cli import parser_instance
from cdit.common.errors import Interrupted, UserError
from cdit.common.files import read_json
from cdit.data.loader import WindowLoader, loader
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.windows import WindowDataset
from cdit.training.config import TrainConfig
from cdit.training.durable.bad_steps import BadSteps
from cdit.training.durable.checkpoints import STATE, Checkpoints, RunState, find_resume
from cdit.training.durable.processes import Processes, on_main
from cdit.training.durable.signals import StopSignals
from cdit.training.ema import EMA
from cdit.training.setup import prepare_folder, resume_schedule, set_rates
from cdit.training.sharding import bare_networks, whole, whole_world
from cdit.training.tracking import Tracker
from cdit.world_model import Units, WorldModel

ENDLESS = 2**40
"""More steps than any run has."""


class DurableRun:
    """One run, from its start or its newest checkpoint to its last step.

    In `training`, the loop calls `next_batch`, `before_step` and `after_step` at each step. Validation and probes,
    which follow a step, come first in the loop, so that a run resumed at that step repeats them.

    Raises:
        UserError: there is no usable checkpoint to resume, or one would be overwritten.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, signals: StopSignals):
        self.config, self.accelerator, self.signals = config, accelerator, signals
        self._most_steps = config.steps if config.train_seconds is None else ENDLESS
        self.last_step = min(self._most_steps, config.stop_at or self._most_steps)
        self._counts_seconds = config.train_seconds is not None or config.stop_at_seconds is not None
        self._processes = Processes(accelerator, timedelta(minutes=config.timeout_minutes))
        self._resume_from = on_main(accelerator, lambda: find_resume(config))

    @property
    def units(self) -> Units | None:
        """Those of the checkpoint that the run continues from, if it has them."""
        saved = read_json(self._resume_from / STATE).get("units") if self._resume_from else None
        return parser_instance(Units, saved) if saved else None

    @contextmanager
    def training(
        self,
        train_set: WindowDataset,
        world: WorldModel,
        optimizer: torch.optim.Optimizer,
        schedule: LambdaLR,
        ema: EMA,
    ) -> Iterator[None]:
        """Restores a checkpoint if the run resumes one, and writes checkpoints until the end of the `with`.

        The average is that of the CDiT; optimizer and checkpoints include the objective's networks.

        Raises:
            UserError: the checkpoint does not fit, or the run's folder cannot be written to.
        """
        config, accelerator = self.config, self.accelerator
        self.train_set, self.world, self.schedule, self.ema = train_set, world, schedule, ema
        self._networks = bare_networks(world)
        prepare_folder(config, accelerator)
        limit = config.optimizer.max_bad_steps
        self._bad_steps = BadSteps(optimizer, accelerator, config.folder, limit, self._batch_again)
        with Checkpoints(accelerator, config, self._networks, optimizer, ema) as self._checkpoints:
            units = asdict(world.description.units)
            self.state = RunState(data=train_set.fingerprint(), units=units)
            if self._resume_from:
                self.state = self._checkpoints.load(self._resume_from, self.state.data)
                self.state.units = units
                if config.train_seconds is not None and self.step and not self.state.seconds:
                    raise UserError("train_seconds: this run did not count its time; give steps instead")
                resume_schedule(schedule, self.state.schedule, self.step if config.train_seconds is None else None)
            self._batches = iter(self._loader(self.step, self._most_steps))
            self.tracker = Tracker(accelerator, config, self.state)
            main = accelerator.is_main_process
            total = config.steps if config.train_seconds is None else None
            self._bar = tqdm(total=total, initial=self.step, desc=config.name, disable=not main)
            # Shares of the losses since the last row; the main process counts those from a checkpoint.
            known = [math.nan if loss is None else loss if main else 0.0 for loss in self.state.losses]
            self._losses = list(torch.tensor(known, device=accelerator.device))
            self._timed_from, self._since = self.step, time.perf_counter()
            self._started = self._since - self.state.seconds
            self.signals.defer()
            yield
            self._bar.close()

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return self.state.step

    @property
    def is_finished(self) -> bool:
        """Whether all steps of the schedule are completed, or all its time has passed."""
        if self.config.train_seconds is not None:
            return self.state.seconds >= self.config.train_seconds
        return self.step == self.config.steps

    @property
    def is_done(self) -> bool:
        """Whether this process is done: `stop_at` and `stop_at_seconds` may end it before the schedule."""
        stop_at = math.inf if self.config.stop_at_seconds is None else self.config.stop_at_seconds
        return self.is_finished or self.step >= self.last_step or self.state.seconds >= stop_at

    def is_due(self, every: int) -> bool:
        """Whether something done every `every` steps and after the last one is due now; 0: only after the last one."""
        return self.is_finished or bool(self.step and every and self.step % every == 0)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Applies the averaged weights, in evaluation mode, and excludes the time from that of training."""
        with self._not_timed(), self.ema.applied():
            yield

    def next_batch(self) -> tuple[list[Batch], float]:
        """This process's micro-batches of the step, and the total number of samples over all processes.

        Raises:
            Interrupted: a signal stopped the run, after a checkpoint.
        """
        parts = [next(self._batches) for _ in range(self.accelerator.gradient_accumulation_steps)]
        weight = sum(part.weight.sum().item() for part in parts)
        missing = [message for part in parts for message in part.skipped]
        stop = self.signals.received is not None
        samples, skipped, stopping = self._processes.sum(weight, len(missing), stop)
        for message in missing:
            tqdm.write(f"skipped: {message}", file=sys.stderr)
        if stopping:
            if self._checkpoints.saved_step != self.step:
                self._save()
            self._checkpoints.wait()
            # A launcher that sees one process exit would kill the one that is writing.
            self.accelerator.wait_for_everyone()
            raise Interrupted(f"at step {self.step}, which is saved; --resume auto continues")
        self.state.skipped_samples += int(skipped)
        return parts, max(samples, 1)

    def before_step(self, norm: Tensor, loss: Tensor) -> None:
        """Makes the optimizer skip the step if its gradient is not finite.

        Args:
            norm: () of the gradient.
            loss: () this process's share of the step's loss.
        """
        self._norm = whole(norm)
        self._bad_steps.before(self.step, self._norm, loss)
        self._losses.append(loss)

    def after_step(self) -> None:
        """Counts the step; logs metrics and writes a checkpoint if they are due."""
        self.state.step += 1
        if self._counts_seconds:
            self._count_seconds()
        self._bar.update()
        if self.step % self.config.log_every == 0 or self.is_finished:
            self._log_row()
        self.state.rows = self.tracker.rows  # without those of the next validation, which a resumed run repeats
        self._checkpoints.check()
        if self.is_done or self.step % self.config.checkpoint.every == 0:
            with self._not_timed():
                self._save()

    def keep_if_best(self, loss: float) -> None:
        """Saves the world model to <run>/best/ if no validation loss was smaller; every process must call it."""
        best = self.state.best_loss
        if math.isfinite(loss) and (best is None or loss < best):
            self.state.best_loss = loss
            self.save_world("best")

    def save_world(self, name: str) -> None:
        """Saves the world model, with the weights it holds now, to <run>/<name>/; every process must call it."""
        if complete := whole_world(self.world, self.accelerator):
            complete.save_pretrained(self.config.folder / name)

    def _loader(self, start: int, stop: int, workers: int | None = None) -> WindowLoader:
        """This process's micro-batches of the steps from start to stop."""
        sampler = KeyedBatchSampler(
            len(self.train_set),
            self.config.batch_size,
            self.config.seed,
            start_step=start,
            steps=stop,
            process_index=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            micro_batches=self.accelerator.gradient_accumulation_steps,
            order=self.train_set.order,
        )
        data = self.config.data if workers is None else replace(self.config.data, workers=workers)
        return loader(self.train_set, sampler, data)

    def _batch_again(self, step: int) -> WindowLoader:
        return self._loader(step, step + 1, workers=0)

    def _joint_losses(self) -> Tensor:
        """The losses of all processes, added in a fixed order; that of a reduction depends on their number."""
        device = self.accelerator.device
        shares = torch.stack(self._losses) if self._losses else torch.zeros(0, device=device)
        return self.accelerator.gather(shares[None]).cpu().double().sum(dim=0).float()

    def _log_row(self) -> None:
        self._bad_steps.look(self.state)
        losses = self._joint_losses()
        loss = losses[losses.isfinite()].mean().item()
        samples = (self.step - self._timed_from) * self.config.batch_size * self.config.data.goals
        rate = samples / (time.perf_counter() - self._since)
        self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} samples/s")
        row = {
            "train/loss": loss,
            "train/gradient_norm": self._norm.item(),
            "train/learning_rate": self.schedule.optimizer.param_groups[0]["lr"],
            "train/samples_per_second": rate,
            "train/bad_steps": self.state.bad_steps,
            "train/skipped_samples": self.state.skipped_samples,
        }
        self.tracker.log(row, self.step)
        self._losses, self._timed_from, self._since = [], self.step, time.perf_counter()

    def _count_seconds(self) -> None:
        """Counts the main process's time, so that all processes stop at the same step, and adjusts the learning rate to
        it."""
        own = time.perf_counter() - self._started if self.accelerator.is_main_process else 0.0
        (self.state.seconds,) = self._processes.sum(own)
        if self.config.train_seconds is not None:
            share = min(self.state.seconds / self.config.train_seconds, 1.0)
            self.schedule.last_epoch = share * self.config.steps
            set_rates(self.schedule)

    def _save(self) -> None:
        self._bad_steps.look(self.state)
        for name, network in self._networks.items():
            if not all(p.isfinite().all() for p in network.parameters()):
                raise UserError(
                    f"weights of {name} are not finite at step {self.step}: try a lower optimizer.learning_rate"
                )
        self.state.schedule = self.schedule.state_dict()
        self.state.losses = [loss if math.isfinite(loss) else None for loss in self._joint_losses().tolist()]
        self._checkpoints.save(self.state)

    @contextmanager
    def _not_timed(self) -> Iterator[None]:
        pause = time.perf_counter()
        yield
        pause = time.perf_counter() - pause
        self._since += pause
        self._started += pause
