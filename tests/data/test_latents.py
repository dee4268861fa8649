"""The latent cache as a format and as what windows read, with made-up latents that tell trajectory, frame and place."""

import json
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cdit.common.errors import DataError
from cdit.data.config import DataConfig
from cdit.data.latent_store import open_latents
from cdit.data.latents import DESCRIPTION, Encoding, LatentCache
from cdit.data.loader import loader
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.sources import Source
from cdit.data.windows import WindowDataset, WindowKey

sys.path.append(str(Path(__file__).parent))
from walks import same

ENCODING = Encoding("kl", "some/autoencoder", "0123456789abcdef" * 4, (12, 16), "aspect")
SHAPE = (2, 3, 4, 5)
FPS = 5.0


def latents_of(name: str, length: int) -> Tensor:
    """(length, *SHAPE): thousands say the trajectory, whole numbers the frame, fractions the place: exact."""
    place = torch.arange(120).reshape(SHAPE) / 128
    return 1000 * "abc".index(name) + torch.arange(length).reshape(-1, 1, 1, 1, 1) + place


def fill(folder: Path, encoding: Encoding = ENCODING, precision: str = "float32") -> LatentCache:
    cache = LatentCache.create(folder, encoding, precision)
    for split in ("train", "test"):
        for trajectory in windows(folder, split).trajectories:
            cache.write(trajectory, latents_of(trajectory.name, len(trajectory)))
    return cache


def windows(folder: Path, split: str = "train", **values) -> WindowDataset:
    return WindowDataset(DataConfig(str(folder), image_size=(12, 16), workers=0, **values), split)


def mix(*folders: Path) -> WindowDataset:
    return WindowDataset(DataConfig(mix=[Source(str(folder)) for folder in folders], image_size=(12, 16)), "train")


@pytest.fixture
def cache(dataset: Path) -> LatentCache:
    return fill(dataset)


def test_samples_hold_the_latents_of_their_frames(dataset, cache):
    plain, cached = windows(dataset, min_offset=-3), windows(dataset, min_offset=-3)
    cached.use_latents(ENCODING)
    for index in range(len(cached)):
        frames, item = plain[WindowKey(index, 4, 7)], cached[WindowKey(index, 4, 7)]
        trajectory, now = cached.locate(index)
        latents = latents_of("ab"[trajectory], 20)
        past = [latents[time] if time >= 0 else torch.zeros(SHAPE) for time in range(now - 3, now + 1)]
        goals = [latents[now + round(shift * FPS)] for shift in item.condition.time_shift.tolist()]
        assert torch.equal(item.context, torch.stack(past))
        assert torch.equal(item.target, torch.stack(goals))
        assert same(replace(item, context=frames.context, target=frames.target), frames)


def test_probes_and_rollouts_are_given_frames(dataset, cache):
    plain, cached = windows(dataset), windows(dataset)
    cached.use_latents(ENCODING)
    assert cached[2].context.dtype == torch.float32
    for ours, theirs in ((cached.window(2, [1, 3]), plain.window(2, [1, 3])), (cached.path(4, 3), plain.path(4, 3))):
        assert ours.context.dtype == torch.uint8
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_no_frame_is_decoded_for_a_sample(dataset, cache, count_decodes):
    cached = windows(dataset)
    cached.use_latents(ENCODING)
    for index in range(len(cached)):
        _ = cached[index]
    assert count_decodes() == {}
    cached.window(3, [1])
    assert sum(count_decodes().values()) == 5


def test_half_precision_rounds_and_is_read_as_float32(dataset):
    fill(dataset, precision="float16")
    cached = windows(dataset)
    cached.use_latents(ENCODING)
    context, exact = cached[len(cached) - 1].context, latents_of("b", 13)[8:12]
    assert context.dtype == torch.float32
    assert torch.equal(context, exact.half().float())
    assert not torch.equal(context, exact)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_read_them(dataset, cache, workers):
    config = DataConfig(str(dataset), image_size=(12, 16), workers=workers)
    cached = WindowDataset(config, "train")
    cached.use_latents(ENCODING)
    batches = list(loader(cached, KeyedBatchSampler(len(cached), 8, 0, start_step=0, steps=3), config))
    sampler = KeyedBatchSampler(len(cached), 8, 0, start_step=0, steps=3)
    for batch, keys in zip(batches, sampler, strict=True):
        assert batch.context.shape == (8, 4, *SHAPE)
        assert batch.target.shape == (8, 4, *SHAPE)
        for place, key in enumerate(keys):
            assert torch.equal(batch.target[place], cached[key].target)


