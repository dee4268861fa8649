"""Writes the gradients of a training step as train.py makes them: a script for torchrun.

    gradients.py CONFIG OUT [BATCH_SIZE:MICRO_BATCHES:WORKERS:WINDOWS …]

OUT/<batch_size>_<micro_batches>_<workers>_<windows>_<process>.pt holds what `watched` finds in a run of train.py with
that batch size, so many micro-batches and loader workers, and so many held-out windows.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from cdit.common.cli import parse_config
from cdit.training import setup
from cdit.training.config import TrainConfig
from cdit.training.durable.run import DurableRun
from cdit.training.durable.signals import StopSignals
from cdit.training.tracking import Tracker
from cdit.training.validation import Validation
from cdit.world_model import WorldModel

sys.path.append(str(Path(__file__).parents[2]))
import train

STEP = 3
# Weights stay as they are to the last bit, and gradients are not clipped: the step does not matter but for its batch.
STANDING = {
    "optimizer.learning_rate": "1e-30", "optimizer.max_grad_norm": "1e30", "validation.every": STEP + 1,
    "stop_at": STEP + 1, "action_dropout": "0.3",
}  # fmt: skip


def options(values: dict[str, Any]) -> list[str]:
    """As the command line takes them."""
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def randomise(network: nn.Module) -> None:
    """Small random numbers added to every parameter, always the same."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=0.05)


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Runs of train.py begin with random weights. Yields what is found in the last step of one.

    The gradient of every parameter, the loss over all processes, the number of this process's micro-batches and of
    processes, and the loss on held-out windows.
    """
    found: dict[str, Any] = {}
    build, next_batch, before_step, validate = (
        setup.build_world, DurableRun.next_batch, DurableRun.before_step, Validation.run
    )  # fmt: skip

    def build_random(*arguments: Any) -> WorldModel:
        world = build(*arguments)
        randomise(world.cdit)
        return world

    def count_parts(run: DurableRun) -> Any:
        batch = next_batch(run)
        found["parts"] = len(batch[0])
        return batch

    def look(run: DurableRun, norm: Tensor, loss: Tensor) -> None:
        found["gradients"] = {name: p.grad.clone() for name, p in run.world.cdit.named_parameters()}
        found["loss"] = run.accelerator.reduce(loss, "sum").item()
        found["processes"] = run.accelerator.num_processes
        before_step(run, norm, loss)

    def held_out(*arguments: Any) -> dict[str, float]:
        found["held_out"] = validate(*arguments)
        return found["held_out"]

    replaced: list[tuple[Any, str, Callable]] = [
        (setup, "build_world", build_random), (DurableRun, "next_batch", count_parts),
        (DurableRun, "before_step", look), (Validation, "run", held_out),
    ]  # fmt: skip
    patches = [patch.object(*where) for where in replaced]
    for each in patches:
        each.start()
    try:
        yield found
    finally:
        for each in patches:
            each.stop()


def main(config_file: str, out: str, *cases: str) -> None:
    processes = PartialState(cpu=True).num_processes
    for case in cases:
        batch_size, micro_batches, workers, windows = map(int, case.split(":"))
        values = {
            "name": case.replace(":", "_"), "output": out, "batch_size": batch_size, "data.workers": workers,
            "micro_batch_size": math.ceil(math.ceil(batch_size / processes) / micro_batches),
            "validation.samples": windows, **STANDING,
        }  # fmt: skip
        config = parse_config(TrainConfig, "", ["--config", config_file, *options(values)])
        # The end of a run is that of its processes' group, which the next one needs.
        with watched() as found, patch.object(Tracker, "finish"), StopSignals() as signals:
            train.train(config, signals)
        assert found["parts"] == micro_batches
        torch.save(found, Path(out) / f"{config.name}_{PartialState().process_index}.pt")
        for state in (AcceleratorState, GradientState):
            state._reset_state()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
