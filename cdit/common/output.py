"""Folders of results that appear complete or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cdit.common.errors import UserError


@contextmanager
def finished_folder(out: Path) -> Iterator[Path]:
    """A temporary folder whose files move to `out` at the end, so that no partial results appear.

    Files with the same names are replaced; others are kept.

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
