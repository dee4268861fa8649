"""Video files as trajectories, against the frames and poses they were written with."""

import os
import pickle
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from cdit.common.errors import DataError
from cdit.data import shard_writer
from cdit.data.check import check
from cdit.data.config import DataConfig, Source
from cdit.data.from_video import VideoOptions, _sample, convert
from cdit.data.layout import DatasetInfo, write_split
from cdit.data.sources import open_source
from cdit.data.video import VideoReader, VideoTrajectory
from cdit.data.windows import WindowDataset

sys.path.append(str(Path(__file__).parent))
from test_from_video import grey, write_video

FPS = 4.0


@pytest.fixture
def folder(tmp_path):
    """Two videos to train on and one to test on, without poses."""
    for name, seconds in {"a": 10, "b": 5, "c": 5}.items():
        write_video(tmp_path / f"{name}.mp4", seconds)
    return tmp_path


def opened(folder, split="train", **options) -> list[VideoTrajectory]:
    return open_source(Source(str(folder), source="video", **options), split)[0]


def windows(folder, split="train", **values) -> WindowDataset:
    config = {"folder": str(folder), "source": "video", "image_size": (12, 16), "workers": 0, "max_offset": 4, **values}
    return WindowDataset(DataConfig(**config), split)


def value(frames: torch.Tensor) -> list[float]:
    """The grey of each frame, which tells its time."""
    return frames[..., -4:, -4:].float().mean((-3, -2, -1)).tolist()


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv", ".MOV"])
@pytest.mark.parametrize("times", [range(40), [39], [30, 2, 31, 0], [7, 6, 5]], ids=["all", "last", "jumps", "back"])
def test_frames_are_those_shown_at_their_time(tmp_path, suffix, times):
    video = write_video(tmp_path / "it.mp4", 10) if suffix == ".MOV" else write_video(tmp_path / f"it{suffix}", 10)
    video = video.rename(tmp_path / f"it{suffix}")
    trajectory = VideoTrajectory("it", video, FPS, 40, tmp_path)
    assert value(trajectory.frames(times)) == pytest.approx([grey(time / FPS) for time in times], abs=2)


@pytest.mark.parametrize("fps", [24, 30, 60])
@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv"])
def test_every_frame_is_found_whatever_its_time_stamp_is_rounded_to(tmp_path, suffix, fps):
    video = write_video(tmp_path / f"it{suffix}", 2, fps=fps)
    with av.open(str(video)) as container:
        stamps = [frame.pts for frame in container.decode(video=0)]
    reader = VideoReader(video)
    assert [reader.shown_at(Fraction(i, fps)).pts for i in range(2 * fps)] == stamps
    assert [frame.pts for frame in _sample(video, Fraction(fps))] == stamps
    assert [reader.shown_at(Fraction(i, fps)).pts for i in range(0, 2 * fps, 2)] == stamps[::2]
    assert [frame.pts for frame in _sample(video, Fraction(fps, 2))] == stamps[::2]


def test_what_converting_would_give(folder):
    """The same frames as JPEGs of the highest quality, but for their compression."""
    convert([folder / "a.mp4", folder / "b.mp4"], folder / "jpegs", VideoOptions(fps=FPS, size=48, quality=100))
    converted = open_source(Source(str(folder / "jpegs")), "train")[0][0]
    (video,) = (trajectory for trajectory in opened(folder) if trajectory.name == "a")
    assert len(video) == len(converted)
    times = range(len(video))
    difference = video.frames(times).float() - converted.frames(times).float()
    assert difference.abs().max() < 8


def test_without_lists_the_last_tenth_is_the_test_split(folder):
    assert [(t.name, len(t)) for t in opened(folder)] == [("a", 40), ("b", 20)]
    assert [(t.name, len(t)) for t in opened(folder, "test")] == [("c", 20)]
    with pytest.raises(DataError, match=r"unknown.*traj_names\.txt"):
        opened(folder, "unknown")


