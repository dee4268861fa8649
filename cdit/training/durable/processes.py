"""Communication between the processes of a run besides gradients: small numbers, over the CPU."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from cdit.common.errors import UserError

T = TypeVar("T")


class Processes:
    """The processes of a run."""

    def __init__(self, accelerator: Accelerator, timeout: timedelta):
        self.accelerator = accelerator
        several = accelerator.num_processes > 1
        self._group = dist.new_group(backend="gloo", timeout=timeout) if several else None

    def sum(self, *numbers: float) -> list[float]:
        """Sums over all processes; every process must call it."""
        if self._group is None:
            return [float(number) for number in numbers]
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums, group=self._group)
        return sums.tolist()


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Runs `work` on the main process and returns its result on every process; every process must call it.

    Raises:
        UserError: `work` raised it, on all of them.
    """
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result
