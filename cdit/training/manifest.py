"""What a finished folder holds: every file's size and SHA-256, so that damage is found before it is used."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
VERSION = 1

Entry = dict[str, Any]  # bytes, sha256


def entry(path: Path) -> Entry:
    """Size and hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def write_manifest(folder: Path, files: Mapping[str, Entry]) -> None:
    """Writes `<folder>/manifest.json`, through to the disk.

    Args:
        folder: what holds the files.
        files: the `entry` of each, by name.
    """
    write_through(folder / MANIFEST, json.dumps({"version": VERSION, "files": dict(files)}, indent=2) + "\n")


def problem(folder: Path) -> str | None:
    """What is wrong with a folder that has a manifest, reading every file; None if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["version"] > VERSION:
            return f"{MANIFEST} has version {manifest['version']}, but this code reads up to {VERSION}"
        files = {name: (expected["bytes"], expected["sha256"]) for name, expected in manifest["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} is not readable ({error})"
    if not files:
        return f"{MANIFEST} lists no files"
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink():
            return f"{MANIFEST} lists {name!r}, which is no file of the folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected[0]:
            return f"{name} has {path.stat().st_size} bytes, not {expected[0]}"
        try:
            found = entry(path)["sha256"]
        except OSError as error:
            return f"{name} is not readable ({error.strerror})"
        if found != expected[1]:
            return f"{name} does not have its checksum"
    return None


def write_through(path: Path, text: str) -> None:
    """Writes a text file and waits until the disk has it."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush(paths: Iterable[Path]) -> None:
    """Waits until the disk has these files, or the names in these folders."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
