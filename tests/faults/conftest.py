"""A small config, runs of it with faults, and the table that they add up to."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from cdit.data.layout import DatasetInfo, write_split, write_trajectory

sys.path.append(str(Path(__file__).parent))
from harness import Table, Trainer

LENGTHS = {"train": {"a": 20, "b": 17}, "test": {"c": 13, "d": 11}}
OURS = ("WANDB_", "CDIT_", "ACCELERATE_", "HF_")  # variables of the person who runs the tests
TABLE = pytest.StashKey[Table]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = Table()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Everything here is a test of faults; those marked `faults("all")` belong to the whole suite only.

    One of each file, which is one kind of fault, is not slow.
    """
    kinds: set[Path] = set()
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        only_in_all = any(mark.args == ("all",) for mark in item.iter_markers("faults"))
        item.add_marker(pytest.mark.faults)
        if only_in_all or item.path in kinds:
            item.add_marker(pytest.mark.slow)
        else:
            kinds.add(item.path)
        if only_in_all and config.getoption("--faults") != "all":
            item.add_marker(pytest.mark.skip(reason="only with --faults all"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash[TABLE]
    if table.rows:
        terminalreporter.section("faults")
        terminalreporter.write_line(table.text())


@pytest.fixture(scope="session")
def table(pytestconfig: pytest.Config) -> Table:
    """Where each test says what it injected and what became of it."""
    return pytestconfig.stash[TABLE]


@pytest.fixture(scope="session")
def whole(pytestconfig: pytest.Config) -> bool:
    """Whether the whole suite was asked for."""
    return pytestconfig.getoption("--faults") == "all"


def write_dataset(folder: Path) -> Path:
    """Noise that a camera walks through: each frame another."""
    random = np.random.default_rng(5)
    for split, lengths in LENGTHS.items():
        for name, length in lengths.items():
            frames = random.integers(0, 256, (length, 4, 4, 3), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
            position = random.normal(scale=0.2, size=(length, 2)).cumsum(axis=0)
            write_trajectory(folder, name, frames, position, random.normal(scale=0.3, size=length).cumsum())
        write_split(folder, split, list(lengths))
    DatasetInfo("noise", fps=5.0, metric_waypoint_spacing=0.2).save(folder)
    return folder


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """Runs train.py on a config whose checkpoints, rows, validations and probes do not fall on the same steps."""
    home = tmp_path_factory.mktemp("home")
    values = {
        "steps": 12,
        "batch_size": 4,
        "mixed_precision": "no",
        "timeout_minutes": 0.5,
        "data": {
            "folder": str(write_dataset(home / "noise")),
            "image_size": [16, 16],
            "context_frames": 2,
            "goals": 2,
            "min_offset": -2,
            "max_offset": 4,
            "workers": 0,
        },
        "model": {"hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "dropout": 0.1},
        "flow": {"prediction": "clean"},
        "sampler": {"steps": 2},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "ema": {"warmup_power": 0.5},
        "validation": {"every": 4, "samples": 7, "time_bins": 2},
        "probe": {
            "every": 6,
            "samples": 3,
            "final_samples": 4,
            "offsets": [1, 2],
            "rows": 2,
            "rollouts": 1,
            "rollout_frames": 3,
            "attention": {"samples": 0},
        },
        "checkpoint": {"every": 3, "keep": 2},
        "tracking": "none",
        "log_every": 2,
    }
    (home / "config.yaml").write_text(yaml.safe_dump(values))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    places = {"HOME": str(home), "XDG_CONFIG_HOME": str(home / "config"), "XDG_CACHE_HOME": str(home / "cache")}
    (home / "tmp").mkdir()  # what a killed process leaves in it goes with it
    places["TMPDIR"] = str(home / "tmp")
    devices = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    logs = tmp_path_factory.mktemp("faults")
    with Trainer(logs, home / "config.yaml", {**kept, **places, **devices}) as trainer:
        yield trainer
