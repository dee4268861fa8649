"""Messages between server and page: JSON to the server, JSON and arrays from it."""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cdit.common.errors import DataError
from cdit.common.files import parse_json, to_json


class Malformed(Exception):
    """A message that the page would not send."""


def pack(kind: str, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> bytes:
    """A binary message: uint32 length of the JSON (little endian), the JSON, then the arrays one after the other.

    The JSON holds the facts (null for NaN), `type`, and `arrays`: by name [dtype, shape], in their order. Arrays are
    uint8 or float32.
    """
    arrays = arrays or {}
    listed = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
    text = to_json({**facts, "type": kind, "arrays": listed}).encode()
    return b"".join([struct.pack("<I", len(text)), text, *(array.tobytes() for array in arrays.values())])


class Message:
    """A JSON message of the page, whose fields are checked as they are read.

    Raises:
        Malformed: it is not a JSON object with a `type`, or a field is not what is expected.
    """

    def __init__(self, text: str):
        try:
            self._fields = parse_json(text, "message")
        except DataError as error:
            raise Malformed(str(error)[:200]) from error
        if not isinstance(self._fields, dict) or not isinstance(self._fields.get("type"), str):
            raise Malformed("expected an object with a type")
        self.type: str = self._fields["type"]

    def has(self, name: str) -> bool:
        """Whether there is such a field, which is not null."""
        return self._fields.get(name) is not None

    def number(self, name: str, low: float, high: float) -> float:
        """A number from low to high."""
        value = self._fields.get(name)
        if not _is_number(value, low, high):
            raise Malformed(f"{name}: expected a number from {low:g} to {high:g}")
        return float(value)

    def numbers(self, name: str, bounds: Sequence[tuple[float, float]]) -> tuple[float, ...]:
        """One number for each (low, high)."""
        value = self._fields.get(name)
        if not isinstance(value, list) or len(value) != len(bounds):
            raise Malformed(f"{name}: expected {len(bounds)} numbers")
        for i, (x, (low, high)) in enumerate(zip(value, bounds, strict=True)):
            if not _is_number(x, low, high):
                raise Malformed(f"{name}: expected number {i} to be from {low:g} to {high:g}")
        return tuple(map(float, value))

    def integer(self, name: str, low: int, high: float = math.inf) -> int:
        """An integer from low to high."""
        value = self._fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise Malformed(f"{name}: expected an integer from {low} to {high:g}")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._fields.get(name)
        if not isinstance(value, bool):
            raise Malformed(f"{name}: expected true or false")
        return value

    def choice(self, name: str, options: Sequence[str]) -> str:
        """One of the options."""
        value = self._fields.get(name)
        if value not in options:
            raise Malformed(f"{name}: expected one of {', '.join(options)}")
        return value

    def pairs(self, name: str, ends: tuple[int, int], most: int) -> list[tuple[int, int]]:
        """At most `most` different pairs of integers, from (0, 0) to below the ends."""
        value = self._fields.get(name)
        if not isinstance(value, list) or len(value) > most:
            raise Malformed(f"{name}: expected at most {most} pairs")
        for pair in value:
            good = isinstance(pair, list) and len(pair) == 2 and all(type(i) is int for i in pair)
            if not good or not all(0 <= i < end for i, end in zip(pair, ends, strict=True)):
                raise Malformed(f"{name}: expected pairs of integers below {ends}")
        return list(dict.fromkeys(map(tuple, value)))


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
