"""Manifest of a folder: size and SHA-256 of every file, so that damage is detected before use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdit.common.errors import DataError
from cdit.common.files import read_json, sha256, write_json

MANIFEST = "manifest.json"
VERSION = 1

Entry = dict[str, Any]  # bytes, sha256


def entry(path: Path) -> Entry:
    """Size and hash of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_manifest(folder: Path, files: Mapping[str, Entry]) -> None:
    """Writes `<folder>/manifest.json` and flushes it to disk."""
    write_json(folder / MANIFEST, {"version": VERSION, "files": dict(files)})


def problem(folder: Path) -> str | None:
    """The first problem of a folder with a manifest, after reading every file; None if there is none."""
    try:
        if not (folder / MANIFEST).exists():
            return f"{MANIFEST} is missing"
        manifest = read_json(folder / MANIFEST, version=VERSION)
        files = {name: (expected["bytes"], expected["sha256"]) for name, expected in manifest["files"].items()}
    except DataError as error:
        return str(error)
    except (TypeError, LookupError, AttributeError) as error:
        return f"{MANIFEST} is not readable ({error})"
    if not files:
        return f"{MANIFEST} lists no files"
    for name, expected in files.items():
        try:
            found = _file_problem(folder, name, *expected)
        except (OSError, ValueError) as error:  # also for names that no file can have
            found = f"{name[:100]} is not readable ({getattr(error, 'strerror', None) or error})"
        if found:
            return found
    return None


def _file_problem(folder: Path, name: str, size: Any, checksum: Any) -> str | None:
    path = folder / name
    if Path(name).name != name or path.is_symlink():
        return f"{MANIFEST} lists {name!r}, which is not a file in the folder"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None if entry(path)["sha256"] == checksum else f"{name} does not have its checksum"