@pytest.mark.slow
def test_spawned_workers_read_them(dataset, cache):
    cached = windows(dataset)
    cached.use_latents(ENCODING)
    spawned = DataLoader(cached, sampler=[3, 9], num_workers=1, multiprocessing_context="spawn", batch_size=None)
    for item, index in zip(spawned, (3, 9), strict=True):
        assert torch.equal(item.target, cached[index].target)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc here")
def test_a_sample_of_a_long_trajectory_reads_its_own_frames_only(dataset, cache):
    """By what the process can be charged for: a copy of the file would be 168 MB."""
    trajectory = windows(dataset).trajectories[0]
    cache.write(trajectory, torch.zeros(20, 2, 4, 512, 512))  # 168 MB
    store = open_latents([trajectory], ENCODING)
    before = anonymous_memory()
    kept = store.read(0, [19, 3])
    assert kept.shape == (2, 2, 4, 512, 512)
    assert anonymous_memory() - before < 60e6


def anonymous_memory() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_without_a_cache_frames_are_read(dataset):
    plain = windows(dataset)
    plain.use_latents(ENCODING)
    assert plain[0].context.dtype == torch.uint8


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ({"fingerprint": "f" * 64}, r"encoder 0123456789ab\).*expected .*encoder ffffffffffff\)"),
        ({"codec": "tiny"}, r"with kl some/autoencoder .*expected tiny some/autoencoder"),
        ({"image_size": (16, 12)}, r"frames of 12×16.*expected .*frames of 16×12"),
        ({"crop": "4:3"}, r"crop aspect; expected .*crop 4:3"),
    ],
)
def test_a_cache_of_another_encoding_is_refused_by_name(dataset, cache, asked, shown):
    with pytest.raises(DataError, match=shown) as error:
        windows(dataset).use_latents(replace(ENCODING, **asked))
    assert str(cache.folder) in str(error.value)
    assert "--data.latents no" in str(error.value)
    with pytest.raises(DataError, match=shown):
        LatentCache.create(dataset, replace(ENCODING, **asked), "float32")


def test_the_same_weights_from_elsewhere_are_the_same_codec(dataset, cache):
    cached = windows(dataset)
    cached.use_latents(replace(ENCODING, name="a/copy"))
    assert cached[0].context.dtype == torch.float32


def test_another_precision_is_not_mixed_in(dataset, cache):
    with pytest.raises(DataError, match="holds float32, expected float16"):
        LatentCache.create(dataset, ENCODING, "float16")


def test_an_unfinished_cache_is_refused(dataset, cache):
    (cache.folder / "b.safetensors").unlink()
    windows(dataset, "test").use_latents(ENCODING)
    with pytest.raises(DataError, match=r"lacks the latents of 1 of 2 .*b\.safetensors: missing.*cdit\.data\.encode"):
        windows(dataset).use_latents(ENCODING)


def spoil_by_truncation(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def spoil_by_foreign_trajectory(file: Path) -> None:
    shutil.copy(file.with_name("c.safetensors"), file)


def spoil_by_foreign_encoding(file: Path) -> None:
    fill_one(file, replace(ENCODING, fingerprint="f" * 64))


def spoil_by_length(file: Path) -> None:
    fill_one(file, ENCODING, 12)


def spoil_by_precision(file: Path) -> None:
    fill_one(file, ENCODING, precision="float16")


def spoil_by_nonsense(file: Path) -> None:
    file.write_bytes(b"nonsense")


def spoil_by_emptiness(file: Path) -> None:
    file.write_bytes(b"")


def fill_one(file: Path, encoding: Encoding, length: int = 13, precision: str = "float32") -> None:
    """Another cache's file of trajectory b in the place of this one's."""
    elsewhere = file.parent.parent / "elsewhere"
    elsewhere.mkdir()
    trajectory = windows(file.parent.parent).trajectories[1]
    other = LatentCache.create(elsewhere, encoding, precision)
    other.write(trajectory, latents_of("b", length))
    shutil.copy(other.file(trajectory), file)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (spoil_by_truncation, "damaged"),
        (spoil_by_nonsense, "damaged"),
        (spoil_by_emptiness, "damaged"),
        (spoil_by_foreign_trajectory, "from another trajectory or encoding"),
        (spoil_by_foreign_encoding, "from another trajectory or encoding"),
        (spoil_by_length, "12 frames, but the trajectory has 13"),
        (spoil_by_precision, "not in float32"),
    ],
)
def test_unusable_files_are_noticed_before_training(dataset, cache, spoil, problem):
    spoil(cache.folder / "b.safetensors")
    with pytest.raises(DataError, match=rf"1 of 2 trajectories \(the first: .*b\.safetensors: {problem}"):
        windows(dataset).use_latents(ENCODING)


