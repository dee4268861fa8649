"""Sampling: one frame, many at once, rollouts, and many action sequences from one context."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import torch

from cdit.batch import Condition
from cdit.benchmark.bench import Bench
from cdit.benchmark.config import Precision
from cdit.benchmark.contenders import PIXELS, Contender, Ours, random_codec
from cdit.benchmark.measure import Row, Spread, Table, median
from cdit.diffusion.config import SamplerConfig
from cdit.model.cdit import EncodedFrames
from cdit.world_model import WorldModel, WorldState


def sample(bench: Bench) -> Iterator[Table]:
    """One frame at equal numbers of steps and at each one's default, many frames at once; then our samplers."""
    config, contenders = bench.config, bench.contenders()
    yield latencies(bench, contenders)
    many = bench.batch()
    title = f"Many predicted frames: {config.batch_size} contexts of {config.goals} goals"
    yield bench.rates(title, contenders, config.batch_size * config.goals, lambda c, s: c.sample(many, s))
    ours = [contender for contender in contenders if isinstance(contender, Ours)]
    if ours:
        yield samplers(bench, ours[0])


def latencies(bench: Bench, contenders: list[Contender]) -> Table:
    """Times and ratios at equal numbers of steps, and at each contender's default."""
    batch = bench.batch(1, 1)
    seconds = bench.sampling_times(contenders, lambda c, sampler: c.sample(batch, sampler), bench.config.steps)
    first, *others = contenders
    rows: list[Row] = []
    for steps in [*bench.config.steps, None]:
        times = {c.name: seconds[c.name, steps or c.sampler.steps] for c in contenders}
        row: Row = {"steps": str(steps or "default")}
        row |= {f"{name} [s]": median(values) for name, values in times.items()}
        rows.append(row | {f"{c.name} / {first.name}": Spread.of(times[c.name] / times[first.name]) for c in others})
    title = "One predicted frame, without codec: latency against the number of denoising steps"
    return Table(title, rows, bench.about_steps)


def samplers(bench: Bench, contender: Contender) -> Table:
    """Our schedulers at the same number of steps, guidance, and one goal per context instead of several."""
    steps, usual = contender.sampler.steps, contender.sampler.scheduler
    many, single = bench.batch(), bench.batch(goals=1)
    cases = {name: (many, SamplerConfig(name, steps)) for name in contender.objective.schedulers}
    cases[f"{usual}, guidance 2"] = (many, SamplerConfig(usual, steps, guidance=2.0))
    cases[f"{usual}, one goal a context"] = (single, SamplerConfig(usual, steps))
    seconds = bench.watch.times(
        {name: lambda b=batch, s=sampler: contender.sample(b, s) for name, (batch, sampler) in cases.items()}
    )
    rates = {name: batch.clean.shape[:2].numel() / seconds[name] for name, (batch, _) in cases.items()}
    rows: list[Row] = [
        {"": name, "frames/s": median(rate), f"rate / {usual}": Spread.of(rate / rates[usual])}
        for name, rate in rates.items()
    ]
    return Table(f"Samplers of {contender.name} in {steps} steps", rows)


def rollout(bench: Bench) -> Iterator[Table]:
    """One sequence of frames, each predicted from those before, at each contender's default number of steps."""
    config, length = bench.config, bench.config.rollout_length
    codec = random_codec(config).to(bench.device)
    size = [side * codec.downscale for side in config.image_size]
    frames = torch.rand(1, config.context_frames, 3, *size, device=bench.device) * 2 - 1
    actions = torch.randn(1, 1, length, 3, device=bench.device)
    title = f"A rollout of {length} frames of {'×'.join(map(str, size))} pixels, coding and decoding included"
    yield bench.rates(title, bench.contenders(), length, lambda c, s: c.rollout(codec, frames, actions, s))


