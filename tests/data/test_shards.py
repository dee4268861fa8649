"""Shards as a format and as what windows read: what the folder they were made of gives, or plain refusals."""

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from cdit.common.errors import DataError, UserError
from cdit.data import shard_writer
from cdit.data.check import check
from cdit.data.config import DataConfig
from cdit.data.latents import Encoding, LatentCache
from cdit.data.layout import DatasetInfo, write_split
from cdit.data.loader import loader
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.shard_writer import verify
from cdit.data.sources import Source
from cdit.data.windows import WindowDataset, WindowKey

sys.path.append(str(Path(__file__).parent))
from walks import SHARD_MB, config_of, converted, make_walks, same, windows

ENCODING = Encoding("kl", "some/autoencoder", "0123456789abcdef" * 4, (12, 16), "aspect")


def fill_latents(folder: Path, precision: str = "float16") -> None:
    cache = LatentCache.create(folder, ENCODING, precision)
    for split in ("train", "test"):
        for trajectory in windows(folder, split).trajectories:
            seed = torch.Generator().manual_seed(len(trajectory.name) + len(trajectory))
            cache.write(trajectory, torch.randn(len(trajectory), 2, 3, 4, 5, generator=seed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_walks(tmp_path / "walks")


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    return converted(folder, tmp_path / "shards")


def test_windows_are_those_of_the_folder(folder, shards):
    for split in ("train", "test"):
        before, after = windows(folder, split), windows(shards, split)
        assert len(before) == len(after) > 0
        assert before.info == after.info
        for index in range(len(before)):
            assert same(before[WindowKey(index, 2, 9)], after[WindowKey(index, 2, 9)])
        offsets = [-1, 2]
        assert before.windows_with(offsets) == after.windows_with(offsets) != []
        assert all(same(before.window(i, offsets), after.window(i, offsets)) for i in before.windows_with(offsets))
        assert same(before.path(1, 3), after.path(1, 3))


def test_there_are_several_shards(shards):
    files = sorted(file.name for file in shards.iterdir())
    assert [name for name in files if name.startswith("train-")] == [f"train-{i:05d}.tar" for i in range(4)]
    assert {"shards.json", "dataset.json", "train.safetensors", "test.safetensors", "test-00000.tar"} < {*files}
    assert not any(name.startswith(".") for name in files)


def test_any_tar_reader_finds_the_frames(folder, shards):
    found = {}
    for file in shards.glob("*.tar"):
        with tarfile.open(file, "r:") as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    expected = {
        f"{file.parent.name}/{int(file.stem):06d}.jpg": file.read_bytes() for file in folder.glob("walk_*/*.jpg")
    }
    assert found == expected


def test_every_window_once_an_epoch_and_the_order_is_that_of_shards(shards):
    dataset = windows(shards, lanes=2, shuffle_shards=1)
    order = dataset.order(0)
    assert sorted(order) == list(range(len(dataset)))
    assert not np.array_equal(order, dataset.order(1))
    lane = [dataset.trajectories[dataset.locate(window)[0]].shard.record.file for window in order[::2]]
    begun = [len({*lane[: i + 1]} & {*lane[i:]}) for i in range(len(lane))]
    assert max(begun) <= 2


def test_batches_with_and_without_workers_and_resumed(shards):
    def batches(workers, start):
        config = config_of(shards, workers=workers)
        dataset = WindowDataset(config, "train", seed=3)
        return list(loader(dataset, KeyedBatchSampler(len(dataset), 8, 3, start, 9, order=dataset.order), config))

    alone = batches(0, 0)
    assert all(same(one, other) for one, other in zip(alone, batches(2, 0), strict=True))
    assert all(same(one, other) for one, other in zip(alone[5:], batches(2, 5), strict=True))


@pytest.mark.slow
def test_spawned_workers_read_them(shards):
    dataset = windows(shards)
    spawned = DataLoader(dataset, sampler=[3, 9], num_workers=1, multiprocessing_context="spawn", batch_size=None)
    assert all(same(item, dataset[index]) for item, index in zip(spawned, (3, 9), strict=True))


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize("content", ["latents", "both"])
def test_latents_are_those_of_the_cache(folder, tmp_path, content, precision):
    fill_latents(folder, precision)
    out = converted(folder, tmp_path / "shards", content=content)
    assert verify(str(out))[0] == []
    before, after = windows(folder), windows(out)
    before.use_latents(ENCODING)
    after.use_latents(ENCODING)
    assert after[0].context.dtype == torch.float32
    assert all(same(before[index], after[index]) for index in range(len(before)))
    if content == "both":
        assert same(after.window(2, [1]), windows(folder).window(2, [1]))
    else:
        with pytest.raises(DataError, match=r"train-00000\.tar: contains latents only"):
            after.window(2, [1])
    other = Encoding("kl", "some/autoencoder", "f" * 64, (12, 16), "aspect")
    with pytest.raises(DataError, match=r"encoder 0123456789ab\).*expected .*encoder ffffffffffff\)"):
        after.use_latents(other)


def test_a_mix_of_shards_and_folders(folder, shards, video_dataset):
    sources = [Source(str(shards)), Source(str(video_dataset)), Source(str(folder))]
    mix = WindowDataset(DataConfig(mix=sources, image_size=(12, 16), max_offset=4), "train", seed=3)
    parts = [windows(shards), windows(video_dataset), windows(folder)]
    expected = [part[WindowKey(index, 3, 9)] for part in parts for index in range(len(part))]
    assert all(same(mix[WindowKey(index, 3, 9)], one) for index, one in enumerate(expected))
    assert sorted(mix.order(0)) == list(range(len(expected)))
    mix.use_latents(ENCODING)
    assert mix[0].context.dtype == torch.uint8


def test_splits_are_added_one_by_one(folder, tmp_path):
    fill_latents(folder)
    out = tmp_path / "shards"
    converted(folder, out, splits=["train"], content="latents")
    converted(folder, out, splits=["test"])
    assert same(windows(out, "test")[1], windows(folder, "test")[1])
    train = windows(out)
    train.use_latents(ENCODING)
    assert train[1].context.dtype == torch.float32
    assert verify(str(out))[0] == []
    with pytest.raises(UserError, match="already contains split"):
        converted(folder, out)
    with pytest.raises(DataError, match="no split 'unknown' in these shards, only train, test"):
        windows(out, "unknown")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("calls", range(1, 12))
def test_stopped_anywhere_it_goes_on_where_it_was(folder, shards, tmp_path, monkeypatch, calls):
    """Killed before the n-th rename, when one more file is written: what is there is never taken for whole."""
    out, replace, made = tmp_path / "again", os.replace, []

    def killing(source, target):
        if len(made) == calls:
            raise Killed
        made.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killing)
    with pytest.raises(Killed):
        converted(folder, out)
    monkeypatch.undo()
    assert not (out / "shards.json").exists()
    with pytest.raises(DataError):
        windows(out)
    kept = {file: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    converted(folder, out)
    untouched = [file for file, time in kept.items() if file.stat().st_mtime_ns == time]
    assert len(untouched) >= len(kept) - 1
    assert contents(out) == contents(shards)


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_a_dataset_that_changed_meanwhile_is_written_anew(folder, tmp_path, monkeypatch):
    out = tmp_path / "shards"
    monkeypatch.setattr(shard_writer, "DESCRIPTION", "../nowhere/shards.json")
    with pytest.raises(FileNotFoundError):
        converted(folder, out)
    monkeypatch.undo()
    frame = folder / "walk_2" / "3.jpg"
    shutil.copy(folder / "walk_2" / "4.jpg", frame)
    converted(folder, out)
    assert verify(str(out))[0] == []
    before, after = windows(folder), windows(out)
    assert all(same(before[i], after[i]) for i in range(len(before)))


def test_refusals(folder, shards, tmp_path):
    with pytest.raises(UserError, match="has no latents; make them with"):
        converted(folder, tmp_path / "none", content="latents")
    with pytest.raises(DataError, match="holds shards; expected the folder"):
        converted(shards, tmp_path / "none")
    other = make_walks(tmp_path / "other")
    DatasetInfo("others", fps=7.0).save(other)
    write_split(other, "more", ["walk_1"])
    with pytest.raises(UserError, match="another dataset"):
        converted(other, shards, splits=["more"])
    assert not (tmp_path / "none").exists()
    assert "python -m cdit.data.shard verify" in check(Source(str(shards))).problems[0]


def test_a_name_that_does_not_fit_a_tar_header(tmp_path):
    folder = make_walks(tmp_path / "walks", 2)
    name = "/".join("long" * 20 for _ in range(3))
    (folder / name).parent.mkdir(parents=True)
    (folder / "walk_0").rename(folder / name)
    write_split(folder, "train", [name])
    with pytest.raises(DataError, match=r"0\.jpg: does not fit into a shard \(name is too long"):
        converted(folder, tmp_path / "shards")


def edit(shards: Path, change) -> None:
    """Changes the index; the checksum of what it says of the tables stays true."""
    values = json.loads((shards / "shards.json").read_text())
    change(values["splits"]["train"])
    (shards / "shards.json").write_text(json.dumps(values))


def renamed(name: str):
    def change(split):
        trajectories = split["shards"][0]["trajectories"]
        split["shards"][0]["trajectories"] = {name if i == 0 else n: c for i, (n, c) in enumerate(trajectories.items())}

    return change


@pytest.mark.parametrize("name", ["../walk_0", "/etc/passwd", "a/../../b", "", ".", "a\\b", "a\nb"])
def test_trajectories_stay_in_their_folder(shards, name):
    edit(shards, renamed(name))
    with pytest.raises(DataError, match=r"is not a trajectory name"):
        windows(shards)


@pytest.mark.parametrize("name", ["../train-00000.tar", "/dev/zero", ".hidden.tar", "a/b.tar", "train-00000.tgz", ""])
def test_shards_stay_in_their_folder(shards, name):
    edit(shards, lambda split: split["shards"][0].update(file=name))
    with pytest.raises(DataError, match="is not the name of a shard or table"):
        windows(shards)


@pytest.mark.parametrize(
    "change",
    [
        lambda split: split.pop("table"),
        lambda split: split.update(shards=3),
        lambda split: split.update(shards=[]),
        lambda split: split["shards"].append(split["shards"][0]),
        lambda split: split["shards"][0].update(bytes=-1),
        lambda split: split["shards"][0].update(bytes="1"),
        lambda split: split["shards"][0].update(sha256="x"),
        lambda split: split["shards"][0].update(trajectories=[1]),
        lambda split: split["shards"][0].update(trajectories={"walk_0": 10**30}),
        lambda split: split["shards"][0].update(trajectories={"walk_0": 6}),
        lambda split: split.update(latents={"precision": "float16"}),
        lambda split: split.update(poses=False, frames=False, table=split["shards"][0]),
    ],
)
def test_broken_indices_are_plain_errors(shards, change):
    edit(shards, change)
    with pytest.raises(DataError, match=r"shards\.json|train.safetensors|tar: "):
        windows(shards)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"version": 1}', '{"version": "1", "splits": {}}', "[" * 10000])
def test_nonsense_is_no_index(shards, text):
    (shards / "shards.json").write_text(text)
    with pytest.raises(DataError, match=r"shards\.json: (not|format)"):
        windows(shards)


def test_a_newer_format_is_refused(shards):
    (shards / "shards.json").write_text('{"version": 2, "splits": {}}')
    with pytest.raises(DataError, match="version 2, but this code reads up to 1"):
        windows(shards)


def rewrite(shards: Path, change) -> None:
    """A first shard of other members at the same places, with sizes and checksums in the index as they then are."""
    file = shards / "train-00000.tar"
    out = io.BytesIO()
    with tarfile.open(file, "r:") as tar, tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as changed:
        for i, member in enumerate(tar):
            content = tar.extractfile(member).read()
            if i == 2:
                content = change(member) or content
            changed.addfile(member, io.BytesIO(content))
    file.write_bytes(out.getvalue())
    digest = hashlib.sha256(out.getvalue()).hexdigest()
    edit(shards, lambda split: split["shards"][0].update(bytes=len(out.getvalue()), sha256=digest))


def to_link(member: tarfile.TarInfo) -> bytes | None:
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"


def to_hard_link(member: tarfile.TarInfo) -> bytes | None:
    member.type, member.linkname = tarfile.LNKTYPE, "walk_0/000000.jpg"


def to_device(member: tarfile.TarInfo) -> bytes | None:
    member.type, member.devmajor, member.devminor = tarfile.CHRTYPE, 1, 5


def to_pipe(member: tarfile.TarInfo) -> bytes | None:
    member.type = tarfile.FIFOTYPE


def to_folder(member: tarfile.TarInfo) -> bytes | None:
    member.type = tarfile.DIRTYPE


def to_another_name(member: tarfile.TarInfo) -> bytes | None:
    member.name = "walk_0/000003.jpg"


def to_an_outside_name(member: tarfile.TarInfo) -> bytes | None:
    member.name = "../../000002.jpg"


def to_another_suffix(member: tarfile.TarInfo) -> bytes | None:
    member.name = "walk_0/000002.svg"


def to_another_size(member: tarfile.TarInfo) -> bytes | None:
    member.size -= 1


@pytest.mark.parametrize(
    "change",
    [to_link, to_hard_link, to_device, to_pipe, to_folder, to_another_name, to_an_outside_name, to_another_suffix,
     to_another_size],
)  # fmt: skip
def test_only_the_plain_file_of_that_name_is_read(shards, change):
    rewrite(shards, change)
    with pytest.raises(DataError, match=r"train-00000\.tar:walk_0/000002: "):
        windows(shards).window(2, [1])
    assert any("train-00000.tar" in problem for problem in verify(str(shards))[0])


def test_an_undecodable_frame_is_named(shards):
    rewrite(shards, lambda member: bytes(member.size))
    with pytest.raises(DataError, match=r"train-00000\.tar:walk_0/000002: not a readable image"):
        windows(shards).window(2, [1])
    assert [line for line in verify(str(shards))[0] if "walk_0/000002: not a readable image" in line]
    assert verify(str(shards), decode_frames=False)[0] == []


def with_table(shards: Path, change) -> None:
    table = load_file(shards / "train.safetensors")
    change(table)
    save_file(table, shards / "train.safetensors")
    content = (shards / "train.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    edit(shards, lambda split: split["table"].update(bytes=len(content), sha256=digest))


@pytest.mark.parametrize("value", [-1, 0, 1, 511, 513, 2**40, 2**62, -(2**62)])
@pytest.mark.parametrize("name", ["offset", "size"])
def test_places_that_are_not_those_of_files(shards, name, value):
    with_table(shards, lambda table: table[name].__setitem__(2, value))
    with pytest.raises(DataError, match=r"train-00000\.tar"):
        windows(shards).window(2, [1])
    assert verify(str(shards))[0] != []


@pytest.mark.parametrize("name", ["offset", "size", "position", "yaw"])
def test_tables_of_another_shape(shards, name):
    with_table(shards, lambda table: table.update({name: table[name][1:].clone()}))
    with pytest.raises(DataError, match=rf"train\.safetensors: {name} is .*, expected "):
        windows(shards)
    assert any(name in problem for problem in verify(str(shards))[0])


def test_poses_that_are_not_finite(shards):
    with_table(shards, lambda table: table["yaw"].__setitem__(5, float("nan")))
    with pytest.raises(DataError, match="not finite"):
        windows(shards)


@pytest.mark.parametrize("kind", ["missing", "short", "pipe", "folder"])
def test_a_shard_that_cannot_be_read(shards, kind):
    dataset, file = windows(shards), shards / "train-00000.tar"
    content = file.read_bytes()
    file.unlink()
    if kind == "short":
        file.write_bytes(content[:2000])
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    with pytest.raises(DataError, match=r"train-00000\.tar: "):
        dataset.window(2, [1])
    assert any("train-00000.tar: " in problem for problem in verify(str(shards))[0])


def test_any_flipped_bit_is_found(shards):
    """In every file but the index: one bit of each 997th byte, another one each time."""
    for file in [*shards.glob("*.tar"), *shards.glob("*.safetensors")]:
        whole = file.read_bytes()
        for place in range(0, len(whole), 997):
            spoiled = bytearray(whole)
            spoiled[place] ^= 1 << place % 8
            file.write_bytes(spoiled)
            assert any(file.name in problem for problem in verify(str(shards), decode_frames=False)[0]), (file, place)
        file.write_bytes(whole)
    assert verify(str(shards))[0] == []


def test_all_problems_are_listed(shards):
    (shards / "train-00001.tar").unlink()
    rewrite(shards, lambda member: bytes(member.size))
    (shards / "test-00000.tar").write_bytes(b"")
    (shards / "dataset.json").unlink()
    problems = verify(str(shards))[0]
    for text in (
        "train-00001.tar: missing",
        "walk_0/000002: not a readable",
        "test-00000.tar: 0 bytes",
        "dataset.json",
    ):
        assert any(text in problem for problem in problems), text
    assert len(problems) == 4


def test_samples_of_broken_frames_are_left_out(shards):
    rewrite(shards, lambda member: bytes(member.size))
    config = config_of(shards, on_error="skip")
    dataset = WindowDataset(config, "train", seed=3)
    batches = list(loader(dataset, KeyedBatchSampler(len(dataset), 8, 3, 0, 9, order=dataset.order), config))
    told = [message for batch in batches for message in batch.skipped]
    assert told
    assert all("train-00000.tar:walk_0/000002: not a readable image" in message for message in told)
    assert sum((batch.weight == 0).sum().item() for batch in batches) == len(told)


def test_the_dataset_is_handed_over(shards):
    dataset = windows(shards)
    assert same(pickle.loads(pickle.dumps(dataset))[5], dataset[5])


@pytest.mark.slow
def test_the_command_line(folder, tmp_path):
    def run(*arguments):
        code = [sys.executable, "-m", "cdit.data.shard", *map(str, arguments)]
        return subprocess.run(code, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})

    out = tmp_path / "shards"
    done = run("convert", folder, out, "--shard_mb", SHARD_MB)
    assert done.returncode == 0, done.stderr
    done = run("verify", out)
    assert (done.returncode, done.stdout) == (
        0,
        f"{out}: fine (test: 1 trajectories, 11 frames; train: 6 trajectories, 51 frames)\n",
    )
    (out / "train-00001.tar").unlink()
    done = run("verify", out)
    assert done.returncode == 2
    assert "1 problems\n" in done.stderr
    assert "train-00001.tar: missing" in done.stderr
    assert "Traceback" not in done.stderr
