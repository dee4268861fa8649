"""Runs at W&B in processes of their own, with a server of our own: what fails there, fails there alone."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).parent))
from wandb_server import WandbServer

# Logs a row at each of the steps; `act(step)` is what a test does to it on the way.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from urllib.request import urlopen
import psutil
import wandb
import cdit.common.wandb_run
from cdit.common.wandb_run import WandbRun

cdit.common.wandb_run.INIT_S, cdit.common.wandb_run.CALL_S, cdit.common.wandb_run.FINISH_S = 2.0, 4.0, 2.0

def service(number):
    (core,) = (child for child in psutil.Process().children() if child.name() == "wandb-core")
    core.send_signal(number)

run = WandbRun(Path("."), "r1", project="p", name="n")
print("started", run.next_step, flush=True)
for step in STEPS:
    ACT
    time.sleep(0.05)
    run.log(lambda: {"a": step}, step)
    run.log(lambda: {"b": -step}, step)
END
"""


@dataclass
class Ended:
    code: int
    seconds: float
    out: str
    errors: list[str]
    services_left: list[psutil.Process]


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Ended]:
    """Runs the program in a folder of its own: offline, or with the server at `url`."""

    def call(
        steps: str = "range(1, 5)",
        act: str = "pass",
        end: str = "run.finish()",
        url: str | None = None,
        **variables: str,
    ) -> Ended:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        mode = (
            {"WANDB_MODE": "online", "WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40}
            if url
            else {"WANDB_MODE": "offline"}
        )
        text = PROGRAM.replace("STEPS", steps).replace("ACT", act).replace("END", end)
        begin = time.monotonic()
        with (tmp_path / "out").open("w+") as out, (tmp_path / "err").open("w+") as errors:  # a pipe would be kept open
            process = subprocess.Popen(
                [sys.executable, "-c", text],
                cwd=tmp_path,
                env={**kept, **mode, "HOME": str(tmp_path), **variables},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
            )
            services: dict[int, psutil.Process] = {}
            while process.poll() is None and time.monotonic() < begin + 60:
                with suppress(psutil.NoSuchProcess):
                    children = psutil.Process(process.pid).children()
                    services |= {child.pid: child for child in children if child.name() == "wandb-core"}
                time.sleep(0.05)
            seconds = time.monotonic() - begin
            process.kill()
            code = process.wait()
        _, left = psutil.wait_procs(list(services.values()), timeout=5)
        for service in left:
            service.kill()
        return Ended(code, seconds, (tmp_path / "out").read_text(), (tmp_path / "err").read_text().splitlines(), left)

    return call


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.close()


other = server


def warnings(ended: Ended) -> list[str]:
    """Our own; everything else on stderr must be W&B's own words, and no traceback."""
    assert not any("Traceback" in line or "Exception" in line for line in ended.errors), ended.errors
    return [line for line in ended.errors if not line.startswith("wandb: ")]


def folders(folder: Path, kind: str) -> list[Path]:
    return sorted((folder / "wandb").glob(f"{kind}-*-r1"))


@pytest.mark.slow
def test_the_server_gets_every_row(program: Callable[..., Ended], server: WandbServer):
    ended = program(url=server.url)
    assert ended.code == 0
    assert not warnings(ended)
    assert server.rows("r1") == [{"_step": step, "a": step, "b": -step} for step in range(1, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["refused", "silent"])
def test_a_server_out_of_reach(program: Callable[..., Ended], tmp_path: Path, how: str):
    """It starts in bounded time, offline."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if how == "silent":
            listening.listen()
        ended = program(url=f"http://127.0.0.1:{listening.getsockname()[1]}")
    assert ended.code == 0
    assert "started 0" in ended.out
    (warning,) = warnings(ended)
    assert warning.startswith("warning: W&B failed (")
    assert "W&B offline: to see the run" in ended.out
    assert len(folders(tmp_path, "offline-run")) == 1
    assert not ended.services_left
    assert ended.seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "end", "code"),
    [("SIGKILL", "run.finish()", 0), ("SIGKILL", "sys.exit(75)", 75), ("SIGSTOP", "sys.exit(75)", 75)],
)
def test_its_process_killed_or_stuck(program: Callable[..., Ended], number: str, end: str, code: int):
    ended = program(act=f"if step == 3: service(signal.{number})", end=end)
    assert ended.code == code
    (warning,) = warnings(ended)
    assert warning.startswith("warning: W&B failed (")
    assert not ended.services_left
    assert ended.seconds < 30


@pytest.mark.slow
def test_a_server_that_is_lost_on_the_way(
    program: Callable[..., Ended], server: WandbServer, other: WandbServer, tmp_path: Path
):
    """What was not uploaded is on disk, and can be."""
    act = "if step == 3: time.sleep(0.5); urlopen(os.environ['WANDB_BASE_URL'] + '/silence')"
    ended = program(act=act, end="sys.exit(75)", url=server.url)
    assert ended.code == 75
    assert not warnings(ended)
    assert any("Use `wandb sync`" in line for line in ended.errors)  # its own words
    assert not ended.services_left
    assert ended.seconds < 30
    sync(tmp_path, folders(tmp_path, "run")[-1], other)
    assert other.rows("r1") == [{"_step": step, "a": step, "b": -step} for step in range(1, 5)]


@pytest.mark.slow
def test_the_same_run_goes_on(program: Callable[..., Ended], server: WandbServer):
    """Rows that the server has are not sent again, and keep their steps, as those have that it lacked."""
    program(url=server.url, steps="(20, 40, 60)")
    ended = program(url=server.url, steps="(20, 40, 60, 80, 100)")
    assert "started 61" in ended.out
    assert not warnings(ended)
    assert not any("WARNING" in line for line in ended.errors)  # W&B would complain of each row that it drops
    assert server.rows("r1") == [{"_step": step, "a": step, "b": -step} for step in (20, 40, 60, 80, 100)]


@pytest.mark.slow
def test_offline_the_newest_folder_is_the_whole_run(program: Callable[..., Ended], server: WandbServer, tmp_path: Path):
    program(steps="(20, 40, 60)")
    time.sleep(1)  # folders are named by the second
    program(steps="(20, 40, 60, 80, 100)")
    first, second = folders(tmp_path, "offline-run")
    for folder, steps in ((first, (20, 40, 60)), (second, (20, 40, 60, 80, 100))):
        sync(tmp_path, folder, server)
        assert server.rows("r1") == [{"_step": step, "a": step, "b": -step} for step in steps]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk(program: Callable[..., Ended], tmp_path: Path):
    """Of the pictures: half a megabyte each, in 1 MB."""
    folder = tmp_path / "wandb"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        picture = "np.random.default_rng(step).integers(0, 256, (400, 400, 3), np.uint8)"
        ended = program(act=f"import numpy as np; run.log(lambda: {{'picture': wandb.Image({picture})}}, step)")
    finally:
        subprocess.run(["umount", folder], check=True)
    assert ended.code == 0
    (warning,) = warnings(ended)
    assert "No space left on device" in warning
    assert not ended.services_left


def sync(folder: Path, run: Path, server: WandbServer) -> None:
    """What a person does later."""
    environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40, "HOME": str(folder)}
    command = [str(Path(sys.executable).parent / "wandb"), "sync", "--include-online", str(run)]
    subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True, timeout=60)
