"""LRU cache of remote files, each downloaded once per machine."""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from cdit.common.errors import DataError, Interrupted, UserError
from cdit.common.files import sha256

T = TypeVar("T")

PAUSES = (1.0, 4.0, 16.0)
"""Seconds to wait before each further attempt."""
TOUCH_EVERY = 60.0
"""Seconds within which repeated use of a file counts once."""
ABANDONED_AFTER = 3600.0
"""Seconds after which a partial file that does not grow is considered abandoned."""
LOCKS = 256
"""Number of files that a machine downloads at the same time."""
LOCAL = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM)
"""Errors of the local disk, not of the network."""


@dataclass(frozen=True)
class FileRecord:
    """The expected name, size and checksum of a file."""

    file: str
    bytes: int
    sha256: str


def default_folder() -> Path:
    """The default cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cdit" / "shards"


class ShardCache:
    """A folder of downloaded files, named by their checksums and shared by the processes of a machine.

    A file gets its name only after its size and checksum are verified. It may be evicted while it is open; a process
    that finds it missing requests it again.

    Args:
        folder: of the cache, created when needed. By default `default_folder()`.
        capacity_gb: capacity in GB (10⁹ bytes).
    """

    def __init__(self, folder: Path | str | None = None, capacity_gb: float = 64.0):
        self.folder = Path(folder) if folder else default_folder()
        self.capacity = int(capacity_gb * 1e9)
        self._touched: dict[str, float] = {}

    def path(self, location: str, record: FileRecord) -> Path:
        """The local path of a file, downloaded from the folder `location` (any fsspec URL) if it is not cached.

        Raises:
            DataError: the file is missing, or differs from the expected one.
            UserError: the cache is not writable, or too small.
            Interrupted: it could not be downloaded after several attempts.
        """
        path = self.folder / record.sha256
        if not path.exists():
            try:
                self._fetch(location, record, path)
            except OSError as error:
                raise UserError(f"data.shard_cache: {self.folder} cannot be written to ({error.strerror})") from error
        now = time.monotonic()
        if now - self._touched.get(record.sha256, -TOUCH_EVERY) >= TOUCH_EVERY:
            self._touched[record.sha256] = now
            try:
                os.utime(path)
            except FileNotFoundError:  # just evicted
                return self.path(location, record)
            except PermissionError:  # downloaded by another user, whose runs update its time of use
                pass
        return path

    def _fetch(self, location: str, record: FileRecord, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(f"fetch_{int(record.sha256[:8], 16) % LOCKS}"):
            if path.exists():  # another process was faster
                return
            partial = path.with_name(_partial_name(record))
            with self._lock("space"):
                self._make_room(record)
                partial.touch()
            try:
                url = f"{location.rstrip('/')}/{record.file}"
                _attempts(lambda: _copy(url, record, partial), url)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def _make_room(self, record: FileRecord) -> None:
        """Evicts the least recently used files to make space for a new one."""
        if record.bytes > self.capacity:
            raise UserError(
                f"data.shard_cache_gb is {self.capacity / 1e9:g}, expected more: {record.file} alone has "
                f"{record.bytes / 1e9:.3g} GB"
            )
        taken, kept = record.bytes, []
        for file in self.folder.iterdir():
            try:
                status = file.stat()
            except FileNotFoundError:  # just finished, or evicted
                continue
            if file.suffix == ".partial" and time.time() - status.st_mtime > ABANDONED_AFTER:
                file.unlink(missing_ok=True)
            elif file.suffix == ".partial" and file.name != _partial_name(record):
                taken += int(file.name.split(".")[1])  # its final size
            elif not file.suffix:
                taken += status.st_size
                kept.append((status.st_mtime, status.st_size, file))
        for _, size, file in sorted(kept):
            if taken <= self.capacity:
                break
            file.unlink(missing_ok=True)
            taken -= size

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Excludes other processes of this machine; a process that dies releases the lock."""
        with open(self.folder / f"{name}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def read_remote(url: str, limit: int) -> bytes:
    """The contents of a small file, from any fsspec URL.

    Raises:
        DataError: there is no such file, or it is larger than `limit` bytes.
        Interrupted: it could not be downloaded after several attempts.
    """
    system, path = _system(url)
    content = _attempts(lambda: system.cat_file(path, 0, limit + 1), url)
    if len(content) > limit:
        raise DataError(f"{url}: larger than {limit} bytes, the limit for such files")
    return content


class _Different(Exception):
    """A file differs from the expected one."""


def _copy(url: str, record: FileRecord, partial: Path) -> None:
    system, path = _system(url)
    system.get_file(path, str(partial))
    if partial.stat().st_size != record.bytes:
        raise _Different(f"{partial.stat().st_size} bytes, expected {record.bytes}")
    if sha256(partial) != record.sha256:
        raise _Different("its checksum does not match")


def _attempts(attempt: Callable[[], T], url: str) -> T:
    """The result of the first attempt that succeeds, with pauses between them."""
    pauses = iter(PAUSES)
    while True:
        try:
            return attempt()
        except FileNotFoundError as error:
            raise DataError(f"{url}: no such file") from error
        except UserError:
            raise
        except Exception as error:  # each kind of storage has its own exceptions
            if getattr(error, "errno", None) in LOCAL:
                raise
            pause = next(pauses, None)
            if pause is None:
                if isinstance(error, _Different):
                    raise DataError(f"{url}: {error}") from error
                text = str(error) or type(error).__name__
                raise Interrupted(f"{url} cannot be fetched ({text}); `--resume auto` continues") from error
            time.sleep(pause)


def _system(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path in it; created in every process, because most do not survive a fork.

    Raises:
        UserError: the kind of storage is unknown or not installed.
    """
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error}") from error


def _partial_name(record: FileRecord) -> str:
    return f"{record.sha256}.{record.bytes}.partial"
