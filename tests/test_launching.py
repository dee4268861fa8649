"""configs/accelerate: what accelerate makes of its files, and the SLURM template against a stand-in for SLURM."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "accelerate"
FILES = {"one_gpu": ("NO", 1), "ddp_8gpu": ("MULTI_GPU", 8), "fsdp2_8gpu": ("FSDP", 8), "multi_node": ("MULTI_GPU", 16)}


def test_these_are_all_files():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_them(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_processes) == FILES[name]


def launched(name: str, *options: str) -> tuple[object, dict[str, str]]:
    """What `accelerate launch` makes of a file before it starts processes: its arguments and their environment."""
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(FOLDER / f"{name}.yaml"), *options, "train.py"]
    )
    arguments, *_ = _validate_launch_command(arguments)
    return arguments, prepare_multi_gpu_env(arguments)


def test_ddp_is_not_sharded_and_fsdp_is():
    for name, sharded in (("ddp_8gpu", False), ("fsdp2_8gpu", True)):
        arguments, environment = launched(name)
        assert arguments.nproc_per_node == "8"
        assert environment.get("ACCELERATE_USE_FSDP", "false") == str(sharded).lower()
    assert environment["FSDP_VERSION"] == "2"


def test_nodes_meet_at_the_first():
    options = ["--machine_rank", "1", "--main_process_ip", "first"]
    for more, sharded in (([], "false"), (["--use_fsdp", "--fsdp_version", "2"], "true")):
        arguments, environment = launched("multi_node", *options, *more)
        assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
        assert (arguments.rdzv_endpoint, arguments.rdzv_backend) == ("first:29500", "static")
        assert environment.get("ACCELERATE_USE_FSDP", "false") == sharded


SHOW = """
import os
print(*(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_FSDP")))
"""


CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}


def launch(folder: Path, name: str, *options: str) -> subprocess.Popen:
    """`accelerate launch` of a script that tells what it was started with."""
    script = folder / "show.py"
    script.write_text(SHOW)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", FOLDER / f"{name}.yaml", *options]
    return subprocess.Popen([*command, script], stdout=subprocess.PIPE, text=True, env=CLEAN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("one_gpu", ["--cpu"], ["None None None None"]),
        ("ddp_8gpu", ["--num_processes", "2"], ["0 2 0 None", "1 2 1 None"]),
        ("fsdp2_8gpu", ["--num_processes", "2"], ["0 2 0 true", "1 2 1 true"]),
    ],
)
def test_processes_start(tmp_path: Path, name, options, expected):
    process = launch(tmp_path, name, *options)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert sorted(said.splitlines()) == expected


@pytest.mark.slow
def test_nodes_start(tmp_path: Path):
    """Two launchers, of one process each, that meet on this host."""
    port = str(20000 + os.getpid() % 10000)
    options = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank"]
    nodes = [launch(tmp_path, "multi_node", *options, rank) for rank in "01"]
    assert [node.communicate(timeout=60)[0] for node in nodes] == ["0 2 0 None\n", "1 2 0 None\n"]
    assert [node.returncode for node in nodes] == [0, 0]


# --- SLURM ---

SRUN = f"""#!{sys.executable}
# Two tasks on two nodes; the highest exit code, as srun gives it; SIGTERM goes on to all tasks.
import os, signal, subprocess, sys
command = sys.argv[sys.argv.index("bash"):]
tasks = []
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
for task in range(2):
    numbers = {{"SLURM_PROCID": str(task), "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}}
    tasks.append(subprocess.Popen(command, env=os.environ | numbers))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'node-a\\nnode-b\\n'; else echo "$@" >>"$FAKE/scontrol.calls"; fi
"""
PYTHON = """#!/usr/bin/env bash
echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" >>"$FAKE/python.calls"
trap 'exit 75' TERM
if [[ $CODE == wait ]]; then
    while true; do sleep 0.05; done
fi
((RANK == 1)) && exit "$CODE"
exit 0
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a SLURM job whose commands are stand-ins that note in $FAKE how they were called."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        program = tmp_path / name
        program.write_text(text)
        program.chmod(0o755)
    job = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_CPUS_PER_TASK": "12"}
    return {**os.environ, **job, "FAKE": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}


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
    done = subprocess.run(["bash", FOLDER / "slurm.sh", *arguments], env=cluster, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert noted(cluster, "scontrol") == (["requeue 41234"] if requeued else [])
    address = f"node-a:{20000 + 41234 % 20000}"
    assert noted(cluster, "python") == [
        f"{rank}/2 0/1 {address} train.py --config a b.yaml --steps 5 --resume auto" for rank in (0, 1)
    ]


@pytest.mark.parametrize("whole_group", [False, True], ids=["tasks", "script_too"])
def test_a_signal_stops_the_tasks_and_requeues_the_job(cluster, whole_group):
    """As at the time limit, where the tasks are told, and where a cluster tells the script as well."""
    cluster["CODE"] = "wait"
    job = subprocess.Popen(["bash", FOLDER / "slurm.sh"], env=cluster, start_new_session=True, stdout=subprocess.PIPE)
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
    text = (FOLDER / "slurm.sh").read_text()
    for option in ("--signal=TERM@120", "--requeue", "--open-mode=append", "--ntasks-per-node=8", "--gpus-per-node=8"):
        assert f"#SBATCH {option}\n" in text


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", FOLDER / "slurm.sh"], check=True)