def test_any_flipped_bit_is_found(dataset, cache):
    """Each byte of the header, and some of the numbers; the bit is another one from byte to byte."""
    trajectory = windows(dataset).trajectories[1]
    file = cache.file(trajectory)
    whole = file.read_bytes()
    assert cache.problem(trajectory, checksum=True) is None
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(header), *range(header, len(whole), 997), len(whole) - 1]:
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << place % 8
        file.write_bytes(spoiled)
        assert cache.problem(trajectory, checksum=True), place
    file.write_bytes(whole)
    assert cache.problem(trajectory, checksum=True) is None


def test_writing_leaves_one_readable_file(dataset, cache):
    assert sorted(path.name for path in cache.folder.iterdir()) == [
        "a.safetensors", "b.safetensors", "c.safetensors", DESCRIPTION,
    ]  # fmt: skip
    assert len({path.stat().st_mode for path in cache.folder.iterdir()}) == 1  # for those who share the dataset, too


def test_a_file_that_vanishes_is_a_plain_error(dataset, cache):
    cached = windows(dataset)
    cached.use_latents(ENCODING)
    (cache.folder / "a.safetensors").unlink()
    with pytest.raises(DataError, match=r"a\.safetensors: not readable"):
        _ = cached[0]


@pytest.mark.parametrize("text", ["{", "[]", '{"precision": "float16"}', '{"encoding": {"codec": 3}}'])
def test_a_broken_description_is_refused(dataset, cache, text):
    (cache.folder / DESCRIPTION).write_text(text)
    with pytest.raises(DataError, match=r"latents\.json: not "):
        windows(dataset).use_latents(ENCODING)


def test_a_newer_format_is_refused(dataset, cache):
    values = json.loads((cache.folder / DESCRIPTION).read_text())
    (cache.folder / DESCRIPTION).write_text(json.dumps({**values, "version": 2}))
    with pytest.raises(DataError, match="version 2, but this code reads up to 1"):
        windows(dataset).use_latents(ENCODING)


def test_a_mix_reads_latents_where_all_have_them(dataset, video_dataset, cache, capsys):
    both = mix(dataset, video_dataset)
    both.use_latents(ENCODING)
    assert both[0].context.dtype == torch.uint8
    assert f"{video_dataset}: no latents, so the images" in capsys.readouterr().err

    fill(video_dataset, precision="float16")
    both.use_latents(ENCODING)
    half = len(both) // 2
    assert torch.equal(both[10].context, latents_of("a", 20)[7:11])
    assert torch.equal(both[half + 10].context, latents_of("a", 20)[7:11].half().float())
    assert capsys.readouterr().err == ""


def test_every_part_of_a_mix_is_checked(dataset, video_dataset, cache):
    fill(video_dataset, replace(ENCODING, crop="none"))
    with pytest.raises(DataError, match=r"video.latents was made with .*crop none; expected .*crop aspect"):
        mix(dataset, video_dataset).use_latents(ENCODING)


def test_trajectories_in_folders_of_folders(dataset):
    (dataset / "deep").mkdir()
    (dataset / "b").rename(dataset / "deep" / "b")
    listing = dataset / "splits" / "train" / "traj_names.txt"
    listing.write_text("a\ndeep/b\n")
    cached = windows(dataset)
    assert {trajectory.dataset for trajectory in cached.trajectories} == {dataset}
    cache = LatentCache.create(dataset, ENCODING, "float32")
    for name, trajectory in zip("ab", cached.trajectories, strict=True):
        cache.write(trajectory, latents_of(name, len(trajectory)))
    cached.use_latents(ENCODING)
    assert torch.equal(cached[len(cached) - 1].context, latents_of("b", 13)[8:12])


def test_the_dataset_is_handed_over_with_its_latents(dataset, cache):
    cached = windows(dataset)
    cached.use_latents(ENCODING)
    assert torch.equal(pickle.loads(pickle.dumps(cached))[5].target, cached[5].target)
