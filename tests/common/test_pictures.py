from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from cdit.common.frames import to_float, to_uint8
from cdit.common.pictures import comparison_grid, rollout_video, save_gif, save_mp4, strip, to_image

RED, GREEN, BLUE = (torch.tensor(c, dtype=torch.uint8)[:, None, None] for c in ([255, 0, 0], [0, 255, 0], [0, 0, 255]))


def solid(colour: torch.Tensor, *leading: int, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    return colour.expand(*leading, 3, *size)


def areas(image: Image.Image) -> list[int]:
    """Pixels that are exactly red, green and blue."""
    pixels = np.asarray(image)
    return [int((pixels == np.array(c)).all(-1).sum()) for c in ([255, 0, 0], [0, 255, 0], [0, 0, 255])]


def test_uint8_and_float_are_inverse():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_float(values).min() == -1
    assert to_float(values).max() == 1
    assert to_uint8(torch.tensor([-3.0, -1.0, -0.002, 0.0, 1.0, 3.0])).tolist() == [0, 0, 127, 128, 255, 255]
    assert torch.equal(to_uint8(values), values)


def test_small_frames_are_magnified_by_whole_pixels():
    frame = torch.randint(256, (3, 60, 64), dtype=torch.uint8)
    image = to_image(frame)
    assert image.size == (128, 120)
    assert np.array_equal(np.asarray(image)[::2, ::2], frame.permute(1, 2, 0).numpy())
    assert to_image(torch.zeros(3, 100, 300)).size == (300, 100)


def test_grid_shows_every_frame_once():
    context, truth, prediction = solid(RED, 2, 4), solid(GREEN, 2, 3), solid(BLUE, 2, 3)
    cell = 128 * 128
    image = comparison_grid(context, truth, to_float(prediction), ["1 s", "2 s", "4 s"], rows=["first", "second"])
    assert areas(image) == [2 * cell, 6 * cell, 6 * cell]
    image = comparison_grid(context, None, prediction, ["1 s", "2 s", "4 s"], scale=1)
    assert areas(image) == [2 * 256, 0, 6 * 256]


def test_strip_shows_the_context_and_evenly_spaced_futures():
    context, truth, prediction = solid(RED, 4), solid(GREEN, 32), solid(BLUE, 32)
    assert areas(strip(context, truth, prediction, fps=4, scale=1)) == [4 * 256, 8 * 256, 8 * 256]
    mask = torch.tensor([False, False, True, True])
    assert areas(strip(context, None, prediction, fps=4, context_mask=mask, scale=1)) == [2 * 256, 0, 8 * 256]
    grey = (torch.arange(1, 13, dtype=torch.uint8) * 20)[:, None, None, None].expand(-1, 3, 16, 16)
    for columns, expected in ((4, {60, 120, 180, 240}), (5, {60, 120, 180, 240}), (6, {40, 80, 120, 160, 200, 240})):
        shown = np.asarray(strip(context, None, grey, fps=4, columns=columns, scale=1))
        assert {value for value in range(20, 241, 20) if (shown == value).all(-1).sum() >= 256} == expected
    assert areas(strip(context[:1], truth[:1], prediction[:1], fps=4, scale=1)) == [256, 256, 256]


@pytest.mark.parametrize("with_truth", [True, False])
def test_rollout_video_plays_the_context_first(with_truth: bool):
    truth = solid(GREEN, 5) if with_truth else None
    images = list(rollout_video(solid(RED, 2), truth, solid(BLUE, 5), fps=4, scale=1))
    assert len(images) == 7
    assert len({image.size for image in images}) == 1
    assert areas(images[1]) == [512 if with_truth else 256, 0, 0]
    assert areas(images[2]) == [0, 256 if with_truth else 0, 256]


def test_mp4_can_be_read_back(tmp_path: Path):
    video = tmp_path / "video.mp4"
    frames = torch.stack([solid(c, size=(33, 47)) for c in (RED, GREEN, BLUE, RED, GREEN)])
    save_mp4(frames, video, fps=4)
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate == 4
    assert [frame.shape for frame in decoded] == [(34, 48, 3)] * 5
    for frame, source in zip(decoded, frames, strict=True):
        assert np.abs(frame[:33, :47].mean((0, 1)) - source.float().mean((1, 2)).numpy()).max() < 8
    first = video.read_bytes()
    save_mp4(frames, video, fps=4)
    assert video.read_bytes() == first


def test_mp4_without_h264(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    save_mp4(solid(GREEN, 3, size=(32, 32)), tmp_path / "video.mp4", fps=7.5)
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
        assert len(list(container.decode(video=0))) == 3


def test_gif_can_be_read_back(tmp_path: Path):
    save_gif(rollout_video(solid(RED, 1), None, solid(BLUE, 4), fps=5), tmp_path / "video.gif", fps=5)
    with Image.open(tmp_path / "video.gif") as gif:
        assert gif.n_frames == 5
        assert gif.info["duration"] == 200
        assert gif.info["loop"] == 0
