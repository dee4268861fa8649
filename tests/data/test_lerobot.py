"""LeRobot datasets, written by hand with pyarrow and PyAV, and by `cdit.data.to_lerobot`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from cdit.common.errors import UserError
from cdit.data import shard_writer
from cdit.data.config import DataConfig, Source
from cdit.data.lerobot import Episode
from cdit.data.shard_writer import convert
from cdit.data.sources import listed_splits, open_source
from cdit.data.to_lerobot import to_lerobot
from cdit.data.windows import WindowDataset

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FPS = 10
LENGTHS = [24, 17, 21]
NAMES = ["shoulder.pos", "elbow.pos", "gripper.pos"]
CAMERAS = ["observation.images.front", "observation.images.wrist"]


def shade(camera: int, row: int) -> int:
    """The grey of a frame."""
    return 20 + 3 * row + 10 * camera


def write_video(path: Path, shades: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt, stream.options = 32, 24, "yuv420p", {"crf": "10", "g": "12"}
        for value in shades:
            frame = av.VideoFrame.from_ndarray(np.full((24, 32, 3), value, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def arm(tmp_path: Path) -> Path:
    """Three episodes of an arm with two cameras; the first two share a video and a data file."""
    folder, draws = tmp_path / "arm", np.random.default_rng(0)
    actions = draws.normal(size=(sum(LENGTHS), 3)).astype(np.float32)
    starts = np.cumsum([0, *LENGTHS])
    for camera, key in enumerate(CAMERAS):
        shades = [shade(camera, row) for row in range(sum(LENGTHS))]
        for file, part in enumerate((shades[: starts[2]], shades[starts[2] :])):
            write_video(folder / f"videos/{key}/chunk-000/file-{file:03d}.mp4", part)
    rows = pa.table({
        "action": pa.array(actions.tolist(), pa.list_(pa.float32())),
        "reward": pa.array(np.arange(sum(LENGTHS)) / 2),
        "timestamp": pa.array(np.concatenate([np.arange(n) / FPS for n in LENGTHS]), pa.float32()),
        "frame_index": pa.array(np.concatenate([np.arange(n) for n in LENGTHS])),
        "episode_index": pa.array(np.repeat(range(3), LENGTHS)),
        "index": pa.array(range(sum(LENGTHS))),
        "task_index": pa.array([0] * 30 + [1] * (sum(LENGTHS) - 30)),
    })  # fmt: skip
    for file, part in enumerate((rows[: starts[2]], rows[starts[2] :])):
        path = folder / f"data/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(part, path)
    located = {"chunk_index": [0, 0, 0], "file_index": [0, 0, 1], "from_timestamp": [0.0, LENGTHS[0] / FPS, 0.0]}
    episodes = {"episode_index": [0, 1, 2], "length": LENGTHS}
    episodes |= {f"videos/{key}/{name}": values for key in CAMERAS for name, values in located.items()}
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(episodes), folder / "meta/episodes/chunk-000/file-000.parquet")
    pq.write_table(pa.table({"task_index": [1, 0], "task": ["put down", "lift"]}), folder / "meta/tasks.parquet")
    stats = {"action": {"min": actions.min(0).tolist(), "max": actions.max(0).tolist()}}
    (folder / "meta/stats.json").write_text(json.dumps(stats))
    features = {
        key: {"dtype": "video", "shape": [24, 32, 3], "names": ["height", "width", "channels"]} for key in CAMERAS
    }
    features |= {
        "action": {"dtype": "float32", "shape": [3], "names": NAMES},
        "reward": {"dtype": "float64", "shape": [1], "names": None},
        **{key: {"dtype": "int64", "shape": [1], "names": None} for key in ("frame_index", "episode_index", "index")},
        "task_index": {"dtype": "int64", "shape": [1], "names": None},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    }
    (folder / "meta/info.json").write_text(
        json.dumps(
            {
                "codebase_version": "v3.0",
                "fps": FPS,
                "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
                "splits": {"train": "0:3"},
                "features": features,
            }
        )
    )
    return folder


def opened(folder: Path, split: str = "train", **options) -> list[Episode]:
    return open_source(Source(str(folder), source="lerobot", **options), split)[0]


def recorded_actions(folder: Path) -> np.ndarray:
    files = sorted((folder / "data").rglob("*.parquet"))
    return np.concatenate([np.array(pq.read_table(file)["action"].to_pylist()) for file in files])


def decoded(path: Path) -> list[np.ndarray]:
    """All frames of a video, in sequence."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("times", [range(17), [16, 0, 9], [3]], ids=["all", "jumps", "one"])
