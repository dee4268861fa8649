"""A Weights & Biases run whose failures cause at most a warning and a short delay."""

import atexit
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # not the built-in one before Python 3.11
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import psutil
import wandb
from tqdm import tqdm

T = TypeVar("T")

INIT_S = 30.0
"""Longest wait for the first response of the server."""
CALL_S = 60.0
"""Longest wait for one call: to start, including the login, or to log, which only writes to disk."""
FINISH_S = 60.0
"""Longest wait for pending uploads when the program ends. `wandb sync --include-online` uploads the rest later."""
SERVICE = "wandb-core"


class WandbRun:
    """Online if the user is logged in and the server responds, otherwise in `<folder>/wandb`, to be synced later.

    No method raises or waits longer than the times above: the first call that fails or does not return is the last one,
    with a warning. If the program ends without `finish`, it is called at exit.

    Passing the same `run_id` continues the run: online from `next_step` on; offline in a new folder, which holds the
    whole run if everything is logged again, and which replaces the earlier ones when it is synced.
    """

    next_step = 0
    """The first step that the server lacks; earlier ones are not logged again."""

    def __init__(self, folder: Path, run_id: str | None = None, **about: Any):
        """Starts or continues a run.

        Args:
            folder: its files go to `wandb` in it.
            run_id: its id; by default a new one.
            about: further arguments of `wandb.init`: project, name, config.
        """
        self._folder, self._calls = folder, _Calls()
        # Where pictures in tables are kept for `wandb sync`; the default is the home folder.
        os.environ.setdefault("WANDB_DATA_DIR", str((folder / "wandb").absolute()))
        # Error reports to W&B; if the server is unreachable, they delay the end of Python for long.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        for mode, otherwise in (
            (os.environ.get("WANDB_MODE"), "trying offline"),
            ("offline", "nothing is logged there"),
        ):
            self._run = self._try(partial(_start, folder, run_id, mode, about), otherwise, CALL_S)
            if self._run is not None:
                break
        if self._run is None:
            return
        atexit.register(self.finish)  # called before wandb's own handler, which waits without limit
        if self._run.settings.mode == "offline":
            files = Path(os.path.relpath(self._run.dir)).parent
            tqdm.write(f"W&B offline: to see the run, `wandb login` and then `wandb sync {files}`")
        elif self._run.resumed:
            self.next_step = self._run.starting_step

    def log(self, content: Callable[[], Mapping[str, Any]], step: int | None = None) -> None:
        """Logs what a function returns: numbers, W&B objects. Errors in the function are handled like those of W&B."""
        run = self._run
        if run is not None and (step is None or step >= self.next_step):
            self._try(
                lambda: run.log(dict(content()), step=step), f"from here on, results are only in {self._folder}", CALL_S
            )

    def finish(self) -> None:
        """Uploads the rest and ends the run; W&B itself prints a message if there is not enough time."""
        atexit.unregister(self.finish)
        run = self._run
        if run is not None:
            self._try(lambda: (run.finish(), wandb.teardown()), f"see {self._folder} for the rest", FINISH_S + CALL_S)
        self._run = None

    def _try(self, call: Callable[[], T], otherwise: str, seconds: float) -> T | None:
        """What a call returns; None if it fails, and W&B is shut down in this process."""
        try:
            return self._calls.result(call, seconds)
        except (Exception, SystemExit) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            tqdm.write(f"warning: W&B failed ({reason}): {otherwise}", file=sys.stderr)
            for end in (_kill, self._tear_down) if isinstance(error, TimeoutError) else (self._tear_down, _kill):
                end()
        self._run = None
        return None

    def _tear_down(self) -> None:
        """Ends W&B's process, if that succeeds in time, and removes its exit handlers."""
        with suppress(Exception, SystemExit):  # the process is gone, or ended with its own exit code
            self._calls.result(wandb.teardown, FINISH_S + CALL_S)


def _kill() -> None:
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() == SERVICE:
                child.kill()


def _start(folder: Path, run_id: str | None, mode: str | None, about: Mapping[str, Any]) -> Any:
    if mode is None and not wandb.login(prompt=False, verify=False):
        mode = "offline"
    settings = wandb.Settings(silent=True, console="off", init_timeout=INIT_S, finish_timeout=FINISH_S)
    # Syncing an offline run that resumes another would append it with wrong steps.
    resume = None if mode == "offline" else "allow"
    return wandb.init(id=run_id, mode=mode, resume=resume, dir=str(folder), settings=settings, **about)


class _Calls:
    """A thread for calls that may not return."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        Thread(target=self._work, daemon=True).start()

    def result(self, call: Callable[[], T], seconds: float) -> T:
        """What the call returns.

        Raises:
            TimeoutError: it did not return in time.
            BaseException: what the call raises.
        """
        future: Future[T] = Future()
        self._queue.put((call, future))
        try:
            return future.result(seconds)
        except FutureTimeout:
            if future.done():  # the call itself raised it
                raise
            raise TimeoutError(f"no answer within {seconds:g} s") from None

    def _work(self) -> None:
        while True:
            call, future = self._queue.get()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
