import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cylinder import CAMERA, SIZE, view, write_turning
from torch import Tensor, nn

from cdit.data.config import DataConfig
from cdit.data.frames import focal_lengths
from cdit.data.windows import WindowDataset
from cdit.diffusion import SamplerConfig
from cdit.studies.config import TurningConfig
from cdit.studies.turning import predicted_turns, true_turns, turning_table

STEP = 0.2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A camera that turns to the left on the spot, by `STEP` a frame."""
    return write_turning(tmp_path / "data", torch.arange(14) * STEP - 1.3)


@pytest.mark.parametrize(("obeys", "share", "ratio"), [(1.0, 1.0, 1.0), (-1.0, 0.0, -1.0), (0.5, 1.0, 0.5)])
def test_a_world_that_turns_as_told(folder: Path, obeys: float, share: float, ratio: float):
    dataset = WindowDataset(DataConfig(str(folder), image_size=SIZE, context_frames=2), "test")
    windows = dataset.windows_with([1])
    told: list[float] = []

    class World(nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(()))
            self.description = SimpleNamespace(fps=4.0, objective="flow", sampler=SamplerConfig())
            self.device = torch.device("cpu")

        def predict(self, context, condition, sampler, generator) -> Tensor:
            actions = condition.action
            now = [dataset.locate(windows[len(told) // actions.shape[1] + i])[1] for i in range(len(context))]
            told.extend([0.0] * actions[..., 0].numel())
            yaw = torch.tensor(now)[:, None] * STEP - 1.3 + obeys * actions[..., 2]
            return view(yaw.flatten()).unflatten(0, yaw.shape)

    config = TurningConfig(checkpoint="", data="", turns=[6.0, 14.0], batch_size=5)
    focal = focal_lengths(CAMERA, SIZE, "aspect")
    small, large = predicted_turns(World(), dataset, windows, focal, config)
    for turn in (small, large):
        assert len(turn.asked) == 2 * len(windows)
        assert turn.right_sign == share
        assert float((turn.measured / turn.asked).median()) == pytest.approx(ratio, abs=0.1)
    table = turning_table([small, large], focal[0])
    assert f"| predicted, ±14° | {2 * len(windows)} | {share:.1%} | {focal[0] * np.tan(np.radians(14)):.1f} |" in table


def test_true_frames_turn_as_the_poses_say(folder: Path):
    dataset = WindowDataset(DataConfig(str(folder), image_size=SIZE, context_frames=2), "test")
    (turn,) = true_turns(dataset, focal_lengths(CAMERA, SIZE, "aspect"))
    torch.testing.assert_close(turn.asked, torch.full((12,), STEP))
    torch.testing.assert_close(turn.measured, turn.asked, atol=0.01, rtol=0)


@pytest.mark.slow
def test_command_line_needs_a_world_model(folder: Path):
    command = [sys.executable, "-m", "cdit.studies", "turning", "--checkpoint", str(folder), "--data", str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no world model here" in done.stderr
