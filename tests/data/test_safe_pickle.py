import os
import pickle
import pickletools

import numpy as np
import pytest

from cdit.data import safe_pickle
from cdit.errors import DataError

VALUES = {
    "position": np.arange(12.0).reshape(6, 2),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "permuted": np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0),
    "big endian": np.arange(4, dtype=">f8"),
    "half": np.ones(3, np.float16),
    "flags": np.array([True, False]),
    "names": np.array(["one", "three"]),
    "strided": np.arange(10)[::2],
    "scalar": np.float64(2.5),
    "count": np.int32(7),
    "plain": {
        "list": [1, 2.5, None],
        "tuple": ("x", b"\xff\x00"),
        "set": {1, 2},
        "frozen": frozenset({3}),
        "yes": True,
    },
}


def assert_same(read, written):
    assert type(read) is type(written) or isinstance(read, np.ndarray)
    if isinstance(written, np.ndarray):
        assert read.dtype.newbyteorder("=") == written.dtype.newbyteorder("=")  # numpy, too, reads into native order
        np.testing.assert_array_equal(read, written)
    else:
        assert read == written


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_containers_of_every_protocol(tmp_path, protocol):
    path = tmp_path / "values.pkl"
    path.write_bytes(pickle.dumps(VALUES, protocol))
    read = safe_pickle.load(path)
    assert read.keys() == VALUES.keys()
    for key, value in VALUES.items():
        assert_same(read[key], value)


@pytest.mark.parametrize("protocol", range(5))
def test_arrays_written_by_numpy_1(tmp_path, protocol):
    data = pickle.dumps(VALUES["position"], protocol)
    if protocol < 4:  # from protocol 4 on, the module name carries its length
        data = data.replace(b"numpy._core", b"numpy.core")
    else:
        data = data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
        frame = data.index(b"\x95") + 1
        size = int.from_bytes(data[frame : frame + 8], "little") - 1
        data = data[:frame] + size.to_bytes(8, "little") + data[frame + 8 :]
    assert b"numpy.core.multiarray" in data
    path = tmp_path / "old.pkl"
    path.write_bytes(data)
    np.testing.assert_array_equal(safe_pickle.load(path), VALUES["position"])


class Command:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def poisons(marker: str) -> dict[str, object]:
    nested = np.empty(1, object)
    nested[0] = Command(os.system, f"touch {marker}")
    return {
        "system": Command(os.system, f"touch {marker}"),
        "in a dict": {"position": np.zeros((3, 2)), "yaw": Command(os.system, f"touch {marker}")},
        "in an object array": nested,
        "eval": Command(eval, f"open({marker!r}, 'w')"),
        "getattr": Command(getattr, "text", "upper"),
        "codec": Command(__import__("_codecs").encode, b"x", "zlib_codec"),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("kind", poisons(""))
def test_poison_is_refused_and_nothing_runs(tmp_path, kind, protocol):
    marker, path = tmp_path / "marker", tmp_path / "poison.pkl"
    poison = pickle.dumps(poisons(str(marker))[kind], protocol)
    path.write_bytes(poison)
    with pytest.raises(DataError, match=r"poison\.pkl: .*admitted"):
        safe_pickle.load(path)
    assert not marker.exists()


def test_the_forbidden_name_is_in_the_message(tmp_path):
    (tmp_path / "poison.pkl").write_bytes(pickle.dumps(Command(os.system, "true")))
    with pytest.raises(DataError, match=f"{os.system.__module__}.system"):
        safe_pickle.load(tmp_path / "poison.pkl")


def test_a_dtype_cannot_pass_bytes_as_object_pointers(tmp_path):
    path = tmp_path / "forged.pkl"
    data = pickle.dumps(np.array([None, None]), 2)
    assert any(opcode.name == "BUILD" for opcode, *_ in pickletools.genops(data))
    path.write_bytes(data)
    with pytest.raises(DataError, match="'O8' are not admitted"):
        safe_pickle.load(path)
    # A float dtype with the state (flags 63) of an object dtype: the flags are not taken over.
    state = (3, "<", None, None, None, -1, -1, 63)
    dtype = Command(np.dtype, "f8", False, True)
    dtype.call = (*dtype.call, state)
    array = Command(np.ndarray([]).__reduce__()[0], np.ndarray, (0,), b"b")
    array.call = (*array.call, (1, (2,), dtype, False, np.arange(2.0).tobytes()))
    path.write_bytes(pickle.dumps(array))
    read = safe_pickle.load(path)
    assert not read.dtype.hasobject
    np.testing.assert_array_equal(read, [0.0, 1.0])


@pytest.mark.parametrize("data", [b"", b"not a pickle", pickle.dumps(VALUES)[:-20]], ids=["empty", "text", "cut short"])
def test_damaged_files(tmp_path, data):
    (tmp_path / "bad.pkl").write_bytes(data)
    with pytest.raises(DataError, match=r"bad\.pkl: not a readable pickle"):
        safe_pickle.load(tmp_path / "bad.pkl")


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.pkl"):
        safe_pickle.load(tmp_path / "none.pkl")
