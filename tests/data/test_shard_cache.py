"""Remote shards: downloaded once, verified, evicted in LRU order; clear errors on failure."""

import hashlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from cdit.common.errors import DataError, Interrupted, UserError
from cdit.data import prefetch, shard_cache
from cdit.data.loader import loader
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.shard_cache import FileRecord, ShardCache
from cdit.data.shard_writer import verify
from cdit.data.windows import WindowDataset

sys.path.append(str(Path(__file__).parent))
from walks import config_of, converted, make_walks, same, windows


class RemoteStore(LocalFileSystem):
    """A store that logs downloads, one name per line, and raises or returns the given failures first."""

    protocol = "remote"
    log: Path
    failures: list = []  # noqa: RUF012
    seconds = 0.0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("remote://"))

    def get_file(self, rpath, lpath, **kwargs):
        with open(self.log, "a") as log:
            log.write(f"{Path(rpath).name}\n")
        time.sleep(self.seconds)
        if self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, Exception):
                raise failure
            Path(lpath).write_bytes(failure)
            return None
        return super().get_file(rpath, lpath, **kwargs)


@pytest.fixture
def remote(tmp_path, monkeypatch):
    fsspec.register_implementation("remote", RemoteStore, clobber=True)
    monkeypatch.setattr(RemoteStore, "log", tmp_path / "log", raising=False)
    monkeypatch.setattr(RemoteStore, "failures", [])
    monkeypatch.setattr(shard_cache, "PAUSES", (0.0, 0.0))
    return lambda: RemoteStore.log.read_text().split() if RemoteStore.log.exists() else []


@pytest.fixture
def shards(tmp_path) -> Path:
    return converted(make_walks(tmp_path / "walks"), tmp_path / "shards")


