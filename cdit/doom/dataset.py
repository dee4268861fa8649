"""Recording of a dataset by several processes: resumable, with a result that does not depend on their number."""

import json
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import util
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cdit.common.errors import DataError, Interrupted, UserError
from cdit.common.randomness import seed_of
from cdit.data.layout import DESCRIPTION, POSES, DatasetInfo, write_split, write_trajectory
from cdit.doom.engine import Engine
from cdit.doom.geometry import MapGeometry
from cdit.doom.maps import MAPS, file_name
from cdit.doom.record import record

RECORDER_VERSION = 2
"""Incremented when the same options no longer give the same recording."""

WAYPOINT_SPACING = 0.3
"""Metres between consecutive frames at the explorer's typical 1.2 m/s; constant, so that all recordings agree."""


CLAIM = "recording.json"
"""Name of `dataset.json` while the recording is incomplete."""


@dataclass(frozen=True)
class Job:
    """One trajectory to record, with everything that its content depends on."""

    map_name: str
    number: int
    split: str
    length: int
    min_length: int
    size: int
    seed: int
    depth: bool

    @property
    def name(self) -> str:
        """The trajectory's name: map and number."""
        return f"{file_name(self.map_name)}_{self.number:04}"


def record_dataset(folder: Path, info: DatasetInfo, jobs: list[Job], workers: int) -> None:
    """Records the missing parts of a dataset; `dataset.json` is written last and marks it as complete.

    Args:
        info: its description; `info.source` must hold all options that the frames depend on.

    Raises:
        UserError: the folder holds another recording, or ViZDoom is not installed.
    """
    _claim(folder, info)
    missing = [job for job in jobs if not (folder / job.name / POSES).is_file()]
    done = sum(job.length for job in jobs) - sum(job.length for job in missing)
    total = sum(job.length for job in jobs)
    with tqdm(total=total, initial=done, unit=" frames", desc=f"recording {folder}", smoothing=0.1) as bar:
        for job, frames in _record_all(folder, missing, workers):
            bar.update(job.length)
            bar.set_postfix_str(f"{job.name}: {frames}", refresh=False)
    _restore_maps(folder, jobs)
    for split in dict.fromkeys(job.split for job in jobs):
        write_split(folder, split, [job.name for job in jobs if job.split == split])
    info.save(folder)
    (folder / CLAIM).unlink(missing_ok=True)


def _claim(folder: Path, info: DatasetInfo) -> None:
    """Marks a folder as belonging to this recording; rejects one that was started with other options."""
    name = DESCRIPTION if (folder / DESCRIPTION).is_file() else CLAIM
    marked = folder / name
    try:
        before = DatasetInfo.load(folder, name)
    except DataError as error:
        raise UserError(f"{error}; choose another --out or delete {folder}") from error
    if before is None:
        info.save(folder, CLAIM)
        return
    now = json.loads(json.dumps(info.source))
    if before.source.get("recipe") != now["recipe"]:
        raise UserError(f"{marked}: not a recording of {now['recipe']}; choose another --out")
    differing = sorted(key for key in before.source.keys() | now.keys() if before.source.get(key) != now.get(key))
    if differing:
        changes = ", ".join(f"{key} was {before.source.get(key)!r}, is {now.get(key)!r}" for key in differing)
        raise UserError(f"{marked}: recorded with other options ({changes}); choose another --out or delete it")


def _record_all(folder: Path, jobs: list[Job], workers: int) -> Iterator[tuple[Job, int]]:
    """Records jobs in separate processes; yields each with its number of frames when finished."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(stop,)) as pool:
        # Only this process handles Ctrl-C: its children inherit that it is ignored, and are stopped by `stop`.
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        futures = {pool.submit(_record_job, folder, job): job for job in jobs}
        signal.signal(signal.SIGINT, on_interrupt)
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise Interrupted(
                "a recording process was killed; the same command continues, in less memory with fewer --workers"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """The recording is being stopped from outside."""


_stop: Event
_open: tuple[Engine, MapGeometry] | None = None


def _begin_worker(stop: Event) -> None:
    global _stop
    _stop = stop
    util.Finalize(None, _close_engine, exitpriority=1)


def _check_stop() -> None:
    if _stop.is_set():
        raise _Stopped


def _record_job(folder: Path, job: Job) -> int:
    _check_stop()
    engine, geometry = _engine_for(folder, job)
    rng = np.random.default_rng(seed_of(job.seed, list(MAPS).index(job.map_name), job.number))
    walk = record(engine, geometry, rng, job.length, job.min_length, tick=_check_stop)
    extra = {"depth": walk.depth} if job.depth else {}
    write_trajectory(folder, job.name, walk.frames, walk.position, walk.yaw, eye=walk.eye, **extra)
    return len(walk.frames)


def _restore_maps(folder: Path, jobs: list[Job]) -> None:
    """Writes missing geometry files of maps whose trajectories exist."""
    for map_name, size in {job.map_name: job.size for job in jobs}.items():
        path = map_path(folder, map_name)
        if not path.is_file():
            with Engine(map_name, size) as engine:
                MapGeometry.of(engine).save(path)


def map_path(folder: Path, map_name: str) -> Path:
    """The geometry file of a map in a dataset."""
    return folder / "maps" / f"{file_name(map_name)}.npz"


def _engine_for(folder: Path, job: Job) -> tuple[Engine, MapGeometry]:
    """The worker's open engine, switched to another map if the job needs it."""
    global _open
    if _open is None or _open[0].map_name != job.map_name:
        _close_engine()
        engine = Engine(job.map_name, job.size)
        geometry = MapGeometry.of(engine)
        geometry.save(map_path(folder, job.map_name))
        _open = engine, geometry
    return _open


def _close_engine() -> None:
    global _open
    if _open is not None:
        _open[0].close()
        _open = None
