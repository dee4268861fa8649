import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from cdit.common.errors import DataError, UserError
from cdit.data import from_video
from cdit.data import video as video_files
from cdit.data.check import check
from cdit.data.config import DataConfig, Source
from cdit.data.frames import decode
from cdit.data.from_video import VideoOptions, convert
from cdit.data.layout import DatasetInfo
from cdit.data.trajectory import read_split
from cdit.data.windows import WindowDataset


def grey(seconds: float) -> int:
    return round(30 + 10 * seconds)


def write_video(path: Path, seconds: float, fps: int = 20, size=(64, 48), rotation: int = 0, skip=()) -> Path:
    """A video whose grey level tells the time; its upper left quarter is black. Frames in `skip` are left out."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height = size
        stream.bit_rate = 4_000_000
        stream.time_base = Fraction(1, fps)
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(round(seconds * fps)):
            if i in skip:
                continue
            image = np.full((size[1], size[0], 3), grey(i / fps), np.uint8)
            image[: size[1] // 2, : size[0] // 2] = 0
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(folder: Path, split: str) -> dict[str, list[float]]:
    """The grey level of each trajectory's frames."""
    trajectories, found = read_split(folder, split)
    assert found == []
    return {
        t.name: [decode(t.frame(i))[:, -4:, -4:].float().mean().item() for i in range(len(t))] for t in trajectories
    }


def test_single_video_is_split_in_time(tmp_path):
    video = write_video(tmp_path / "walk.mp4", 15)
    out = tmp_path / "out"
    names = convert([video], out, VideoOptions(segment_seconds=6, test_fraction=0.3))
    assert names == {"train": ["walk_0000", "walk_0001"], "test": ["walk_0002"]}
    assert check(Source(str(out))).problems == []
    levels = [level for split in ("train", "test") for part in greys(out, split).values() for level in part]
    assert [len(part) for part in greys(out, "train").values()] == [24, 18]  # 60 frames, 18 of them to test on
    assert levels == pytest.approx([grey(i / 4) for i in range(60)], abs=2)
    info = DatasetInfo.load(out)
    assert (info.fps, info.has_actions, info.source["videos"]) == (4.0, False, ["walk.mp4"])
    windows = WindowDataset(DataConfig(folder=str(out)), "train")
    assert not windows[0].condition.known.any()
    assert windows.window(5, [4]).condition.time_shift.tolist() == [1.0]


def test_of_several_videos_the_last_are_for_testing(tmp_path):
    videos = [write_video(tmp_path / f"{name}.mp4", 6) for name in "abc"]
    names = convert(videos, tmp_path / "out", VideoOptions(test_fraction=0.3))
    assert names == {"train": ["a_0000", "b_0000"], "test": ["c_0000"]}
    assert check(Source(str(tmp_path / "out"))).problems == []


def test_a_gap_shows_the_last_frame_before_it(tmp_path):
    video = write_video(tmp_path / "gap.mp4", 12, skip=range(41, 79))
    convert([video], tmp_path / "out", VideoOptions())
    seconds = [i / 4 if not 2 < i / 4 < 3.95 else 2 for i in range(32)]
    assert greys(tmp_path / "out", "train")["gap_0000"] == pytest.approx([grey(s) for s in seconds], abs=2)


