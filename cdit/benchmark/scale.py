"""The cost of one more past frame, a larger frame, one more context or one more candidate."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.polynomial.polynomial import polyfit, polyval
from PIL import Image

from cdit.benchmark.bench import Bench
from cdit.benchmark.contenders import Ours, random_batch
from cdit.benchmark.measure import Call, Row, Spread, Table, median
from cdit.common.charts import Line, line_chart
from cdit.model.describe import counted_flops

Series = dict[str, Callable[[int], Call]]
"""What is timed at a size, by name."""


def scale(bench: Bench) -> Iterator[Table]:
    """Denoising steps against past frames, with the fitted polynomial, then against the other sizes."""
    config, sizes = bench.config, bench.config.scale
    contenders = bench.contenders(context_frames=max(sizes.past_frames))

    past: Series = {}
    for c in contenders:
        past[c.name] = lambda n, c=c: c.denoising(bench.batch(1, 1, n))
        if isinstance(c, Ours) and not c.network.config.context_modulation:
            past[f"{c.name}, encoding once"] = lambda n, c=c: c.inference(
                partial(c.encoded, bench.batch(1, 1, n).context)
            )
    seconds, flops = sweep(bench, past, sizes.past_frames)
    yield points("A denoising step of one frame against past frames", "past frames", seconds, sizes.past_frames)
    yield fits(seconds, flops, sizes.past_frames)
    bench.figures["past_frames"] = plot(seconds, sizes.past_frames, "past frames", fitted=True)

    def against(unit: str, title: str, label: str, tested: list[int], series: Series) -> Table:
        seconds, _ = sweep(bench, series, tested)
        bench.figures[unit] = plot(seconds, tested, label)
        return points(title, unit, seconds, tested)

    def sized(name: str, side: int) -> Call:
        contender = bench.contender(name, image_size=(side, side))
        return contender.denoising(random_batch(contender.config, bench.device, 1, 1))

    series = {c.name: lambda n, c=c: c.denoising(bench.batch(1, n)) for c in contenders}
    title, label = "A denoising step against candidates of one context", "candidates of one context"
    yield against("candidates", title, label, sizes.candidates, series)
    series = {c.name: lambda n, c=c: c.denoising(bench.batch(n, 1)) for c in contenders}
    yield against("contexts", "A denoising step against contexts", "contexts", sizes.batches, series)
    series = {name: partial(sized, name) for name in config.contenders}
    title, label = "A denoising step of one frame against its size", "height and width of what is denoised"
    yield against("side", title, label, sizes.sides, series)


def sweep(bench: Bench, series: Series, sizes: list[int]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Seconds (sizes, rounds) and FLOPs (sizes,) of every series; all calls run in turn."""
    calls = {(name, size): call(size) for name, call in series.items() for size in sizes}
    flops = {name: np.array([counted_flops(calls[name, size]) for size in sizes]) for name in series}
    times = bench.watch.times(calls)
    return {name: np.stack([times[name, size] for size in sizes]) for name in series}, flops


def points(title: str, unit: str, seconds: dict[str, np.ndarray], sizes: list[int]) -> Table:
    """Medians."""
    rows: list[Row] = [
        {unit: str(size), **{f"{name} [ms]": 1000 * median(s[i]) for name, s in seconds.items()}}
        for i, size in enumerate(sizes)
    ]
    return Table(title, rows)


def fits(seconds: dict[str, np.ndarray], flops: dict[str, np.ndarray], past: list[int]) -> Table:
    """Fits a + b·T + c·T² to the times, round by round, and to the FLOPs, which are exactly such a polynomial."""
    rows: list[Row] = []
    for name, values in seconds.items():
        time, work = polyfit(past, 1000 * values, 2), polyfit(past, flops[name] / 1e9, 2)  # (3, rounds) and (3,)
        row: Row = {"": name, **{f"{x} [ms]": Spread.of(rounds) for x, rounds in zip("abc", time, strict=True)}}
        rows.append(row | {f"{x} [GFLOP]": float(round(v, 6) + 0.0) for x, v in zip("abc", work, strict=True)})
    return Table("a + b·T + c·T² for T past frames, one denoising step of one frame", rows)


def plot(seconds: dict[str, np.ndarray], sizes: list[int], unit: str, fitted: bool = False) -> Image.Image:
    """Milliseconds against sizes; lines are parabolas through the medians, or join them."""
    lines = []
    for i, (name, values) in enumerate(seconds.items()):
        medians = 1000 * np.median(values, axis=1)
        lines.append(Line(name, sizes, medians, f"C{i}", "o" if fitted else "o-"))
        if fitted:
            grid = np.linspace(min(sizes), max(sizes), 100)
            lines.append(Line("", grid, polyval(grid, polyfit(sizes, medians, 2)), f"C{i}", "-"))
    return line_chart({"": lines}, unit, "ms", from_zero=True)
