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
    ["-m", "cdit.benchmark"],
    ["data/doom/prepare.py"],
    ["-m", "cdit.data.check"],
    ["-m", "cdit.data.encode"],
    ["-m", "cdit.data.from_video"],
    ["-m", "cdit.data.shard"],
    ["-m", "cdit.data.shard", "convert"],
    ["-m", "cdit.evaluate"],
    ["-m", "cdit.heads"],
    ["-m", "cdit.studies"],
    ["-m", "cdit.studies", "ablate"],
    ["-m", "cdit.studies", "steps"],
    ["-m", "cdit.studies", "turning"],
    ["-m", "cdit.model"],
    ["-m", "cdit.model", "describe"],
    ["-m", "cdit.model", "scale"],
    ["-m", "cdit.nwm"],
    ["-m", "cdit.nwm", "convert"],
    ["-m", "cdit.nwm", "export"],
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