def test_frames_are_those_of_sequential_decoding(arm: Path, camera: str, times):
    episode = opened(arm, camera=camera)[1]
    all_frames = decoded(arm / f"videos/{camera}/chunk-000/file-000.mp4")
    expected = np.stack([all_frames[LENGTHS[0] + time] for time in times])
    assert np.array_equal(episode.frames(list(times)).permute(0, 2, 3, 1).numpy(), expected)


def test_actions_names_ranges_and_splits(arm: Path):
    trajectories, info = open_source(Source(str(arm), source="lerobot"), "train")
    actions = recorded_actions(arm)
    assert [t.name for t in trajectories] == ["episode_000000", "episode_000001"]
    np.testing.assert_array_equal(trajectories[1].actions, actions[24:41])
    assert info.actions.names == NAMES
    np.testing.assert_allclose(info.actions.low, actions.min(0))
    np.testing.assert_array_equal(trajectories[1].conditions["reward"], np.arange(24, 41) / 2)
    assert info.fps == FPS
    assert [t.name for t in opened(arm, "test")] == ["episode_000002"]


def test_texts_are_the_tasks_of_the_frames(arm: Path):
    lifting, both = opened(arm, fps=5.0)
    assert lifting.texts == ["lift"] * 12
    assert both.texts == ["lift"] * 3 + ["put down"] * 5


def test_windows_have_the_text_of_their_current_frame(arm: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "cdit.data.windows.encode_texts", lambda name, texts: torch.tensor([[float(len(text))] for text in texts])
    )
    config = DataConfig(str(arm), source="lerobot", text_encoder="any", image_size=(24, 32), workers=0, cache_gb=0.1)
    dataset = WindowDataset(config, "train")
    for window in range(0, len(dataset), 3):
        episode, now = dataset.locate(window)
        text = "lift" if sum(LENGTHS[:episode]) + now < 30 else "put down"
        assert dataset.window(window, [0]).condition.text == len(text)


def test_a_lower_rate_takes_every_other_frame_and_sums_or_ends_its_actions(arm: Path):
    actions = recorded_actions(arm)[:24].reshape(12, 2, 3)
    episode = opened(arm, fps=5.0, action_kind="sum")[0]
    np.testing.assert_allclose(episode.actions, actions.sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(opened(arm, fps=5.0)[0].actions, actions[:, 1], rtol=1e-6)
    greys = episode.frames([0, 1, 11]).float().mean((1, 2, 3))
    np.testing.assert_allclose(greys, [shade(0, row) for row in (0, 2, 22)], atol=2)
    _, info = open_source(Source(str(arm), source="lerobot", fps=5.0, action_kind="sum"), "train")
    assert info.fps == 5
    np.testing.assert_allclose(info.actions.high, 2 * recorded_actions(arm).max(0), rtol=1e-6)
    with pytest.raises(UserError, match="fps is 4"):
        opened(arm, fps=4.0)


def test_windows_sum_actions_over_the_interval(arm: Path):
    config = DataConfig(
        str(arm), source="lerobot", action_kind="sum", image_size=(24, 32), context_frames=2, workers=0, cache_gb=0.1
    )
    dataset = WindowDataset(config, "train")
    item = dataset.window(dataset.windows_with([5, -3])[4], [5, -3])
    _, now = dataset.locate(dataset.windows_with([5, -3])[4])
    actions = recorded_actions(arm)[:24]
    expected = [actions[now : now + 5].sum(0), -actions[now - 3 : now].sum(0)]
    np.testing.assert_allclose(item.condition.action, expected, rtol=1e-5, atol=1e-6)
    assert item.condition.known.all()
    np.testing.assert_allclose(item.target.float().mean((1, 2, 3)), [shade(0, now + 5), shade(0, now - 3)], atol=2)


def _edit(field: str, value):
    def change(folder: Path) -> None:
        info = json.loads((folder / "meta/info.json").read_text())
        info[field] = value
        (folder / "meta/info.json").write_text(json.dumps(info))

    return change


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (_edit("codebase_version", "v2.1"), {}, r"info\.json: codebase_version is 'v2.1', expected 'v3.0'"),
        (_edit("fps", 0), {}, r"info\.json: fps"),
        (_edit("features", {}), {}, r"info\.json: .*data\.camera"),
        (_edit("video_path", "{0.__class__}"), {}, r"info\.json: video_path"),
        (lambda folder: None, {"camera": "observation.images.top"}, r"data\.camera is observation\.images\.top"),
        (lambda folder: None, {"action_key": "torque"}, r"data\.action_key is torque"),
        (
            lambda folder: (folder / "meta/stats.json").write_text("{}"),
            {},
            r"stats\.json: action: expected min and max",
        ),
        (lambda folder: shutil.rmtree(folder / "meta/episodes"), {}, r"meta/episodes: no chunk"),
        (lambda folder: (folder / "data/chunk-000/file-001.parquet").write_text("x"), {}, r"file-001\.parquet: not a"),
        (
            lambda folder: pq.write_table(pa.table({"a": [1]}), folder / "data/chunk-000/file-000.parquet"),
            {},
            "no column",
        ),
    ],
)
def test_damaged_datasets_are_named(arm: Path, damage, options: dict, message: str):
    damage(arm)
    with pytest.raises(UserError, match=message):
        opened(arm, **options)


