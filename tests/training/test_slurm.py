"""configs/accelerate/slurm.sh against stand-ins for SLURM, with a stand-in for train.py and with train.py itself."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "configs" / "accelerate" / "slurm.sh"

SRUN = f"""#!{sys.executable}
# Two tasks on two nodes; the highest exit code, as srun gives it; SIGTERM goes on to all processes of all tasks.
import os, signal, subprocess, sys
command = sys.argv[sys.argv.index("bash"):]
tasks = []
signal.signal(signal.SIGTERM, lambda *_: [os.killpg(task.pid, signal.SIGTERM) for task in tasks])
for task in range(2):
    numbers = {{"SLURM_PROCID": str(task), "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}}
    tasks.append(subprocess.Popen(command, env=os.environ | numbers, start_new_session=True))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then tr ' ' '\\n' <<<"$NODES"; else echo "$@" >>"$FAKE/scontrol.calls"; fi
"""
PYTHON = """#!/usr/bin/env bash
echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" >>"$FAKE/python.calls"
trap 'exit 75' TERM
if [[ $CODE == wait ]]; then
    while true; do sleep 0.05; done
fi
((RANK == 1)) && exit "$CODE"
exit "${OTHERS:-0}"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a SLURM job whose commands are stand-ins that note in $FAKE how they were called."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        program = tmp_path / name
        program.write_text(text)
        program.chmod(0o755)
    job = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_CPUS_PER_TASK": "12"}
    return {
        **os.environ,
        **job,
        "NODES": "node-a node-b",
        "FAKE": str(tmp_path),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }


def noted(cluster: dict[str, str], name: str) -> list[str]:
    path = Path(cluster["FAKE"], f"{name}.calls")
    return sorted(path.read_text().splitlines()) if path.is_file() else []


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, None, False),  # done
        (2, None, False),  # a mistake, which the next time would be one again
        (1, None, False),
        (75, None, True),
        (75, "500", True),
        (137, None, True),  # killed
        (137, "19", True),
        (137, "20", False),
    ],
)
def test_a_stopped_job_is_requeued_and_a_mistaken_one_is_not(cluster, code, restarts, requeued):
    cluster["CODE"] = str(code)
    if restarts is not None:
        cluster["SLURM_RESTART_COUNT"] = restarts
    arguments = ["--config", "a b.yaml", "--steps", "5"]
    done = subprocess.run(["bash", SCRIPT, *arguments], env=cluster, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert noted(cluster, "scontrol") == (["requeue 41234"] if requeued else [])
    address = f"node-a:{20000 + 41234 % 20000}"
    assert noted(cluster, "python") == [
        f"{rank}/2 0/1 {address} train.py --config a b.yaml --steps 5 --resume auto" for rank in (0, 1)
    ]


@pytest.mark.parametrize("code", [1, 2])
@pytest.mark.parametrize("others", [75, 137])
def test_what_failed_is_not_requeued_for_the_others_that_it_stopped(cluster, code, others):
    """They find that a process is gone, which may be gone on after, and do not know why."""
    cluster |= {"CODE": str(code), "OTHERS": str(others)}
    assert subprocess.run(["bash", SCRIPT], env=cluster).returncode == code
    assert noted(cluster, "scontrol") == []


@pytest.mark.parametrize("whole_group", [False, True], ids=["tasks", "script_too"])
def test_a_signal_stops_the_tasks_and_requeues_the_job(cluster, whole_group):
    """As at the time limit, when the tasks are signalled, and on clusters that signal the script as well."""
    cluster["CODE"] = "wait"
    job = subprocess.Popen(["bash", SCRIPT], env=cluster, start_new_session=True, stdout=subprocess.PIPE)
    try:
        while len(noted(cluster, "python")) < 2:
            assert job.poll() is None
            time.sleep(0.02)
        time.sleep(0.2)  # their traps are set
        if whole_group:
            os.killpg(job.pid, signal.SIGTERM)
        else:
            children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGTERM)
        assert job.wait(20) == 75
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert noted(cluster, "scontrol") == ["requeue 41234"]


def test_the_script_asks_slurm_for_what_its_comments_say():
    text = SCRIPT.read_text()
    for option in ("--signal=TERM@120", "--requeue", "--open-mode=append", "--ntasks-per-node=8", "--gpus-per-node=8"):
        assert f"#SBATCH {option}\n" in text


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", SCRIPT], check=True)


@pytest.mark.slow
def test_a_run_stopped_and_requeued_is_finished(
    cluster: dict[str, str],
    environment: dict[str, str],
    tiny: Path,
    tmp_path: Path,
    rows: Callable[..., list[dict[str, float]]],
):
    """Two processes of the real train.py, SIGTERM in the middle, and the job once more, as from the queue."""
    (tmp_path / "python").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    job = {name: value for name, value in cluster.items() if name.startswith("SLURM_") or name in ("FAKE", "PATH")}
    options = {"output": tmp_path / "runs", "steps": 80, "validation.every": 1000, "checkpoint.every": 1000}
    command = ["bash", SCRIPT, "--config", tiny, *(f"--{name}={value}" for name, value in options.items())]
    started = {"env": environment | job | {"NODES": "127.0.0.1"}, "cwd": ROOT, "stdout": subprocess.DEVNULL}

    first = subprocess.Popen(command, start_new_session=True, **started)
    try:
        metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
        until = time.monotonic() + 120
        while not metrics.is_file() or not metrics.read_text():
            assert first.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGTERM)
        assert first.wait(60) == 75
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
    assert noted(cluster, "scontrol") == ["requeue 41234"]
    assert 0 < len(rows(tmp_path / "runs" / "tiny", "train/loss")) < 80

    assert subprocess.run(command, timeout=240, **started).returncode == 0
    assert noted(cluster, "scontrol") == ["requeue 41234"]  # not once more
    assert [row["step"] for row in rows(tmp_path / "runs" / "tiny", "train/loss")] == list(range(1, 81))
