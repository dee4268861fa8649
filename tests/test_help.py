"""Help and mistakes answer at once: no command imports torch before its arguments are parsed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "diffusers", "matplotlib", "wandb")
COMMANDS = [
    ["train.py"],
    ["sample.py"],
    ["data/doom/prepare.py"],
    *(["-m", f"cdit.{path.parent.name}"] for path in sorted(ROOT.glob("cdit/*/__main__.py"))),
    *(["-m", f"cdit.data.{name}"] for name in ("check", "encode", "from_video", "shard")),
    ["-m", "cdit.data.shard", "convert"],
    ["-m", "cdit.model", "scale"],
    ["-m", "cdit.nwm", "convert"],
    *(["-m", "cdit.plan", name] for name in ("open", "curve", "diagnose", "learn", "episodes", "act")),
    ["-m", "cdit.studies", "ablate"],
    ["-m", "cdit.studies", "steps"],
    ["-m", "cdit.studies", "turning"],
]


def imported(*command: str) -> tuple[int, str, set[str]]:
    """Exit code, output, and the top-level packages that a command imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    modules = re.findall(r"^import time: .*\| +(\w+)\S*$", done.stderr, flags=re.MULTILINE)
    return done.returncode, done.stdout + done.stderr, set(modules)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(command: list[str]):
    code, output, modules = imported(*command, "--help")
    assert code == 0, output
    assert output.startswith("usage: ")
    assert modules
    assert not modules & set(HEAVY)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_unknown_options_import_nothing_heavy(command: list[str]):
    code, output, modules = imported(*command, "--no_such_option")
    assert code == 2, output
    assert not modules & set(HEAVY)


def test_no_module_beside_a_command_hides_one_of_the_standard_library():
    """`python cdit/room/command.py` puts the folder first on the path."""
    modules = [path for path in ROOT.glob("cdit/**/*.py") if path.stem not in ("__init__", "__main__")]
    commands = {path.parent for path in ROOT.glob("cdit/**/*.py") if '__name__ == "__main__"' in path.read_text()}
    assert commands
    assert not [path for path in modules if path.parent in commands and path.stem in sys.stdlib_module_names]
