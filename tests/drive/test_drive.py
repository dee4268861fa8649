"""What one person drives: commands become motions, beginnings become contexts, drives become files."""

import io
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from cdit.common.errors import UserError
from cdit.common.frames import to_float, to_uint8
from cdit.data.actions import read_actions
from cdit.data.motion import local_motion
from cdit.data.trajectory import read_split
from cdit.drive.config import DriveConfig
from cdit.drive.drive import Begin, Drive, Inside, Stage, arc
from cdit.drive.truth import Place, Truth
from cdit.evaluate.metrics import psnr
from cdit.heads.importance import Head

SIDE = 32


@pytest.fixture
def drive(stage: Stage) -> Drive:
    made = Drive(stage)
    made.begin(Begin(start=5))
    return made


@pytest.mark.parametrize(
    "command", [(1.2, 0, 0), (0, -0.7, 0), (1.2, 0.3, 1.0), (-2, 0, -3.0), (0, 0, 1), (1, 0, 1e-7)]
)
def test_an_arc_is_the_sum_of_many_small_steps(command):
    forward, left, turn = command
    position, yaw, parts = np.zeros(2), 0.0, 20_000
    for _ in range(parts):
        middle = yaw + turn / 4 / parts / 2
        position += np.array([forward * math.cos(middle) - left * math.sin(middle),
                              forward * math.sin(middle) + left * math.cos(middle)]) / 4 / parts  # fmt: skip
        yaw += turn / 4 / parts
    assert arc(*command, fps=4) == pytest.approx((*position, yaw), abs=1e-6)


def test_it_begins_with_the_past_of_a_window(drive, stage):
    item = stage.data.window(stage.starts[5], [])
    assert torch.equal(drive.dreams[0].context, item.context)
    assert (drive.view().arrays["dream 0"] == item.context[-1].permute(1, 2, 0).numpy()).all()


def test_a_picture_stands_still_or_alone(stage):
    picture = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8)
    drive = Drive(stage)
    drive.begin(Begin(picture=picture))
    assert torch.equal(drive.dreams[0].frame, picture)
    assert drive.dreams[0].mask.tolist() == [False, False, True]  # the tiny world was trained with min_history 1
    assert drive.step(1, 0, 0)