def test_check_reads_videos(folder):
    source = Source(str(folder), source="video")
    findings = check(source)
    assert findings.problems == []
    assert {name: len(found) for name, found in findings.trajectories.items()} == {"train": 2, "test": 1}
    assert "b: 20 frames, expected at least 30" in check(source, min_frames=30).problems[0]
    (folder / "b.mp4").write_bytes((folder / "b.mp4").read_bytes()[:-3000])
    write_split(folder, "train", ["a", "b", "c"])
    write_split(folder, "test", ["c"])
    found = check(source).problems
    assert any("b.mp4: not a readable video" in problem for problem in found)


def test_shards_of_videos_hold_their_frames_as_jpegs(folder, tmp_path_factory):
    shards = tmp_path_factory.mktemp("shards")
    shard_writer.convert(Source(str(folder), source="video", fps=2.0), shards, None)
    assert shard_writer.verify(str(shards)) == ([], "train: 2 trajectories, 30 frames; test: 1 trajectories, 10 frames")
    for split in ("train", "test"):
        found, info = open_source(Source(str(shards)), split)
        assert (info.fps, info.has_actions) == (2.0, False)
        for packed, video in zip(found, opened(folder, split, fps=2.0), strict=True):
            assert (packed.name, len(packed)) == (video.name, len(video))
            assert value(packed.frames(range(len(packed)))) == pytest.approx(
                value(video.frames(range(len(video)))), abs=2
            )
    assert not (shards / shard_writer.WORK).exists()


def test_lists_choose_videos(folder):
    (folder / "day").mkdir()
    (folder / "b.mp4").rename(folder / "day" / "b.mp4")
    write_split(folder, "train", ["day/b", "c"])
    assert [t.name for t in opened(folder)] == ["day/b", "c"]
    write_split(folder, "train", ["day/b", "none"])
    with pytest.raises(DataError, match="none: no video of this name"):
        opened(folder)


def test_windows_of_video(folder):
    dataset = windows(folder)
    assert not dataset.info.has_actions
    assert dataset.info.fps == FPS
    for index in (0, 20, 35):
        trajectory, now = dataset.locate(index)
        assert trajectory == 0
        window = dataset.window(index, [1])
        exists = [time for time in range(now - 3, now + 1) if time >= 0]
        assert value(window.context[-len(exists) :]) == pytest.approx([grey(time / FPS) for time in exists], abs=2)
        assert value(window.target) == pytest.approx([grey((now + 1) / FPS)], abs=2)
        assert not window.condition.known.any()


def test_the_rate_is_that_of_the_config_then_of_the_description(folder):
    DatasetInfo("it", fps=2.0, has_actions=False).save(folder)
    assert windows(folder).info.fps == 2.0
    assert len(opened(folder)[0]) == 20
    assert windows(folder, fps=5.0).info.fps == 5.0
    assert len(opened(folder, fps=5.0)[0]) == 50


def walk(rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "position": random.normal(size=(rows, 2)).cumsum(axis=0),
        "yaw": np.linspace(0, 9, rows),
        "hour": np.linspace(6, 18, rows),
    }


