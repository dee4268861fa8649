"""How a program ends early: by a mistake that a person can mend, or by an interruption that it can go on after."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)
"""What a disk says that is full, or cannot be written to."""


class UserError(Exception):
    """A mistake in what the user gave. The message names the file or field and what was expected of it.

    Command lines print the message without a traceback and exit with code 2 (see `cdit.common.cli`).
    """


class DataError(UserError):
    """A dataset on disk is missing, malformed or too small. The message names the file."""


class Interrupted(Exception):
    """Something outside ended a run that can go on: a signal, a killed worker, other processes that are gone.

    There is nothing to mend; the message says how to continue. Command lines exit with code 75, "try again".
    """


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a file or folder is written: where the disk takes no more, the error names it, as Python's does not.

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
