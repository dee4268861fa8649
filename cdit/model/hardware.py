"""The GPUs for which `python -m cdit.model scale` estimates. Imports no torch."""

from dataclasses import dataclass, field

from cdit.common.limits import NotNegative, Positive


@dataclass
class Hardware:
    """GPUs and their connections; rates are those that training is assumed to reach, as shares of data-sheet values."""

    gpus: list[Positive[int]] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    """Numbers of GPUs to compare."""
    gpus_per_node: Positive[int] = 8
    """GPUs per node."""
    memory_gb: list[Positive[float]] = field(default_factory=lambda: [24, 40, 80, 141])
    """Memory sizes of a GPU to compare, in 10^9 bytes."""
    reserve_gb: NotNegative[float] = 4.0
    """Part of it for CUDA, NCCL, workspaces of libraries, temporary tensors and fragmentation; assumed."""
    tflops: Positive[float] = 400.0
    """10^12 FLOPs per second of a GPU in training; assumed: 40 % of the 989 of NVIDIA's H100 SXM (dense bfloat16)."""
    gpu_link_gb_s: Positive[float] = 360.0
    """10^9 bytes per second that a GPU sends within its node; assumed: 80 % of the 450 of NVLink 4."""
    node_link_gb_s: Positive[float] = 40.0
    """The same for other nodes; assumed: 80 % of a 400 Gbit/s InfiniBand adapter for each GPU."""
    latency_us: NotNegative[float] = 5.0
    """10^-6 seconds from one GPU to the next for the smallest message; assumed."""
    host_gb_s: Positive[float] = 20.0
    """10^9 bytes per second from a GPU to the memory of its host; assumed: 60 % of PCIe 4.0 ×16."""
    disk_gb_s: Positive[float] = 1.0
    """10^9 bytes per second that all processes together write to the folder of the run; assumed."""
    hours_between_failures: Positive[float] = 50000.0
    """Mean time between failures of a GPU (with its share of the node), in hours: 16384 GPUs were interrupted 419 times
    in 54 days (Llama 3, arXiv 2407.21783, section 3.3.4)."""
