"""Worlds that ship with the package: packed in half precision, found by name, run in float32."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cdit import worlds
from cdit.codec import PixelCodec
from cdit.model import CDiT
from cdit.world_model import WorldDescription, WorldModel


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
    done = pack(tmp_path, world, "--evaluation", str([str(tmp_path / "results")]))
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(worlds, "FOLDER", tmp_path)
    monkeypatch.chdir(tmp_path / "results")  # where no folder has the name
    loaded = WorldModel.from_pretrained("toy")
    for (name, ours), theirs in zip(loaded.cdit.named_parameters(), world.cdit.parameters(), strict=True):
        assert ours.dtype == torch.float32, name
        assert torch.equal(ours, theirs.half().float()), name
    assert "23.4" in (tmp_path / "toy" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "toy" / "cdit" / "config.json").read_text()


def test_a_missing_table_is_named_before_anything_is_written(tmp_path, world):
    done = pack(tmp_path, world, "--evaluation", str([str(tmp_path / "nowhere")]))
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert not (tmp_path / "toy").exists()


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worlds, "FOLDER", tmp_path / "shipped")
    (tmp_path / "shipped" / "toy").mkdir(parents=True)
    (tmp_path / "shipped" / "toy" / "world_model.json").touch()
    assert worlds.resolve("toy") == tmp_path / "shipped" / "toy"
    (tmp_path / "toy").mkdir()
    assert worlds.resolve("toy") == Path("toy")
