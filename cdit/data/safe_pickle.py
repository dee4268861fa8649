"""Reads pickles of numpy arrays and plain containers; nothing else in them is looked up, called or built.

Numpy's own reconstruction trusts the pickle (a dtype can be given flags under which raw bytes count as object
pointers, an array can be pointed anywhere), so the pickle only ever reaches the stand-ins below, which check what they
are given: none of them is a class that it could instantiate, none can be altered, and no array is larger than its
bytes in the file.

Time and memory are bounded, too: by the number of opcodes, by the bytes that calls may copy (a pickle can name the same
string a million times), and by keys that hash at once (a tuple of tuples of tuples may not, nor a thousand numbers that
hash alike).
"""

import io
import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdit.common.errors import DataError
from cdit.common.files import read_bytes

MAX_BYTES = 2**30
"""Largest file."""
MAX_OPCODES = 2**21
"""Most opcodes; an array has about 20, an entry of an index file of NWM 10. Each takes at most some 200 bytes."""


@dataclass(frozen=True)
class Name:
    """Stands in for what the pickle asks for by name: can be passed on and, if it has a function, called."""

    function: Callable | None = None


class _Dtype:
    """Stands in for `numpy.dtype`: booleans, integers, floats, complex numbers and fixed-width strings."""

    __slots__ = ("numpy",)

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not (isinstance(code, str) and re.fullmatch(r"[biufcSU][1-9][0-9]{0,8}", code)):
            raise pickle.UnpicklingError(f"arrays of dtype {code!r} are not admitted")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.numpy = self.numpy.newbyteorder(state[1])  # no flags, fields or shape are taken over


class _Array(np.ndarray):
    """What `numpy.core.multiarray._reconstruct` makes: empty until filled from bytes, once, so never with objects.

    A second filling would free memory that a view, also made by the pickle, could still show.
    """

    _filled = False

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, fortran, data = state
        if not (isinstance(dtype, _Dtype) and isinstance(data, bytes)):
            raise pickle.UnpicklingError("arrays of objects are not admitted")
        _check_size(shape, dtype, data)
        if self._filled:
            raise pickle.UnpicklingError("filling an array twice is not admitted")
        self._filled = True
        super().__setstate__((version, shape, dtype.numpy, bool(fortran), data))


def _check_size(shape: tuple, dtype: _Dtype, data: bytes | bytearray) -> None:
    """Refuses a shape that is none, or not that of the data."""
    if not (isinstance(shape, tuple) and len(shape) <= 32 and all(type(n) is int and 0 <= n < 2**63 for n in shape)):
        raise pickle.UnpicklingError("arrays of a shape other than at most 32 counts are not admitted")
    if math.prod(shape) * dtype.numpy.itemsize != len(data):
        raise pickle.UnpicklingError("arrays larger or smaller than their data are not admitted")


def _empty_array(subtype: Name, shape: tuple, code: bytes) -> np.ndarray:
    if subtype is not _NDARRAY:
        raise pickle.UnpicklingError("arrays of other classes are not admitted")
    return np.empty(0).view(_Array)


def _scalar(dtype: _Dtype, data: bytes) -> np.generic:
    return _array_from_buffer(data, dtype, (), "C")[()]