def test_the_same_beginning_gives_the_same_drive_and_other_noise_another(drive):
    def frames(seed: int) -> list[np.ndarray]:
        drive.begin(Begin(start=5, seed=seed))
        return [drive.view().arrays["dream 0"] for _ in range(3) if drive.step(1, 0, 0.5)]

    first, again, other = frames(0), frames(0), frames(1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_drive_ends_where_its_memory_does(checkpoint, walks):
    small = Drive(Stage(DriveConfig(checkpoint=str(checkpoint), data=str(walks), session_mb=1)))
    small.begin(Begin(start=0))
    limit = small.limit
    assert limit < 200
    for _ in range(limit):
        assert small.step(1, 0, 0)
    assert not small.step(1, 0, 0)
    assert small.steps == limit
    small.back()
    assert small.step(1, 0, 0)


def test_a_second_dream_has_the_same_actions_and_noise(drive):
    drive.compare(0)
    drive.dreams[0].off = frozenset({Head(0, "cross", 0)})
    for command in ((1, 0, 0), (1, 0.2, 1)):
        drive.step(*command)
    view = drive.view()
    assert not np.array_equal(view.arrays["dream 0"], view.arrays["dream 1"])  # which has all heads
    alone = Drive(drive.stage)
    alone.begin(Begin(start=5))
    for command in ((1, 0, 0), (1, 0.2, 1)):
        alone.step(*command)
    assert np.array_equal(alone.view().arrays["dream 0"], view.arrays["dream 1"])
    drive.sample_with(1, "heun", 3)
    drive.step(1, 0, 0)
    assert [dream["calls"] for dream in drive.view().facts["dreams"]] == [2, 5]  # heun's last step is Euler's
    drive.back()
    assert [dream["calls"] for dream in drive.view().facts["dreams"]] == [2, 2]
    with pytest.raises(UserError, match="euler"):
        drive.sample_with(0, "ddpm", 3)


def test_heads_are_shown_with_type_and_measures(drive):
    drive.inside = Inside((1, 2), [(0, 1), (0, 0)])
    assert "attention" not in drive.view().arrays  # the start was not dreamed
    drive.step(1, 0, 0)
    view = drive.view()
    look = drive.dreams[0].look([0])
    assert np.array_equal(view.arrays["attention"], look.weights[0][[1, 0], 1 * 4 + 2].numpy())
    assert view.arrays["past"].shape == (3, SIDE, SIDE, 3)
    for head in view.facts["heads"]:
        assert sum(head["masses"]) == pytest.approx(1, abs=1e-5)
        assert head["type"]


def test_spread_is_the_deviation_of_the_samples(drive):
    drive.doubt = 4
    view = drive.view((1, 0, 0))
    expected = view.arrays["ends"].astype(np.float64).std(0, ddof=1).mean(-1)
    assert np.abs(view.arrays["spread"] - expected).max() <= 1
    assert view.facts["spread"] == pytest.approx(expected.mean() / 255, rel=1e-4)


def test_saved_actions_are_those_the_model_received(drive, tmp_path):
    for command in ((1, 0, 0), (0.5, 0.1, -2), (0, 0, 1.7)):
        drive.step(*command)
    (tmp_path / "drive.json").write_text(json.dumps(drive.actions()))
    read = read_actions(str(tmp_path / "drive.json"))
    assert np.array_equal(read, np.array([moment.action for moment in drive.dreams[0].moments], np.float32))


def test_a_saved_video_has_the_past_and_every_frame(drive):
    with pytest.raises(UserError, match="no step"):
        drive.video()
    for _ in range(5):
        drive.step(1, 0, 0)
    with av.open(io.BytesIO(drive.video())) as video:
        assert sum(1 for _ in video.decode(video=0)) == 3 + 5
        assert video.streams.video[0].average_rate == 4


def test_a_recorded_dream_is_a_dataset_without_poses(drive, tmp_path):
    for _ in range(2):
        drive.step(1, 0, 0)
        drive.record(tmp_path / "drives")
    trajectories, problems = read_split(tmp_path / "drives" / "dream", "train")
    assert problems == []
    assert [(t.name, len(t), t.position) for t in trajectories] == [("dream_0000", 2, None), ("dream_0001", 3, None)]


def test_drives_of_another_world_are_not_mixed(drive, tmp_path, monkeypatch):
    drive.step(1, 0, 0)
    drive.record(tmp_path)
    recorded = (tmp_path / "dream" / "dataset.json").read_bytes()
    monkeypatch.setattr(drive.stage, "description", replace(drive.stage.description, fps=8.0))
    with pytest.raises(UserError, match=r"record: .*dream has drives of another world"):
        drive.record(tmp_path)
    assert (tmp_path / "dream" / "dataset.json").read_bytes() == recorded


def test_a_recording_that_cannot_be_written_is_refused(drive, tmp_path):
    (tmp_path / "file").touch()
    drive.step(1, 0, 0)
    with pytest.raises(UserError, match="cannot be written"):
        drive.record(tmp_path / "file")


def test_worlds_of_other_sizes_are_not_compared(checkpoint, walks, world, tmp_path):
    other = world()
    other.description = replace(other.description, fps=8.0)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="fps"):
        Stage(DriveConfig(checkpoint=str(checkpoint), data=str(walks), also=[str(tmp_path / "other")]))


def test_without_an_engine_it_says_why(stage):
    assert stage.maps == []
    assert "Doom" in stage.no_truth


# ---- in the engine ----


@pytest.fixture(scope="module")
def maze() -> Stage:
    pytest.importorskip("vizdoom", reason="the engine is part of the extra 'doom'")
    return Stage(DriveConfig())


@pytest.mark.slow
def test_the_shipped_world_needs_no_dataset(maze):
    assert len(maze.starts) >= 8
    assert maze.maps[0] == "my_way_home"


