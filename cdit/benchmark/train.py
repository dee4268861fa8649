"""Training steps: loss, gradients, optimizer, average of the weights."""

from collections.abc import Iterator

import numpy as np
import torch

from cdit.benchmark.bench import Bench
from cdit.benchmark.contenders import Batch, Contender
from cdit.benchmark.stopwatch import Spread, counted_flops, peak_bytes, product
from cdit.benchmark.tables import Cell, Table


def train(bench: Bench) -> Iterator[Table]:
    """Of every contender at the config's precision, and of the first in float32 and compiled, where it is not."""
    config = bench.config
    steps, flops, peaks = {}, {}, {}
    for name, changes in variants(bench).items():
        contender_name = name.split(",")[0]

        def build(contender_name: str = contender_name, changes: dict = changes) -> Contender:
            return bench.contender(contender_name, **changes)

        def whole(build=build) -> None:
            step = build().training_step(batch(bench))
            step()
            step()

        if not changes.get("compile", config.compile):
            peaks[name] = peak_bytes(bench.device, whole)
        contender = build()
        steps[name] = contender.training_step(batch(bench))
        flops[name] = training_flops(contender, batch(bench))
    dtypes = {"bf16": torch.bfloat16, "no": torch.float32}
    rates = {key: product(bench.device, dtype) for key, dtype in dtypes.items()}
    seconds = bench.watch.times(steps | {f"product {key}": call for key, (call, _) in rates.items()})
    samples, first = config.batch_size * config.goals, seconds[next(iter(steps))]
    rows = []
    for name in steps:
        precision = "no" if name.endswith("float32") else config.mixed_precision
        ceiling = rates[precision][1] / seconds[f"product {precision}"]
        row: dict[str, Cell] = {
            "": name,
            "step [s]": float(np.median(seconds[name])),
            "samples/s": float(samples / np.median(seconds[name])),
            "step / that of the first": Spread.of(seconds[name] / first),
            "TFLOP": flops[name] / 1e12,
            "TFLOP/s": float(np.median(flops[name] / seconds[name]) / 1e12),
            "of the rate of products [%]": Spread.of(100 * flops[name] / seconds[name] / ceiling),
            "peak memory [GB]": None if peaks.get(name) is None else peaks[name] / 1e9,
        }
        rows.append(row)
    measured = ", ".join(
        f"{flop / np.median(seconds[f'product {key}']) / 1e12:.3g} TFLOP/s in {str(dtypes[key]).removeprefix('torch.')}"
        for key, (_, flop) in rates.items()
    )
    title = f"Training, {config.batch_size} contexts of {config.goals} goals, {config.context_frames} past frames"
    note = f"Products of large matrices, in the same rounds: {measured}. Peak memory: from building through two steps."
    yield Table(title, rows, note)


def variants(bench: Bench) -> dict[str, dict]:
    """What is run, by name, with what it changes of the config."""
    found: dict[str, dict] = {name: {} for name in bench.config.contenders}
    if bench.config.mixed_precision == "bf16":
        found |= {f"{name}, float32": {"mixed_precision": "no"} for name in bench.config.contenders}
    if bench.config.compile:
        ours = [name for name in bench.config.contenders if name.startswith("ours")]
        found |= {f"{name}, not compiled": {"compile": False} for name in ours}
    return found


def batch(bench: Bench) -> Batch:
    """What every contender is trained on."""
    return Batch.random(bench.config, bench.device, bench.config.batch_size, bench.config.goals)


def training_flops(contender: Contender, batch: Batch) -> int:
    """FLOPs of prediction and gradients."""
    timestep = torch.full(batch.clean.shape[:2], 500.0, device=contender.device)

    def call() -> None:
        contender.predict(batch.clean, timestep, batch).sum().backward()

    counted = counted_flops(call)
    contender.network.zero_grad()
    return counted
