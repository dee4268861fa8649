"""Datasets that somebody else packed: names and links that lead out of them, numbers that overflow."""

import json
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from cdit.common.errors import DataError
from cdit.data.check import check
from cdit.data.config import DataConfig
from cdit.data.latents import LatentCache
from cdit.data.layout import POSES, DatasetInfo, split_file
from cdit.data.shards import Shards
from cdit.data.sources import Source
from cdit.data.trajectory import read_split
from cdit.data.windows import WindowDataset
from cdit.training.durable import manifest


def problems_of(dataset: Path, **options) -> list[str]:
    trajectories, problems = read_split(dataset, "train", **options)
    if problems:
        with pytest.raises(DataError):
            WindowDataset(DataConfig(folder=str(dataset)), "train")
    else:
        assert len(trajectories) == 2
    return problems


NAMES = [
    "../outside", "/etc", "a/../../outside", "a//b", "./a", "a/.", "..", "a/", "a\\..\\b", "a\0b", "a\x1b[31m",
    "a\u202eb", "a" * 300, "a/" * 600 + "a", "ä" * 150, "~/\t.",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_that_lead_elsewhere_are_refused(dataset, name):
    shutil.copytree(dataset / "a", dataset.parent / "outside")
    split_file(dataset, "train").write_text(f"a\n{name}\n")
    (problem,) = problems_of(dataset)
    assert "traj_names.txt" in problem
    assert "is not a trajectory name" in problem
    assert problem.isprintable()
    assert len(problem) < 700
    assert check(Source(str(dataset))).problems


def test_names_of_several_components_stay(dataset):
    (dataset / "day 1").mkdir()
    (dataset / "a").rename(dataset / "day 1" / "größe_1")
    split_file(dataset, "train").write_text("day 1/größe_1\nb\n", "utf-8")
    assert problems_of(dataset) == []


LINKS = {
    "trajectory": "a",
    "frame": "a/3.jpg",
    "poses": f"a/{POSES}",
    "list of names": "splits/train/traj_names.txt",
    "folder of splits": "splits",
    "description": "dataset.json",
    "latents": "latents",
}


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("kind", LINKS)
def test_links_out_of_the_dataset_are_refused_unless_admitted(dataset, kind, relative):
    (dataset / "latents").mkdir()
    path, outside = dataset / LINKS[kind], dataset.parent / f"outside {kind}"
    path.rename(outside)
    path.symlink_to(os.path.relpath(outside, path.parent) if relative else outside)
    (problem,) = problems_of(dataset)
    assert all(
        words in problem for words in (str(path), f"a link to {outside}", f"outside of {dataset}; ", "follow_links")
    )
    assert problems_of(dataset, follow_links=True) == []
    assert WindowDataset(DataConfig(folder=str(dataset), follow_links=True), "train")[0].target.any()
    assert WindowDataset(DataConfig(mix=[Source(str(dataset), follow_links=True)]), "train")
    assert check(Source(str(dataset))).problems
    assert not check(Source(str(dataset), follow_links=True)).problems


def test_the_folder_itself_may_be_a_link_and_links_within_stay(dataset):
    link = dataset.parent / "link"
    link.symlink_to(dataset)
    (dataset / "a" / "5.jpg").unlink()
    (dataset / "a" / "5.jpg").symlink_to("4.jpg")
    (dataset / "b").rename(dataset / "c1")
    (dataset / "b").symlink_to(dataset / "c1")
    assert problems_of(dataset) == []
    assert problems_of(link) == []


def test_a_link_in_a_circle_is_a_problem(dataset):
    (dataset / "a" / "3.jpg").unlink()
    (dataset / "a" / "3.jpg").symlink_to("3.jpg")
    windows = WindowDataset(DataConfig(folder=str(dataset), workers=0), "train")
    with pytest.raises(DataError, match=r"3\.jpg: not readable"):
        [windows[i] for i in range(len(windows))]


def test_nothing_is_written_through_a_link(dataset):
    """What is half-written has a name that anybody can guess."""
    precious = dataset.parent / "precious"
    precious.write_text("mine")
    info = DatasetInfo.load(dataset)
    (dataset / ".dataset.json.partial").symlink_to(precious)
    info.save(dataset)
    assert DatasetInfo.load(dataset) == info
    assert precious.read_text() == "mine"
    assert not (dataset / "dataset.json").is_symlink()


def test_a_frame_number_takes_no_memory(dataset):
    shutil.copy(dataset / "a" / "3.jpg", dataset / "a" / "99999999999999999999.jpg")
    begun = time.perf_counter()
    assert any(
        "99999999999999999979 of 100000000000000000000 frames missing" in problem for problem in problems_of(dataset)
    )
    assert time.perf_counter() - begun < 1


def test_a_pipe_is_no_file(dataset):
    for name in ("dataset.json", "splits/train/traj_names.txt", f"a/{POSES}"):
        kept = (dataset / name).read_bytes()
        (dataset / name).unlink()
        os.mkfifo(dataset / name)
        read_split(dataset, "train")  # which comes back
        (dataset / name).unlink()
        (dataset / name).write_bytes(kept)
    assert problems_of(dataset) == []


@pytest.mark.parametrize(
    "value", [np.nan, np.inf, -np.inf, 1e300, 1e10, np.longdouble("1e4000"), np.finfo(np.float64).max]
)
@pytest.mark.parametrize("key", ["position", "yaw"])
def test_poses_that_overflow_are_problems(dataset, key, value):
    poses = {"position": np.zeros((20, 2), np.longdouble), "yaw": np.zeros(20, np.longdouble)}
    poses[key][7] = value
    (dataset / "a" / POSES).write_bytes(pickle.dumps(poses))
    (problem,) = problems_of(dataset)
    assert "the first at frame 7" in problem


def test_poses_far_away_give_finite_actions(dataset):
    poses = {"position": np.full((20, 2), 1e9), "yaw": np.linspace(-1e9, 1e9, 20)}
    poses["position"][::2] *= -1
    (dataset / "a" / POSES).write_bytes(pickle.dumps(poses))
    assert problems_of(dataset) == []
    windows = WindowDataset(DataConfig(folder=str(dataset), workers=0), "train")
    action = windows[0].condition.action
    assert action.isfinite().all()
    assert action.square().sum().isfinite()


@pytest.mark.parametrize("version", [2, 99])
def test_a_newer_format_is_named_whatever_else_it_holds(tmp_path, version):
    """Newer formats have fields and types that this code does not know."""
    newer = json.dumps({"version": version, "new": [1], "encoding": 3, "splits": [], "name": {"new": 1}, "files": 3})
    (tmp_path / "latents").mkdir()
    readers = {
        "dataset.json": DatasetInfo.load,
        "latents/latents.json": LatentCache.open,
        "shards.json": Shards,
    }
    for name, read in readers.items():
        (tmp_path / name).write_text(newer)
        with pytest.raises(DataError, match=rf"{name}: format version {version}, .* reads up to 1"):
            read(tmp_path)
    (tmp_path / "manifest.json").write_text(newer)
    assert f"manifest.json: format version {version}" in manifest.problem(tmp_path)


CAMERA = {"width": 64, "height": 48, "horizontal_fov": 1.5, "eye_height": 1.0}


@pytest.mark.parametrize(
    "change",
    [
        {"fps": 0}, {"fps": -4}, {"fps": float("nan")}, {"fps": float("inf")}, {"fps": 10**400}, {"fps": 1e300},
        {"metric_waypoint_spacing": 0}, {"metric_waypoint_spacing": float("nan")}, {"metric_waypoint_spacing": -1},
        {"camera": CAMERA | {"width": 0}}, {"camera": CAMERA | {"height": 10**30}}, {"camera": "/etc/passwd"},
        {"camera": CAMERA | {"horizontal_fov": 4.0}}, {"camera": CAMERA | {"pitch": float("nan")}}, {"camera": []},
        {"version": 2}, {"version": "x"}, {"unknown": 1}, {"name": None}, {"source": []},
    ],
)  # fmt: skip
def test_descriptions_with_other_values_are_refused(tmp_path, change):
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "it", "camera": CAMERA}))
    assert DatasetInfo.load(tmp_path).camera.width == 64
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "it", "camera": CAMERA} | change))
    with pytest.raises(DataError, match=r"dataset\.json: (not |format version)"):
        DatasetInfo.load(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 10_000_000, "1" * 10_000, '"' + "x" * 2**24, "\udcff", "{}", "null", ""], ids=range(7)
)
def test_files_that_are_no_descriptions(tmp_path, text):
    (tmp_path / "latents").mkdir()
    for name, read in {"dataset.json": DatasetInfo.load, "latents/latents.json": LatentCache.open}.items():
        (tmp_path / name).write_text(text, errors="surrogateescape")
        with pytest.raises(DataError, match=rf"{name}: (not |larger than)"):
            read(tmp_path)