def test_a_video_that_is_too_short_does_not_repeat_its_last_frame(arm: Path):
    write_video(arm / f"videos/{CAMERAS[0]}/chunk-000/file-000.mp4", [0] * 30)
    assert len(opened(arm)[1].frames([5])) == 1
    with pytest.raises(UserError, match=r"file-000\.mp4: no frame at"):
        opened(arm)[1].frames([6])


def test_what_is_written_is_read_again(dataset: Path, tmp_path: Path):
    assert to_lerobot(Source(str(dataset)), tmp_path / "out") == 3
    for split in ("train", "test"):
        ours, info = open_source(Source(str(dataset)), split)
        again, info_again = open_source(Source(str(tmp_path / "out"), source="lerobot"), split)
        assert info_again == info
        for before, after in zip(ours, again, strict=True):
            np.testing.assert_array_equal(after.position, before.position)
            np.testing.assert_array_equal(after.yaw, before.yaw)
            times = list(range(len(before)))
            difference = after.frames(times).float() - before.frames(times).float()
            assert difference.abs().max() <= 3  # H.264
    with pytest.raises(UserError, match="out: exists"):
        to_lerobot(Source(str(dataset)), tmp_path / "out")


def test_named_actions_and_videos_without_any_are_written(arm: Path, video_dataset: Path, tmp_path: Path):
    to_lerobot(Source(str(arm), source="lerobot", camera=CAMERAS[1]), tmp_path / "arm2")
    again, info = open_source(Source(str(tmp_path / "arm2"), source="lerobot"), "train")
    assert info.actions == open_source(Source(str(arm), source="lerobot"), "train")[1].actions
    np.testing.assert_allclose(again[1].actions, recorded_actions(arm)[24:41], rtol=1e-6)
    to_lerobot(Source(str(video_dataset)), tmp_path / "plain")
    trajectories, info = open_source(Source(str(tmp_path / "plain"), source="lerobot"), "test")
    assert not info.has_actions
    assert trajectories[0].actions is None


def test_conversions_keep_rates_kinds_and_splits(arm: Path, dataset: Path, tmp_path: Path):
    to_lerobot(Source(str(arm), source="lerobot", action_kind="sum"), tmp_path / "sums")
    assert open_source(Source(str(tmp_path / "sums"), source="lerobot"), "train")[1].actions.kind == "sum"

    convert(Source(str(dataset), fps=10.0), tmp_path / "shards", None)
    assert open_source(Source(str(tmp_path / "shards")), "train")[1].fps == 10
    to_lerobot(Source(str(tmp_path / "shards")), tmp_path / "both")
    assert json.loads((tmp_path / "both/meta/info.json").read_text())["splits"] == {"test": "0:1", "train": "1:3"}
    to_lerobot(Source(str(dataset), fps=10.0), tmp_path / "faster")
    assert json.loads((tmp_path / "faster/meta/info.json").read_text())["fps"] == 10
    assert listed_splits(Source(str(tmp_path / "both"), source="lerobot")) == ["test", "train"]
    assert listed_splits(Source(str(arm), source="lerobot")) == ["train", "test"]  # as it lists only one


def test_shards_of_other_options_do_not_take_frames_of_an_interrupted_conversion(dataset, tmp_path, monkeypatch):
    to_lerobot(Source(str(dataset)), tmp_path / "walks")
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "_groups", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(Source(str(tmp_path / "walks"), source="lerobot"), tmp_path / "out", ["train"])
    slower = Source(str(tmp_path / "walks"), source="lerobot", fps=2.5)
    convert(slower, tmp_path / "out", ["train"])
    expected, found = (open_source(source, "train")[0] for source in (slower, Source(str(tmp_path / "out"))))
    for one, other in zip(expected, found, strict=True):
        times = list(range(len(one)))
        assert len(other) == len(one)
        assert (one.frames(times).float() - other.frames(times).float()).abs().max() <= 4  # JPEG


