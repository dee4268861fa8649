"""Writes a gradient of several processes, taken first of all and taken after others: a script for torchrun.

    backwards.py OUT

OUT/<process>.pt holds both, as one row of numbers each.
"""

import sys
from pathlib import Path

import torch

from cdit.training.config import TrainConfig
from cdit.training.setup import build_accelerator

sys.path.append(str(Path(__file__).parents[1]))
from sharded import batch, build, loss_of


def main(out: str) -> None:
    accelerator, _ = build_accelerator(TrainConfig(mixed_precision="no"))
    found = []
    for steps in ([2], [0, 1, 2]):
        network = accelerator.prepare(build("native"))
        for step in steps:
            network.zero_grad()
            prediction = network(**batch(step, accelerator.process_index))
            accelerator.backward(loss_of(prediction, step, accelerator.process_index))
        found.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    torch.save(found, Path(out) / f"{accelerator.process_index}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