def _array_from_buffer(
    data: bytes | bytearray, dtype: _Dtype, shape: tuple, order: str, axes: tuple | None = None
) -> np.ndarray:
    """Contiguous arrays of pickle protocol 5; order "K" (numpy ≥ 2.3) is C order with permuted axes."""
    if not (isinstance(dtype, _Dtype) and isinstance(data, bytes | bytearray)):
        raise pickle.UnpicklingError("arrays of objects are not admitted")
    _check_size(shape, dtype, data)
    array = np.frombuffer(data, dtype.numpy)
    return array.reshape(shape).transpose(axes) if order == "K" else array.reshape(shape, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    """How protocols 0 to 2 write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoding {encoding!r} is not admitted")
    return text.encode("latin1")


def _no_bytes(*arguments: Any) -> bytes:
    """How protocols 0 to 2 write empty bytes; with a number, it would take that much memory."""
    if arguments:
        raise pickle.UnpicklingError("bytes with arguments are not admitted")
    return b""


def _collection(kind: type) -> Callable[[list], set | frozenset]:
    def build(items: list) -> set | frozenset:
        if not isinstance(items, list):
            raise pickle.UnpicklingError("sets of anything but a list are not admitted")
        return kind(_keys(items))

    return build


_NDARRAY = Name()
_ADMITTED = {
    "numpy.ndarray": _NDARRAY,
    "numpy.dtype": Name(_Dtype),
    "numpy.core.multiarray._reconstruct": Name(_empty_array),
    "numpy.core.multiarray.scalar": Name(_scalar),
    "numpy.core.numeric._frombuffer": Name(_array_from_buffer),
    "_codecs.encode": Name(_latin1),
    "builtins.bytes": Name(_no_bytes),
    "builtins.set": Name(_collection(set)),
    "builtins.frozenset": Name(_collection(frozenset)),
}


def _keys(values: Iterable) -> list:
    """The values, if each has a hash that is quickly had and that few others share."""
    values = list(values)
    if not all(type(value) in _KEYS or (type(value) is int and -(2**63) <= value < 2**63) for value in values):
        raise pickle.UnpicklingError("keys other than text and numbers are not admitted")
    return values


_KEYS = (str, bytes, bool, float, type(None))


class Unpickler(pickle._Unpickler):
    """Python's own, since the C one takes memory for as many memo entries as the file claims to have.

    Args:
        data: the pickle.
        admitted: what it may ask for, by module and name.
        expected: what that is, for messages.
    """

    def __init__(self, data: bytes, admitted: Mapping[str, Name], expected: str = "numpy arrays and containers"):
        super().__init__(io.BytesIO(data))
        self.admitted, self.expected = admitted, expected
        self.opcodes_left = MAX_OPCODES
        self.copies_left = 2 * len(data) + 1000  # text that becomes bytes that become an array

    def find_class(self, module: str, name: str) -> Name:
        """What stands in for a name."""
        full_name = f"{module}.{name}"
        canonical = full_name.replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins.")
        if canonical not in self.admitted:
            raise pickle.UnpicklingError(f"it asks for {full_name[:100]}, and only {self.expected} are admitted")
        return self.admitted[canonical]

    def call(self, function: Any, arguments: Any) -> Any:
        """Calls what was asked for by name, as long as the calls do not copy more than the file holds."""
        if type(function) is not Name or type(arguments) is not tuple:
            raise pickle.UnpicklingError("calling what was not asked for by name is not admitted")
        self.charge(arguments)
        if function.function is None:
            raise pickle.UnpicklingError("calling what is only admitted as an argument is not admitted")
        return function.function(*arguments)

    def charge(self, values: tuple) -> None:
        """Counts what may be copied of these values."""
        self.copies_left -= len(values)
        self.copies_left -= sum(len(value) for value in values if isinstance(value, str | bytes | bytearray | list))
        if self.copies_left < 0:
            raise pickle.UnpicklingError("copying the same bytes many times over is not admitted")

    def top(self, *kinds: type) -> Any:
        """What is on top of the stack, if it is of one of these types."""
        if type(self.stack[-1]) not in kinds:
            raise pickle.UnpicklingError("altering what is admitted is not admitted")
        return self.stack[-1]


def _reduce(it: Unpickler) -> None:
    arguments = it.stack.pop()
    it.stack[-1] = it.call(it.stack[-1], arguments)


def _build(it: Unpickler) -> None:
    state = it.stack.pop()
    built = it.top(_Dtype, _Array)
    if type(state) is not tuple:
        raise pickle.UnpicklingError("a state other than a tuple is not admitted")
    it.charge(state)
    built.__setstate__(state)


def _bytearray8(it: Unpickler) -> None:
    size = int.from_bytes(it.read(8), "little")
    it.append(bytearray(it.read(size)))  # Python's own takes that much memory before it looks


def _append(it: Unpickler) -> None:
    value = it.stack.pop()
    it.top(list).append(value)


def _appends(it: Unpickler) -> None:
    values = it.pop_mark()
    it.top(list).extend(values)


def _setitem(it: Unpickler) -> None:
    value, key = it.stack.pop(), it.stack.pop()
    it.top(dict).update(zip(_keys([key]), [value], strict=True))


def _setitems(it: Unpickler) -> None:
    items = it.pop_mark()
    it.top(dict).update(zip(_keys(items[::2]), items[1::2], strict=True))


def _dict(it: Unpickler) -> None:
    items = it.pop_mark()
    it.append(dict(zip(_keys(items[::2]), items[1::2], strict=True)))


def _additems(it: Unpickler) -> None:
    values = it.pop_mark()
    it.top(set).update(_keys(values))


def _frozenset(it: Unpickler) -> None:
    values = it.pop_mark()
    it.append(frozenset(_keys(values)))


def _refuse(it: Unpickler) -> None:
    raise pickle.UnpicklingError("an opcode that numbers, text, containers and arrays do not need is not admitted")


def _counted(load: Callable[[Unpickler], None]) -> Callable[[Unpickler], None]:
    def step(it: Unpickler) -> None:
        it.opcodes_left -= 1
        if it.opcodes_left < 0:
            raise pickle.UnpicklingError(f"more than {MAX_OPCODES} opcodes")
        load(it)

    return step


_LOADS = {
    **dict.fromkeys(("PERSID", "NEXT_BUFFER", "READONLY_BUFFER", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"), _refuse),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _refuse),
    "REDUCE": _reduce,
    "BUILD": _build,
    "BYTEARRAY8": _bytearray8,
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _setitem,
    "SETITEMS": _setitems,
    "DICT": _dict,
    "ADDITEMS": _additems,
    "FROZENSET": _frozenset,
}
Unpickler.dispatch = {
    code: _counted(load)
    for code, load in {**pickle._Unpickler.dispatch, **{getattr(pickle, op)[0]: f for op, f in _LOADS.items()}}.items()
}


def load(path: Path | str) -> Any:
    """Reads a pickle (protocol 0 to 5) of numbers, strings, numpy arrays and dicts, lists, tuples, sets of these.

    Raises:
        DataError: the file cannot be read, is cut short, or holds anything else, which is named and not run.
    """
    data = read_bytes(path, MAX_BYTES)
    try:
        return Unpickler(data, _ADMITTED).load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path}: not a readable pickle ({error})") from error
