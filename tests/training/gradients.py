"""Writes the gradients of a training step as train.py makes them: a script for torchrun.

    gradients.py CONFIG OUT [BATCH_SIZE:MICRO_BATCHES:WORKERS …]

OUT/<batch_size>_<micro_batches>_<workers>_<process>.pt holds, of each process, the gradient of every
parameter, the loss over all processes, the loss on held-out windows with one and with three of them, and the number of
processes.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from cdit.common.cli import parse_config
from cdit.data.loader import loader
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.windows import WindowDataset
from cdit.training.config import TrainConfig, ValidationConfig
from cdit.training.setup import build_world
from cdit.training.validation import Validation

sys.path.append(str(Path(__file__).parents[2]))
import train

STEP = 3


def randomise(network: nn.Module) -> None:
    """Small random numbers added to every parameter, always the same."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=0.05)


def main(config_file: str, out: str, *cases: str) -> None:
    config = parse_config(TrainConfig, "", ["--config", config_file, "--action_dropout", "0.3"])
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    for case in cases:
        batch_size, micro_batches, workers = map(int, case.split(":"))
        data = replace(config.data, workers=workers)
        train_set = WindowDataset(data, "train", config.seed)
        world = build_world(config, train_set)
        randomise(world.cdit)
        network, optimizer = accelerator.prepare(world.cdit, torch.optim.SGD(world.cdit.parameters(), lr=0.0))
        accelerator.gradient_accumulation_steps = micro_batches
        accelerator.step = 0
        sampler = KeyedBatchSampler(
            len(train_set),
            batch_size,
            config.seed,
            start_step=STEP,
            steps=STEP + 1,
            process_index=accelerator.process_index,
            processes=accelerator.num_processes,
            micro_batches=micro_batches,
        )
        network.train()
        parts = list(loader(train_set, sampler, data))
        assert len(parts) == micro_batches
        loss = train.backward(config, accelerator, world, network, parts, STEP, batch_size)
        assert accelerator.sync_gradients
        world.cdit.eval()
        test_set = WindowDataset(data, "test", config.seed)
        held_out = [
            Validation(test_set, ValidationConfig(samples=n, time_bins=2), config.seed).run(world, network, accelerator)
            for n in (1, 3)
        ]
        found = {
            "gradients": {name: p.grad.clone() for name, p in world.cdit.named_parameters()},
            "loss": accelerator.reduce(loss, "sum").item(),
            "held_out": held_out,
            "processes": accelerator.num_processes,
        }
        torch.save(found, Path(out) / f"{case.replace(':', '_')}_{accelerator.process_index}.pt")
        optimizer.zero_grad()
        accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
