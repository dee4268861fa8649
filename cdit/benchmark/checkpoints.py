"""Checkpoints."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import Accelerator

from cdit.benchmark.bench import Bench
from cdit.benchmark.contenders import Batch
from cdit.benchmark.tables import Table
from cdit.training.config import CheckpointConfig, EMAConfig, TrainConfig
from cdit.training.durable.checkpoints import Checkpoints, RunState
from cdit.training.ema import EMA


def checkpoints(bench: Bench) -> Iterator[Table]:
    """Training steps with a checkpoint among them: none, one that a thread writes, one that the steps wait for."""
    config, ours = bench.config, bench.contender("ours")
    accelerator = Accelerator(cpu=bench.device.type == "cpu", mixed_precision="no")
    step = ours.training_step(Batch.random(config, bench.device, config.batch_size, config.goals))
    optimizer, ema = ours.optimizer[0], EMA(ours.network, EMAConfig())
    with TemporaryDirectory() as folder, ExitStack() as stack:

        def with_checkpoint(background: bool) -> Callable[[], None]:
            run = TrainConfig(name=str(background), output=folder, checkpoint=CheckpointConfig(keep=1))
            run.checkpoint.background = background
            written = stack.enter_context(Checkpoints(accelerator, run, ours.network, optimizer, ema))

            def call() -> None:
                written.save(RunState())
                for _ in range(config.checkpoint_every):
                    step()
                written.wait()

            return call

        def without() -> None:
            for _ in range(config.checkpoint_every):
                step()

        row = bench.compare(
            f"{config.checkpoint_every} steps and a checkpoint",
            {"no checkpoint": without, "by a thread": with_checkpoint(True), "waited for": with_checkpoint(False)},
        )
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / 2
    yield Table(f"Checkpoints of {size / 1e6:.3g} MB", [row])
