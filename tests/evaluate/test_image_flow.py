import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdit.data.frames import crop_and_resize, focal_lengths
from cdit.data.layout import Camera
from cdit.evaluate.image_flow import horizontal_shift, measured_turn


def texture(width: int, height: int = 48, count: int = 4) -> Tensor:
    coarse = torch.rand(count, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)


@pytest.mark.parametrize("shift", [-24, -7, 0, 1, 20])
def test_whole_pixels(shift: int):
    wide = texture(128)
    first, second = wide[..., 32:96], wide[..., 32 - shift : 96 - shift]
    torch.testing.assert_close(horizontal_shift(first, second), torch.full((4,), float(shift)), atol=0.1, rtol=0)


@pytest.mark.parametrize("shift", [-3.5, 0.25, 8.75])
def test_fractions_of_a_pixel(shift: float):
    wide = texture(4 * 128)
    start = round(4 * (32 - shift))
    first, second = (F.avg_pool2d(wide[..., s : s + 256], (1, 4)) for s in (4 * 32, start))
    torch.testing.assert_close(horizontal_shift(first, second), torch.full((4,), shift), atol=0.15, rtol=0)


def test_blur_and_brightness_do_not_matter():
    wide = texture(128)
    first, second = wide[..., 32:96], F.avg_pool2d(wide[..., 27:91], 5, 1, 2) * 0.5 + 0.3
    torch.testing.assert_close(horizontal_shift(first, second), torch.full((4,), 5.0), atol=0.3, rtol=0)


def view(panorama: Tensor, yaw: float, focal: float, size: tuple[int, int]) -> Tensor:
    """What a pinhole camera sees in the middle of a cylinder; the panorama is 2π around, yaw is counter-clockwise."""
    height, width = size
    x, y = (torch.arange(width) + 0.5 - width / 2) / focal, (torch.arange(height) + 0.5 - height / 2) / focal
    angle = torch.atan(x) - yaw
    # Columns grow clockwise; its rows span heights -1 to 1.
    grid = torch.stack(((angle / math.pi).expand(height, -1), y[:, None] * x.atan().cos()), dim=-1)
    return F.grid_sample(panorama, grid.expand(len(panorama), -1, -1, -1), align_corners=False)


@pytest.mark.parametrize("degrees", [-30.0, -12.0, -4.0, 2.0, 8.0, 25.0])
def test_a_turn_to_the_left_is_positive_and_of_the_right_size(degrees: float):
    panorama, focal, size = texture(800, 160), 42.7, (64, 64)
    first, second = view(panorama, 0.3, focal, size), view(panorama, 0.3 + math.radians(degrees), focal, size)
    measured = measured_turn(first, second, (focal, focal)).rad2deg()
    torch.testing.assert_close(measured, torch.full((4,), degrees), atol=0.4, rtol=0)


@pytest.mark.parametrize("crop", ["aspect", "4:3", "none"])
@pytest.mark.parametrize("recorded", [(60, 100), (100, 60)])
@pytest.mark.parametrize("image_size", [(32, 32), (24, 64)])
def test_focal_length_follows_crop_and_resize(crop: str, recorded: tuple[int, int], image_size: tuple[int, int]):
    """A ramp over the recorded frame tells by its slope how much of it a pixel of the model's frame covers."""
    height, width = recorded
    camera = Camera(width=width, height=height, horizontal_fov=1.2, eye_height=1.0)
    for axis, length in ((-1, width), (-2, height)):
        ramp = torch.linspace(0, 255, length).reshape((1, 1, -1) if axis == -1 else (1, -1, 1))
        seen = crop_and_resize(ramp.expand(3, height, width).round().byte(), image_size, crop)[0].float()
        line = seen[image_size[0] // 2] if axis == -1 else seen[:, image_size[1] // 2]
        middle = line[len(line) // 4 : -len(line) // 4]
        slope = float((middle[-1] - middle[0]) / (len(middle) - 1)) / (255 / (length - 1))  # recorded pixels a pixel
        focal = focal_lengths(camera, image_size, crop)[0 if axis == -1 else 1]
        assert focal == pytest.approx(camera.focal_length / slope, rel=0.05)
