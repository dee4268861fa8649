"""configs/accelerate: what accelerate makes of its files."""

import os
import subprocess
import sys
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
shown = (str(os.environ.get(name)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_FSDP"))
os.write(1, (" ".join(shown) + "\\n").encode())  # in one piece: processes share the pipe
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
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert sorted(printed.splitlines()) == expected


@pytest.mark.slow
def test_nodes_start(tmp_path: Path):
    """Two launchers, of one process each, that meet on this host."""
    port = str(20000 + os.getpid() % 10000)
    options = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank"]
    nodes = [launch(tmp_path, "multi_node", *options, rank) for rank in "01"]
    assert [node.communicate(timeout=60)[0] for node in nodes] == ["0 2 0 None\n", "1 2 0 None\n"]
    assert [node.returncode for node in nodes] == [0, 0]
