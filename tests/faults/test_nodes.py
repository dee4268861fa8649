"""Two machines, here two network namespaces with a cable between them, and what becomes of a run when it is cut."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import LAUNCH, Table, Trainer, assert_nothing_is_left, differing_bits

pytestmark = pytest.mark.faults("all")
PORT = 29_533
BOUND_S = 60.0
"""Seconds until both report it and end after the cable is cut; timeout_minutes of the config is 0.5."""
WAIT_S = 40.0


def ip(*arguments: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@dataclass
class Network:
    """Two network namespaces, joined by a pair of virtual devices."""

    names: tuple[str, str]
    devices: tuple[str, str]
    addresses: tuple[str, str] = ("10.199.77.1", "10.199.77.2")

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.devices[0], "netns", self.names[0], "type", "veth",
           "peer", "name", self.devices[1], "netns", self.names[1])  # fmt: skip
        for name, device, address in zip(self.names, self.devices, self.addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            for there in ("lo", device):
                ip("-n", name, "link", "set", there, "up")

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", self.devices[1], "down")

    def repair(self) -> None:
        ip("-n", self.names[1], "link", "set", self.devices[1], "up")

    def remove(self) -> None:
        for name in self.names:
            ip("netns", "del", name, check=False)


@pytest.fixture
def network() -> Iterator[Network]:
    mark = os.getpid() % 10_000
    network = Network((f"node{mark}a", f"node{mark}b"), (f"veth{mark}a", f"veth{mark}b"))
    try:
        network.make()
    except OSError as error:
        network.remove()
        pytest.skip(f"no network namespaces here ({error})")
    yield network
    network.remove()


@dataclass
class Machines:
    """train.py on both, one process each, under torch.distributed.run with its own rendezvous."""

    trainer: Trainer
    network: Network
    output: Path
    count: int = 0

    def run(
        self, faults: Sequence[str] = ("[]", "[]"), cut_at: Path | None = None
    ) -> tuple[list[int], list[str], float]:
        """Trains to the end.

        As with `srun --wait`, a launcher is killed some time after the other has ended: cut off from it, torch's waits
        for as long as TCP does, a quarter of an hour, without looking after its process.

        Args:
            faults: of each, as `launch.py` takes them.
            cut_at: when this file is there, the cable is cut.

        Returns:
            The exit codes of the launchers, what was printed, and how long after the cut both reported why they stop.
        """
        started, logs = [], []
        self.count += 1
        for i in range(2):
            command = [
                *("ip", "netns", "exec", self.network.names[i], sys.executable, "-m", "torch.distributed.run"),
                *(
                    "--nnodes",
                    "2",
                    "--nproc_per_node",
                    "1",
                    "--rdzv_backend",
                    "c10d",
                    "--rdzv_id",
                    f"faults{self.count}",
                ),
                *("--rdzv_endpoint", f"{self.network.addresses[0]}:{PORT + self.count}"),
                *("--rdzv_conf", f"is_host={int(i == 0)}", "--local_addr", self.network.addresses[i]),
                *(str(LAUNCH), "--config", str(self.trainer.config)),
                *("--output", str(self.output), "--name", "run", "--resume", "auto"),
            ]
            variables = {
                **self.trainer.environment,
                "GLOO_SOCKET_IFNAME": self.network.devices[i],
                "FAULTS": faults[i],
                "FAULTS_RUN": f"{os.getpid()}.nodes.{i}",
            }
            log = self.output / f"node{i}.{self.count}.log"
            logs.append(log)
            with log.open("w") as file:
                options = {"cwd": self.trainer.folder, "env": variables, "stdin": subprocess.DEVNULL}
                started.append(subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, **options))
        try:
            since = failed = None
            took = 0.0
            until = time.monotonic() + 300
            while any(process.poll() is None for process in started):
                now = time.monotonic()
                if cut_at is not None and since is None and cut_at.exists():
                    since = now
                    self.network.cut()
                if since and not took and all("stopped: " in log.read_text() for log in logs):
                    took = now - since
                failed = failed or (now if any(process.poll() for process in started) else None)
                if failed and now > failed + WAIT_S:
                    for process in started:
                        process.kill()
                assert now < until, [log.read_text()[-3000:] for log in logs]
                time.sleep(0.05)
            for i, process in enumerate(started):
                assert_nothing_is_left(process.pid, f"{os.getpid()}.nodes.{i}")
        finally:
            for process in started:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return [process.returncode for process in started], [log.read_text() for log in logs], took


def test_two_machines_train_as_two_processes(trainer: Trainer, table: Table, network: Network, tmp_path: Path):
    codes, printed, _ = Machines(trainer, network, tmp_path).run()
    assert codes == [0, 0], printed
    bits = differing_bits(tmp_path / "run", trainer.reference(processes=2))
    table.injected("2 nodes, as 2 processes of one", 0)
    table.recovered("2 nodes, as 2 processes of one", bits, times=0, note="undisturbed")
    assert bits == 0


@pytest.mark.parametrize("phase", ["step", "write"])
def test_the_cable_is_cut(trainer: Trainer, table: Table, network: Network, tmp_path: Path, phase: str):
    """Both ends notice, report it and leave no process behind; once it is repaired, the run continues."""
    name = f"link between 2 nodes cut: {phase}"
    entry = {"step": 8, "write": 2}[phase]
    reached = tmp_path / "reached"
    # Both wait for the cut: or else they might be through before.
    shell = f"touch {reached}; sleep 1"
    fault = f'[{{"act": "shell", "argument": "{shell}", "phase": "{phase}", "entry": {entry}, "rank": %d}}]'
    machines = Machines(trainer, network, tmp_path)
    table.injected(name)
    codes, printed, took = machines.run((fault % 0, fault % 1), cut_at=reached)
    assert all(code != 0 for code in codes), codes
    assert 0 < took < BOUND_S
    for text in printed:
        assert "another process is gone or does not respond" in text, text
    network.repair()
    codes, printed, _ = machines.run()
    assert codes == [0, 0], printed
    bits = differing_bits(tmp_path / "run", trainer.reference(processes=2))
    table.recovered(name, bits, note=f"both stop in {took:.0f} s")
    assert bits == 0