def frames(bench: Bench) -> Iterator[Table]:
    """Frames a second of a rollout of the world `maze`, one at a time, and the network's share of the time."""
    config, rows = bench.config, []
    worlds = {"": WorldModel.from_pretrained("maze").to(bench.device)}
    if config.compile:
        worlds[", compiled"] = WorldModel.from_pretrained("maze").to(bench.device)
        worlds[", compiled"].compile()
    length, description = config.rollout_length, worlds[""].description
    past = torch.rand(1, 4, 3, *description.image_size, device=bench.device) * 2 - 1
    actions = torch.tensor([0.3, 0.0, 0.1], device=bench.device).expand(1, 1, length, 3)

    def rolled(world: WorldModel, precision: Precision, steps: int, state: WorldState) -> None:
        enabled = precision == "bf16"
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=enabled):
            world.rollout(state, Condition(action=actions), sampler=replace(description.sampler, steps=steps))

    precisions: tuple[Precision, ...] = ("no", "bf16")
    cases = list(product(precisions, worlds.items(), (1, 2, 4)))
    states = {name: world.begin(past) for name, world in worlds.items()}
    seconds = bench.watch.times(
        {f"{p}{name} {n}": partial(rolled, world, p, n, states[name]) for p, (name, world), n in cases}
    )
    for precision, (name, _), steps in cases:
        each, four, one = (seconds[f"{precision}{name} {n}"] / length for n in (steps, 4, 1))
        row: Row = {"": {"no": "float32", "bf16": "bfloat16"}[precision] + name, "network calls": steps}
        row |= {
            "frames/s": Spread.of(1 / each),
            "in network calls [%]": Spread.of(100 * steps * (four - one) / 3 / each),
        }
        rows.append(row)
    title = f"A rollout of the world maze, {length} frames one after the other, batch 1"
    yield Table(title, rows, "A call's time is a third of the difference between four calls and one.")


def plan(bench: Bench) -> Iterator[Table]:
    """Many action sequences from one context, as in the cross-entropy method: denoising and autoencoder.

    Denoising is measured for some candidates and the autoencoder for one frame.
    """
    config, size = bench.config, bench.config.plan
    measured = size.measured or (size.candidates if bench.device.type == "cuda" else min(4, size.candidates))
    contenders = bench.contenders()
    context = bench.batch(1, 1).context
    actions = torch.randn(1, measured, size.horizon, 3, device=bench.device)

    codec = random_codec(config).to(bench.device)
    picture = torch.rand(1, 3, *(side * codec.downscale for side in config.image_size), device=bench.device)
    latent = codec.encode(picture)
    coder = bench.watch.times({"encode": lambda: codec.encode(picture), "decode": lambda: codec.decode(latent)})
    first = contenders[0]
    seconds = bench.sampling_times(
        contenders, lambda c, sampler: c.rollout(PIXELS, context, actions, sampler), [first.sampler.steps]
    )
    denoising = {key: values * size.candidates / measured for key, values in seconds.items()}

    def coding(contender: Contender) -> np.ndarray:
        encoded, decoded = config.context_frames, size.candidates  # the context; the last frames (rollout's last_only)
        if not isinstance(contender, Ours):  # all past frames of every candidate, and every prediction
            encoded, decoded = encoded * size.candidates * size.horizon, decoded * size.horizon
        return encoded * coder["encode"] + decoded * coder["decode"]

    fastest = denoising[first.name, first.sampler.steps]
    rows: list[Row] = []
    for c in contenders:
        own, equal = denoising[c.name, c.sampler.steps], denoising[c.name, first.sampler.steps]
        rows.append({
            "": c.name,
            "steps": c.sampler.steps,
            "denoising [s]": median(own),
            "/ first": Spread.of(own / fastest),
            f"in {first.sampler.steps} steps [s]": median(equal),
            "/ first ": Spread.of(equal / fastest),
            "autoencoder [s]": median(coding(c)),
            "candidates/s": size.candidates / median(own + coding(c)),
            "total / first": Spread.of((own + coding(c)) / (fastest + coding(first))),
        })  # fmt: skip
    note = (
        f"Times are extrapolated from denoising {measured} of {size.candidates} candidates and from one frame through "
        f"the autoencoder. {bench.about_steps}"
    )
    yield Table(f"Planning: {size.candidates} candidates of {size.horizon} frames from one context", rows, note)
    if any(c.name == "ours" and c.network.can_push for c in contenders):
        yield memory(bench)


@torch.no_grad()
def memory(bench: Bench) -> Table:
    """Memory of keys and values for candidates that have each predicted a frame: of real and of predicted frames."""
    config = bench.config
    cdit = bench.contender("ours").network.eval()
    past = cdit.encode_context(bench.batch(1, 1).context)
    rows: list[Row] = []
    for candidates in sorted({2, max(2, config.plan.candidates // 10), max(2, config.plan.candidates)}):
        own = torch.randn(candidates, config.channels, *config.image_size, device=bench.device)
        real, *predicted = cdit.push_context(past, own).parts
        rows.append({
            "candidates": str(candidates),
            "of real frames [MB]": stored([real]) / 1e6,
            "of predicted frames [MB]": stored(predicted) / 1e6,
            "a copy of the real ones for each [MB]": candidates * stored([real]) / 1e6,
        })  # fmt: skip
    return Table(f"Keys and values of {config.context_frames} past frames, in float32, after one predicted frame", rows)


def stored(parts: list[EncodedFrames]) -> int:
    """Bytes of keys and values, with shared memory counted once."""
    tensors = [x for part in parts for keys_values in part.keys_values for x in keys_values]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
