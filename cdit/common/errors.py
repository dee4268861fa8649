"""Exceptions that end a program early: invalid input, or an interruption after which it can continue."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
)
"""Error numbers of a disk that is full or not writable, and of files in place of folders or the reverse."""


class UserError(Exception):
    """Invalid input. The message names the file or field and what was expected.

    Command lines print the message without a traceback and exit with code 2 (see `cdit.common.cli`).
    """


class DataError(UserError):
    """A dataset on disk is missing, malformed or too small. The message names the file."""


class Interrupted(Exception):
    """A run was interrupted from outside and can continue: a signal, a killed worker, lost processes.

    Nothing needs to be fixed; the message says how to continue. Command lines exit with code 75, "try again".
    """


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the file or folder that is written inside the `with` in errors of the disk, which Python's may not do.

    Raises:
        UserError: the disk is full, or cannot be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(f"{error.filename or path}: cannot be written ({error.strerror})") from error
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
