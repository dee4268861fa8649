import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from cdit.common.errors import UserError
from cdit.data.layout import DatasetInfo
from cdit.data.trajectory import read_names, read_split

pytest.importorskip("vizdoom", reason="the engine is part of the extra 'doom'")

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "data" / "doom" / "prepare.py"
SMOKE = RECIPE.with_name("smoke.yaml")


def start(out: Path, *options: str, config: Path = SMOKE) -> subprocess.Popen:
    command = [sys.executable, str(RECIPE), "--config", str(config), "--out", str(out), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells make background jobs ignore Ctrl-C
    )


def prepare(out: Path, *options: str, config: Path = SMOKE) -> tuple[int, str]:
    """Runs the recipe; exit code and stderr."""
    process = start(out, *options, config=config)
    return process.communicate(timeout=120)[1], process.returncode


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    """The smoke preset with depth, recorded by two processes."""
    folder = tmp_path_factory.mktemp("recording") / "smoke"
    errors, code = prepare(folder, "--workers", "2", "--depth", "true")
    assert code == 0, errors
    assert "frames/s" in errors
    return folder


@pytest.mark.slow
def test_splits_are_readable_and_disjoint(recording):
    names = []
    for split, count in {"train": 3, "test": 1, "unknown": 1}.items():
        trajectories, problems = read_split(recording, split)
        assert not problems
        assert [len(t) >= 32 for t in trajectories] == [True] * count
        names += read_names(recording, split)
    assert len(set(names)) == 5
    assert all(name.startswith("my_way_home_") for name in names[:4])
    assert names[4].startswith("freedoom2_MAP01_")


def test_the_description_says_how_it_was_made(recording):
    info = DatasetInfo.load(recording)
    assert info.name == "smoke"
    assert info.fps == 4
    assert 0.2 < info.metric_waypoint_spacing < 0.4
    assert (info.camera.width, info.camera.height, info.camera.pitch) == (64, 64, 0)
    assert info.source["maps"] == ["my_way_home"]
    assert info.source["seed"] == 0
    assert info.source["vizdoom"]


def test_depth_and_walls_are_stored(recording):
    with np.load(recording / "my_way_home_0000" / "depth.npz", allow_pickle=False) as saved:
        (depth,) = saved.values()
    frames = len(list((recording / "my_way_home_0000").glob("*.jpg")))
    assert depth.shape == (frames, 64, 64)
    assert depth.dtype == np.float16
    with np.load(recording / "my_way_home_0000" / "eye.npz", allow_pickle=False) as saved:
        (eye,) = saved.values()
    np.testing.assert_allclose(eye, np.full(frames, 41 * 1.2 / 32))  # the maze is level
    assert sorted(path.name for path in (recording / "maps").iterdir()) == ["freedoom2_MAP01.npz", "my_way_home.npz"]


def test_maps_that_were_deleted_are_written_anew_and_nothing_else(recording, tmp_path):
    copy = tmp_path / "smoke"
    shutil.copytree(recording, copy)
    shutil.rmtree(copy / "maps")
    errors, code = prepare(copy, "--depth", "true")
    assert code == 0, errors
    assert contents(copy) == contents(recording)


def test_nothing_but_the_layout_is_left(recording):
    folders = [name for split in ("train", "test", "unknown") for name in read_names(recording, split)]
    assert sorted(path.name for path in recording.iterdir()) == sorted([*folders, "dataset.json", "maps", "splits"])


@pytest.mark.slow
def test_recordings_are_the_same_with_one_worker_and_resumed(recording, tmp_path):
    resumed = tmp_path / "smoke"
    shutil.copytree(recording, resumed)
    (resumed / "dataset.json").rename(resumed / "recording.json")
    shutil.rmtree(resumed / "my_way_home_0001")
    shutil.rmtree(resumed / "freedoom2_MAP01_0000")
    (resumed / "my_way_home_0002").rename(resumed / ".my_way_home_0002.partial")  # as a killed process leaves it
    errors, code = prepare(resumed, "--workers", "1", "--depth", "true")
    assert code == 0, errors
    assert contents(resumed) == contents(recording)


def test_other_options_over_a_recording_are_refused(recording):
    before = contents(recording)
    errors, code = prepare(recording, "--seed", "1", "--depth", "true")
    assert code == 2
    assert "seed was 0, is 1" in errors
    assert "Traceback" not in errors
    assert contents(recording) == before