def write_csv(path, poses: dict[str, np.ndarray]) -> None:
    columns = {
        "x": poses["position"][:, 0],
        "y": poses["position"][:, 1],
        **{k: poses[k] for k in poses.keys() - {"position"}},
    }
    rows = [",".join(columns), *(",".join(map(repr, map(float, row))) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("kind", ["csv", "pkl", "traj_data.pkl"])
def test_poses_beside_the_video(folder, kind):
    write_split(folder, "train", ["a" if kind != "traj_data.pkl" else "walk/a"])
    poses = walk(40)
    if kind == "csv":
        write_csv(folder / "a.csv", poses)
    elif kind == "pkl":
        (folder / "a.pkl").write_bytes(pickle.dumps(poses))
    else:
        (folder / "walk").mkdir()
        (folder / "a.mp4").rename(folder / "walk" / "a.mp4")
        (folder / "walk" / "traj_data.pkl").write_bytes(pickle.dumps(poses))
    (trajectory,) = opened(folder)
    np.testing.assert_allclose(trajectory.position, poses["position"])
    np.testing.assert_allclose(trajectory.yaw, poses["yaw"])
    assert set(trajectory.texts) == {""}
    trajectory.path.with_suffix(".txt").write_text("walk on\n")
    assert opened(folder)[0].texts == ["walk on"] * len(trajectory)
    dataset = windows(folder)
    assert dataset.info.has_actions
    window = dataset.window(10, [1, 3])
    goals = [dataset.locate(10)[1] + offset for offset in (1, 3)]
    torch.testing.assert_close(window.condition.extra["hour"], torch.tensor(poses["hour"][goals], dtype=torch.float32))


def test_poses_at_other_times_are_interpolated(folder):
    """A camera's 30 poses a second, of a straight walk with a turn through ±π, which ends after 8 of 10 seconds."""
    write_split(folder, "train", ["a"])
    time = np.arange(0, 8.001, 1 / 30)
    yaw = (3.0 + 0.2 * time + np.pi) % (2 * np.pi) - np.pi
    write_csv(folder / "a.csv", {"position": np.stack([2 * time, -time], 1), "yaw": yaw, "time": time})
    (trajectory,) = opened(folder)
    assert len(trajectory) == 33
    instants = np.arange(33) / FPS
    np.testing.assert_allclose(trajectory.position, np.stack([2 * instants, -instants], 1), atol=1e-9)
    np.testing.assert_allclose(np.exp(1j * trajectory.yaw), np.exp(1j * (3.0 + 0.2 * instants)), atol=1e-9)
    assert "time" not in trajectory.conditions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n1,2\n", "header with x, y and yaw"),
        ("x,y,yaw\n1,2\n", "3 numbers in every row"),
        ("x,y,yaw\n1,2,three\n", "3 numbers in every row"),
        ("x,y,yaw\n" + "1,2,3\n" * 20, "20 poses, but the video has 40 frames at 4 a second"),
        ("x,y,yaw\n" + "1,2,3\n" * 39 + "1,2,nan\n", "not finite"),
        ("time,x,y,yaw\n0,1,2,3\n0,1,2,3\n", "time must increase"),
        ("time,x,y,yaw\n3,1,2,3\n4,1,2,3\n", "start at 0"),
        ("time,x,y,yaw\n", "start at 0"),
        ("time,x,y,yaw\n0,1,2,3\ninf,1,2,3\n", "start at 0"),
        ("", "header"),
    ],
)
def test_broken_poses_are_named(folder, text, message):
    write_split(folder, "train", ["a"])
    (folder / "a.csv").write_text(text)
    with pytest.raises(DataError, match=rf"a\.csv: .*{message}"):
        opened(folder)


def test_poses_are_expected_of_all_if_any_has_them(folder):
    write_csv(folder / "a.csv", walk(40))
    with pytest.raises(DataError, match=r"b\.mp4: no poses"):
        opened(folder)


def test_broken_videos_are_named(folder):
    (folder / "a.mp4").write_bytes(b"not a video")
    with pytest.raises(DataError, match=r"a\.mp4: not a readable video"):
        opened(folder)


def test_links_out_of_the_folder_are_refused(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "a.mp4"
    shutil.move(folder / "a.mp4", elsewhere)
    (folder / "a.mp4").symlink_to(elsewhere)
    with pytest.raises(DataError, match="follow_links"):
        opened(folder)
    assert len(opened(folder, follow_links=True)) == 2


def test_a_forked_process_reads_for_itself(folder):
    """It would share its parent's place in the file."""
    (trajectory, _) = opened(folder)
    trajectory.frames([3])
    child = os.fork()
    if child == 0:
        right = value(trajectory.frames([30])) == pytest.approx([grey(30 / FPS)], abs=2)
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert value(trajectory.frames([4])) == pytest.approx([grey(4 / FPS)], abs=2)
