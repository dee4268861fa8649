"""Files of arrays, which are compressed, and what is no regular file."""

import os
import resource
import zipfile

import numpy as np
import pytest

from cdit.common.errors import DataError
from cdit.common.files import MAX_ARRAYS, read_arrays, read_bytes, read_json


def test_arrays_come_back(tmp_path):
    np.savez_compressed(tmp_path / "it.npz", a=np.arange(3), b=np.ones((2, 2), bool))
    arrays = read_arrays(tmp_path / "it.npz")
    assert arrays["a"].tolist() == [0, 1, 2]
    assert arrays["b"].all()


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize("kind", ["bomb", "huge shape", "objects", "text", "pickle", "nested header"])
def test_hostile_arrays_are_refused_and_take_no_memory(tmp_path, kind):
    path = tmp_path / "it.npz"
    content = {
        "bomb": lambda: npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000,)}", bytes(10**9)),
        "huge shape": lambda: npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000,)}", bytes(99)),
        "objects": lambda: npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"\x80\x04N."),
        "pickle": lambda: b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "nested header": lambda: npy("(" * 110),
    }
    if kind == "text":
        path.write_text("no archive")
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.npy", content[kind]())
        assert path.stat().st_size < MAX_ARRAYS
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"it\.npz: not readable arrays"):
        read_arrays(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    for path, message in {
        tmp_path / "pipe": "not a regular file",
        tmp_path: "Is a directory|not a regular file",
        "/dev/zero": "not a regular file",
        tmp_path / "large": "larger than 10 bytes",
        tmp_path / "none": "No such file",
        "a\0b": "null",
    }.items():
        with pytest.raises(DataError, match=message):
            read_bytes(path, 10)
    assert read_bytes(tmp_path / "large", 11) == bytes(11)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "", "\udcff"], ids=range(4))
def test_json_that_is_none(tmp_path, text):
    (tmp_path / "it.json").write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match=r"it\.json: not"):
        read_json(tmp_path / "it.json")
