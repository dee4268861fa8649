"""Reads pickles of numpy arrays and plain containers; nothing else in them is looked up, called or built.

Numpy's own reconstruction trusts the pickle (a dtype can be given flags under which raw bytes count as object
pointers, an array can be pointed anywhere), so the pickle only ever reaches the stand-ins below, which check what they
are given: none of them is a class that it could instantiate, none can be altered, and no array is larger than its
bytes in the file.
"""

import io
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cdit.errors import DataError


class _Name:
    """Stands in for what the pickle asks for by name: can be passed on and, if it has a function, called."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable | None = None):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        if self._function is None:
            raise pickle.UnpicklingError("calling numpy.ndarray is not admitted")
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("altering what is admitted is not admitted")


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
    if not (isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 2**63 for size in shape)):
        raise pickle.UnpicklingError("arrays of a shape other than counts are not admitted")
    if len(shape) > 32 or math.prod(shape) * dtype.numpy.itemsize != len(data):
        raise pickle.UnpicklingError("arrays larger or smaller than their data are not admitted")


def _empty_array(subtype: _Name, shape: tuple, code: bytes) -> np.ndarray:
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
        return kind(items)

    return build


_NDARRAY = _Name()
_ADMITTED = {
    "numpy.ndarray": _NDARRAY,
    "numpy.dtype": _Name(_Dtype),
    "numpy.core.multiarray._reconstruct": _Name(_empty_array),
    "numpy.core.multiarray.scalar": _Name(_scalar),
    "numpy.core.numeric._frombuffer": _Name(_array_from_buffer),
    "_codecs.encode": _Name(_latin1),
    "builtins.bytes": _Name(_no_bytes),
    "builtins.set": _Name(_collection(set)),
    "builtins.frozenset": _Name(_collection(frozenset)),
}


class _Unpickler(pickle._Unpickler):
    """Python's own, since the C one takes memory for as many memo entries as the file claims to have."""

    def find_class(self, module: str, name: str) -> _Name:
        full_name = f"{module}.{name}"
        canonical = full_name.replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins.")
        if canonical not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {full_name}, and only numpy arrays and containers are admitted")
        return _ADMITTED[canonical]


def load(path: Path | str) -> Any:
    """Reads a pickle (protocol 0 to 5) of numbers, strings, numpy arrays and dicts, lists, tuples, sets of these.

    Raises:
        DataError: the file cannot be read, is cut short, or holds anything else, which is named and not run.
    """
    try:
        return _Unpickler(io.BytesIO(Path(path).read_bytes())).load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path}: not a readable pickle ({error})") from error
