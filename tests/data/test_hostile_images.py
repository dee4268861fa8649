"""Images that are not what they seem: bombs, damage, kinds that cameras do not write."""

import contextlib
import io
import os
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from cdit.common.errors import DataError
from cdit.data.frames import MAX_PIXELS, crop_and_resize, decode


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int, height: int, bits: int = 1, color: int = 0) -> bytes:
    """A PNG of zeros, a thousandth of its pixels' size; written piece by piece."""
    deflate = zlib.compressobj(9)
    channels = {0: 1, 2: 3, 6: 4}[color]
    row = bytes(1 + (width * bits * channels + 7) // 8)
    data = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg(size=(64, 48), **options) -> bytes:
    buffer = io.BytesIO()
    gradient = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    Image.fromarray(gradient).save(buffer, "jpeg", **options)
    return buffer.getvalue()


def restated(data: bytes, width: int, height: int) -> bytes:
    """A baseline JPEG that states another size."""
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


BOMBS = {
    "png of 1.6 gigapixels": lambda: png_bomb(40_000, 40_000),
    "png that states terapixels": lambda: png_bomb(1, 1).replace(
        struct.pack(">II", 1, 1), struct.pack(">II", 2**31 - 1, 2**31 - 1)
    ),
    "png with a text of a gigabyte": lambda: with_text(10**9),
    "one line": lambda: png_bomb(2**27, 1),
    "jpeg that states 4 gigapixels": lambda: restated(jpeg(), 65535, 65535),
}


def test_bombs_are_refused_by_their_header(tmp_path):
    """In a process whose memory grows by less than 100 MB over it; the first decodes to 4.8 GB."""
    for name, make in BOMBS.items():
        (tmp_path / f"{name}.jpg").write_bytes(make())
        assert (tmp_path / f"{name}.jpg").stat().st_size < 3_000_000, name
    program = f"""
import resource, time
from pathlib import Path
from cdit.data.frames import decode
from cdit.common.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in Path({str(tmp_path)!r}).iterdir():
    begun = time.perf_counter()
    try:
        decode(path)
        raise SystemExit(f"{{path}}: decoded")
    except DataError as error:
        print(error)
    assert time.perf_counter() - begun < 1, path
print("kB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{2**27}×1 pixels" in done.stdout
    assert int(done.stdout.split()[-1]) < 100_000


@pytest.mark.slow
def test_the_largest_images_fit_in_memory(tmp_path):
    """What is decoded takes at most 3 bytes a pixel, and a progressive JPEG 6 more while it is."""
    (tmp_path / "0.png").write_bytes(png_bomb(8192, 8192, 8, 6))
    assert MAX_PIXELS == 8192**2
    (tmp_path / "1.jpg").write_bytes(jpeg((8192, 8192), progressive=True, subsampling=0))
    program = f"""
import resource, sys
from pathlib import Path
from cdit.data.frames import crop_and_resize, decode
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path({str(tmp_path)!r}).iterdir()):
    crop_and_resize(decode(path), (64, 64), "aspect")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(map(int, done.stdout.split())) < 1_500_000


def corners(image) -> list[list[int]]:
    """Mean colours of the quarters: top left, top right, bottom left, bottom right."""
    height, width = image.shape[1] // 2, image.shape[2] // 2
    quarters = [image[:, y:, x:][:, :height, :width] for y in (0, height) for x in (0, width)]
    return [[round(c / 85) * 85 for c in quarter.float().mean((1, 2)).tolist()] for quarter in quarters]


RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]


def picture() -> Image.Image:
    """Red, green, blue and white quarters, 32 wide and 16 high."""
    return Image.fromarray(np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8).repeat(8, 0).repeat(16, 1))


def with_text(length: int) -> bytes:
    """A PNG with a compressed text."""
    buffer = io.BytesIO()
    picture().save(buffer, "png")
    text = chunk(b"zTXt", b"a\x00\x00" + zlib.compress(bytes(length), 9))
    return buffer.getvalue()[:33] + text + buffer.getvalue()[33:]


@pytest.mark.parametrize("kind", ["RGB", "P", "CMYK", "RGBA", "animated", "with text"])
def test_kinds_of_images_become_rgb(kind, tmp_path):
    path = tmp_path / "it.png"
    if kind == "CMYK":
        picture().convert("CMYK").save(tmp_path / "it.jpg", subsampling=0, quality=95)
        path = tmp_path / "it.jpg"
    elif kind == "animated":
        picture().save(path, save_all=True, append_images=[picture().rotate(180)], duration=100)
    elif kind == "with text":
        path.write_bytes(with_text(1000))
    else:
        picture().convert(kind).save(path)
    image = decode(path)
    assert image.shape == (3, 16, 32)
    assert corners(image) == [RED, GREEN, BLUE, WHITE]


def test_damaged_pngs_do_not_end_the_process(tmp_path):
    """As they do with torchvision's decoder."""
    picture().save(tmp_path / "it.png")
    whole = (tmp_path / "it.png").read_bytes()
    for at in range(len(whole)):
        for damaged in (
            whole[:at],
            whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :],
            whole[:at] + whole[at + 2 :],
        ):
            (tmp_path / "it.png").write_bytes(damaged)
            with contextlib.suppress(DataError):
                decode(tmp_path / "it.png")


TURNED = {
    1: [RED, GREEN, BLUE, WHITE], 2: [GREEN, RED, WHITE, BLUE], 3: [WHITE, BLUE, GREEN, RED],
    4: [BLUE, WHITE, RED, GREEN], 5: [RED, BLUE, GREEN, WHITE], 6: [BLUE, RED, WHITE, GREEN],
    7: [WHITE, GREEN, BLUE, RED], 8: [GREEN, WHITE, RED, BLUE], 9: [RED, GREEN, BLUE, WHITE],
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", TURNED)
def test_photos_are_turned_upright(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / f"it.{suffix}", exif=exif, quality=95, subsampling=0)
    assert corners(decode(tmp_path / f"it.{suffix}")) == TURNED[orientation]


@pytest.mark.parametrize(
    "kind", ["gif", "webp", "bmp", "tiff", "16-bit png", "12-bit jpeg", "text", "a pipe", "a folder"]
)
def test_other_files_are_refused(kind, tmp_path):
    path = tmp_path / "0.jpg"
    if kind in ("gif", "webp", "bmp", "tiff"):
        picture().save(path, kind)
    elif kind == "16-bit png":
        Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(path, "png")
    elif kind == "12-bit jpeg":
        data = jpeg()
        at = data.index(b"\xff\xc0")
        path.write_bytes(data[: at + 4] + b"\x0c" + data[at + 5 :])
    elif kind == "text":
        path.write_text("a text")
    elif kind == "a pipe":
        os.mkfifo(path)  # opening it would wait for ever
    else:
        path.mkdir()
    with pytest.raises(DataError, match=r"0\.jpg: not"):
        decode(path)


@pytest.mark.parametrize("crop", ["aspect", "4:3", "none"])
@pytest.mark.parametrize("size", [(1, 1), (1, 40_000), (40_000, 1), (2, 3)])
def test_slivers_of_images_are_resized(size, crop, tmp_path):
    (tmp_path / "it.png").write_bytes(png_bomb(*size, 8, 2))
    image = decode(tmp_path / "it.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert crop_and_resize(image, (16, 48), crop).shape == (3, 16, 48)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
