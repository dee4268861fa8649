"""Reads pickles of numpy arrays and plain containers; nothing else in them is looked up, called or built.

Numpy's own reconstruction trusts the pickle (a dtype can be given flags under which raw bytes count as object
pointers), so the pickle only ever reaches the stand-ins below, which check what they are given.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from cdit.errors import DataError


class _Dtype:
    """Stands in for `numpy.dtype`: booleans, integers, floats, complex numbers and fixed-width strings."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not (isinstance(code, str) and re.fullmatch(r"[biufcSU]\d+", code)):
            raise pickle.UnpicklingError(f"arrays of dtype {code!r} are not admitted")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array(np.ndarray):
    """Stands in for `numpy.ndarray`: filled from bytes only, so never with objects."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, fortran, data = state
        if not (isinstance(dtype, _Dtype) and isinstance(data, bytes)):
            raise pickle.UnpicklingError("arrays of objects are not admitted")
        super().__setstate__((version, shape, dtype.numpy, fortran, data))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Bound methods cannot be assigned to, so a pickle cannot alter them for the next one.
        admitted = {
            "numpy.ndarray": _Array,
            "numpy.dtype": _Dtype,
            "numpy.core.multiarray._reconstruct": self._empty_array,
            "numpy.core.multiarray.scalar": self._scalar,
            "numpy.core.numeric._frombuffer": self._array_from_buffer,
            "_codecs.encode": self._latin1,
            "builtins.set": set,
            "builtins.frozenset": frozenset,
        }
        full_name = f"{module}.{name}"
        canonical = full_name.replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins.")
        if canonical not in admitted:
            raise pickle.UnpicklingError(f"it asks for {full_name}, and only numpy arrays and containers are admitted")
        return admitted[canonical]

    def _empty_array(self, subtype: type, shape: tuple, code: bytes) -> np.ndarray:
        """What `numpy.core.multiarray._reconstruct` does before the array's state is set."""
        return np.empty(0).view(_Array)

    def _scalar(self, dtype: _Dtype, data: bytes) -> np.generic:
        return np.frombuffer(data, dtype.numpy)[0]

    def _array_from_buffer(
        self, data: bytes | bytearray, dtype: _Dtype, shape: tuple, order: str, axes: tuple | None = None
    ) -> np.ndarray:
        """Contiguous arrays of pickle protocol 5; order "K" (numpy ≥ 2.3) is C order with permuted axes."""
        array = np.frombuffer(data, dtype.numpy)
        return array.reshape(shape).transpose(axes) if order == "K" else array.reshape(shape, order=order)

    def _latin1(self, text: str, encoding: str) -> bytes:
        """How protocols 0 to 2 write bytes."""
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"text encoding {encoding!r} is not admitted")
        return text.encode("latin1")


def load(path: Path | str) -> Any:
    """Reads a pickle (protocol 0 to 5) of numbers, strings, numpy arrays and dicts, lists, tuples, sets of these.

    Raises:
        DataError: the file cannot be read, is cut short, or holds anything else, which is named and not run.
    """
    try:
        with open(path, "rb") as file:
            return _Unpickler(file).load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path}: not a readable pickle ({error})") from error
