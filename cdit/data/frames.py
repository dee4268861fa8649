"""Frames for the model: decoded, cropped, resized, and cached in memory shared by loader workers."""

import io
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from cdit.common.errors import DataError
from cdit.common.files import read_bytes
from cdit.data.config import MAX_PIXELS, Crop
from cdit.data.layout import Camera
from cdit.data.source import TrajectorySource

MAX_BYTES = 4 * MAX_PIXELS
"""Largest image file."""


class Member(Protocol):
    """An image file inside another file; `str` names both."""

    def read(self) -> bytes:
        """The bytes of the image file."""


def decode(path: Path | Member) -> Tensor:
    """Reads a JPEG or PNG file as (3, H, W) uint8 RGB, turned upright as its EXIF orientation says.

    Grey, palette and CMYK become RGB; transparency is dropped; the first frame of an animated PNG is used.

    Raises:
        DataError: the file is missing, damaged, another kind of image, a 16-bit grey one, or has more than `MAX_PIXELS`
            pixels, which is checked before decoding.
    """
    data = read_bytes(path, MAX_BYTES) if isinstance(path, Path) else path.read()
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:  # reads the header only
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels, expected at most {MAX_PIXELS}")
            if image.mode.startswith("I"):
                raise ValueError("more than 8 bits per channel")
            if image.format == "JPEG":  # twice as fast as Pillow, with the same pixels
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                return decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
            # torchvision 0.29 crashes on damaged PNGs
            upright = ImageOps.exif_transpose(image).convert("RGB")
        return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()
    except Exception as error:  # Pillow and torchvision raise many types
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else str(error).partition("\n")[0]
        if isinstance(error, RuntimeError):
            reason = reason.rsplit(", ", 1)[-1]  # after torchvision's source file and line
        raise DataError(f"{path}: not a readable image ({reason})") from error


def crop_and_resize(image: Tensor, image_size: tuple[int, int], crop: Crop) -> Tensor:
    """Resizes an image (3, h, w) uint8 to `image_size` = (height, width), antialiased bilinear.

    Args:
        image: the recorded frame.
        image_size: of the model.
        crop: the centre crop before the resize: "aspect" to the aspect ratio of `image_size`; "4:3" as in the NWM
            release (4:3, padded with black at the sides of frames between square and 4:3, then squeezed); "none"
            squeezes the whole frame.
    """
    h, w = image.shape[-2:]
    height, width = image_size
    if crop == "aspect":
        scale = min(h / height, w / width)
        image = F.center_crop(image, [max(1, round(height * scale)), max(1, round(width * scale))])
    elif crop == "4:3":
        image = F.center_crop(image, [h, 4 * h // 3] if w > h else [max(1, 3 * w // 4), w])
    return F.resize(image, list(image_size), F.InterpolationMode.BILINEAR, antialias=True)


def focal_lengths(camera: Camera, image_size: tuple[int, int], crop: Crop) -> tuple[float, float]:
    """Horizontal and vertical focal length in pixels of a frame after `crop_and_resize`."""
    height, width = image_size
    cropped_height, cropped_width = camera.height, camera.width
    if crop == "aspect":
        scale = min(camera.height / height, camera.width / width)
        cropped_height, cropped_width = round(height * scale), round(width * scale)
    elif crop == "4:3" and camera.width > camera.height:
        cropped_width = 4 * camera.height // 3
    elif crop == "4:3":
        cropped_height = 3 * camera.width // 4
    return camera.focal_length * width / cropped_width, camera.focal_length * height / cropped_height


def stack(images: Sequence[Tensor], origin: object) -> Tensor:
    """Images as one tensor (N, 3, H, W).

    Raises:
        DataError: they have different sizes.
    """
    if len({image.shape for image in images}) > 1:
        raise DataError(f"{origin}: frames of different sizes")
    return torch.stack(list(images))


class FrameStore:
    """The frames of some trajectories, each decoded when first needed and then cached while there is space.

    The cache is shared with processes forked from this one, and with spawned ones to which the store is passed. Frames
    that do not fit are decoded each time.

    Args:
        trajectories: whose frames.
        image_size: (height, width) of the frames returned.
        crop: see `crop_and_resize`.
        cache_gb: space for decoded frames in GB (10⁹ bytes), allocated as it fills.
    """

    def __init__(
        self, trajectories: Sequence[TrajectorySource], image_size: tuple[int, int], crop: Crop, cache_gb: float
    ):
        self.trajectories = trajectories
        self.image_size = image_size
        self.crop = crop
        self.starts = np.cumsum([0, *map(len, trajectories)])
        frame_bytes = 3 * image_size[0] * image_size[1]
        self.capacity = min(int(self.starts[-1]), int(cache_gb * 1e9) // frame_bytes)
        self.cache = _shared_bytes(self.capacity * frame_bytes).view(self.capacity, 3, *image_size)
        self.filled = _shared_bytes(self.capacity)

    def read(self, trajectory: int, times: Sequence[int]) -> Tensor:
        """Frames (len(times), 3, H, W) uint8 of a trajectory (by its index) at `times`, repetitions allowed.

        Raises:
            DataError: a frame cannot be decoded.
        """
        start = int(self.starts[trajectory])
        cached = {time: start + time < self.capacity and bool(self.filled[start + time]) for time in times}
        frames = {time: self.cache[start + time] for time in cached if cached[time]}
        if missing := sorted(cached.keys() - frames.keys()):
            for time, image in zip(missing, self.trajectories[trajectory].frames(missing), strict=True):
                frames[time] = crop_and_resize(image, self.image_size, self.crop)
                if start + time < self.capacity:
                    self.cache[start + time] = frames[time]
                    self.filled[start + time] = 1  # last, because another process may be reading
        return torch.stack([frames[time] for time in times])


def _shared_bytes(size: int) -> Tensor:
    """Zeros (size,) uint8 in memory shared over fork.

    An anonymous map allocates memory as it is written, and uses none of /dev/shm, which is small in containers. Torch
    moves the tensor to its own shared memory if it is passed to a spawned process.
    """
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8) if size else torch.zeros(0, dtype=torch.uint8)
