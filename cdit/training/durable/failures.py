"""One-line explanations of failures that come from outside: out of memory, lost processes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from cdit.common.errors import Interrupted, UserError
from cdit.common.processes import is_lost_peer

NO_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory|bad_alloc", re.IGNORECASE)
ADVICE = (
    "a smaller micro_batch_size (the same training, in smaller pieces), --activation_checkpointing true, a smaller "
    "data.cache_gb or fewer data.workers"
)


@contextmanager
def explained() -> Iterator[None]:
    """Turns library errors about memory and lost processes into one clear error.

    Raises:
        UserError: out of memory.
        Interrupted: another process, or the network to it, was lost.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(f"out of memory: try {ADVICE} ({_first_line(error)})") from error
    except (dist.DistError, RuntimeError, OSError) as error:
        if isinstance(error, (RuntimeError, OSError)) and NO_MEMORY.search(str(error)):
            raise UserError(f"out of memory: try {ADVICE} ({_first_line(error)})") from error
        if is_lost_peer(error):
            raise Interrupted(
                f"another process is gone or does not respond ({_first_line(error)}); --resume auto continues"
            ) from error
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