def remote_config(shards, cache, **values):
    return config_of(f"remote://{shards}", shard_cache=str(cache), **values)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_a_remote_store_is_training_from_the_folder(shards, tmp_path, remote, workers):
    def batches(config):
        dataset = WindowDataset(config, "train", seed=3)
        return list(loader(dataset, KeyedBatchSampler(len(dataset), 4, 3, 0, 30, order=dataset.order), config))

    near, far = batches(config_of(shards)), batches(remote_config(shards, tmp_path / "cache", workers=workers))
    assert all(same(one, other) for one, other in zip(near, far, strict=True))
    assert sorted(remote()) == [*(f"train-{i:05d}.tar" for i in range(4)), "train.safetensors"]  # each once
    files = [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"]
    assert {file.name for file in files} == {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_shards_are_there_before_they_are_needed(shards, tmp_path, remote, monkeypatch):
    """Of a sampler that is three batches ahead: what its first four batches need, and what the others do later."""
    monkeypatch.setattr(prefetch, "AHEAD", 3)
    dataset = WindowDataset(remote_config(shards, tmp_path / "cache", lanes=1, shuffle_shards=1), "train", seed=3)
    sampler = KeyedBatchSampler(len(dataset), 4, 3, 0, 10, order=dataset.order)
    needed = [
        {dataset.trajectories[dataset.locate(key.window)[0]].shard.record.file for key in keys} for keys in sampler
    ]
    seen = []
    for number, keys in enumerate(prefetch.FetchingAhead(sampler, dataset)):
        seen.append(keys)
        wanted = set().union(*needed[: number + 4])
        deadline = time.monotonic() + 10
        while not wanted <= {*remote()}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert {*remote()} <= wanted | {"train.safetensors"}
    assert seen == list(sampler)
    assert len(needed[0]) < 4
    assert sorted(remote()) == sorted({*remote()})


def test_a_killed_fetcher_leaves_nothing_in_the_way(shards, tmp_path, remote):
    """Killed with half of the file written and the lock in hand."""
    record = record_of(shards)
    cache = ShardCache(tmp_path / "cache")

    def die(_self, _source, target, **_):
        Path(target).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    def fetch():
        RemoteStore.get_file = die
        cache.path(f"remote://{shards}", record)

    process = multiprocessing.get_context("fork").Process(target=fetch)
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    assert [file.read_bytes() for file in cache.folder.glob("*.partial")] == [b"half"]
    assert cache.path(f"remote://{shards}", record).read_bytes() == (shards / record.file).read_bytes()
    assert [*cache.folder.glob("*.partial")] == []


def test_a_cache_smaller_than_the_dataset(shards, tmp_path, remote):
    """With room for one shard of four and the table, at all times, and the same windows."""
    largest = max(file.stat().st_size for file in shards.glob("train-*"))
    gb = 1.5 * largest / 1e9
    near = windows(shards, cache_gb=0)
    far = WindowDataset(remote_config(shards, tmp_path / "cache", cache_gb=0, shard_cache_gb=gb), "train", seed=3)
    for index in range(0, len(near), 3):
        assert same(near[index], far[index])
        kept = sum(file.stat().st_size for file in (tmp_path / "cache").iterdir())
        assert kept <= gb * 1e9
    assert len(remote()) == 5  # in the order of shards, each is fetched once all the same
    assert same(far[0], near[0])
    assert len(remote()) == 6


def test_the_least_recently_used_is_evicted(tmp_path, remote, monkeypatch):
    monkeypatch.setattr(shard_cache, "TOUCH_EVERY", 0.0)
    records = {}
    for name in "abcd":
        (tmp_path / f"{name}.tar").write_bytes(name.encode() * 1000)
        records[name] = FileRecord(f"{name}.tar", 1000, hashlib.sha256(name.encode() * 1000).hexdigest())
    cache = ShardCache(tmp_path / "cache", 3000 / 1e9)

    def use(name: str) -> None:
        assert cache.path(f"remote://{tmp_path}", records[name]).read_bytes() == name.encode() * 1000
        time.sleep(0.01)

    for name in "abcabd":  # c is the one not used for longest
        use(name)
    assert remote() == ["a.tar", "b.tar", "c.tar", "d.tar"]
    for name in "abd":
        use(name)
    assert len(remote()) == 4
    use("c")
    assert remote()[4:] == ["c.tar"]


def test_one_fetch_for_all_processes(shards, tmp_path, remote, monkeypatch):
    monkeypatch.setattr(RemoteStore, "seconds", 0.5)
    record = next(iter(windows(shards).trajectories)).shard.record
    context = multiprocessing.get_context("fork")
    cache = ShardCache(tmp_path / "cache")
    several = [context.Process(target=cache.path, args=(f"remote://{shards}", record)) for _ in range(6)]
    for process in several:
        process.start()
    for process in several:
        process.join()
    assert [process.exitcode for process in several] == [0] * 6
    assert remote() == [record.file]


def record_of(shards: Path) -> FileRecord:
    return windows(shards).trajectories[0].shard.record


def test_failures_that_pass(shards, tmp_path, remote):
    RemoteStore.failures[:] = [ConnectionError("reset"), b"half of i"]
    cache = ShardCache(tmp_path / "cache")
    assert cache.path(f"remote://{shards}", record_of(shards)).stat().st_size == record_of(shards).bytes
    assert len(remote()) == 3


def test_a_network_that_is_down_is_an_interruption(shards, tmp_path, remote, monkeypatch):
    """Skipping samples would not help: all samples of the shard would be skipped."""
    monkeypatch.setattr(prefetch, "THREADS", 0)  # which might still be downloading at the end
    dataset = WindowDataset(remote_config(shards, tmp_path / "cache", on_error="skip"), "train", seed=3)
    RemoteStore.failures[:] = [ConnectionError("reset by peer")] * 100
    batches = loader(dataset, KeyedBatchSampler(len(dataset), 4, 3, 0, 30), dataset.config)
    with pytest.raises(Interrupted, match=r"tar cannot be fetched \(reset by peer\); `--resume auto` continues"):
        list(batches)
    assert [file for file in (tmp_path / "cache").iterdir() if file.suffix == ".partial"] == []


@pytest.mark.parametrize(("content", "message"), [(b"short", "5 bytes, expected"), (None, "checksum")])
def test_files_that_differ_are_never_kept(shards, tmp_path, remote, content, message):
    record = record_of(shards)
    RemoteStore.failures[:] = [content or bytes(record.bytes)] * 3
    cache = ShardCache(tmp_path / "cache")
    with pytest.raises(DataError, match=rf"remote://.*train-00000\.tar: .*{message}"):
        cache.path(f"remote://{shards}", record)
    assert [file.suffix for file in cache.folder.iterdir()] == [".lock"] * 2


def test_missing_files(shards, tmp_path, remote):
    record = record_of(shards)
    (shards / record.file).unlink()
    with pytest.raises(DataError, match=r"train-00000\.tar: no such file"):
        ShardCache(tmp_path / "cache").path(f"remote://{shards}", record)
    with pytest.raises(DataError, match=r"remote://.*nowhere/shards\.json: no such file"):
        WindowDataset(remote_config(tmp_path / "nowhere", tmp_path / "cache"), "train")
    with pytest.raises(UserError, match=r"nonsense"):
        WindowDataset(config_of("nonsense://bucket/x"), "train")


def test_a_cache_that_is_too_small(shards, tmp_path, remote):
    with pytest.raises(UserError, match=r"data\.shard_cache_gb is 1e-06, expected more: train\.safetensors alone"):
        WindowDataset(remote_config(shards, tmp_path / "cache", shard_cache_gb=1e-6), "train")


def test_a_cache_that_cannot_be_written(shards, tmp_path, remote):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.shard_cache: .*file/cache cannot be written to"):
        WindowDataset(remote_config(shards, tmp_path / "file" / "cache"), "train")


def test_what_a_killed_process_left_is_removed(shards, tmp_path, remote):
    cache = ShardCache(tmp_path / "cache", 1e-4)
    cache.folder.mkdir()
    old, new = (cache.folder / f"{digit * 64}.99999.partial" for digit in "ab")
    for file in (old, new):
        file.write_bytes(b"half")
    hours_ago = time.time() - 7200
    os.utime(old, (hours_ago, hours_ago))
    cache.path(f"remote://{shards}", record_of(shards))
    assert not old.exists()
    assert new.exists()


def test_verify_from_a_remote_store(shards, remote, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    problems, counts = verify(f"remote://{shards}")
    assert problems == []
    assert "6 trajectories" in counts
    file = shards / "train-00001.tar"
    file.write_bytes(file.read_bytes()[::-1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert ["checksum" in problem for problem in verify(f"remote://{shards}")[0]] == [True]


def test_the_memory_file_system(shards, tmp_path):
    """A store of fsspec's own, as it is."""
    store = fsspec.filesystem("memory")
    store.put(str(shards), "/walks", recursive=True)
    far = WindowDataset(config_of("memory://walks", shard_cache=str(tmp_path / "cache")), "train", seed=3)
    near = windows(shards)
    assert all(same(far[i], near[i]) for i in range(len(near)))
    store.rm("/walks", recursive=True)
