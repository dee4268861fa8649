"""Predicted frames: how long one takes, and how many come in a second."""

from collections.abc import Iterator

import numpy as np

from cdit.benchmark.bench import Bench
from cdit.benchmark.contenders import Batch, Contender, Ours
from cdit.benchmark.stopwatch import Spread
from cdit.benchmark.tables import Cell, Table
from cdit.diffusion import SamplerConfig


def sample(bench: Bench) -> Iterator[Table]:
    """One frame at equal numbers of steps, at each one's default, many frames at once; then our samplers."""
    contenders, one = bench.contenders(), Batch.random(bench.config, bench.device, 1, 1)
    yield latencies(bench, contenders, one)
    yield throughput(bench, contenders)
    ours = [contender for contender in contenders if isinstance(contender, Ours)]
    if ours:
        yield samplers(bench, ours[0])


def latencies(bench: Bench, contenders: list[Contender], batch: Batch) -> Table:
    """Times and ratios at equal numbers of steps, and at the number that each takes by default."""
    seconds = bench.sampling_times(contenders, lambda c, sampler: c.sample(batch, sampler), bench.config.steps)
    first, *others = contenders
    rows: list[dict[str, Cell]] = []
    for steps in [*bench.config.steps, None]:
        times = {c.name: seconds[c.name, steps or c.sampler.steps] for c in contenders}
        row: dict[str, Cell] = {"steps": str(steps or "default")}
        row |= {f"{name} [s]": float(np.median(values)) for name, values in times.items()}
        rows.append(row | {f"{c.name} / {first.name}": Spread.of(times[c.name] / times[first.name]) for c in others})
    title = "One predicted frame, without codec: latency against the number of denoising steps"
    return Table(title, rows, bench.about_steps)


def throughput(bench: Bench, contenders: list[Contender]) -> Table:
    """Frames a second at the default number of steps, of a batch of contexts with their goals."""
    config = bench.config
    many = Batch.random(config, bench.device, config.batch_size, config.goals)
    rows = bench.rates(contenders, config.batch_size * config.goals, lambda c, s: c.sample(many, s))
    return Table(
        f"Many predicted frames: {config.batch_size} contexts of {config.goals} goals", rows, bench.about_steps
    )


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
