"""Worlds that ship with the package: packed in half precision, found by name, run in float32."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cdit import worlds
from cdit.codec import PixelCodec
from cdit.data.config import Source
from cdit.data.layout import DatasetInfo, write_split, write_trajectory
from cdit.data.sources import open_source
from cdit.model import CDiT
from cdit.plan.goal_network import GoalDescription, GoalNetwork, load_goal_network
from cdit.world_model import WorldDescription, WorldModel
from cdit.worlds.__main__ import pack_starts


@pytest.fixture
def world() -> WorldModel:
    torch.manual_seed(0)
    cdit = CDiT(image_size=(8, 8), patch_size=4, hidden_size=16, depth=1, num_heads=2)
    for parameter in cdit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return WorldModel(cdit, PixelCodec(), WorldDescription(image_size=(8, 8), fps=4.0)).eval()


def pack(tmp_path: Path, world: WorldModel, *options: str) -> subprocess.CompletedProcess:
    world.save_pretrained(tmp_path / "run")
    command = [sys.executable, "-m", "cdit.worlds", "--checkpoint", str(tmp_path / "run"), "--out"]
    return subprocess.run([*command, str(tmp_path / "toy"), *options], capture_output=True, text=True)


@pytest.mark.slow
def test_a_packed_world_is_found_by_name_and_has_the_weights_rounded_once(tmp_path, world, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results.md").write_text("| PSNR |\n|---|\n| 23.4 |\n")
    network = GoalNetwork(GoalDescription(4, (0.1,) * 3, (1.0,) * 3, 0.5, 0.5))
    network.save(tmp_path / "learned")
    options = ("--evaluation", str([str(tmp_path / "results")]), "--learned", str(tmp_path / "learned"))
    done = pack(tmp_path, world, *options)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(worlds, "FOLDER", tmp_path)
    monkeypatch.chdir(tmp_path / "results")  # where no folder has the name
    loaded = WorldModel.from_pretrained("toy")
    for (name, ours), theirs in zip(loaded.cdit.named_parameters(), world.cdit.parameters(), strict=True):
        assert ours.dtype == torch.float32, name
        assert torch.equal(ours, theirs.half().float()), name
    for ours, theirs in zip(load_goal_network("toy").parameters(), network.parameters(), strict=True):
        assert torch.equal(ours, theirs.half().float())
    assert "23.4" in (tmp_path / "toy" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "toy" / "cdit" / "config.json").read_text()


def test_a_missing_table_is_named_before_anything_is_written(tmp_path, world):
    done = pack(tmp_path, world, "--evaluation", str([str(tmp_path / "nowhere")]))
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    done = pack(tmp_path, world, "--evaluation", "[]", "--learned", str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert "nothing: no readable goal network" in done.stderr
    assert not (tmp_path / "toy").exists()


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worlds, "FOLDER", tmp_path / "shipped")
    (tmp_path / "shipped" / "toy").mkdir(parents=True)
    (tmp_path / "shipped" / "toy" / "world_model.json").touch()
    assert worlds.resolve("toy") == tmp_path / "shipped" / "toy"
    (tmp_path / "toy").mkdir()
    assert worlds.resolve("toy") == Path("toy")


def test_starts_are_short_walks_with_their_poses(tmp_path):
    lengths = {"a": 40, "b": 5}
    for number, (name, length) in enumerate(lengths.items()):
        frames = np.full((length, 8, 8, 3), 100 * number, np.uint8)
        position = np.arange(2 * length, dtype=float).reshape(length, 2)
        write_trajectory(tmp_path / "walks", name, frames, position, np.arange(length) / 10, text=f"walk {name}")
    write_split(tmp_path / "walks", "test", list(lengths))
    DatasetInfo("walks", source={"maps": ["a"]}).save(tmp_path / "walks")
    pack_starts(str(tmp_path / "walks"), tmp_path / "toy" / "starts", 9)
    (first, second), info = open_source(Source(str(tmp_path / "toy" / "starts")), "test")
    assert info.source == {"maps": ["a"]}
    assert [(walk.name, len(walk)) for walk in (first, second)] == [("a_0025", 9), ("b_0000", 5)]
    assert first.texts[0] == "walk a"
    assert first.position[0].tolist() == [50, 51]
    assert first.yaw[-1] == pytest.approx(3.3)
    assert second.frames([4]).float().mean() == pytest.approx(100, abs=1)
    pack_starts(str(tmp_path / "walks"), tmp_path / "toy" / "starts", 9)  # again, in its place


def test_starts_ship_with_a_world_that_has_them(tmp_path, monkeypatch):
    monkeypatch.setattr(worlds, "FOLDER", tmp_path)
    for name in ("toy", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "world_model.json").touch()
    (tmp_path / "toy" / "starts").mkdir()
    assert worlds.starts_of("toy") == str(tmp_path / "toy" / "starts")
    assert worlds.starts_of("other") is None
