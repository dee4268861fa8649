"""Steps whose gradient is not finite: skipped on the device, counted, and their batch saved for inspection."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import save_file
from torch import Tensor

from cdit.batch import Batch
from cdit.common.errors import UserError, writing
from cdit.common.files import write_json
from cdit.training.durable.checkpoints import RunState

FOLDER = "bad_steps"


class BadSteps:
    """Skips and reports them. The host reads the results only when it has to wait for the device anyway.

    A gradient scaler (fp16) itself skips steps whose gradients overflow while it searches for a scale; only losses that
    are not finite count here in that case.

    Args:
        optimizer: a fused AdamW, which can skip a step by a flag on the device.
        limit: `look` raises after this many in a row.
        batch: reads this process's micro-batches of a step again.
    """

    def __init__(
        self,
        optimizer: AcceleratedOptimizer,
        accelerator: Accelerator,
        folder: Path,
        limit: int,
        batch: Callable[[int], Iterable[Batch]],
    ):
        self.optimizer, self.accelerator = optimizer.optimizer, accelerator
        self.folder, self.limit, self.batch = folder / FOLDER, limit, batch
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}  # norm and losses of the steps since the last look

    def before(self, step: int, norm: Tensor, loss: Tensor) -> None:
        """Makes the optimizer skip this step if its gradient is not finite.

        Args:
            step: its number, counted from 0.
            norm: () of the gradients of all processes.
            loss: () of this process's samples.
        """
        if self.accelerator.scaler is None:
            self.optimizer.found_inf = (~norm.isfinite()).float()  # as torch's own GradScaler sets it
            self._seen[step] = norm, loss
        else:
            self._seen[step] = self.accelerator.reduce(loss, "sum"), loss

    def look(self, state: RunState) -> None:
        """Counts the bad steps since the last call, and saves their batches.

        Raises:
            UserError: there are too many in a row, or a batch cannot be written.
        """
        seen, self._seen = self._seen, {}
        values = torch.stack([torch.stack((n.float(), x.float())) for n, x in seen.values()]).tolist() if seen else []
        for step, (norm, loss) in zip(seen, values, strict=True):
            if math.isfinite(norm):
                state.bad_in_a_row = 0
                continue
            state.bad_steps += 1
            state.bad_in_a_row += 1
            self._keep(step, norm, loss)
            if state.bad_in_a_row >= self.limit:
                raise UserError(
                    f"the gradient was not finite in {state.bad_in_a_row} steps in a row, up to step {step}: "
                    f"try a lower optimizer.learning_rate, or inspect their batches in {self.folder}"
                )

    def _keep(self, step: int, norm: float, loss: float) -> None:
        parts = list(self.batch(step))
        named = [part.named_tensors() for part in parts]
        tensors = {name: torch.cat([part[name] for part in named]) for name in named[0]}
        path = self.folder / f"step_{step:08d}_process_{self.accelerator.process_index}"
        record = {"step": step, "gradient_norm": str(norm), "loss": str(loss)}  # nan and inf are not JSON numbers
        with writing(path):
            self.folder.mkdir(exist_ok=True)
            save_file(tensors, path.with_suffix(".safetensors"))
            write_json(path.with_suffix(".json"), record)
