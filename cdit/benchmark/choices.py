"""Choices made in this package: attention kernels, context caching, probes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from cdit.batch import Batch, Condition
from cdit.benchmark.bench import Bench
from cdit.benchmark.contenders import PIXELS
from cdit.benchmark.measure import Row, Spread, Table, median
from cdit.common.errors import UserError
from cdit.heads.config import AttentionConfig
from cdit.heads.inspection import inspect_attention
from cdit.model import CDiT
from cdit.model.attention import KeysValues, attention_weights, scaled_dot_product_attention


def attention(bench: Bench) -> Iterator[Table]:
    """Fused against explicit attention: torch's kernel, what CDiT uses, and two products and a softmax."""
    config, size = bench.config, bench.config.model.arguments()
    heads = size["num_heads"]
    width = size["hidden_size"] // heads
    patches = config.image_size[0] * config.image_size[1] // size["patch_size"] ** 2

    def fused(q: Tensor, kv: KeysValues) -> Tensor:
        return F.scaled_dot_product_attention(q, *kv)

    def explicit(q: Tensor, kv: KeysValues) -> Tensor:
        return ((q * width**-0.5) @ kv.k_BHMK.transpose(-1, -2)).softmax(-1) @ kv.v_BHMK

    def observed(q: Tensor, kv: KeysValues) -> Tensor:
        attention_weights(q, kv.k_BHMK)
        return scaled_dot_product_attention(q, kv)

    functions = {"fused": fused, "ours": scaled_dot_product_attention, "explicit": explicit, "ours, observed": observed}
    rows = []
    for kind, queries, keys, batch in (
        ("self", patches, patches, config.batch_size * config.goals),
        ("cross", patches * config.goals, patches * config.context_frames, config.batch_size),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v, grad = (
                torch.randn(batch, heads, n, width, device=bench.device).to(dtype).requires_grad_()
                for n in (queries, keys, keys, queries)
            )

            def forward(function: Callable, q=q, k=k, v=v) -> None:
                with torch.no_grad():
                    function(q, KeysValues(k, v))

            def both(function: Callable, q=q, k=k, v=v, grad=grad) -> None:
                torch.autograd.grad(function(q, KeysValues(k, v)), (q, k, v), grad)

            for passes, call in (("forward", forward), ("forward + backward", both)):
                case = f"{kind} {queries}×{keys}, {str(dtype).removeprefix('torch.')}, {passes}"
                alternatives = {name: lambda call=call, f=f: call(f) for name, f in functions.items()}
                rows.append(bench.compare(case, alternatives))
    yield Table(f"Attention, {heads} heads of {width}: queries × keys", rows)


@torch.no_grad()
def context(bench: Bench) -> Iterator[Table]:
    """A context encoded once, goals that share it, attention recorded, the network compiled."""
    config, ours = bench.config, bench.contender("ours")
    cdit: CDiT = ours.network.eval()
    batch = bench.batch()
    inputs = (batch.clean, torch.full(batch.clean.shape[:2], 500.0, device=bench.device), batch.condition)
    steps = ours.sampler.steps
    with ours.autocast():
        cache = cdit.encode_context(batch.context)

        def encoded_once() -> None:
            cache = cdit.encode_context(batch.context)
            for _ in range(steps):
                cdit(*inputs, cache)

        def encoded_each_step() -> None:
            for _ in range(steps):
                cdit(*inputs, batch.context)

        row = bench.compare(f"{steps} steps", {"once": encoded_once, "at each step": encoded_each_step})
        yield Table("Context encoded once or at each denoising step", [row])

        repeated = batch.context.repeat_interleave(config.goals, 0)
        flat = (*(x.flatten(0, 1) for x in inputs[:2]), {name: x.flatten(0, 1) for name, x in batch.condition.items()})
        row = bench.compare(
            f"{config.batch_size} contexts of {config.goals} goals",
            {"shared": lambda: cdit(*inputs, batch.context), "repeated": lambda: cdit(*flat, repeated)},
        )
        yield Table("Goals that share a context, or each with a copy of it", [row])

        def recorded() -> None:
            with observers(cdit):
                cdit(*inputs, cache)

        row = bench.compare("cross-attention of all blocks", {"off": lambda: cdit(*inputs, cache), "on": recorded})
        yield Table("Recording attention weights", [row])

        if config.compile:
            row = bench.compare(
                "a denoising step, cached context",
                {"eager": lambda: cdit(*inputs, cache), "compiled": lambda: ours.compiled(*inputs, cache)},
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


def probes(bench: Bench) -> Iterator[Table]:
    """A probe of attention with its figures and files, compared with the training steps between two probes.

    Raises:
        UserError: frames are not RGB.
    """
    config, attention = bench.config, AttentionConfig()
    if config.channels != 3:
        raise UserError(f"channels is {config.channels}, expected 3: probes draw pixels")
    ours = bench.contender("ours", mixed_precision="no")
    world = ours.world(PIXELS)
    samples, goals = attention.samples, config.goals
    windows = Batch(
        torch.randint(256, (samples, config.context_frames, 3, *config.image_size), dtype=torch.uint8),
        torch.ones(samples, config.context_frames, dtype=torch.bool),
        torch.randint(256, (samples, goals, 3, *config.image_size), dtype=torch.uint8),
        Condition(torch.rand(samples, goals), torch.randn(samples, goals, 3)),
    )
    rows, columns = world.cdit.grid
    places = torch.rand(samples, goals, rows * columns, config.context_frames, 2) * torch.tensor([rows, columns])

    with TemporaryDirectory() as folder:

        def probe() -> None:
            report = inspect_attention(world, windows, attention, 0, list(map(str, range(samples))), places)
            report.save(folder)
            report.to_wandb(folder)

        seconds = bench.watch.times({"step": ours.training_step(bench.batch()), "probe": probe})
    row: Row = {
        "": "float32",
        f"step of {config.batch_size} contexts of {goals} goals [ms]": 1000 * median(seconds["step"]),
        f"probe of {samples} contexts [ms]": 1000 * median(seconds["probe"]),
        "probe / training time [%]": Spread.of(100 * seconds["probe"] / (config.probe_every * seconds["step"])),
    }
    yield Table(f"Probes of attention, one every {config.probe_every} steps", [row])
