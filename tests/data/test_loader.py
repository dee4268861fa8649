"""Batches from worker processes: the same as without, and plain words where a frame is broken or a worker is killed."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cdit.batch import Batch
from cdit.common.errors import DataError, Interrupted
from cdit.data.config import DataConfig
from cdit.data.loader import loader
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.windows import WindowDataset, WindowKey

sys.path.append(str(Path(__file__).parent))
from walks import same


def loader_of(dataset, workers: int, steps: int = 3, split: str = "train", share=(0, 1), batch_size: int = 8, **values):
    config = DataConfig(folder=str(dataset), image_size=(12, 16), workers=workers, **values)
    windows = WindowDataset(config, split, seed=4)
    return loader(windows, KeyedBatchSampler(len(windows), batch_size, 4, 0, steps, *share), config)


def batches(dataset, workers: int, **values):
    return list(loader_of(dataset, workers, **values))


def truncate(file) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_the_same_with_and_without_workers(dataset, on_error):
    for alone, worker in zip(
        batches(dataset, 0, on_error=on_error), batches(dataset, 2, on_error=on_error), strict=True
    ):
        assert alone.context.shape == (8, 4, 3, 12, 16)
        assert alone.weight.tolist() == [1.0] * 8
        assert alone.skipped == []
        assert same(alone, worker)


def test_padding_has_no_weight(dataset):
    for process, weights in enumerate(([1, 1, 1], [1, 1, 1], [1, 1, 0])):
        assert [batch.weight.tolist() for batch in batches(dataset, 0, share=(process, 3))] == [weights] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_frame_is_a_plain_error(dataset, workers):
    truncate(dataset / "b" / "6.jpg")
    with pytest.raises(DataError, match=rf"^{dataset}/b/6\.jpg: not a readable [^\n]*$"):
        batches(dataset, workers)


def needs_broken(batch: Batch, place: int) -> bool:
    """By the greys of its frames: b/6 is 48, b/7 is 54, and every other frame is another grey."""
    greys = torch.cat((batch.context[place], batch.target[place])).float().mean(dim=(1, 2, 3))
    return bool(((greys - 48).abs() < 2).any() or ((greys - 54).abs() < 2).any())


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_of_broken_frames_count_for_nothing(dataset, workers):
    """They are reported; all others are unchanged."""
    whole = batches(dataset, 0, steps=10)
    lossy = loader_of(dataset, workers, steps=10, on_error="skip")
    truncate(dataset / "b" / "6.jpg")
    (dataset / "b" / "7.jpg").unlink()
    told = 0
    for before, after in zip(whole, lossy, strict=True):
        lost = [place for place in range(8) if needs_broken(before, place)]
        assert (after.weight == 0).nonzero().flatten().tolist() == lost
        assert len(after.skipped) == len(lost)
        assert all(re.search(r"/b/[67]\.jpg: .*read", text) for text in after.skipped)
        for place in range(8):
            assert not needs_broken(after, place)
            if place not in lost:
                assert same(replace(after, skipped=[])[place], before[place])
        told += len(lost)
    assert 5 < told < 60


def test_a_lost_trajectory_is_left_out(dataset):
    lossy = loader_of(dataset, 0, steps=5, on_error="skip")
    for file in (dataset / "a").glob("*.jpg"):
        file.unlink()
    found = list(lossy)
    assert all(len(batch.skipped) == (batch.weight == 0).sum() for batch in found)
    assert 0 < sum(batch.weight.sum().item() for batch in found) < 40


def test_padding_that_cannot_be_read_is_not_told_of_twice(dataset):
    """Five samples per step, padded to eight: as many are reported as by one process."""
    alone = loader_of(dataset, 0, batch_size=5, on_error="skip")
    shares = [loader_of(dataset, 0, share=(index, 2, 2), batch_size=5, on_error="skip") for index in range(2)]
    for file in (dataset / "a").glob("*.jpg"):
        file.unlink()
    found = [batch for share in shares for batch in share]
    told = sum(len(batch.skipped) for batch in found)
    assert told == sum(len(batch.skipped) for batch in alone) > 0
    assert sum(batch.weight.sum().item() for batch in found) == 15 - told


def test_nothing_readable_is_an_error(dataset):
    lossy = loader_of(dataset, 0, on_error="skip")
    for name in "ab":
        for file in (dataset / name).glob("*.jpg"):
            truncate(file)
    with pytest.raises(DataError, match=r"\.jpg: not a readable"):
        list(lossy)


def test_validation_stops_at_a_broken_frame_all_the_same(dataset):
    windows = WindowDataset(DataConfig(folder=str(dataset), image_size=(12, 16), on_error="skip"), "train")
    truncate(dataset / "b" / "6.jpg")
    with pytest.raises(DataError):
        Batch.collate([windows[WindowKey(window, 0, 0)] for window in range(len(windows))])


def start(dataset, steps: int):
    """Batches of two workers, the first batch, and the workers."""
    before = set(multiprocessing.active_children())
    found = iter(loader_of(dataset, 2, steps=steps))
    first = next(found)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    return found, first, workers


@pytest.mark.slow  # a dead worker is looked for every five seconds
def test_a_killed_worker_is_an_interruption(dataset):
    found, _, workers = start(dataset, 200)
    os.kill(workers.pop().pid, signal.SIGKILL)
    time.sleep(1)  # nothing is raised wherever the process is just then, but where the next batch is asked for
    with pytest.raises(Interrupted, match=r"a loader worker was killed .*--resume auto.*data\.workers"):
        for _ in found:
            pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_workers_leave_stop_signals_to_their_process(dataset, number):
    """Launchers and schedulers send them to the whole process group, but the step still has to be finished."""
    found, first, workers = start(dataset, 20)
    for worker in workers:
        os.kill(worker.pid, number)
    taken = [first, *found]
    assert len(taken) == 20
    assert all(same(one, other) for one, other in zip(taken, batches(dataset, 0, steps=20), strict=True))


@pytest.mark.slow
def test_a_process_that_fails_leaves_no_worker(dataset):
    """Though workers ignore the signal that Python ends its children with; within the five seconds of its patience."""
    code = """
import multiprocessing, sys
from cdit.data.loader import loader
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.config import DataConfig
from cdit.data.windows import WindowDataset

config = DataConfig(folder=sys.argv[1], image_size=(12, 16), workers=2)
windows = WindowDataset(config, "train")
batches = iter(loader(windows, KeyedBatchSampler(len(windows), 8, 0, 0, 10**6), config))
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
raise SystemExit(2)
"""
    done = subprocess.run([sys.executable, "-c", code, dataset], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
