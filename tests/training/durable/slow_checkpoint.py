"""train.py with checkpoints that take long to write, and SIGTERM to the process that does, in step 3: for torchrun.

The arguments are those of train.py.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from cdit.training.durable import manifest

sys.path.append(str(Path(__file__).parents[3]))
import train

LONG_S = 8.0
"""Longer than another process takes to end, and a launcher to notice that."""


def main() -> None:
    write, backward = manifest.write_manifest, train.backward

    def slow_write(*arguments: Any) -> None:
        time.sleep(LONG_S)
        write(*arguments)

    def stopped_backward(config: Any, accelerator: Any, world: Any, network: Any, parts: Any, step: int, *more: Any):
        if step == 2 and accelerator.is_main_process:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(config, accelerator, world, network, parts, step, *more)

    manifest.write_manifest, train.backward = slow_write, stopped_backward
    train.run(train.main)


if __name__ == "__main__":
    main()
