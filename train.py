"""Trains a CDiT world model: `accelerate launch train.py --config configs/quickstart.yaml`."""

from pathlib import Path

from cdit.common import cli
from cdit.training.config import TrainConfig

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def main() -> None:
    """Reads the config and trains until the end, or until the run is stopped."""
    config = cli.parse_config(TrainConfig, __doc__, default_file=QUICKSTART)
    config.validate()
    config.check_folder()

    from cdit.training.durable.failures import explained
    from cdit.training.durable.signals import StopSignals, end_with_launcher

    end_with_launcher()
    with StopSignals() as signals, explained():
        train(config, signals)


def train(config: TrainConfig, signals: "StopSignals") -> None:  # noqa: F821
    """Data, model, the loop."""
    import torch

    from cdit.batch import KeyedDraws
    from cdit.common.randomness import seed_of
    from cdit.data.windows import WindowDataset
    from cdit.training.durable.run import DurableRun
    from cdit.training.durable.tensors import trainable
    from cdit.training.ema import EMA
    from cdit.training.probes import Probes
    from cdit.training.setup import build_accelerator, build_optimizer, build_world, prepare_data, use_latents
    from cdit.training.sharding import bare_networks, prepare_networks
    from cdit.training.validation import Validation

    accelerator, sharded = build_accelerator(config)
    run = DurableRun(config, accelerator, signals)

    # Data: recorded if missing, then windows of past frames and goals.
    prepare_data(config.data, accelerator)
    train_set = WindowDataset(config.data, config.data.train_split, config.seed)
    test_set = WindowDataset(config.data, config.data.test_split, config.seed)

    # Model, optimizer, and the running average of the weights. `network` is what is trained: the world's CDiT, wrapped.
    world = build_world(config, train_set, run.units)
    use_latents((train_set, test_set), world.codec, config)
    network = prepare_networks(world, accelerator, sharded, config.compile)
    networks = bare_networks(world)
    optimizer, schedule = build_optimizer(networks, config.optimizer, config.steps)
    optimizer = accelerator.prepare(optimizer)
    ema = EMA(world.cdit, config.ema)
    validation = Validation(test_set, config.validation, config.seed)
    probes = Probes(test_set, world.cdit, config, accelerator)

    with run.training(train_set, world, optimizer, schedule, ema):
        network.train()
        while True:
            if run.is_due(config.validation.every):
                with run.looking():
                    measured = validation.run(world, network, accelerator)
                    run.keep_if_best(measured["validation/loss"])
                run.tracker.log(measured, run.step)
            if run.is_due(config.probe.every):
                with run.looking():
                    probes.run(world, run.tracker, run.step, run.is_finished)
            if run.is_done:
                break

            # The samples of all processes form the step's batch. Its loss is their weighted mean; each micro-batch of
            # each process contributes a share.
            parts, samples = run.next_batch()
            shares = []
            for i, part in enumerate(parts):
                batch = world.encode(part, config.action_dropout, config.clean_context)
                place = i * accelerator.num_processes + accelerator.process_index
                torch.manual_seed(seed_of(config.seed, run.step, place, 1))  # what model.dropout draws from
                with accelerator.accumulate(network):
                    losses = world.objective.loss(network, batch, KeyedDraws(part.key, accelerator.device))
                    share = (part.weight.to(accelerator.device) @ losses.mean(dim=1)) / samples
                    # Accelerate divides by the number of parts, and DDP averages gradients over processes.
                    accelerator.backward(share * (len(parts) * accelerator.num_processes))
                shares.append(share.detach())
            norm = accelerator.clip_grad_norm_(trainable(networks).values(), config.optimizer.max_grad_norm)
            run.before_step(norm, torch.stack(shares).sum())
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            ema.step()
            world.objective.after_step(world.cdit)
            run.after_step()

        with ema.applied():
            run.save_world("last")
        run.tracker.finish()
    accelerator.print(f"done: {config.folder} holds the world model, metrics.jsonl and pictures")


if __name__ == "__main__":
    cli.run(main)
