"""What one more past frame, a larger frame, one more context or one more candidate costs."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure

from cdit.benchmark.bench import Bench
from cdit.benchmark.contenders import Batch, Contender, Ours
from cdit.benchmark.stopwatch import Call, Spread
from cdit.benchmark.tables import Cell, Table
from cdit.model.describe import counted_flops

Series = dict[str, Callable[[int], Call]]
"""By name, what is timed at a size."""


def scale(bench: Bench) -> Iterator[Table]:
    """Denoising steps against past frames, with the fitted polynomial, then against the other sizes."""
    config = bench.config
    contenders = bench.contenders(context_frames=max(config.scale.past_frames))
    seconds, flops = sweep(bench, past_series(bench, contenders), config.scale.past_frames)
    yield points("A denoising step of one frame against past frames", "past frames", seconds, config.scale.past_frames)
    yield fits(seconds, flops, config.scale.past_frames)
    bench.figures["past_frames"] = plot(seconds, config.scale.past_frames, "past frames", fitted=True)

    series = {c.name: lambda n, c=c: denoising(c, Batch.random(config, bench.device, 1, n)) for c in contenders}
    seconds, _ = sweep(bench, series, config.scale.candidates)
    yield points("A denoising step against candidates of one context", "candidates", seconds, config.scale.candidates)
    bench.figures["candidates"] = plot(seconds, config.scale.candidates, "candidates of one context")

    series = {c.name: lambda n, c=c: denoising(c, Batch.random(config, bench.device, n, 1)) for c in contenders}
    seconds, _ = sweep(bench, series, config.scale.batches)
    yield points("A denoising step against contexts", "contexts", seconds, config.scale.batches)
    bench.figures["contexts"] = plot(seconds, config.scale.batches, "contexts")

    def sized(name: str, side: int) -> Call:
        contender = bench.contender(name, image_size=(side, side))
        return denoising(contender, Batch.random(contender.config, bench.device, 1, 1))

    seconds, _ = sweep(bench, {name: partial(sized, name) for name in config.contenders}, config.scale.sides)
    yield points("A denoising step of one frame against its size", "side", seconds, config.scale.sides)
    bench.figures["side"] = plot(seconds, config.scale.sides, "height and width of what is denoised")


def past_series(bench: Bench, contenders: list[Contender]) -> Series:
    """Denoising steps of every contender, and what encoding the context costs those that do it once."""
    found: Series = {}
    for c in contenders:

        def step(past: int, c: Contender = c) -> Call:
            return denoising(c, Batch.random(bench.config, bench.device, 1, 1, past))

        def encode(past: int, c: Contender = c) -> Call:
            frames = Batch.random(bench.config, bench.device, 1, 1, past).context
            return under(c, lambda: c.network.encode_context(frames))

        found[c.name] = step
        if isinstance(c, Ours) and not c.network.config.context_modulation:
            found[f"{c.name}, encoding once"] = encode
    return found


def denoising(contender: Contender, batch: Batch) -> Call:
    """One step of sampling: the past is encoded before where the contender can."""
    timestep = torch.full(batch.clean.shape[:2], 500.0, device=contender.device)
    if isinstance(contender, Ours):
        cache = under(contender, lambda: contender.network.encode_context(batch.context))()
        return under(
            contender,
            lambda: contender.network(batch.clean, timestep, batch.action, batch.time_shift, cache),
        )
    return under(contender, lambda: contender.predict(batch.clean, timestep, batch))


def under(contender: Contender, call: Call) -> Call:
    """The call in evaluation, at the contender's precision."""
    contender.network.eval()

    def wrapped() -> object:
        with torch.no_grad(), contender.autocast():
            return call()

    return wrapped


def sweep(bench: Bench, series: Series, sizes: list[int]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Seconds (sizes, rounds) and FLOPs (sizes,) of every series; all calls are run in turn."""
    calls = {(name, size): call(size) for name, call in series.items() for size in sizes}
    flops = {name: np.array([counted_flops(calls[name, size]) for size in sizes]) for name in series}
    times = bench.watch.times(calls)
    return {name: np.stack([times[name, size] for size in sizes]) for name in series}, flops


def points(title: str, unit: str, seconds: dict[str, np.ndarray], sizes: list[int]) -> Table:
    """Medians."""
    rows: list[dict[str, Cell]] = []
    for i, size in enumerate(sizes):
        row: dict[str, Cell] = {unit: str(size)}
        rows.append(row | {f"{name} [ms]": float(1000 * np.median(s[i])) for name, s in seconds.items()})
    return Table(title, rows)


def fits(seconds: dict[str, np.ndarray], flops: dict[str, np.ndarray], past: list[int]) -> Table:
    """a + b·T + c·T² through the times, round by round, and through the FLOPs, which are such a polynomial exactly."""
    rows: list[dict[str, Cell]] = []
    for name, values in seconds.items():
        time = np.polynomial.polynomial.polyfit(past, 1000 * values, 2)  # (3, rounds)
        work = np.polynomial.polynomial.polyfit(past, flops[name] / 1e9, 2)
        row: dict[str, Cell] = {"": name}
        row |= {f"{letter} [ms]": Spread.of(rounds) for letter, rounds in zip("abc", time, strict=True)}
        row |= {f"{letter} [GFLOP]": float(round(value, 6) + 0.0) for letter, value in zip("abc", work, strict=True)}
        rows.append(row)
    return Table("a + b·T + c·T² for T past frames, one denoising step of one frame", rows)


def plot(seconds: dict[str, np.ndarray], sizes: list[int], unit: str, fitted: bool = False) -> Figure:
    """Milliseconds against sizes; lines are parabolas through the medians, or join them."""
    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, values in seconds.items():
        medians = 1000 * np.median(values, axis=1)
        (dots,) = axes.plot(sizes, medians, "o" if fitted else "o-", label=name, markersize=4)
        if fitted:
            grid = np.linspace(min(sizes), max(sizes), 100)
            curve = np.polynomial.polynomial.polyfit(sizes, medians, 2)
            axes.plot(grid, np.polynomial.polynomial.polyval(grid, curve), color=dots.get_color(), linewidth=1)
    axes.set(xlabel=unit, ylabel="ms", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
