"""Training on a GPU, eager and compiled."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

TRAIN = Path(__file__).parents[2] / "train.py"


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_training_runs(tmp_path: Path, dataset: Path, compiled: str):
    smoke = TRAIN.parent / "configs" / "smoke.yaml"
    options = [f"--config={smoke}", f"--data.folder={dataset}", f"--output={tmp_path}", f"--compile={compiled}"]
    command = [sys.executable, str(TRAIN), *options, "--tracking=none"]
    assert subprocess.run(command).returncode == 0
    assert (tmp_path / "smoke" / "last" / "world_model.json").is_file()
