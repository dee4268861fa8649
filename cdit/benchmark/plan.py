"""Planning: many action sequences tried from one context, as the cross-entropy method does."""

from collections.abc import Iterator

import numpy as np
import torch

from cdit.benchmark.autoencoder import random_codec
from cdit.benchmark.bench import Bench
from cdit.benchmark.contenders import PIXELS, Batch, Contender, Ours
from cdit.benchmark.stopwatch import Spread
from cdit.benchmark.tables import Cell, Table
from cdit.model import CDiT
from cdit.model.cdit import EncodedFrames


def plan(bench: Bench) -> Iterator[Table]:
    """Time of all candidates: of the denoising, measured for few of them, and of the autoencoder."""
    config, size = bench.config, bench.config.plan
    measured = size.measured or (size.candidates if bench.device.type == "cuda" else min(4, size.candidates))
    contenders = bench.contenders()
    context = Batch.random(config, bench.device, 1, 1).context
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
    whole = fastest + coding(first)
    rows: list[dict[str, Cell]] = []
    for c in contenders:
        own, equal = denoising[c.name, c.sampler.steps], denoising[c.name, first.sampler.steps]
        rows.append({
            "": c.name,
            "steps": c.sampler.steps,
            "denoising [s]": float(np.median(own)),
            "/ that of the first": Spread.of(own / fastest),
            f"in {first.sampler.steps} steps [s]": float(np.median(equal)),
            "/ that of the first ": Spread.of(equal / fastest),
            "autoencoder [s]": float(np.median(coding(c))),
            "candidates/s": float(size.candidates / np.median(own + coding(c))),
            "all / that of the first": Spread.of((own + coding(c)) / whole),
        })  # fmt: skip
    note = (
        f"Denoising was run for {measured} of {size.candidates} candidates, the autoencoder for one frame: "
        f"what all take is in proportion. {bench.about_steps}"
    )
    yield Table(f"Planning: {size.candidates} candidates of {size.horizon} frames from one context", rows, note)
    if any(c.name == "ours" for c in contenders):
        yield memory(bench)


@torch.no_grad()
def memory(bench: Bench) -> Table:
    """Keys and values held for candidates that have each predicted a frame: of the real frames, and of their own."""
    config = bench.config
    cdit: CDiT = bench.contender("ours").network.eval()
    past = cdit.encode_context(Batch.random(config, bench.device, 1, 1).context)
    rows: list[dict[str, Cell]] = []
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
    """Bytes of memory behind keys and values, what is shared counted once."""
    tensors = [x for part in parts for keys_values in part.keys_values for x in keys_values]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())
