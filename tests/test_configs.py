"""The configs of the published networks: what they say, and that they train on data laid out as docs/data.md says."""

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cdit.batch import Condition
from cdit.world_model import WorldModel

ROOT = Path(__file__).parents[1]
SPACINGS = {"recon": 0.25, "scand": 0.38, "huron": 0.255, "tartan_drive": 0.72}
LENGTH = 70


def read(preset: str) -> dict:
    return yaml.safe_load((ROOT / "configs" / f"nwm_cdit_{preset}.yaml").read_text())


def test_the_published_configs_differ_in_name_and_preset_only():
    small = read("s")
    for preset in ("b", "l", "xl"):
        config = read(preset)
        assert config["name"] == f"nwm_cdit_{preset}"
        assert config["model"]["preset"] == preset.upper()
        config["name"], config["model"]["preset"] = small["name"], small["model"]["preset"]
        assert config == small
    assert {source["folder"]: source["spacing"] for source in small["data"]["mix"]} == {
        f"data/{name}": spacing for name, spacing in SPACINGS.items()
    }


def lay_out(root: Path) -> None:
    """The four datasets as they are published: frames and poses, no dataset.json, yaw of either shape."""
    random = np.random.default_rng(0)
    for index, name in enumerate(SPACINGS):
        for split, trajectories in {"train": ["a", "b"], "test": ["c"]}.items():
            listing = root / "data" / name / "splits" / split / "traj_names.txt"
            listing.parent.mkdir(parents=True)
            listing.write_text("\n".join(trajectories))
            for trajectory in trajectories:
                folder = root / "data" / name / trajectory
                folder.mkdir()
                length = 40 if (name, trajectory) == ("scand", "b") else LENGTH  # too short for a window
                for i in range(length):
                    pixels = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
                    Image.fromarray(pixels).resize((40, 30)).save(folder / f"{i}.jpg")
                yaw = random.normal(size=(length, 1) if index % 2 else length)
                poses = {"position": random.normal(size=(length, 2)).cumsum(0), "yaw": yaw}
                (folder / "traj_data.pkl").write_bytes(pickle.dumps(poses))


@pytest.mark.slow
def test_the_published_recipe_trains_on_data_as_it_is_published(tmp_path: Path):
    """All as in the config but for sizes: a small autoencoder and network, small frames, two steps."""
    lay_out(tmp_path)
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        scaling_factor=0.18215,
    ).save_pretrained(tmp_path / "vae")
    smaller = {
        "codec.name": tmp_path / "vae", "data.image_size": "[32, 32]", "data.workers": 0, "compile": "false",
        "model.hidden_size": 48, "model.depth": 2, "model.num_heads": 4, "steps": 2, "batch_size": 4,
        "micro_batch_size": 2, "validation.samples": 4, "probe.final_samples": 2, "probe.samples": 2, "probe.rows": 2,
        "probe.rollouts": 1, "probe.rollout_frames": 2, "tracking": "none", "log_every": 1,
        "sampler.steps": 3, "mixed_precision": "no", "output": tmp_path / "runs",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "configs" / "nwm_cdit_s.yaml")]
    command += [part for name, value in smaller.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"WANDB_SILENT": "1"})
    assert done.returncode == 0, done.stderr
    assert "data/scand: 1 of 2 trajectories of split 'train' have fewer than 68 frames" in done.stderr
    world = WorldModel.from_pretrained(tmp_path / "runs" / "nwm_cdit_s")
    units = world.description.units
    assert units.spacing is None
    motion = Condition(torch.tensor([[16.0]]), torch.tensor([[[5.0, -2.0, 1.5]]]), spacing=torch.tensor([0.25]))
    condition = world.network_condition(motion)
    # 20 spacings forward and 8 to the right; 64 frames are half of 128.
    torch.testing.assert_close(condition["action"], torch.tensor([[[20 / 7.5 * 2 - 1 / 3, -2.0, 1.5]]]))
    assert condition["time_shift"].item() == pytest.approx(0.5)
    rows = [json.loads(line) for line in (tmp_path / "runs/nwm_cdit_s/metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    # Untrained, all predictions are 0: the noise's variance, and the bound of a variance halfway up its range.
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0.5 for loss in losses)
