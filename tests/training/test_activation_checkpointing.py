"""`activation_checkpointing`: a training run with it is the run without it."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from cdit.data.windows import WindowDataset
from cdit.training.config import TrainConfig
from cdit.training.setup import build_world


def test_the_config_turns_it_on(config: Callable[..., TrainConfig], train_set: WindowDataset):
    for value in (True, False):
        cdit = build_world(config("--activation_checkpointing", str(value)), train_set).cdit
        assert cdit.is_gradient_checkpointing is value


def test_turned_on_in_mid_run_it_changes_no_bit(train: Callable[..., Path], straight: Path, tmp_path: Path):
    train(tmp_path, "--stop_at", "3")
    run = train(tmp_path, "--resume", "auto", "--activation_checkpointing", "true")
    weights, expected = (
        load_file(folder / "checkpoints/step_00000006/model.safetensors") for folder in (run, straight)
    )
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
