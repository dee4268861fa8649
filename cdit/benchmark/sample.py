"""Predicted frames: how long one takes, and how many come in a second."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from cdit.benchmark.bench import Bench
from cdit.benchmark.contenders import Batch, Contender, Ours
from cdit.benchmark.stopwatch import Spread
from cdit.benchmark.tables import Cell, Table
from cdit.diffusion import SamplerConfig


def sample(bench: Bench) -> Iterator[Table]:
    """One frame at equal numbers of steps, at each one's default, many frames at once; then our samplers."""
    contenders, one = bench.contenders(), Batch.random(bench.config, bench.device, 1, 1)
    rows = [latencies(bench, contenders, one, steps) for steps in bench.config.steps]
    rows.append(latencies(bench, contenders, one, None))
    yield Table("One predicted frame, without codec: latency against the number of denoising steps", rows)
    yield throughput(bench, contenders)
    ours = [contender for contender in contenders if isinstance(contender, Ours)]
    if ours:
        yield samplers(bench, ours[0])


def latencies(bench: Bench, contenders: list[Contender], batch: Batch, steps: int | None) -> dict[str, Cell]:
    """A row of times and ratios; without a number of steps everybody takes its own."""
    samplers = {c.name: c.sampler if steps is None else replace(c.sampler, steps=steps) for c in contenders}
    seconds = bench.watch.times({c.name: lambda c=c: c.sample(batch, samplers[c.name]) for c in contenders})
    first, *others = seconds
    row: dict[str, Cell] = {"steps": "default" if steps is None else str(steps)}
    row |= {f"{c.name} [s]": float(np.median(seconds[c.name])) for c in contenders}
    return row | {f"{name} / {first}": Spread.of(seconds[name] / seconds[first]) for name in others}


def throughput(bench: Bench, contenders: list[Contender]) -> Table:
    """Frames a second at the default number of steps, of a batch of contexts with their goals."""
    config = bench.config
    many = Batch.random(config, bench.device, config.batch_size, config.goals)
    rows = bench.rates(contenders, config.batch_size * config.goals, lambda c: c.sample(many, c.sampler))
    return Table(f"Many predicted frames: {config.batch_size} contexts of {config.goals} goals", rows)


def samplers(bench: Bench, contender: Contender) -> Table:
    """Our schedulers at the same number of steps, guidance, and one goal of each context in place of several."""
    config, steps = bench.config, contender.sampler.steps
    many = Batch.random(config, bench.device, config.batch_size, config.goals)
    single = Batch.random(config, bench.device, config.batch_size, 1)
    count = config.batch_size * config.goals
    cases = {name: (count, many, SamplerConfig(name, steps)) for name in contender.objective.schedulers}
    usual = contender.sampler.scheduler
    cases[f"{usual}, guidance 2"] = (count, many, SamplerConfig(usual, steps, guidance=2.0))
    cases[f"{usual}, one goal a context"] = (config.batch_size, single, SamplerConfig(usual, steps))
    seconds = bench.watch.times(
        {name: lambda b=batch, s=sampler: contender.sample(b, s) for name, (_, batch, sampler) in cases.items()}
    )
    first = cases[usual][0] / seconds[usual]
    rows: list[dict[str, Cell]] = []
    for name, (frames, _, _) in cases.items():
        rate = frames / seconds[name]
        rows.append({"": name, "frames/s": float(np.median(rate)), f"rate / that of {usual}": Spread.of(rate / first)})
    return Table(f"Samplers of {contender.name} in {steps} steps", rows)
