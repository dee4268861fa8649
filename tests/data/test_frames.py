import multiprocessing
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cdit.common.errors import DataError
from cdit.data.config import DataConfig
from cdit.data.frames import FrameStore, crop_and_resize, decode
from cdit.data.loader import loader
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.trajectory import read_split
from cdit.data.windows import WindowDataset


def store_of(dataset, cache_gb: float) -> FrameStore:
    return FrameStore(read_split(dataset, "train")[0], (12, 16), "aspect", cache_gb)


def test_no_frame_is_decoded_twice(dataset, count_decodes):
    windows = WindowDataset(DataConfig(folder=str(dataset), image_size=(12, 16)), "train")
    for _ in range(2):
        for index in range(len(windows)):
            windows[index]
    assert len(count_decodes()) == 33
    assert set(count_decodes().values()) == {1}


def test_frames_beyond_the_cache_are_decoded_when_asked(dataset, count_decodes):
    store = store_of(dataset, 25 * 3 * 12 * 16 / 1e9)  # room for 25 of the 33 frames
    assert store.capacity == 25
    first, second = (store.read(1, [0, 4, 9, 9]) for _ in range(2))
    assert torch.equal(first, second)
    assert count_decodes() == {
        str(dataset / "b" / "0.jpg"): 1,
        str(dataset / "b" / "4.jpg"): 1,
        str(dataset / "b" / "9.jpg"): 2,  # once per call, though asked for twice in each
    }


def test_no_cache_at_all(dataset):
    assert torch.equal(store_of(dataset, 0.0).read(0, [3, 1]), store_of(dataset, 1.0).read(0, [3, 1]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_a_worker_decoded_all_have(dataset, method):
    store = store_of(dataset, 1.0)
    process = multiprocessing.get_context(method).Process(target=store.read, args=(0, [0, 1, 2]))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert store.filled.sum() == 3
    shutil.rmtree(dataset)
    assert store.read(0, [2, 0]).float().std() > 0


def test_loader_workers_fill_one_cache(dataset):
    config = DataConfig(folder=str(dataset), image_size=(12, 16), workers=2)
    windows = WindowDataset(config, "train")
    batches = loader(windows, KeyedBatchSampler(len(windows), 8, 0, 0, 40), config)
    assert len(list(batches)) == 40
    assert windows.frames.filled.all()
    shutil.rmtree(dataset)
    assert len(list(batches)) == 40  # nothing is read again


@pytest.mark.parametrize("suffix", ["png", "jpeg", "JPG"])
def test_other_suffixes(dataset, suffix):
    for file in (dataset / "a").glob("*.jpg"):
        Image.open(file).save(file.with_suffix(f".{suffix}"))
        file.unlink(missing_ok=file.with_suffix(f".{suffix}") != file)
    assert store_of(dataset, 1.0).read(0, [0, 19]).shape == (2, 3, 12, 16)


def gradient(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], -1).astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "size", "crop", "box"),  # box: left, top, right, bottom as Pillow has it
    [
        ((48, 64), (24, 32), "aspect", (0, 0, 64, 48)),
        ((48, 64), (24, 24), "aspect", (8, 0, 56, 48)),
        ((64, 48), (24, 24), "aspect", (0, 8, 48, 56)),
        ((48, 64), (24, 24), "none", (0, 0, 64, 48)),
        ((48, 100), (24, 24), "4:3", (18, 0, 82, 48)),
        ((100, 48), (24, 24), "4:3", (0, 32, 48, 68)),
        ((48, 50), (24, 24), "4:3", (-7, 0, 57, 48)),  # narrower than 4:3: black at both sides
    ],
)
def test_crop_and_resize_agree_with_pillow(shape, size, crop, box):
    image = gradient(*shape)
    expected = Image.fromarray(image).crop(box).resize(size[::-1], Image.Resampling.BILINEAR)
    result = crop_and_resize(torch.from_numpy(image).permute(2, 0, 1), size, crop)
    assert result.dtype == torch.uint8
    difference = np.abs(result.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected, int))
    assert difference.max() <= 1


def test_grey_and_transparent_images_become_rgb(tmp_path):
    image = Image.fromarray(gradient(8, 8))
    for mode in ("L", "RGBA", "P"):
        image.convert(mode).save(tmp_path / "0.png")
        assert decode(tmp_path / "0.png").shape == (3, 8, 8)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "16-bit"])
def test_unreadable_images_are_named(tmp_path, kind):
    file = tmp_path / "7.jpg"
    Image.fromarray(gradient(64, 64)).save(file)
    if kind == "missing":
        file.unlink()
    elif kind == "16-bit":
        file = tmp_path / "7.png"
        Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(file)
    else:
        file.write_bytes({"empty": b"", "text": b"hello", "truncated": file.read_bytes()[:-200]}[kind])
    with pytest.raises(DataError, match=rf"{file.name}: not "):
        decode(file)
