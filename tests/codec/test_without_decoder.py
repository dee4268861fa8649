"""The commands on a world in features without a decoder: they run, show recorded frames, and do not measure them."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cdit.codec import CodecConfig, load_codec
from cdit.codec.config import MeasureConfig
from cdit.codec.measure import measure
from cdit.common.cli import run
from cdit.data.config import DataConfig
from cdit.drive.config import DriveConfig
from cdit.drive.drive import Begin, Drive, Stage
from cdit.heads.__main__ import main as inspect_heads
from cdit.plan.config import OpenConfig, OptimizerConfig, PlannerConfig
from cdit.plan.openloop import run_open
from cdit.sample.config import SampleConfig
from cdit.sample.futures import sample

sys.path.append(str(Path(__file__).parents[1]))
from tiny_world import SIDE, make_world

PLANNER = PlannerConfig(cost="latents", optimizer=OptimizerConfig(samples=8, iterations=1, elites=2))


@pytest.fixture(scope="module")
def features_world(walks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with random weights in the features of a backbone with random weights."""
    place = tmp_path_factory.mktemp("features")
    data = DataConfig(str(walks), train_split="test", image_size=(SIDE, SIDE), workers=0)
    config = MeasureConfig(out=str(place / "codec"), data=data, backbone="test_vit", random_weights=True)
    measure(replace(config, downscale=8, frames=8, gallery=6), torch.device("cpu"))
    codec = load_codec(CodecConfig("features", str(place / "codec")))
    make_world(codec, patch_size=1).save_pretrained(place / "world" / "best")
    return place / "world"


def test_samples_have_no_psnr(features_world: Path, walks: Path, tmp_path: Path):
    out = tmp_path / "samples"
    sample(SampleConfig(checkpoint=str(features_world), data=str(walks), out=str(out), samples=1, length=2))
    (entry,) = json.loads((out / "samples.json").read_text())["samples"]
    assert "psnr" not in entry
    assert (out / f"{entry['name']}.mp4").is_file()


def test_a_drive_shows_recorded_frames_and_plans_in_features(features_world: Path, walks: Path):
    stage = Stage(DriveConfig(checkpoint=str(features_world), data=str(walks), planner=replace(PLANNER, frames=[2])))
    assert (stage.costs, stage.metrics) == (["latents"], {})
    drive = Drive(stage)
    drive.begin(Begin(start=3))
    drive.step(1.0, 0.0, 0.5)
    gallery = {frame.permute(1, 2, 0).numpy().tobytes() for frame in stage.worlds[0].codec.gallery}
    assert drive.view().arrays["dream 0"].tobytes() in gallery
    found = drive.plan(drive.goal(4), lambda function, *arguments: function(*arguments))
    assert len(found.costs.unique()) > 6  # more than there are frames to show


def test_open_loop_plans_compare_features(features_world: Path, walks: Path, tmp_path: Path):
    given = {"checkpoint": str(features_world), "data": str(walks), "out": str(tmp_path)}
    options = {"episodes": 2, "seconds": 1.0, "prior_split": "test", "pictures": 1}
    results = run_open(OpenConfig(**given, **options, planner=PLANNER))
    assert np.isfinite(results.errors("world")).all()
    assert len(results.pictures[0].costs.unique()) > 6  # more than there are frames to show


def test_importance_by_pictures_is_refused(
    features_world: Path, walks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    argv = ["heads", "--checkpoint", str(features_world), "--data", str(walks), "--out", str(tmp_path / "heads")]
    monkeypatch.setattr(sys, "argv", [*argv, "--importance", "lpips", "--tracking", "none"])
    with pytest.raises(SystemExit) as end:
        run(inspect_heads)
    assert end.value.code == 2
    assert "no decoder" in capsys.readouterr().err
