import os
import pickle
import pickletools
import resource
import struct
import subprocess
import sys

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


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def argument(*values) -> bytes:
    """What pushes a tuple; bytes are code that pushes a value."""
    code = [value if isinstance(value, bytes) else pickle.dumps(value, 3)[2:-1] for value in values]
    return b"(" + b"".join(code) + b"t"


def literal(value) -> bytes:
    """What pushes a value."""
    return pickle.dumps(value, 3)[2:-1]


NDARRAY = named("numpy", "ndarray")
DTYPE = named("numpy", "dtype")
RECONSTRUCT = named("numpy.core.multiarray", "_reconstruct")
SCALAR = named("numpy.core.multiarray", "scalar")
FROMBUFFER = named("numpy.core.numeric", "_frombuffer")
ENCODE = named("_codecs", "encode")
EMPTY = RECONSTRUCT + argument(NDARRAY, (0,), literal(b"b")) + b"R"
F8 = DTYPE + argument("f8", False, True) + b"R"


def array_state(shape, dtype: bytes, data: bytes) -> bytes:
    return argument(1, shape, dtype, False, literal(data))


def dtype_of(code) -> bytes:
    return DTYPE + argument(code, False, True) + b"R"


ATTACKS = {
    "ndarray called": NDARRAY + argument((1,), "O", literal(bytes(8))) + b"R",
    "ndarray called, float": NDARRAY + argument((4,), "f8", literal(bytes(8)), 0, (0,)) + b"R",
    "ndarray called, strides of bytearray": NDARRAY + argument((1,), "f8", bytearray(64), 8, (-8,)) + b"R",
    "ndarray called, structured": NDARRAY + argument((1,), [("a", "O")], literal(bytes(8))) + b"R",
    "ndarray called, huge": NDARRAY + argument((2**40,), "b1") + b"R",
    "ndarray NEWOBJ": NDARRAY + argument((1,), "O", literal(bytes(8))) + b"\x81",
    "ndarray NEWOBJ_EX": NDARRAY + argument((1,)) + literal({"dtype": "O"}) + b"\x92",
    "ndarray OBJ": b"(" + NDARRAY + literal((1,)) + literal("O") + b"o",
    "ndarray INST": b"(" + literal((1,)) + literal("O") + b"inumpy\nndarray\n",
    "ndarray BUILD": NDARRAY + array_state((1,), F8, bytes(8)) + b"b",
    "ndarray BUILD of slots": NDARRAY + argument(None, {"_function": 1}) + b"b",
    "dtype NEWOBJ": DTYPE + argument("O") + b"\x81",
    "dtype BUILD": DTYPE + literal({"numpy": "O"}) + b"b",
    "function BUILD": ENCODE + literal({"changed": 1}) + b"b",
    "set BUILD": named("builtins", "set") + literal({"add": 1}) + b"b",
    "dtype of objects": dtype_of("O8"),
    "dtype of records": dtype_of([("a", "O")]),
    "dtype of void": dtype_of("V8"),
    "dtype of text": dtype_of("f8,O"),
    "dtype of nothing": dtype_of("S0"),
    "dtype of times": dtype_of("M8"),
    "dtype built from a dict": F8 + literal({"numpy": "O"}) + b"b",
    "dtype in an unknown order": F8 + literal((3, "O", None, None, None, -1, -1, 63)) + b"b",
    "array of another class": RECONSTRUCT + argument(DTYPE, (0,), literal(b"b")) + b"R",
    "array of a dtype's name": EMPTY + array_state((1,), literal("O"), bytes(8)) + b"b",
    "array without dtype": EMPTY + array_state((1,), DTYPE, bytes(8)) + b"b",
    "array of a list": EMPTY + argument(1, (1,), F8, False, [1.0]) + b"b",
    "array built from a dict": EMPTY + literal({"dtype": "O"}) + b"b",
    "array larger than its data": EMPTY + array_state((2,), F8, bytes(8)) + b"b",
    "array smaller than its data": EMPTY + array_state((1,), F8, bytes(16)) + b"b",
    "array of negative shape": EMPTY + array_state((-1, -1), F8, bytes(8)) + b"b",
    "array of inferred shape": EMPTY + array_state((-1,), F8, bytes(8)) + b"b",
    "array of overflowing shape": EMPTY + array_state((2**32, 2**32), F8, b"") + b"b",
    "array of infinite shape": EMPTY + array_state((2**70, 0), F8, b"") + b"b",
    "array of unmeasured shape": EMPTY + array_state((1.0,), F8, bytes(8)) + b"b",
    "array filled twice": EMPTY + 2 * (array_state((1,), F8, bytes(8)) + b"b"),
    "buffer larger than its data": FROMBUFFER + argument(literal(bytes(8)), F8, (2**40,), "C") + b"R",
    "buffer of inferred shape": FROMBUFFER + argument(literal(bytes(8)), F8, (-1,), "C") + b"R",
    "buffer of an array": FROMBUFFER + argument(EMPTY, F8, (0,), "C") + b"R",
    "buffer of a dtype's name": FROMBUFFER + argument(literal(bytes(8)), "O", (1,), "C") + b"R",
    "buffer BUILD": FROMBUFFER
    + argument(literal(bytes(8)), F8, (1,), "C")
    + b"R"
    + array_state((1,), F8, bytes(8))
    + b"b",
    "scalar of a dtype's name": SCALAR + argument("O", literal(bytes(8))) + b"R",
    "scalar of too few bytes": SCALAR + argument(F8, literal(bytes(4))) + b"R",
    "scalar of an object": SCALAR + argument(dtype_of("O8"), 1) + b"R",
    "codec": ENCODE + argument("x", "rot13") + b"R",
    "codec of an array": ENCODE + argument(EMPTY, "latin1") + b"R",
    "bytes bomb": named("builtins", "bytes") + argument(2**40) + b"R",
    "set of text": named("builtins", "set") + argument("text") + b"R",
    "text bomb": b"\x8d" + struct.pack("<Q", 2**62),
    "bytes length bomb": b"\x8e" + struct.pack("<Q", 2**62),
    "frame bomb": b"\x95" + struct.pack("<Q", 2**62),
    "array changed in place": FROMBUFFER
    + argument(bytearray(8), F8, (1,), "C")
    + b"R"
    + literal((0,))
    + literal(1.0)
    + b"s",
    "bytes changed in place": literal(bytearray(8)) + b"K\x01a",
    "key of a tuple": b"}" + literal((1, 2)) + b"Ns",
    "set of tuples": b"\x8f(" + literal((1, 2)) + b"\x90",
    "frozen set of tuples": b"(" + literal((1, 2)) + b"\x91",
    "set of a list of tuples": named("builtins", "set") + argument([(1, 2)]) + b"R",
    "dict of tuples": b"(" + literal((1, 2)) + b"Nd",
    "key of complex numbers": b"}" + SCALAR + argument(dtype_of("c16"), literal(bytes(16))) + b"RNs",
    "key of a huge number": b"}" + literal(2**64) + b"Ns",
    "extension": b"\x82\x01",
    "buffer from outside": b"\x97",
    "persistent": b"Ptext\n",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_forged_pickles_are_refused(tmp_path, attack):
    (tmp_path / "forged.pkl").write_bytes(b"\x80\x05" + ATTACKS[attack] + b".")
    with pytest.raises(DataError, match=r"forged\.pkl: not a readable pickle"):
        safe_pickle.load(tmp_path / "forged.pkl")


def test_the_parts_of_the_forgeries_are_read_where_they_are_honest(tmp_path):
    path = tmp_path / "honest.pkl"
    for code in (
        EMPTY + array_state((1,), F8, np.ones(1).tobytes()) + b"b",
        FROMBUFFER + argument(literal(np.ones(1).tobytes()), F8, (1,), "C") + b"R",
    ):
        path.write_bytes(b"\x80\x05" + code + b".")
        np.testing.assert_array_equal(safe_pickle.load(path), [1.0])


def test_no_memory_is_taken_for_memo_entries_that_are_not_there(tmp_path):
    (tmp_path / "memo.pkl").write_bytes(b"\x80\x05Nr" + struct.pack("<I", 2**32 - 1) + b".")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert safe_pickle.load(tmp_path / "memo.pkl") is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 100_000  # kB; the C unpickler takes 64 GiB


def memoized(code: bytes, times: int, use: bytes) -> bytes:
    """A value that is used many times over, each time anew."""
    return code + b"q\x000" + use * times


LIST = b"](" + b"K\x01" * 100_000 + b"e"
TEXT = b"X" + struct.pack("<I", 1_000_000) + b"x" * 1_000_000
BYTES = b"B" + struct.pack("<I", 1_000_000) + bytes(1_000_000)
NESTED = b"](K\x00K\x00eq\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
TUPLES = b"K\x00K\x00\x86q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
BOMBS = {
    "one bytearray of 64 GB": b"\x96" + struct.pack("<Q", 2**36),
    "text encoded again and again": memoized(TEXT, 100_000, ENCODE + b"h\x00" + literal("latin1") + b"\x86R0"),
    "sets of one list": memoized(LIST, 100_000, named("builtins", "set") + b"h\x00\x85R0"),
    "arrays of one string of bytes": memoized(
        BYTES, 5_000, EMPTY + b"(K\x01K\x01\x85" + dtype_of("S1000000") + b"\x89h\x00tb0"
    ),
    "scalars of one string of bytes": memoized(BYTES, 5_000, SCALAR + dtype_of("S1000000") + b"h\x00\x86R"),
    "long shapes": memoized(LIST, 5_000, EMPTY + b"(K\x01h\x00" + F8 + b"\x89C\x00tb0"),
    "empty sets": b"\x8f" * 5_000_000,
    "empty lists": b"]" * 5_000_000,
    "marks": b"(" * 5_000_000,
    "copies of a number": b"K\x01" + b"2" * 5_000_000,
    "tuples of tuples as a key": b"}" + TUPLES + b"Ns",
    "lists of lists as an index": FROMBUFFER + argument(bytearray(8), F8, (1,), "C") + b"R" + NESTED + b"K\x01s",
    "numbers that hash alike": b"}(" + b"".join(literal(i * (2**61 - 1)) + b"N" for i in range(1, 100_000)) + b"u",
    "a number of a million digits": b"I" + b"1" * 1_000_000 + b"\n",
    "a fraction of a million digits": b"F" + b"1" * 1_000_000 + b"e-1000000\n" + b"F0x\n",
    "a name of a million letters": named("x" * 1_000_000, "y"),
}


def test_bombs_take_little_time_and_memory(tmp_path):
    """In a process of its own with 3 GB of memory; the file limit and this number are what bounds any pickle."""
    for bomb, code in BOMBS.items():
        (tmp_path / bomb).write_bytes(b"\x80\x05" + code + b".")
    program = f"""
import resource, sys, time
from pathlib import Path
from cdit.data import safe_pickle
from cdit.common.errors import DataError
resource.setrlimit(resource.RLIMIT_AS, (3 * 10**9, 3 * 10**9))
for path in sorted(Path({str(tmp_path)!r}).iterdir()):
    begun = time.process_time()
    try:
        safe_pickle.load(path)
        raise SystemExit(f"{{path.name}}: was read")
    except DataError as error:
        assert len(str(error)) < 1000 and "MemoryError" not in str(error.__cause__.__class__), (path.name, error)
    took = time.process_time() - begun
    print(f"{{path.name}}: {{took:.1f}} s")
    assert took < 20, path.name
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" s\n") == len(BOMBS)


def test_values_that_share_their_bytes_are_read(tmp_path):
    """Pickles name what is the same object once; a thousand numbers of one byte are, and so may arrays be."""
    one, text = np.zeros(1000), "x" * 1000
    values = {"scalars": [np.int8(i % 2) for i in range(1000)], "arrays": [one] * 9, "texts": [text] * 999}
    for protocol in range(6):
        (tmp_path / "shared.pkl").write_bytes(pickle.dumps(values, protocol))
        read = safe_pickle.load(tmp_path / "shared.pkl")
        assert read["scalars"] == values["scalars"]
        assert all(array is read["arrays"][0] for array in read["arrays"])
        assert read["texts"] == values["texts"]


def test_a_pickle_cannot_change_how_the_next_one_is_read(tmp_path):
    path = tmp_path / "forged.pkl"
    for name in safe_pickle._ADMITTED:
        for state in ({"x": 1}, (None, {"_function": 1})):
            path.write_bytes(b"\x80\x05" + named(*name.rsplit(".", 1)) + pickle.dumps(state, 3)[2:-1] + b"b.")
            with pytest.raises(DataError, match="altering"):
                safe_pickle.load(path)


@pytest.mark.parametrize("data", [b"", b"not a pickle", pickle.dumps(VALUES)[:-20]], ids=["empty", "text", "cut short"])
def test_damaged_files(tmp_path, data):
    (tmp_path / "bad.pkl").write_bytes(data)
    with pytest.raises(DataError, match=r"bad\.pkl: not a readable pickle"):
        safe_pickle.load(tmp_path / "bad.pkl")


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.pkl"):
        safe_pickle.load(tmp_path / "none.pkl")
