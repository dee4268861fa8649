import os
import pickle
import pickletools

import numpy as np
import pytest

from cdit.common.errors import DataError
from cdit.data import safe_pickle

VALUES = {
    "position": np.arange(12.0).reshape(6, 2),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "permuted": np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0),
    "big endian": np.arange(4, dtype=">f8"),
    "half": np.ones(3, np.float16),
    "flags": np.array([True, False]),
    "names": np.array(["one", "three"]),
    "strided": np.arange(10)[::2],
    "empty": np.zeros((0, 2)),
    "of no dimension": np.array(1.5),
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
        assert_same(pickle.loads(pickle.dumps(read[key])), value)


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
    with pytest.raises(DataError, match=r"poison\.pkl: not a readable pickle"):
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
    with pytest.raises(DataError, match="O8"):
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


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def literal(value) -> bytes:
    """Opcodes that push a value."""
    return pickle.dumps(value, 3)[2:-1]


def arguments(*values) -> bytes:
    """Opcodes that push a tuple; bytes are opcodes that push one value."""
    return b"(" + b"".join(value if isinstance(value, bytes) else literal(value) for value in values) + b"t"


def dtype_of(code) -> bytes:
    return named("numpy", "dtype") + arguments(code, False, True) + b"R"


NDARRAY = named("numpy", "ndarray")
FROMBUFFER = named("numpy.core.numeric", "_frombuffer")
SCALAR = named("numpy.core.multiarray", "scalar")
EMPTY = named("numpy.core.multiarray", "_reconstruct") + arguments(NDARRAY, (0,), literal(b"b")) + b"R"
F8 = dtype_of("f8")


def rebuilt(shape, dtype: bytes, data: bytes) -> bytes:
    return EMPTY + arguments(1, shape, dtype, False, literal(data)) + b"b"


FORGED = {
    "ndarray called": NDARRAY + arguments((1,), "O", literal(bytes(8))) + b"R",
    "ndarray by NEWOBJ": NDARRAY + arguments((1,), "O", literal(bytes(8))) + b"\x81",
    "ndarray by OBJ": b"(" + NDARRAY + literal((1,)) + literal("O") + b"o",
    "ndarray by INST": b"(" + literal((1,)) + literal("O") + b"inumpy\nndarray\n",
    "method of a class": b"\x8c\x05numpy\x8c\x0endarray.tofile\x93",
    "dtype of objects": dtype_of("O8"),
    "dtype of records": dtype_of([("a", "O")]),
    "dtype of void": dtype_of("V8"),
    "array of a dtype's name": rebuilt((1,), literal("O"), bytes(8)),
    "array larger than its data": rebuilt((2,), F8, bytes(8)),
    "array of negative shape": rebuilt((-1, -1), F8, bytes(8)),
    "array of overflowing shape": rebuilt((2**32, 2**32), F8, b""),
    "buffer larger than its data": FROMBUFFER + arguments(literal(bytes(8)), F8, (2**40,), "C") + b"R",
    "buffer of a number": FROMBUFFER + arguments(2**40, F8, (2**37,), "C") + b"R",
    "scalar of too few bytes": SCALAR + arguments(F8, literal(bytes(4))) + b"R",
    "terabyte of bytes": named("builtins", "bytes") + arguments(2**40) + b"R",
    "extension": b"\x82\x01",
    "persistent": b"Ptext\n",
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_pickles_are_refused(tmp_path, kind):
    (tmp_path / "forged.pkl").write_bytes(b"\x80\x05" + FORGED[kind] + b".")
    with pytest.raises(DataError, match=r"forged\.pkl: not a readable pickle"):
        safe_pickle.load(tmp_path / "forged.pkl")


def test_the_parts_of_the_forgeries_are_read_where_they_are_honest(tmp_path):
    path = tmp_path / "honest.pkl"
    ones = np.ones(1).tobytes()
    for code in (rebuilt((1,), F8, ones), FROMBUFFER + arguments(literal(ones), F8, (1,), "C") + b"R"):
        path.write_bytes(b"\x80\x05" + code + b".")
        np.testing.assert_array_equal(safe_pickle.load(path), [1.0])


def test_files_beyond_the_limit_are_refused(tmp_path, monkeypatch):
    (tmp_path / "large.pkl").write_bytes(pickle.dumps(VALUES))
    monkeypatch.setattr(safe_pickle, "MAX_BYTES", 100)
    with pytest.raises(DataError, match=r"large\.pkl: larger than 100 bytes"):
        safe_pickle.load(tmp_path / "large.pkl")


@pytest.mark.parametrize("data", [b"", b"not a pickle", pickle.dumps(VALUES)[:-20]], ids=["empty", "text", "cut short"])
def test_damaged_files(tmp_path, data):
    (tmp_path / "bad.pkl").write_bytes(data)
    with pytest.raises(DataError, match=r"bad\.pkl: not a readable pickle"):
        safe_pickle.load(tmp_path / "bad.pkl")


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.pkl"):
        safe_pickle.load(tmp_path / "none.pkl")
