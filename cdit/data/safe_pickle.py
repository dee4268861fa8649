"""Reads pickles of numpy arrays and plain containers, and rejects all others before any code in them runs.

An allow-list of names is not enough: numpy rebuilds a dtype from flags in the pickle, and with the wrong flags it
interprets the bytes of an array as pointers to objects. The replacements below build only arrays of numbers and text,
from bytes.
"""

import pickle
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from cdit.common.errors import DataError
from cdit.common.files import read_bytes

MAX_BYTES = 2**27
"""Largest file; the poses of a million frames take 24 MB."""


def load(path: Path | str) -> Any:
    """Reads a pickle (any protocol) of numbers, strings, numpy arrays and dicts, lists, tuples and sets of these.

    Raises:
        DataError: the file is missing, damaged or larger than `MAX_BYTES`, or refers to anything else, which is named
            and not run.
    """
    data = read_bytes(path, MAX_BYTES)
    try:
        return _Unpickler(BytesIO(data)).load()
    except Exception as error:  # a damaged pickle can raise almost anything
        raise DataError(f"{path}: not a readable pickle ({error})") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if full_name not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {full_name[:100]}, expected numpy arrays and plain containers")
        return _ALLOWED[full_name]


class _Dtype:
    """Replaces numpy.dtype."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not re.fullmatch(r"[biufcSU][1-9][0-9]{0,8}", code):
            raise pickle.UnpicklingError(f"arrays of dtype {code} are not allowed")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array(np.ndarray):
    """Replaces numpy.ndarray while it is rebuilt: empty until its state is set."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, fortran, data = state
        super().__setstate__((version, shape, dtype.numpy, fortran, data))

    def __reduce_ex__(self, protocol: int) -> Any:
        return np.asarray(self).__reduce_ex__(protocol)


def _array(data: bytes, dtype: _Dtype, shape: tuple, order: str, axes: tuple | None = None) -> np.ndarray:
    """Replaces numpy's _frombuffer; order "K" (numpy ≥ 2.3) is C order with permuted axes."""
    array = np.frombuffer(bytes(memoryview(data)), dtype.numpy)
    return array.reshape(shape).transpose(axes) if order == "K" else array.reshape(shape, order=order)


_ALLOWED = {
    "numpy.ndarray": "numpy.ndarray",  # named as an argument, never called
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": lambda subtype, shape, code: np.empty(0).view(_Array),
    "numpy.core.multiarray.scalar": lambda dtype, data: _array(data, dtype, (), "C")[()],
    "numpy.core.numeric._frombuffer": _array,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # how protocols 0 to 2 write bytes
    "__builtin__.bytes": lambda: b"",
    "builtins.bytes": lambda: b"",
    "__builtin__.set": set,
    "builtins.set": set,
    "__builtin__.frozenset": frozenset,
    "builtins.frozenset": frozenset,
}
