"""The processes of a distributed run."""

import re

import torch.distributed as dist

LOST_PEERS = re.compile(
    r"Connection (closed|reset|refused)|Timed out|timed out|timeout|Broken pipe|\[.*gloo.*\]|NCCL|ProcessGroup"
    r"|Socket (closed|error)",
    re.IGNORECASE,
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process, or the network to it, was lost."""
    return isinstance(error, dist.DistError) or (dist.is_initialized() and bool(LOST_PEERS.search(str(error))))
