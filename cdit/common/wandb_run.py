"""A run at Weights & Biases. Whatever happens there costs the program that reports to it a warning and some seconds."""

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
"""Longest wait for the server's first answer."""
CALL_S = 60.0
"""Longest wait for any one call: to start, with the login, or to take what is logged, which it only puts on disk."""
FINISH_S = 60.0
"""Longest wait for what has not been uploaded when the program ends. `wandb sync --include-online` does it later."""
SERVICE = "wandb-core"


class WandbRun:
    """Online where somebody is logged in and the server answers, else in `<folder>/wandb`, to be synced later.

    Nothing here raises, or waits for longer than the times above: the first call that fails, or does not return, is the
    last one, and a warning says so. Where the program ends without `finish`, that is done on its way out.

    The same `run_id` again continues the run: online from `next_step` on; offline in a further folder, which is the
    whole run by itself if all is logged again, and which takes the place of the others when it is synced.
    """

    next_step = 0
    """The first step that the server does not have; earlier ones are not logged again."""

    def __init__(self, folder: Path, run_id: str | None = None, **about: Any):
        """Starts or continues a run.

        Args:
            folder: whose `wandb` gets its files.
            run_id: its identity; by default a new one.
            about: further arguments of `wandb.init`: project, name, config.
        """
        self._folder, self._calls = folder, _Calls()
        # Where pictures in tables wait for `wandb sync`; by default that would be the home folder.
        os.environ.setdefault("WANDB_DATA_DIR", str((folder / "wandb").absolute()))
        # Reports of W&B's errors to its makers; where the server is gone, they wait for it for long when Python ends.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        for mode, otherwise in (
            (os.environ.get("WANDB_MODE"), "trying offline"),
            ("offline", "nothing is shown there"),
        ):
            self._run = self._try(partial(_start, folder, run_id, mode, about), otherwise, CALL_S)
            if self._run is not None:
                break
        if self._run is None:
            return
        atexit.register(self.finish)  # after wandb's own, which it thereby precedes: that one waits without end
        if self._run.settings.mode == "offline":
            files = Path(os.path.relpath(self._run.dir)).parent
            tqdm.write(f"W&B offline: to see the run, `wandb login` and then `wandb sync {files}`")
        elif self._run.resumed:
            self.next_step = self._run.starting_step

    def log(self, content: Callable[[], Mapping[str, Any]], step: int | None = None) -> None:
        """Logs what a function returns: numbers, W&B objects. What goes wrong in making them is W&B's trouble, too."""
        run = self._run
        if run is not None and (step is None or step >= self.next_step):
            self._try(lambda: run.log(dict(content()), step=step), f"what follows is in {self._folder} alone", CALL_S)

    def finish(self) -> None:
        """Uploads the rest, and ends the run; W&B itself says so where that is not done in time."""
        atexit.unregister(self.finish)
        run = self._run
        if run is not None:
            self._try(lambda: (run.finish(), wandb.teardown()), f"see {self._folder} for the rest", FINISH_S + CALL_S)
        self._run = None

    def _try(self, call: Callable[[], T], otherwise: str, seconds: float) -> T | None:
        """What a call returns; else None, and the run is given up with everything of W&B in this process."""
        try:
            return self._calls.result(call, seconds)
        except (Exception, SystemExit) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            tqdm.write(f"warning: W&B does not work ({reason}): {otherwise}", file=sys.stderr)
            for end in (_kill, self._tear_down) if isinstance(error, TimeoutError) else (self._tear_down, _kill):
                end()
        self._run = None
        return None

    def _tear_down(self) -> None:
        """Ends W&B's process, if it takes its leave in time, and takes back what W&B would do when Python ends."""
        with suppress(Exception, SystemExit):  # of a process that is gone, or ended with a code of its own
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
    # What is synced of an offline run that resumes another is appended to it with other steps than it was logged with.
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
            if future.done():  # and this is what the call raised
                raise
            raise TimeoutError(f"no answer within {seconds:g} s") from None

    def _work(self) -> None:
        while True:
            call, future = self._queue.get()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
