"""Trains a CDiT world model: `accelerate launch train.py --config configs/quickstart.yaml`."""

import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from cdit.common.cli import parse_config, run
from cdit.common.errors import Interrupted, UserError
from cdit.common.randomness import seed_of
from cdit.data.loader import WindowLoader, loader
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.windows import WindowDataset
from cdit.training.batch import noisy_batch
from cdit.training.config import TrainConfig
from cdit.training.durable.bad_steps import BadSteps
from cdit.training.durable.checkpoints import Checkpoints, RunState, find_resume
from cdit.training.durable.failures import explained
from cdit.training.durable.processes import Processes, on_main
from cdit.training.durable.signals import StopSignals, end_with_launcher
from cdit.training.ema import EMA
from cdit.training.probes import Probes
from cdit.training.setup import (
    available_cpus,
    build_accelerator,
    build_optimizer,
    build_world,
    micro_batches,
    prepare_data,
    prepare_folder,
    resume_schedule,
    use_latents,
)
from cdit.training.sharding import shard, take_wish, whole, whole_world
from cdit.training.tracking import Tracker
from cdit.training.validation import Validation
from cdit.world_model import WorldModel

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def main() -> None:
    """Reads the config and trains, until done or told to stop."""
    config = parse_config(TrainConfig, __doc__, default_file=QUICKSTART)
    config.validate()
    config.check_folder()
    end_with_launcher()
    with StopSignals() as signals, explained():
        train(config, signals)