PYTHON = os.environ.get("CDIT_LEROBOT_PYTHON")
WRITE = """
import sys, numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
names = ["shoulder.pos", "elbow.pos", "wrist.pos", "gripper.pos"]
features = {
    "action": {"dtype": "float32", "shape": (4,), "names": names},
    "observation.images.front": {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channels"]},
}
dataset = LeRobotDataset.create("test/arm", 10, features, root=sys.argv[1], use_videos=True)
draws = np.random.default_rng(0)
for episode in range(3):
    for time in range(30):
        action = draws.uniform(-1, 1, 4).astype(np.float32)
        image = np.full((64, 64, 3), 30 + 6 * time + episode, np.uint8)
        dataset.add_frame({"action": action, "observation.images.front": image, "task": "wave"})
    dataset.save_episode()
dataset.finalize()
"""
READ = """
import sys, numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
dataset = LeRobotDataset("test/read", root=sys.argv[1], video_backend="pyav")
items = [dataset[i] for i in range(len(dataset))]
camera = next(key for key in dataset.features if key.startswith("observation.images"))
np.savez(
    sys.argv[2],
    **{key: np.stack([np.asarray(item[key]) for item in items]) for key in ("action", "episode_index", "timestamp")},
    frames=np.stack([np.asarray(item[camera]) for item in items]),
    names=dataset.features["action"]["names"],
    task=items[0]["task"],
)
"""


def lerobot(program: str, *arguments: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([PYTHON, "-c", program, *map(str, arguments)], check=True, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="CDIT_LEROBOT_PYTHON names no interpreter that has lerobot 0.4.4")
def test_with_lerobot_itself(dataset: Path, tmp_path: Path):
    """Its dataset is read, trained on and sampled with its own actions; it reads what we write, of both datasets."""
    lerobot(WRITE, tmp_path / "arm")
    source = Source(str(tmp_path / "arm"), source="lerobot")
    lerobot(READ, tmp_path / "arm", tmp_path / "arm.npz")
    theirs = np.load(tmp_path / "arm.npz")
    trajectories = open_source(source, "train")[0] + open_source(source, "test")[0]
    np.testing.assert_array_equal(np.concatenate([t.actions for t in trajectories]), theirs["action"])
    frames = torch.cat([t.frames(list(range(len(t)))) for t in trajectories])
    np.testing.assert_allclose(frames / 255, theirs["frames"], atol=2 / 255)

    root = Path(__file__).parents[2]
    data = ["--data.folder", source.folder, "--data.source", "lerobot", "--data.prepare", "null"]
    command = [sys.executable, "train.py", "--config", "configs/smoke.yaml", "--output", str(tmp_path / "runs"), *data]
    command += ["--data.action_kind", "sum", "--stop_at", "4", "--name", "arm"]
    subprocess.run(command, check=True, cwd=root)
    command = [sys.executable, "sample.py", "--checkpoint", str(tmp_path / "runs/arm"), "--data", source.folder]
    command += ["--source", "lerobot", "--length", "4", "--samples", "1", "--out", str(tmp_path / "samples")]
    subprocess.run(command, check=True, cwd=root)
    sampled = json.loads((tmp_path / "samples/samples.json").read_text())["samples"][0]
    now = int(sampled["name"].rsplit("_", 1)[1])
    np.testing.assert_allclose(sampled["actions"], trajectories[-1].actions[now : now + 4], rtol=1e-5, atol=1e-6)

    for name, written in (("arm", source), ("walk", Source(str(dataset)))):
        out = tmp_path / f"{name}_written"
        to_lerobot(written, out, task="wave")
        lerobot(READ, out, tmp_path / "read.npz")
        read = np.load(tmp_path / "read.npz")
        splits = json.loads((out / "meta/info.json").read_text())["splits"]  # in the order of the episodes
        ours = [t for split in splits for t in open_source(written, split)[0]]
        assert len(read["frames"]) == sum(map(len, ours))
        frames = torch.cat([t.frames(list(range(len(t)))) for t in ours])
        np.testing.assert_allclose(read["frames"], frames / 255, atol=4 / 255)
        assert str(read["task"]) == "wave"
        expected = list(open_source(written, "train")[1].actions.names)
        assert read["names"].tolist() == expected
        np.testing.assert_allclose(read["timestamp"][1], 1 / open_source(written, "train")[1].fps, rtol=1e-6)
