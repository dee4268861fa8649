"""Files: those that somebody else may have made, of bounded size, no pipes or devices, none outside of a folder; and
our own, which are there in whole or not at all.
"""

import hashlib
import io
import json
import os
import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cdit.common.errors import DataError

MAX_TEXT = 2**24
"""Bytes of a JSON or text file."""
MAX_ARRAYS = 2**28
"""Bytes of an .npz file, and of the arrays in it."""
MAX_NAME = 1000
"""Characters of a trajectory's name."""


def read_bytes(path: Path | str, limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes.

    Raises:
        DataError: it is missing, larger, or a folder, pipe or device, from which one could read for ever.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # opening a pipe would wait for a writer
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(f"{path}: not a regular file")
            content = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: no path at all
        raise DataError(f"{path}: not readable ({getattr(error, 'strerror', None) or error})") from error
    if len(content) > limit:
        raise DataError(f"{path}: larger than {limit} bytes, the most that is read of such a file")
    return content


def read_text(path: Path | str, limit: int = MAX_TEXT) -> str:
    """The contents of a UTF-8 text file, see `read_bytes`.

    Raises:
        DataError: it cannot be read, or is no such text.
    """
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8 ({error})") from error


def read_json(path: Path | str, limit: int = MAX_TEXT) -> Any:
    """The value of a JSON file.

    Raises:
        DataError: it cannot be read, is not JSON, or nested too deeply to be followed.
    """
    return parse_json(read_text(path, limit), path)


def parse_json(text: str, origin: Path | str) -> Any:
    """The value of JSON text.

    Raises:
        DataError: it is not JSON, or nested too deeply to be followed; the message names the origin.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also of numbers with thousands of digits
        raise DataError(f"{origin}: not JSON ({error})") from error


def read_arrays(path: Path | str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, by name; none of objects.

    Raises:
        DataError: it cannot be read, or they would be larger than `MAX_ARRAYS` bytes.
    """
    content = io.BytesIO(read_bytes(path, MAX_ARRAYS))
    try:
        with zipfile.ZipFile(content) as archive:  # which never gives more of a member than it states
            if sum(member.file_size for member in archive.infolist()) > MAX_ARRAYS:
                raise ValueError(f"arrays of more than {MAX_ARRAYS} bytes")
        with np.load(content, allow_pickle=False) as arrays:
            found = dict(arrays.items())
        if not all(isinstance(array, np.ndarray) for array in found.values()):
            raise ValueError("other files among them")
        return found
    except Exception as error:  # numpy and zipfile have many, for a shape beyond memory, too
        raise DataError(f"{path}: not readable arrays ({error})") from error


def check_name(name: str, listing: Path | str) -> None:
    """Refuses a trajectory's name that is no plain relative path: it becomes the path of files that are written, too.

    Args:
        name: one or several components, separated by "/".
        listing: where it stands, for the message.

    Raises:
        DataError: it is absolute, has components such as "..", or characters that are not printed.
    """
    parts = name.split("/")
    plain = name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)
    if not plain or len(name) > MAX_NAME or any(len(os.fsencode(part)) > 200 for part in parts):
        shown = ascii(name[:100])
        raise DataError(
            f"{listing}: {shown} is no name of a trajectory: expected a path within the dataset's folder, without "
            f"'..', '\\' and control characters, of at most 200 bytes a component and {MAX_NAME} characters"
        )


def check_inside(path: Path, folder: Path) -> None:
    """Refuses a path that links lead out of a folder; the folder itself may be a link.

    Raises:
        DataError: it lies elsewhere; the message names both.
    """
    real = os.path.realpath(path)
    if Path(os.path.realpath(folder)) not in (Path(real), *Path(real).parents):
        raise DataError(
            f"{path}: a link to {ascii(real)[1:-1]}, outside of {folder}; where that is meant, --data.follow_links true"
        )


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes a file, whole or not at all: a hidden one, then renamed. The disk has it when this returns."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # it may be a link to somewhere
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    flush([partial])
    partial.replace(path)
    flush([path.parent])


def flush(paths: Iterable[Path]) -> None:
    """Waits until the disk has these files, or the names in these folders."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256(path: Path) -> str:
    """The checksum of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