def train(config: TrainConfig, signals: StopSignals) -> None:
    """Data, model, the loop."""
    sharded = take_wish()
    accelerator = build_accelerator(config, sharded)
    processes = Processes(accelerator, timedelta(minutes=config.timeout_minutes))
    accelerator.gradient_accumulation_steps = micro_batches(config, accelerator.num_processes)
    if accelerator.device.type == "cpu":  # the launcher leaves each process one thread
        torch.set_num_threads(max(1, available_cpus() // accelerator.num_processes))
    resume_from = on_main(accelerator, lambda: find_resume(config))

    # Data: recorded where missing, then windows of past frames and goals.
    prepare_data(config.data, accelerator)
    train_set = WindowDataset(config.data, config.data.train_split, config.seed)
    test_set = WindowDataset(config.data, config.data.test_split, config.seed)

    # Model, optimizer, and the running average of the weights. `cdit` is the bare network, `network` what is trained.
    world = build_world(config, train_set)
    cdit = world.cdit
    world.codec.to(accelerator.device)
    use_latents((train_set, test_set), world.codec, config)
    network = shard(cdit, accelerator, config.compile) if sharded else accelerator.prepare(cdit)
    optimizer, schedule = build_optimizer(cdit, config.optimizer, config.steps)
    optimizer = accelerator.prepare(optimizer)
    ema = EMA(cdit, config.ema)

    def batches(start: int, stop: int) -> KeyedBatchSampler:
        """Which windows this process has in these steps."""
        return KeyedBatchSampler(
            len(train_set),
            config.batch_size,
            config.seed,
            start_step=start,
            steps=stop,
            process_index=accelerator.process_index,
            processes=accelerator.num_processes,
            micro_batches=accelerator.gradient_accumulation_steps,
            order=train_set.order,
        )

    def batch_again(step: int) -> WindowLoader:
        return loader(train_set, batches(step, step + 1), replace(config.data, workers=0))

    validation = Validation(test_set, config.validation, config.seed)
    probes = Probes(test_set, cdit, config, accelerator)
    bad_steps = BadSteps(optimizer, accelerator, config.folder, config.optimizer.max_bad_steps, batch_again)
    prepare_folder(config, accelerator)
    with Checkpoints(accelerator, config, cdit, optimizer, ema) as checkpoints:
        state = RunState(data=train_set.fingerprint())
        if resume_from:
            state = checkpoints.load(resume_from, state.data)
            resume_schedule(schedule, state.schedule)
        loaded = iter(loader(train_set, batches(state.step, config.steps), config.data))
        tracker = Tracker(accelerator, config, state)

        def joint_losses() -> Tensor:
            """All processes' `losses`, added in a fixed order: that of a reduction depends on how many there are."""
            shares = torch.stack(losses) if losses else torch.zeros(0, device=accelerator.device)
            return accelerator.gather(shares[None]).cpu().double().sum(dim=0).float()

        def save() -> None:
            bad_steps.look(state)
            if not all(p.isfinite().all() for p in cdit.parameters()):
                raise UserError(f"weights are not finite at step {state.step}: try a lower optimizer.learning_rate")
            state.schedule = schedule.state_dict()
            state.losses = joint_losses().tolist()
            checkpoints.save(state)

        # The loop. What a step is followed by (validation, probes) comes after its checkpoint, and first on resuming.
        last_step = min(config.steps, config.stop_at or config.steps)
        bar = tqdm(total=config.steps, initial=state.step, desc=config.name, disable=not accelerator.is_main_process)
        known = state.losses if accelerator.is_main_process else [0.0] * len(state.losses)
        losses = list(torch.tensor(known, device=accelerator.device))  # shares of the steps since the last row
        timed_from, since = state.step, time.perf_counter()
        network.train()
        signals.defer()
        while True:
            finished, pause = state.step == config.steps, time.perf_counter()
            if state.step and (finished or state.step % config.validation.every == 0):
                with ema.applied():
                    measured = validation.run(world, network, accelerator)
                    if measured["validation/loss"] < state.best_loss:
                        state.best_loss = measured["validation/loss"]
                        if complete := whole_world(world, accelerator):
                            complete.save_pretrained(config.folder / "best")
                tracker.log(measured, state.step)
            if finished or (state.step and config.probe.every and state.step % config.probe.every == 0):
                with ema.applied():
                    probes.run(whole_world(world, accelerator), tracker, state.step, finished)
            since += time.perf_counter() - pause
            if state.step >= last_step:
                break

            # All processes' samples together are the step's batch: its loss is their weighted mean.
            parts = [next(loaded) for _ in range(accelerator.gradient_accumulation_steps)]
            weight = sum(part["weight"].sum().item() for part in parts)
            missing = [message for part in parts for message in part["skipped"]]
            samples, skipped, stopping = processes.sum(weight, len(missing), signals.received is not None)
            for message in missing:
                tqdm.write(f"skipped: {message}", file=sys.stderr)
            if stopping:
                if checkpoints.saved_step != state.step:
                    save()
                checkpoints.wait()
                accelerator.wait_for_everyone()  # a launcher that sees one process end would end the one that writes
                raise Interrupted(f"at step {state.step}, which is saved; --resume auto continues")
            loss = backward(config, accelerator, world, network, parts, state.step, samples)
            norm = whole(accelerator.clip_grad_norm_(network.parameters(), config.optimizer.max_grad_norm))
            bad_steps.before(state.step, norm, loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            schedule.step()
            ema.step()
            state.step += 1
            state.skipped_samples += int(skipped)
            bar.update()

            if state.step % config.tracking.every == 0 or state.step == config.steps:
                bad_steps.look(state)
                mean_loss = joint_losses()
                mean_loss = mean_loss[mean_loss.isfinite()].mean().item()
                steps = state.step - timed_from
                rate = steps * config.batch_size * config.data.goals / (time.perf_counter() - since)
                bar.set_postfix_str(f"loss {mean_loss:.4f}, {rate:.0f} samples/s")
                tracker.log(
                    {
                        "train/loss": mean_loss,
                        "train/gradient_norm": norm.item(),
                        "train/learning_rate": schedule.get_last_lr()[0],
                        "train/samples_per_second": rate,
                        "train/bad_steps": state.bad_steps,
                        "train/skipped_samples": state.skipped_samples,
                    },
                    state.step,
                )
                losses, timed_from, since = [], state.step, time.perf_counter()
            state.rows = tracker.rows  # without those of a validation to come, which a run that is continued repeats
            checkpoints.check()
            if state.step == last_step or state.step % config.checkpoint.every == 0:
                pause = time.perf_counter()
                save()
                since += time.perf_counter() - pause

        bar.close()
        with ema.applied():
            if complete := whole_world(world, accelerator):
                complete.save_pretrained(config.folder / "last")
        tracker.finish()
    accelerator.print(f"done: {config.folder} holds the world model, metrics.jsonl and pictures")


def backward(
    config: TrainConfig,
    accelerator: Accelerator,
    world: WorldModel,
    network: torch.nn.Module,
    parts: list[dict[str, torch.Tensor]],
    step: int,
    samples: float,
) -> torch.Tensor:
    """The gradient of a step's loss, which is the weighted mean over the samples of all processes.

    Args:
        config: of the run.
        accelerator: the processes.
        world: gives codec, units and objective.
        network: the CDiT to train.
        parts: this process's micro-batches.
        step: the step, counted from 0.
        samples: how many there are in all processes together.

    Returns:
        () this process's share of the loss; all shares together are the loss.
    """
    shares = []
    for i, part in enumerate(parts):
        batch = noisy_batch(world, part, accelerator.device, config.action_dropout)
        # What model.dropout draws from.
        torch.manual_seed(seed_of(config.seed, step, i * accelerator.num_processes + accelerator.process_index, 1))
        with accelerator.accumulate(network):
            prediction = network(**batch.inputs())
            loss = world.objective.loss(prediction, batch.clean, batch.noise, batch.time).mean(dim=1)
            share = (batch.weight @ loss) / max(samples, 1)
            # Accelerate divides by the number of parts, and processes take the mean of their gradients.
            accelerator.backward(share * (len(parts) * accelerator.num_processes))
        shares.append(share.detach())
    return torch.stack(shares).sum()


if __name__ == "__main__":
    run(main)
