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
from cdit.training.durable.run import DurableRun

sys.path.append(str(Path(__file__).parents[3]))
import train

LONG_S = 8.0
"""Longer than another process takes to end, and a launcher to notice that."""


def main() -> None:
    write, before_step = manifest.write_manifest, DurableRun.before_step

    def slow_write(*arguments: Any) -> None:
        time.sleep(LONG_S)
        write(*arguments)

    def stopped(run: DurableRun, *arguments: Any) -> None:
        if run.step == 2 and run.accelerator.is_main_process:
            os.kill(os.getpid(), signal.SIGTERM)
        before_step(run, *arguments)

    manifest.write_manifest, DurableRun.before_step = slow_write, stopped
    train.cli.run(train.main)


if __name__ == "__main__":
    main()
