"""A tiny dataset and config, and `train.py` run on them: in this process (quick) or as a person starts it."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import save_file
from torchvision.models import alexnet

from cdit.common.cli import parse_config, run
from cdit.data.layout import DatasetInfo, write_split, write_trajectory
from cdit.data.windows import WindowDataset
from cdit.training.config import TrainConfig
from cdit.training.setup import build_world
from cdit.world_model import WorldModel

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from gradients import randomise

TRAIN = Path(__file__).parents[2] / "train.py"
LENGTHS = {"train": {"a": 20, "b": 17}, "test": {"c": 13, "d": 11}}
FPS, SPACING = 5.0, 0.2
OURS = ("WANDB_", "CDIT_", "ACCELERATE_", "HF_")  # variables of the person who runs the tests


def write_dataset(folder: Path, side: int = 32) -> Path:
    """Views of a striped plane, seen by a camera that walks and turns at random."""
    random = np.random.default_rng(5)
    rows, columns = np.mgrid[0:side, 0:side] / side
    for split, lengths in LENGTHS.items():
        for name, length in lengths.items():
            yaw = random.normal(scale=0.3, size=length).cumsum()
            step = SPACING * np.stack((np.cos(yaw), np.sin(yaw)), axis=1)
            position = np.concatenate((np.zeros((1, 2)), step[:-1].cumsum(axis=0)))
            waves = [(4, 0, 0.0), (0, 3, 1.0), (2, 2, 2.0)]
            frames = [
                np.stack([np.sin(a * (columns + y) + b * (rows + p[0]) + c) for a, b, c in waves], axis=-1)
                for p, y in zip(position, yaw, strict=True)
            ]
            write_trajectory(folder, name, ((np.stack(frames) + 1) * 127.5).astype(np.uint8), position, yaw)
        write_split(folder, split, list(lengths))
    DatasetInfo("stripes", fps=FPS, metric_waypoint_spacing=SPACING).save(folder)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "stripes")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of somebody who is logged in nowhere, with some AlexNet for LPIPS, so that nothing is downloaded."""
    folder = tmp_path_factory.mktemp("home")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = alexnet(weights=None).features.state_dict()
    save_file({f"features.{name}": tensor for name, tensor in weights.items()}, folder / "alexnet.safetensors")
    return folder


@pytest.fixture(scope="session")
def environment(home: Path) -> dict[str, str]:
    """The environment of a training run."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    places = {"HOME": str(home), "XDG_CONFIG_HOME": str(home / "config"), "XDG_CACHE_HOME": str(home / "cache")}
    devices = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "passive"}
    return {**kept, **places, **devices, "CDIT_LPIPS_BACKBONE": str(home / "alexnet.safetensors")}


@pytest.fixture(scope="session")
def tiny(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of runs that take a second or two."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    values = {
        "name": "tiny",
        "steps": 6,
        "batch_size": 4,
        "mixed_precision": "no",
        "data": {
            "folder": str(dataset),
            "image_size": [32, 32],
            "context_frames": 3,
            "goals": 2,
            "min_offset": -2,
            "max_offset": 4,
            "workers": 0,
        },
        "model": {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
        "flow": {"prediction": "clean"},
        "sampler": {"steps": 2},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "ema": {"warmup_power": 0.5},
        "validation": {"every": 2, "samples": 7, "time_bins": 2},
        "probe": {
            "every": 0,
            "samples": 3,
            "final_samples": 4,
            "offsets": [1, 2],
            "rows": 2,
            "rollouts": 1,
            "rollout_frames": 3,
            "attention": {"layers": [1], "times": [0.5]},
        },
        "checkpoint": {"every": 1, "keep": 10},
        "tracking": "none",
        "log_every": 1,
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """The tiny config with overrides, as the command line reads it."""
    return lambda *overrides: parse_config(
        TrainConfig, "", ["--config", str(tiny), "--output", str(tmp_path / "runs"), *overrides]
    )


@pytest.fixture(scope="session")
def train(tiny: Path, environment: dict[str, str]) -> Callable[..., Path]:
    """Runs `train.py` in this process: `train(output, "--name", …)` returns the run's folder.

    A `SystemExit` comes through, as from the command line.
    """
    spec = importlib.util.spec_from_file_location("train_under_test", TRAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def train(output: Path, *arguments: str, name: str = "tiny") -> Path:
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
            for variable in set(os.environ) - set(environment):
                patch.delenv(variable)
            for variable, value in environment.items():
                patch.setenv(variable, value)
            argv = [str(TRAIN), "--config", str(tiny), "--output", str(output), "--name", name, *arguments]
            # One thread: on tensors this small, several threads only wait for each other.
            patch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
            patch.setattr(sys, "argv", argv)
            _forget_accelerator()
            try:
                run(module.main)
            finally:
                _forget_accelerator()
                torch.set_num_threads(threads)
        return output / name

    return train


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """One process on the CPU in full precision."""
    _forget_accelerator()
    yield Accelerator(cpu=True, mixed_precision="no")
    _forget_accelerator()


def _forget_accelerator() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="session")
def launch(environment: dict[str, str], home: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a script as a process, or as several under torchrun, with further environment variables."""

    def launch(
        script: Path, *arguments: str, processes: int | None = None, **variables: str
    ) -> subprocess.CompletedProcess:
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(several if processes else []), str(script), *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=home,
            env={**environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return launch


@pytest.fixture(scope="session")
def straight(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the tiny config from start to end, in one process."""
    return train(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def offline(
    launch: Callable[..., subprocess.CompletedProcess], tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess, Path]:
    """The same run as a person starts it who is not logged in at W&B, with probes on the way: its output and folder."""
    output = tmp_path_factory.mktemp("offline")
    options = ("--name", "shown", "--tracking", "wandb", "--probe.every", "2")
    done = launch(TRAIN, "--config", tiny, "--output", output, *options)
    assert done.returncode == 0, done.stderr
    return done, output / "shown"


@pytest.fixture
def world(config: Callable[..., TrainConfig], train_set: WindowDataset) -> WorldModel:
    """The tiny world model, every weight drawn at random, so that none of its parts is silent."""
    world = build_world(config(), train_set)
    randomise(world.cdit)
    return world.eval()


@pytest.fixture
def train_set(config: Callable[..., TrainConfig]) -> WindowDataset:
    return WindowDataset(config().data, "train", seed=0)


@pytest.fixture
def test_set(config: Callable[..., TrainConfig]) -> WindowDataset:
    return WindowDataset(config().data, "test", seed=0)


@pytest.fixture(scope="session")
def rows() -> Callable[..., list[dict[str, float]]]:
    """Rows of a run's metrics.jsonl that hold a field, without the speed, which is no result."""

    def rows(run: Path, field: str = "step") -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found = [{k: v for k, v in line.items() if k != "train/samples_per_second"} for line in lines if field in line]
        assert all(math.isfinite(value) for row in found for value in row.values())
        return found

    return rows
