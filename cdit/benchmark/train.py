"""Training steps: loss, gradients, optimizer, average of the weights."""

from collections.abc import Iterator

import numpy as np
import torch

from cdit.benchmark.bench import Bench
from cdit.benchmark.config import Precision
from cdit.benchmark.contenders import Batch, Contender, Ours
from cdit.benchmark.stopwatch import Call, Spread, peak_bytes, product
from cdit.benchmark.tables import Cell, Table
from cdit.model.describe import counted_flops

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "no": torch.float32}


def train(bench: Bench) -> Iterator[Table]:
    """Of every contender at the config's precision, compiled where asked for, and in float32."""
    config = bench.config
    batch = Batch.random(config, bench.device, config.batch_size, config.goals)
    peaks = {
        name: peak_bytes(bench.device, lambda name=name: two_steps(bench, name, batch)) for name in config.contenders
    }
    contenders = bench.contenders()
    flops = {c.name: training_flops(c, batch) for c in contenders}
    steps: dict[tuple[str, Precision], Call] = {}
    for c in contenders:
        steps[c.name, config.mixed_precision] = c.training_step(batch)
        if config.compile and isinstance(c, Ours):
            steps[f"{c.name}, compiled", config.mixed_precision] = c.training_step(batch, predict=c.predict_compiled)
    if config.mixed_precision != "no":
        steps |= {(f"{c.name}, float32", "no"): c.training_step(batch, "no") for c in contenders}
    products = {precision: product(bench.device, DTYPES[precision]) for precision in dict.fromkeys(p for _, p in steps)}
    seconds = bench.watch.times(steps | {("product", p): call for p, (call, _) in products.items()})
    first = next(iter(steps))
    rows: list[dict[str, Cell]] = []
    for name, precision in steps:
        time, work = seconds[name, precision], flops[name.split(",")[0]]
        ceiling = products[precision][1] / seconds["product", precision]
        peak = peaks.get(name)
        rows.append({
            "": name,
            "step [s]": float(np.median(time)),
            "samples/s": float(config.batch_size * config.goals / np.median(time)),
            "step / that of the first": Spread.of(time / seconds[first]),
            "TFLOP": work / 1e12,
            "TFLOP/s": float(np.median(work / time) / 1e12),
            "of the rate of products [%]": Spread.of(100 * work / time / ceiling),
            "peak memory [GB]": None if peak is None else peak / 1e9,
        })  # fmt: skip
    measured = ", ".join(
        f"{flop / np.median(seconds['product', p]) / 1e12:.3g} TFLOP/s in {str(DTYPES[p]).removeprefix('torch.')}"
        for p, (_, flop) in products.items()
    )
    title = f"Training, {config.batch_size} contexts of {config.goals} goals, {config.context_frames} past frames"
    note = f"Products of large matrices, in the same rounds: {measured}. Peak memory: from building through two steps."
    yield Table(title, rows, note)


def two_steps(bench: Bench, name: str, batch: Batch) -> None:
    """What a training needs memory for."""
    step = bench.contender(name).training_step(batch)
    step()
    step()


def training_flops(contender: Contender, batch: Batch) -> int:
    """FLOPs of prediction and gradients."""
    timestep = torch.full(batch.clean.shape[:2], 500.0, device=contender.device)
    counted = counted_flops(lambda: contender.predict(batch.clean, timestep, batch).sum().backward())
    contender.network.zero_grad()
    return counted