def test_frames_are_shrunk_and_upright(tmp_path):
    video = write_video(tmp_path / "phone.mp4", 9, rotation=90)
    convert([video], tmp_path / "out", VideoOptions(size=24))
    frame = decode(tmp_path / "out" / "phone_0000" / "15.jpg").float().mean(0)
    assert frame.shape == (32, 24)
    assert frame[20:30, 2:10].mean() < 20  # the upper left quarter, turned counter-clockwise, is the lower left
    assert frame[2:10, 2:10].mean() > 50


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    video = write_video(tmp_path / "walk.mp4", 15)
    options = VideoOptions(segment_seconds=5)
    convert([video], tmp_path / "whole", options)
    out, written = tmp_path / "out", []
    write = from_video.write_trajectory

    def interrupt(folder, name, *arguments, **named):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(name)
        write(folder, name, *arguments, **named)

    monkeypatch.setattr(from_video, "write_trajectory", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert([video], out, options)
    assert not (out / "splits").exists()
    before = (out / "walk_0000" / "0.jpg").stat().st_mtime_ns
    monkeypatch.setattr(from_video, "write_trajectory", write)
    convert([video], out, options)
    assert (out / "walk_0000" / "0.jpg").stat().st_mtime_ns == before
    for split in ("train", "test"):
        assert greys(out, split) == greys(tmp_path / "whole", split)


def test_another_dataset_is_not_overwritten(tmp_path):
    video = write_video(tmp_path / "walk.mp4", 9)
    convert([video], tmp_path / "out", VideoOptions())
    with pytest.raises(UserError, match="other videos or options"):
        convert([video], tmp_path / "out", VideoOptions(size=32))


def test_all_unusable_videos_are_listed(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    short, slow = write_video(tmp_path / "short.mp4", 1), write_video(tmp_path / "slow.mp4", 20, fps=2)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        container.add_stream("pcm_s16le", rate=8000)
    videos = [tmp_path / "text.mp4", tmp_path / "none.mp4", tmp_path / "sound.wav", short, slow]
    with pytest.raises(DataError) as error:
        convert(videos, tmp_path / "out", VideoOptions())
    lines = str(error.value).splitlines()[1:]
    expected = ["not a readable video", "not a readable video", "no", "too short, 4 frames", "2 frames per second"]
    for line, video, words in zip(lines, videos, expected, strict=True):
        assert video.name in line
        assert words in line
    assert not (tmp_path / "out").exists()


def test_two_videos_of_one_name(tmp_path):
    (tmp_path / "other").mkdir()
    videos = [write_video(tmp_path / "walk.mp4", 6), write_video(tmp_path / "other" / "walk.mp4", 6)]
    with pytest.raises(DataError, match="walk: 2 videos of this name"):
        convert(videos, tmp_path / "out", VideoOptions())


@pytest.mark.parametrize(
    "values",
    [{"fps": 0}, {"size": 0}, {"quality": 101}, {"segment_seconds": 1}, {"test_fraction": 0}, {"test_fraction": 1}],
    ids=str,
)
def test_options_out_of_range(tmp_path, values):
    with pytest.raises(UserError, match=f"--{next(iter(values))}"):
        convert([], tmp_path, VideoOptions(**values))


def test_command_line(tmp_path, monkeypatch, capsys):
    video, out = write_video(tmp_path / "walk.mp4", 9), tmp_path / "out"
    arguments = [str(video), "--out", str(out), "--size", "24"]
    monkeypatch.setattr(sys, "argv", ["from_video", *arguments])
    from_video.main()
    assert "1 trajectories for training, 1 for testing" in capsys.readouterr().out
    command = [sys.executable, "-m", "cdit.data.from_video", *arguments]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert "Traceback" not in again.stderr


def test_a_list_of_other_files_is_not_followed(tmp_path):
    """FFmpeg would, whatever the file is called."""
    write_video(tmp_path / "secret.mp4", 9)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile 'secret.mp4'\n")
    with av.open(str(tmp_path / "list.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 180
    with pytest.raises(DataError, match=r"list\.mp4: not a readable video"):
        convert([tmp_path / "list.mp4"], tmp_path / "out", VideoOptions())


def test_a_time_stamp_far_ahead_is_not_filled_with_images(tmp_path, monkeypatch):
    monkeypatch.setattr(from_video, "LONGEST_GAP", 9)
    video = write_video(tmp_path / "walk.mkv", 20, fps=4, skip=range(20, 60))
    with pytest.raises(DataError, match=r"walk\.mkv: 10\.25 s from one frame to the next"):
        convert([video], tmp_path / "out", VideoOptions())


def test_frames_of_too_many_pixels_are_refused(tmp_path, monkeypatch):
    video = write_video(tmp_path / "walk.mp4", 15)
    monkeypatch.setattr(video_files, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(DataError, match=r"walk\.mp4: (cannot be decoded|ends before)"):
        convert([video], tmp_path / "out", VideoOptions())
    monkeypatch.setattr(video_files, "MAX_PIXELS", 64 * 48 * 100)  # FFmpeg counts a margin
    convert([video], tmp_path / "out", VideoOptions())
