"""Folders of results that are there whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cdit.common.errors import UserError


@contextmanager
def finished_folder(out: Path) -> Iterator[Path]:
    """A folder to write to; its files move to `out` when all is done, so that nothing is there half.

    Files of the same names are replaced, others stay.

    Raises:
        UserError: `out` cannot be written to.
    """
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial_", dir=out))
    except OSError as error:
        raise UserError(f"out is {out}: not a folder that can be written to ({error.strerror})") from error
    try:
        yield partial
        for file in sorted(path for path in partial.rglob("*") if path.is_file()):
            target = out / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    finally:
        shutil.rmtree(partial)
        if is_new and not any(out.iterdir()):
            out.rmdir()