@pytest.mark.slow
def test_the_truth_walks_where_the_window_was_recorded(maze):
    drive = Drive(maze)
    try:
        for start in range(0, len(maze.starts), 9):
            drive.begin(Begin(start=start, truth=True))
            recorded = to_float(maze.data.window(maze.starts[start], []).context[-1])
            shown = to_float(torch.from_numpy(drive.view().arrays["truth"]).permute(2, 0, 1))
            assert psnr(shown[None], recorded[None]) > 20  # positions are rounded to 3 cm
    finally:
        drive.close()


@pytest.mark.slow
def test_the_dream_gets_the_motion_of_the_truth_and_is_scored_against_it(maze, tmp_path):
    drive = Drive(maze)
    try:
        drive.begin(Begin(map_name="my_way_home", seed=3))
        for command in [(1.2, 0, 0)] * 6 + [(1.2, 0.3, 1.0)] * 4:
            assert drive.step(*command)
        walk = drive.truth.walk
        for (before, after), moment in zip(pairwise(walk), drive.dreams[0].moments, strict=True):
            motion = local_motion(before.position, np.float64(before.yaw), after.position, np.float64(after.yaw))
            assert moment.action == pytest.approx(tuple(motion))
        view = drive.view()
        dream, truth = (to_float(torch.from_numpy(view.arrays[n]).permute(2, 0, 1))[None] for n in ("dream 0", "truth"))
        assert view.facts["dreams"][0]["psnr"] == pytest.approx(float(psnr(dream, truth)), abs=1e-3)

        place = walk[-3].position
        drive.back()
        drive.back()
        assert np.allclose(drive.truth.walk[-1].position, place)
        drive.step(0, 0, 0)
        assert np.linalg.norm(drive.truth.walk[-1].position - place) < 0.05  # it stands where it was

        drive.from_here()
        assert drive.steps == 0
        assert np.array_equal(drive.view().arrays["dream 0"], drive.view().arrays["truth"])
        assert torch.equal(drive.dreams[0].context[-1], drive.truth.frame)
        drive.step(1, 0, 0)

        folder = Path(drive.record(tmp_path / "drives"))
        [trajectory], problems = read_split(folder.parent, "train")
        assert problems == []
        assert len(trajectory) == len(drive.truth.walk) == 11
        assert np.allclose(trajectory.position, [seen.position for seen in drive.truth.walk])
    finally:
        drive.close()


@pytest.mark.slow
def test_a_drive_is_repeated_by_sample_py(maze, tmp_path):
    """The picture that it began with, its actions and its seed give the same frames."""
    import subprocess
    import sys

    from PIL import Image

    drive = Drive(maze)
    picture = maze.data.window(maze.starts[3], []).context[-1]
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "start.png")
    drive.begin(Begin(picture=picture, seed=7))
    for command in [(1.2, 0, 0), (1, 0, 1), (0, 0, 1)]:
        drive.step(*command)
    (tmp_path / "drive.json").write_text(json.dumps(drive.actions()))
    script = (
        "import sys, torch; from cdit.sample import futures; from cdit.sample.config import SampleConfig;"
        "futures.write_rollouts = lambda folder, scenes, rollout, *_: torch.save(rollout, sys.argv[1]);"
        "futures.sample(SampleConfig(checkpoint='maze', image=sys.argv[2], actions=sys.argv[3], samples=1, seed=7,"
        " horizons=[], out=sys.argv[4]))"
    )
    files = [str(tmp_path / name) for name in ("frames.pt", "start.png", "drive.json", "out")]
    subprocess.run([sys.executable, "-c", script, *files], check=True, capture_output=True)
    sampled = torch.load(tmp_path / "frames.pt", weights_only=True)[0]
    frames = torch.stack([moment.frame for moment in drive.dreams[0].moments])
    assert (to_uint8(sampled).int() - frames.int()).abs().max() <= 1


def test_a_truth_elsewhere_is_refused(stage):
    with pytest.raises(UserError, match="nowhere"):
        Truth(Place("nowhere"), 64, stage.description)
