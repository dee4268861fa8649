"""What the structure of the network saves."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cdit.benchmark.bench import Bench
from cdit.benchmark.contenders import Batch
from cdit.benchmark.tables import Table
from cdit.model import CDiT


@torch.no_grad()
def context(bench: Bench) -> Iterator[Table]:
    """A context encoded once, goals that share it, attention recorded, the network compiled."""
    config, ours = bench.config, bench.contender("ours")
    cdit: CDiT = ours.network.eval()
    batch = Batch.random(config, bench.device, config.batch_size, config.goals)
    timestep = torch.full(batch.clean.shape[:2], 500.0, device=bench.device)
    conditions = (batch.clean, timestep, batch.action, batch.time_shift)
    steps = ours.sampler.steps
    with ours.autocast():
        cache = cdit.encode_context(batch.context)

        def encoded_once() -> None:
            cache = cdit.encode_context(batch.context)
            for _ in range(steps):
                cdit(*conditions, cache)

        def encoded_each_step() -> None:
            for _ in range(steps):
                cdit(*conditions, batch.context)

        row = bench.compare(f"{steps} steps", {"once": encoded_once, "at each step": encoded_each_step})
        yield Table("Context encoded once or at each denoising step", [row])

        repeated = batch.context.repeat_interleave(config.goals, 0)
        flat = [x.flatten(0, 1) for x in conditions]
        row = bench.compare(
            f"{config.batch_size} contexts of {config.goals} goals",
            {"shared": lambda: cdit(*conditions, batch.context), "repeated": lambda: cdit(*flat, repeated)},
        )
        yield Table("Goals that share a context, or each with a copy of it", [row])

        def recorded() -> None:
            with observers(cdit):
                cdit(*conditions, cache)

        row = bench.compare("cross-attention of all blocks", {"off": lambda: cdit(*conditions, cache), "on": recorded})
        yield Table("Recording attention weights", [row])

        if config.compile:
            row = bench.compare(
                "a denoising step, cached context",
                {"eager": lambda: cdit(*conditions, cache), "compiled": lambda: ours.compiled(*conditions, cache)},
            )
            yield Table("torch.compile", [row])


@contextmanager
def observers(cdit: CDiT) -> Iterator[None]:
    """Computes the cross-attention weights of all blocks, as recording does."""
    for block in cdit.blocks:
        block.cross_attn.observer = lambda observation: observation.weights()
    try:
        yield
    finally:
        for block in cdit.blocks:
            block.cross_attn.observer = None
