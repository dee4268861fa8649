"""Training steps: how long they take, and where the time goes."""

import re
from collections import Counter
from collections.abc import Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from cdit.batch import EncodedBatch
from cdit.benchmark.bench import Bench
from cdit.benchmark.config import Precision
from cdit.benchmark.contenders import Contender, Ours
from cdit.benchmark.measure import Call, Row, Spread, Table, median, peak_bytes, product
from cdit.model.describe import counted_flops

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "no": torch.float32}
KINDS = {
    "products": r"aten::(addmm|mm|bmm|baddbmm|\w*convolution\w*)$",
    "fused attention": r"aten::_(scaled_dot_product|flash|efficient|cudnn)\w*attention\w*",
    "softmax": r"aten::_softmax\w*",
    "GELU": r"aten::gelu\w*",
    "layer norm": r"aten::native_layer_norm\w*",
    "copies and casts": r"aten::(copy_|cat|clone|fill_|zero_|repeat_interleave|index\w*)$",
    "optimizer, average, norm of gradients": r"aten::(_fused_\w+|_foreach_\w+|lerp_|linalg_vector_norm)$",
    "other element-wise operations and sums": r"aten::\w+",
    "compiled kernels": r".*(fused_|triton_|Compiled).*",
}
"""Kinds of operations by their names; the first match counts."""
REST = "dispatch and everything else"


def train(bench: Bench) -> Iterator[Table]:
    """Steps of every contender at the config's precision, compiled if the config says so, and in float32."""
    config, batch = bench.config, bench.batch()
    peaks = {
        name: peak_bytes(bench.device, lambda name=name: two_steps(bench, name, batch)) for name in config.contenders
    }
    contenders = bench.contenders()
    flops = {c.name: training_flops(c, batch) for c in contenders}
    steps: dict[tuple[str, Precision], Call] = {
        (name, config.mixed_precision): step for name, step in training_steps(bench, contenders, batch).items()
    }
    if config.mixed_precision != "no":
        steps |= {(f"{c.name}, float32", "no"): c.training_step(batch, "no") for c in contenders}
    products = {precision: product(bench.device, DTYPES[precision]) for precision in dict.fromkeys(p for _, p in steps)}
    seconds = bench.watch.times(steps | {("product", p): call for p, (call, _) in products.items()})
    first = next(iter(steps))
    rows: list[Row] = []
    for name, precision in steps:
        time, work = seconds[name, precision], flops[name.split(",")[0]]
        ceiling = products[precision][1] / seconds["product", precision]
        peak = peaks.get(name)
        rows.append({
            "": name,
            "step [s]": median(time),
            "samples/s": config.batch_size * config.goals / median(time),
            "step / first": Spread.of(time / seconds[first]),
            "TFLOP": work / 1e12,
            "TFLOP/s": median(work / time) / 1e12,
            "% of matrix-product rate": Spread.of(100 * work / time / ceiling),
            "peak memory [GB]": None if peak is None else peak / 1e9,
        })  # fmt: skip
    measured = ", ".join(
        f"{flop / median(seconds['product', p]) / 1e12:.3g} TFLOP/s in {str(DTYPES[p]).removeprefix('torch.')}"
        for p, (_, flop) in products.items()
    )
    title = f"Training, {config.batch_size} contexts of {config.goals} goals, {config.context_frames} past frames"
    note = f"Products of large matrices, in the same rounds: {measured}. Peak memory: from building through two steps."
    yield Table(title, rows, note)


def profile(bench: Bench) -> Iterator[Table]:
    """Time of each kind of operation in the steps of every contender."""
    config = bench.config
    steps = training_steps(bench, bench.contenders(), bench.batch())
    times = {name: by_kind(step, config.rounds, bench.device) for name, step in steps.items()}
    rows: list[Row] = []
    for kind in (*KINDS, REST):
        row: Row = {"": kind}
        for name, spent in times.items():
            row |= {f"{name} [ms]": float(spent[kind]), f"{name} [%]": float(100 * spent[kind] / spent.total())}
        rows.append(row)
    yield Table(f"Where a training step's time goes, {config.batch_size} contexts of {config.goals} goals", rows)


def training_steps(bench: Bench, contenders: list[Contender], batch: EncodedBatch) -> dict[str, Call]:
    """A step of every contender, and of our networks compiled if the config says so."""
    steps: dict[str, Call] = {}
    for c in contenders:
        steps[c.name] = c.training_step(batch)
        if bench.config.compile and isinstance(c, Ours):
            steps[f"{c.name}, compiled"] = c.training_step(batch, network=c.compiled)
    return steps


def two_steps(bench: Bench, name: str, batch: EncodedBatch) -> None:
    """A training set-up whose memory is measured."""
    step = bench.contender(name).training_step(batch)
    step()
    step()


def training_flops(contender: Contender, batch: EncodedBatch) -> int:
    """FLOPs of prediction and gradients."""
    timestep = torch.full(batch.clean.shape[:2], 500.0, device=contender.device)
    inputs = (batch.clean, timestep, batch.condition, batch.context)
    counted = counted_flops(lambda: contender.predict(*inputs).sum().backward())
    contender.network.zero_grad()
    return counted


def by_kind(step: Call, rounds: int, device: torch.device) -> Counter[str]:
    """Milliseconds of a step by kind, from the profiler, which slows small operations down a little."""
    for _ in range(2):
        step()
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(rounds):
            step()
    spent: Counter[str] = Counter()
    for event in recorded.key_averages():
        if event.device_type == DeviceType.CPU:  # kernels on a GPU count for the operations that started them
            microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
            spent[kind_of(event.key)] += microseconds / 1000 / rounds
    return spent


def kind_of(operation: str) -> str:
    """The kind of an operation by its name."""
    return next((kind for kind, names in KINDS.items() if re.match(names, operation)), REST)
