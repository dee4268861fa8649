"""Trains a CDiT world model: `accelerate launch train.py --config configs/quickstart.yaml`."""

import math
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from cdit.cli import parse_config, run
from cdit.data.loader import loader
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.windows import WindowDataset
from cdit.errors import UserError
from cdit.randomness import seed_of
from cdit.training.batch import noisy_batch
from cdit.training.checkpoints import RunState, check_config, find_resume, load_checkpoint, save_checkpoint
from cdit.training.config import TrainConfig
from cdit.training.ema import EMA
from cdit.training.probes import Probes
from cdit.training.setup import (
    build_accelerator,
    build_optimizer,
    build_world,
    micro_batches,
    prepare_data,
    resume_schedule,
    use_latents,
)
from cdit.training.tracking import Tracker
from cdit.training.validation import Validation

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def main() -> None:
    """Config, data, model, the loop."""
    config = parse_config(TrainConfig, __doc__, default_file=QUICKSTART)
    config.validate()
    config.check_folder()

    accelerator = build_accelerator(config)
    accelerator.gradient_accumulation_steps = micro_batches(config, accelerator.num_processes)
    if accelerator.device.type == "cpu":  # the launcher leaves each process one thread
        torch.set_num_threads(max(1, os.cpu_count() // accelerator.num_processes))
    resume_from = find_resume(config.resume, config.folder)
    if resume_from:
        check_config(config, resume_from)

    # Data: recorded where missing, then windows of past frames and goals.
    prepare_data(config.data, accelerator)
    train_set = WindowDataset(config.data, config.data.train_split, config.seed)
    test_set = WindowDataset(config.data, config.data.test_split, config.seed)

    # Model, optimizer, and the running average of the weights. `cdit` is the bare network, `network` what is trained.
    world = build_world(config, train_set)
    cdit = world.cdit
    world.codec.to(accelerator.device)
    use_latents((train_set, test_set), world.codec, config)
    optimizer, schedule = build_optimizer(cdit, config.optimizer, config.steps)
    network, optimizer = accelerator.prepare(cdit, optimizer)
    ema = EMA(cdit, config.ema)
    state = RunState()
    if resume_from:
        state = load_checkpoint(accelerator, ema, resume_from, config.folder)
        resume_schedule(schedule, state.schedule)

    sampler = KeyedBatchSampler(
        len(train_set),
        config.batch_size,
        config.seed,
        start_step=state.step,
        steps=config.steps,
        process_index=accelerator.process_index,
        processes=accelerator.num_processes,
        micro_batches=accelerator.gradient_accumulation_steps,
    )
    batches = iter(loader(train_set, sampler, config.data))
    validation = Validation(test_set, config.validation, config.seed)
    probes = Probes(test_set, cdit, config, accelerator)

    if accelerator.is_main_process:
        config.folder.mkdir(parents=True, exist_ok=True)
        config.save(config.folder / "config.yaml")
    accelerator.wait_for_everyone()
    tracker = Tracker(accelerator, config, state)

    # The loop.
    last_step = min(config.steps, config.stop_at or config.steps)
    bar = tqdm(total=config.steps, initial=state.step, desc=config.name, disable=not accelerator.is_main_process)
    losses = list(torch.tensor(state.losses, device=accelerator.device))  # of the steps since the last row
    timed_from, since = state.step, time.perf_counter()
    network.train()
    while state.step < last_step:
        parts = []
        for micro_batch in range(accelerator.gradient_accumulation_steps):
            batch = noisy_batch(world, next(batches), accelerator.device, config.action_dropout)
            part = micro_batch * accelerator.num_processes + accelerator.process_index  # of the step's batch
            torch.manual_seed(seed_of(config.seed, state.step, part, 1))  # what model.dropout draws from
            with accelerator.accumulate(network):
                prediction = network(**batch.inputs())
                loss = world.objective.loss(prediction, batch.clean, batch.noise, batch.time).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(network.parameters(), config.optimizer.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            parts.append(loss.detach())
        losses.append(torch.stack(parts).mean())
        schedule.step()
        ema.step()
        state.step += 1
        bar.update()

        ended, finished = state.step == last_step, state.step == config.steps
        if state.step % config.tracking.every == 0 or finished:
            mean_loss = accelerator.reduce(torch.stack(losses), "mean").mean().item()
            if not math.isfinite(mean_loss):
                raise UserError(f"the loss is {mean_loss} at step {state.step}: try a lower optimizer.learning_rate")
            steps = state.step - timed_from
            rate = steps * config.batch_size * config.data.goals / (time.perf_counter() - since)
            bar.set_postfix_str(f"loss {mean_loss:.4f}, {rate:.0f} samples/s")
            tracker.log(
                {
                    "train/loss": mean_loss,
                    "train/gradient_norm": norm.item(),
                    "train/learning_rate": schedule.get_last_lr()[0],
                    "train/samples_per_second": rate,
                },
                state.step,
            )
            losses, timed_from, since = [], state.step, time.perf_counter()

        validating = ended or state.step % config.validation.every == 0
        probing = finished or (config.probe.every and state.step % config.probe.every == 0)
        saving = ended or state.step % config.checkpoint.every == 0
        if (validating or probing or saving) and not all(p.isfinite().all() for p in cdit.parameters()):
            raise UserError(f"weights are not finite at step {state.step}: try a lower optimizer.learning_rate")
        pause = time.perf_counter()
        if validating:
            with ema.applied():
                measured = validation.run(world, network, accelerator)
                if measured["validation/loss"] < state.best_loss:
                    state.best_loss = measured["validation/loss"]
                    if accelerator.is_main_process:
                        world.save_pretrained(config.folder / "best")
            tracker.log(measured, state.step)
        if probing:
            with ema.applied():
                probes.run(world, tracker, state.step, finished)
        if saving:
            state.schedule = schedule.state_dict()
            state.losses = accelerator.reduce(torch.stack(losses), "mean").tolist() if losses else []
            save_checkpoint(accelerator, ema, state, config)
        since += time.perf_counter() - pause

    bar.close()
    with ema.applied():
        if accelerator.is_main_process:
            world.save_pretrained(config.folder / "last")
    tracker.finish()
    accelerator.print(f"done: {config.folder} holds the world model, metrics.jsonl and pictures")


if __name__ == "__main__":
    run(main)
