"""Where the time of a training step goes."""

import re
from collections import Counter
from collections.abc import Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from cdit.benchmark.bench import Bench
from cdit.benchmark.contenders import Batch, Ours
from cdit.benchmark.stopwatch import Call
from cdit.benchmark.tables import Cell, Table

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
"""Kinds of operations by their names; the first that fits counts."""
REST = "dispatch and all else"


def profile(bench: Bench) -> Iterator[Table]:
    """Of every contender, and of our networks compiled where asked for."""
    config = bench.config
    batch = Batch.random(config, bench.device, config.batch_size, config.goals)
    steps: dict[str, Call] = {}
    for c in bench.contenders():
        steps[c.name] = c.training_step(batch)
        if config.compile and isinstance(c, Ours):
            steps[f"{c.name}, compiled"] = c.training_step(batch, predict=c.predict_compiled)
    times = {name: by_kind(step, config.rounds, bench.device) for name, step in steps.items()}
    rows: list[dict[str, Cell]] = []
    for kind in (*KINDS, REST):
        row: dict[str, Cell] = {"": kind}
        for name, spent in times.items():
            row[f"{name} [ms]"] = float(spent[kind])
            row[f"{name} [%]"] = float(100 * spent[kind] / spent.total())
        rows.append(row)
    yield Table(f"Where a training step's time goes, {config.batch_size} contexts of {config.goals} goals", rows)


def by_kind(step: Call, rounds: int, device: torch.device) -> Counter[str]:
    """Milliseconds of a step by kind, from the profiler, which slows small operations down a little."""
    for _ in range(2):
        step()
    gpu = device.type == "cuda"
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    ) as recorded:
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
