"""Reading files of bounded size that may come from elsewhere, and writing files atomically."""

import fcntl
import hashlib
import io
import json
import math
import os
import stat
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cdit.common.errors import DataError, UserError

MAX_TEXT = 2**24
"""Largest JSON or text file, in bytes."""
MAX_ARRAYS = 2**28
"""Largest .npz file, and all arrays in it together, in bytes."""
MAX_NAME = 1000
"""Longest trajectory name, in characters."""


def read_bytes(path: Path | str, limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes.

    Raises:
        DataError: the file is missing, unreadable or larger, or is a folder, pipe or device.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # opening a pipe would wait for a writer
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(f"{path}: not a regular file")
            content = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise DataError(f"{path}: not readable ({getattr(error, 'strerror', None) or error})") from error
    if len(content) > limit:
        raise DataError(f"{path}: larger than {limit} bytes, the limit for such files")
    return content


def read_text(path: Path | str, limit: int = MAX_TEXT) -> str:
    """The contents of a UTF-8 text file of at most `limit` bytes.

    Raises:
        DataError: the file cannot be read (see `read_bytes`) or is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from error


def read_json(path: Path | str, limit: int = MAX_TEXT, version: int | None = None) -> Any:
    """The value of a strict JSON file; see `parse_json` for `version`.

    Raises:
        DataError: the file cannot be read, is not strict JSON, or has a newer format.
    """
    return parse_json(read_text(path, limit), path, version)


def parse_json(text: str, origin: Path | str, version: int | None = None) -> Any:
    """The value of strict JSON, in which NaN and Infinity are errors.

    Args:
        text: the JSON.
        origin: its file, for messages.
        version: the newest format that can be read, compared with the field "version", if any, before anything else is
            checked.

    Raises:
        DataError: the text is not strict JSON, is nested too deeply, or has a newer format.
    """
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError: also numbers with thousands of digits
        raise DataError(f"{origin}: not JSON ({error})") from error
    found = values.get("version", version) if isinstance(values, dict) else version
    if version is not None and not (isinstance(found, int) and found <= version):
        raise DataError(f"{origin}: format version {ascii(found)[:20]}, but this code reads up to {version}")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Writes the JSON of `to_json` and a newline atomically (see `write_whole`)."""
    write_whole(path, to_json(value, indent=indent) + "\n")


def to_json(value: Any, **options: Any) -> str:
    """Strict JSON, in which NaN and infinities become null; options are those of `json.dumps`."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_arrays(path: Path | str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name; object arrays are refused.

    Raises:
        DataError: the file cannot be read, or its arrays take more than `MAX_ARRAYS` bytes.
    """
    content = io.BytesIO(read_bytes(path, MAX_ARRAYS))
    try:
        with zipfile.ZipFile(content) as archive:  # never reads more of a member than its stated size
            if sum(member.file_size for member in archive.infolist()) > MAX_ARRAYS:
                raise ValueError(f"arrays of more than {MAX_ARRAYS} bytes")
        with np.load(content, allow_pickle=False) as arrays:
            found = dict(arrays.items())
        if not all(isinstance(array, np.ndarray) for array in found.values()):
            raise ValueError("it contains files that are not arrays")
        return found
    except Exception as error:  # numpy and zipfile raise many types
        raise DataError(f"{path}: not readable arrays ({error})") from error


def check_name(name: str, listing: Path | str) -> None:
    """Checks that a trajectory name is a plain relative path, since files are also written under it.

    `listing` is the file that has the name, for messages.

    Raises:
        DataError: the name is absolute, too long, or has components such as ".." or non-printing characters.
    """
    parts = name.split("/")
    plain = name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)
    if not plain or len(name) > MAX_NAME or any(len(os.fsencode(part)) > 200 for part in parts):
        shown = ascii(name[:100])
        raise DataError(
            f"{listing}: {shown} is not a trajectory name: expected a path within the dataset's folder, without '..', "
            f"'\\' and control characters, of at most 200 bytes per component and {MAX_NAME} characters"
        )


def check_inside(path: Path, folder: Path) -> None:
    """Checks that links do not lead from a path to outside a folder; the folder itself may be a link.

    Raises:
        DataError: the path resolves to a place outside the folder.
    """
    real = os.path.realpath(path)
    if Path(os.path.realpath(folder)) not in (Path(real), *Path(real).parents):
        raise DataError(
            f"{path}: a link to {ascii(real)[1:-1]}, outside of {folder}; to allow it, set the option follow_links"
        )


def check_writable(folder: Path, option: str) -> None:
    """Checks that a folder can be created or written to, before any work.

    Raises:
        UserError: it cannot; the message names the option.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is not writable" if there.is_dir() else "is not a folder"
        raise UserError(f"{option}, but {there} {what}")


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes a file atomically, through a hidden file that is renamed, and flushes it to disk."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # might be a link
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    flush([partial])
    partial.replace(path)
    flush([path.parent])


def flush(paths: Iterable[Path]) -> None:
    """Flushes files, or the entries of folders, to disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file, which is created and left behind, across processes and, on a network file
    system, machines. A process that dies releases it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
