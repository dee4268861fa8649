"""Memory and communication of a training run: calculated, not measured.

Weights, gradients, AdamW's two moments and the average are float32 (Muon keeps one momentum of the matrices it takes);
autocast computes with bfloat16 copies. N is the number of parameters, P that of GPUs. Replicated (DDP), every GPU holds
everything, and a second set of gradients in the buckets that are sent. Sharded (FSDP2), it holds 1/P of that, plus the
weights of a block or two while they compute.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from cdit.model.activations import activation_bytes, backward_bytes
from cdit.model.cdit import CDiT
from cdit.model.describe import HIDDEN_MATRIX, flops
from cdit.model.hardware import Hardware

BUCKET = 25 * 2**20
"""Bytes per message of DDP, torch's `bucket_cap_mb`."""
Mode = Literal["DDP", "FSDP2"]


@dataclass(frozen=True)
class Run:
    """What is trained: a network, which may be on the meta device, and its batches."""

    cdit: CDiT
    context_frames: int
    goals: int
    batch_size: int
    """Contexts per step, over all GPUs."""
    micro_batch_size: int | None
    """Contexts per GPU and forward pass; None: its whole share."""
    checkpointing: bool
    """Whether activations are checkpointed."""
    optimizer: Literal["adamw", "muon"] = "adamw"

    @cached_property
    def forward_flops(self) -> int:
        """Of the forward pass of one context with its goals."""
        return flops(self.cdit, self.context_frames, self.goals)["forward, context included"]

    @cached_property
    def parameters(self) -> int:
        """N."""
        return sum(p.numel() for p in self.cdit.parameters())

    @cached_property
    def matrices(self) -> list[tuple[int, int]]:
        """Rows and columns of each matrix that Muon orthogonalises; none with AdamW."""
        named = self.cdit.named_parameters() if self.optimizer == "muon" else ()
        shapes = {name: tuple(p.shape) for name, p in named if HIDDEN_MATRIX.fullmatch(name)}
        return [
            (rows // 2, columns) if name.endswith(".kv.weight") else (rows, columns)
            for name, (rows, columns) in shapes.items()
            for _ in range(2 if name.endswith(".kv.weight") else 1)
        ]

    @property
    def block_parameters(self) -> list[int]:
        """Of each block, those of the wide head included."""
        blocks = (*self.cdit.blocks, *self.cdit.wide_blocks)
        return [sum(p.numel() for p in block.parameters()) for block in blocks]

    def micro_batches(self, gpus: int) -> tuple[int, int]:
        """Micro-batches per GPU and step, and contexts in each; the last ones are padded."""
        share = math.ceil(self.batch_size / gpus)
        count = math.ceil(share / (self.micro_batch_size or share))
        return count, math.ceil(share / count)


def state_bytes(run: Run, gpus: int, mode: Mode) -> dict[str, float]:
    """Bytes on each GPU that do not depend on the batch, by purpose.

    If sharded, two blocks are gathered at a time in bfloat16, the second while the first computes, and the gradients of
    one block are complete, in bfloat16 and in the float32 that is sent, all of the size of the largest; the outermost
    part (embeddings, final layer) is gathered in float32.
    """
    share = 1 / gpus if mode == "FSDP2" else 1.0
    each = 4 * run.parameters * share
    state = {"weights": each, "gradients": each, "moments": moment_bytes(run) * share, "average": each}
    if mode == "FSDP2" and gpus > 1:
        blocks = run.block_parameters
        state["gathered"] = (2 * 2 + 2 + 4) * max(blocks) + 4 * (run.parameters - sum(blocks))
    else:
        state["bfloat16 copies"] = 2.0 * run.parameters
        if gpus > 1:
            state["buckets"] = each
    return state


def moment_bytes(run: Run) -> int:
    """Bytes of the optimizer's state: two moments of each parameter, one of those that Muon takes."""
    return 4 * (2 * run.parameters - sum(rows * columns for rows, columns in run.matrices))


def muon_flops(run: Run) -> int:
    """FLOPs of orthogonalising all matrices, m × n with m ≤ n, in 5 iterations: x·xᵀ, its square, their sum times x."""
    shapes = [sorted(shape) for shape in run.matrices]
    return 5 * sum(2 * m * m * (2 * n + m) for m, n in shapes)


def largest_micro_batch(run: Run, gpus: int, mode: Mode, checkpointing: bool, memory: float) -> int:
    """How many contexts fit on a GPU of this many bytes at once; 0 if not even one does."""
    free = memory - sum(state_bytes(run, gpus, mode).values())
    each = activation_bytes(run.cdit, run.context_frames, run.goals, checkpointing) + backward_bytes(
        run.cdit, run.goals
    )
    return max(0, int(free // each))


def all_reduce_seconds(size: float, gpus: int, messages: int, hardware: Hardware) -> float:
    """Seconds to sum `size` bytes over all GPUs, in this many messages.

    By rings, 2(P-1) hops and 2(P-1)/P of the bytes over each link (Patarasuk & Yuan 2009, doi
    10.1016/j.jpdc.2008.09.002), or by trees, 2·log₂P hops and twice the bytes (Sanders et al. 2009, doi
    10.1016/j.parco.2009.09.001): NCCL uses the faster one.
    """
    rate, hop = link_rate(gpus, hardware), messages * hardware.latency_us * 1e-6
    ring = 2 * (gpus - 1) * hop + 2 * (gpus - 1) / gpus * size / rate
    tree = 2 * math.log2(gpus) * hop + 2 * size / rate
    return min(ring, tree)


def gather_seconds(size: float, gpus: int, messages: int, hardware: Hardware) -> float:
    """Seconds to gather `size` bytes on every GPU, or to reduce-scatter them, by rings: P-1 hops, (P-1)/P of the bytes.

    Thakur, Rabenseifner & Gropp 2005, doi 10.1177/1094342005051521.
    """
    return (gpus - 1) * (messages * hardware.latency_us * 1e-6 + size / gpus / link_rate(gpus, hardware))


def link_rate(gpus: int, hardware: Hardware) -> float:
    """Bytes per second over the slowest link of a ring.

    Between nodes as many rings run in parallel as a node has GPUs, each over the adapter of another GPU, so that the
    adapters of a node share the traffic.
    """
    within = hardware.gpu_link_gb_s * 1e9
    if gpus <= hardware.gpus_per_node:
        return within
    return min(within, hardware.gpus_per_node * hardware.node_link_gb_s * 1e9)


@dataclass(frozen=True)
class Step:
    """The seconds of an optimizer step on each GPU."""

    compute: float
    communication: float
    exposed: float
    """The part of it that does not overlap with computation."""

    @property
    def efficiency(self) -> float:
        """Share of the step in which the GPU computes."""
        return self.compute / (self.compute + self.exposed)


def step(run: Run, gpus: int, mode: Mode, hardware: Hardware) -> Step:
    """The time of a step, without AdamW, data loading and everything before the first overlap.

    A backward pass is two forward passes, three with checkpointing. DDP sends 4 bytes per parameter once per step,
    during the backward pass of the last micro-batch. FSDP2 communicates in each micro-batch: it gathers the blocks, 2
    bytes per parameter, during the forward and again during the backward pass, where it also reduces 4 bytes per
    parameter, block by block. Muon orthogonalises every matrix on every GPU; if they are sharded, it first gathers the
    updates, 2 bytes per parameter, without overlap.
    """
    count, size = run.micro_batches(gpus)
    forward = size * run.forward_flops / hardware.tflops / 1e12
    backward = (3 if run.checkpointing else 2) * forward
    compute = count * (forward + backward) + muon_flops(run) / hardware.tflops / 1e12
    if gpus == 1:
        return Step(compute, 0.0, 0.0)
    if mode == "DDP":
        bytes_sent = 4 * run.parameters
        sent = all_reduce_seconds(bytes_sent, gpus, math.ceil(bytes_sent / BUCKET), hardware)
        return Step(compute, sent, max(0.0, sent - backward))
    blocks = len(run.block_parameters)
    gather = gather_seconds(2 * run.parameters, gpus, blocks, hardware)
    reduce = gather_seconds(4 * run.parameters, gpus, blocks, hardware)
    exposed = max(0.0, gather - forward) + max(0.0, gather + reduce - backward)
    updates = 2 * sum(rows * columns for rows, columns in run.matrices)
    updated = gather_seconds(updates, gpus, len(run.matrices), hardware) if updates else 0.0
    return Step(compute, count * (2 * gather + reduce) + updated, count * exposed + updated)


def checkpoint_interval(seconds: float, hours_between_failures: float) -> tuple[float, float]:
    """The best interval between checkpoints, in seconds, and the share of time lost with it.

    √(2·δ·M) with a checkpoint that stops the loop for δ and a failure every M (Young 1974, doi 10.1145/361147.361115;
    the first term of Daly 2006, doi 10.1016/j.future.2004.11.016). Lost are δ per interval and half an interval
    per failure, in addition to the restart itself, which does not depend on the interval.
    """
    between = 3600 * hours_between_failures
    interval = math.sqrt(2 * seconds * between)
    return interval, seconds / interval + interval / (2 * between)


def tables(run: Run, hardware: Hardware) -> str:
    """All estimates as Markdown."""
    return "\n\n".join((_memory(run), _presets(run, hardware), _scaling(run, hardware), _checkpoints(run, hardware)))


def _memory(run: Run) -> str:
    columns: list[tuple[str, int, Mode]] = [("1 GPU", 1, "DDP"), ("DDP", 8, "DDP")]
    columns += [(f"FSDP2 on {gpus}", gpus, "FSDP2") for gpus in (8, 64, 512)]
    states = [state_bytes(run, gpus, mode) for _, gpus, mode in columns]
    names = ["weights", "gradients", "moments", "average", "bfloat16 copies", "buckets", "gathered"]
    rows = [[name, *(f"{state[name] / 1e9:.2f}" if name in state else "" for state in states)] for name in names]
    rows.append(["together", *(f"{sum(state.values()) / 1e9:.2f}" for state in states)])
    for label, checkpointing in (("a context's activations", False), ("the same, checkpointed", True)):
        each = activation_bytes(run.cdit, run.context_frames, run.goals, checkpointing) / 1e9
        rows.append([label, *[f"{each:.3f}"] * len(columns)])
    return _table([f"GB, {run.parameters / 1e6:.1f} M parameters", *(name for name, *_ in columns)], rows)


def _presets(run: Run, hardware: Hardware) -> str:
    modes: list[tuple[str, int, Mode]] = [("1 GPU", 1, "DDP"), ("DDP", 8, "DDP"), ("FSDP2 on 8", 8, "FSDP2")]
    rows = [
        [f"{size:g} GB", *(
            str(largest_micro_batch(run, gpus, mode, checkpointing, 1e9 * (size - hardware.reserve_gb)) or "–")
            for _, gpus, mode in modes for checkpointing in (False, True)
        )]
        for size in hardware.memory_gb
    ]  # fmt: skip
    heads = [name for mode, *_ in modes for name in (mode, "checkpointed")]
    return _table(["largest micro_batch_size", *heads], rows)


def _scaling(run: Run, hardware: Hardware) -> str:
    rows = []
    for gpus in hardware.gpus:
        steps = [step(run, gpus, mode, hardware) for mode in ("DDP", "FSDP2")]
        count, size = run.micro_batches(gpus)
        rows.append([str(gpus), f"{count} × {size}", f"{1e3 * steps[0].compute:.1f}"])
        rows[-1] += [text for s in steps for text in (f"{1e3 * s.communication:.1f}", f"{s.efficiency:.0%}")]
    heads = ["GPUs", "micro-batches × contexts", "compute ms", "DDP sends ms", "computes", "FSDP2 sends ms", "computes"]
    return _table(heads, rows)


def _checkpoints(run: Run, hardware: Hardware) -> str:
    size = 8 * run.parameters + moment_bytes(run)  # weights, average, moments
    written = size / hardware.disk_gb_s / 1e9
    rows = []
    for gpus in hardware.gpus:
        hours = hardware.hours_between_failures / gpus
        rows.append([str(gpus), f"{hours:.0f}"])
        for mode in ("DDP", "FSDP2"):
            stopped = size / (gpus if mode == "FSDP2" else 1) / hardware.host_gb_s / 1e9
            interval, lost = checkpoint_interval(stopped, hours)
            taken = step(run, gpus, mode, hardware)
            steps = max(interval, written) / (taken.compute + taken.exposed)
            rows[-1] += [f"{stopped:.3f}", f"{interval / 60:.1f}", f"{steps:.0f}", f"{lost:.3%}"]
    heads = ["GPUs", "hours between failures"]
    for mode in ("DDP", "FSDP2"):
        heads += [f"{mode} stops s", "best every min", "checkpoint.every", "lost"]
    return f"A checkpoint: {size / 1e9:.1f} GB, {written:.0f} s to write\n\n{_table(heads, rows)}"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