@pytest.mark.parametrize("name", ["recording.json", "dataset.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [('{"name": "smo', "not JSON"), ('{"name": "mine"}', "not a recording"), ("[]", "not a")],
    ids=["cut short", "without source", "another thing"],
)
def test_a_description_that_is_not_ours_is_refused(tmp_path, monkeypatch, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: {message}.*another --out"):
        call_main(monkeypatch, "--config", str(SMOKE), "--out", str(tmp_path))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, content)]


def test_the_claim_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        call_main(monkeypatch, "--config", str(SMOKE), "--out", str(tmp_path))
    assert not (tmp_path / "recording.json").exists()


def sessions() -> set[int]:
    """The sessions of all processes."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError):
            found.add(os.getsid(int(process.name)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("number", "send"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_a_stopped_recording_leaves_nothing_half_written_and_no_engine(tmp_path, number, send):
    out = tmp_path / "long"
    process = start(out, "--frames", "100000", "--workers", "2")
    deadline = time.monotonic() + 60
    while len(list(out.glob("my_way_home_*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    send(process.pid, number)
    deadline = time.monotonic() + 30
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number
    while process.pid in sessions() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.pid not in sessions()
    assert "Traceback" not in errors
    assert not (out / "dataset.json").exists()
    assert json.loads((out / "recording.json").read_text())["source"]["frames"] == 100000
    assert not list(out.glob(".*"))
    for trajectory in out.glob("my_way_home_*"):
        assert (trajectory / "traj_data.pkl").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--maps", "nowhere"], "'nowhere'"),
        (["--frames", "0"], "frames"),
        (["--length", "8"], "length"),
        (["--size", "9999"], "size"),
        (["--test_share", "1.5"], "test_share"),
        (["--test_share", "0"], "test_share"),
        (["--frames", "64"], "frames is 64, which makes 1 of length 64 per map"),
        (["--workers", "0"], "workers"),
        (["--maps", "freedoom2/MAP01,my_way_home"], "maps names freedoom2/MAP01, and so does unknown_maps"),
        (["--maps", "freedoom2/MAP02", "--unknown_maps", "freedoom2"], "maps names freedoom2/MAP02, and so does"),
        (["--maps", "freedoom2", "--unknown_maps", "freedoom2"], "none is left"),
    ],
)
def test_wrong_options_are_named(tmp_path, monkeypatch, options, message):
    with pytest.raises(UserError, match=message):
        call_main(monkeypatch, "--config", str(SMOKE), "--out", str(tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()


def test_missing_vizdoom_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("cdit.doom.engine.vizdoom", None)
    with pytest.raises(UserError, match=r"pip install 'cdit\[doom\]'"):
        call_main(monkeypatch, "--config", str(SMOKE), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("preset", "counts"),
    [("quickstart", (99, 11, 6)), ("freedoom", (840, 120, 32)), ("smoke", (3, 1, 1))],
)
def test_presets(preset, counts, monkeypatch):
    recorded = []
    monkeypatch.setattr("cdit.doom.dataset.record_dataset", lambda *arguments: recorded.append(arguments))
    call_main(monkeypatch, "--config", str(RECIPE.with_name(f"{preset}.yaml")))
    [(folder, info, jobs, _)] = recorded
    assert folder.name == info.name == preset
    assert tuple(sum(job.split == split for job in jobs) for split in ("train", "test", "unknown")) == counts
    maps = {split: {job.map_name for job in jobs if job.split == split} for split in ("train", "test", "unknown")}
    assert maps["train"] == maps["test"]
    assert not maps["train"] & maps["unknown"]
    assert len({job.name for job in jobs}) == len(jobs)


@pytest.mark.parametrize(
    "command", [line.split("#")[0] for line in RECIPE.read_text().splitlines() if line.startswith("    python ")]
)
def test_the_examples_train_on_the_maps_they_name(command, monkeypatch):
    recorded = []
    monkeypatch.setattr("cdit.doom.dataset.record_dataset", lambda *arguments: recorded.append(arguments))
    monkeypatch.chdir(ROOT)
    options = command.split()[2:]
    call_main(monkeypatch, *options)
    [(_, info, _, _)] = recorded
    if "--maps" in options:
        assert info.source["maps"] == options[options.index("--maps") + 1].split(",")


def call_main(monkeypatch, *options: str) -> None:
    """The recipe's `main` in this process."""
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *options])
    specification = importlib.util.spec_from_file_location("prepare_doom", RECIPE)
    recipe = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "prepare_doom", recipe)
    specification.loader.exec_module(recipe)
    recipe.main()
