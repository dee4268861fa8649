"""Stops a run on a signal: from Ctrl-C, `kill`, or a cluster that reclaims its machine."""

import ctypes
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

from cdit.common.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_SIGNAL_S = 1.0
"""Launchers forward signals that the process group has already received; repeats within this time are ignored."""


class StopSignals:
    """Handles SIGTERM, SIGINT and SIGUSR1 inside the `with`.

    Until `defer` is called, the first signal raises `Interrupted`, also if other code catches and replaces it. From
    then on it is recorded in `received`, so that the loop can finish its step. A second signal, more than a second
    later, ends the process immediately.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferred = False
        self._first_s = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def defer(self) -> None:
        """From now on a signal is only recorded.

        Raises:
            Interrupted: a signal has already been received.
        """
        self._deferred = True
        if self.received:
            raise self._early()

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.received and not self._deferred and isinstance(error, Exception):  # perhaps one that replaced it
            raise self._early() from error

    def _early(self) -> Interrupted:
        return Interrupted(f"{self.received.name}, before the first step")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self._first_s > SAME_SIGNAL_S:
            os._exit(128 + number)
        if self.received:
            return
        self.received, self._first_s = signal.Signals(number), time.monotonic()
        if not self._deferred:
            raise self._early()
        # Not print: the handler may have interrupted one.
        os.write(2, f"\n{self.received.name}: stopping after this step; send again to stop immediately\n".encode())


def end_with_launcher() -> None:
    """Makes Linux send SIGTERM to this process when the launcher that started it is gone.

    A killed launcher would otherwise leave it running. Without a launcher nothing happens, so that runs started with
    nohup outlive their shell.
    """
    launched = any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))
    if sys.platform == "linux" and launched:
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
