"""Limits of the values in configs, stated with their types: `steps: Positive[int] = 1000`."""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from itertools import cycle
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from cdit.common.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Limit:
    """A condition on a value, in words and as a function."""

    expected: str
    holds: Callable[[Any], bool]

    def __repr__(self) -> str:
        return f"‹{self.expected}›"  # see `readable`


def within(low: float, high: float) -> Limit:
    """From `low` to `high`, both included."""
    return Limit(f"{low:g} to {high:g}", lambda x: low <= x <= high)


Positive = Annotated[T, Limit("more than 0", lambda x: x > 0)]
NotNegative = Annotated[T, Limit("at least 0", lambda x: x >= 0)]
Share = Annotated[float, Limit("at least 0 and less than 1", lambda x: 0 <= x < 1)]
Between = Annotated[float, Limit("between 0 and 1, both excluded", lambda x: 0 < x < 1)]
Distinct = Annotated[T, Limit("at least one, each of them once", lambda x: x and len(set(x)) == len(x))]

Offsets = Annotated[list[int], Limit("non-zero numbers of frames", lambda x: x and 0 not in x)]


def check_limits(config: object, prefix: str = "") -> None:
    """Checks the fields of a dataclass and of those nested in it, named with `prefix`; None is always allowed.

    Raises:
        UserError: a value is out of its limits; the message names the field.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        _check(prefix + name, getattr(config, name), hint)


def readable(text: str) -> str:
    """Help or an error with types such as `int, more than 0` in place of `Annotated[int, ‹more than 0›]`."""
    return text.replace("Annotated[", "").replace("›]", "").replace("‹", "")


def _check(name: str, value: Any, hint: Any) -> None:
    if value is None:
        return
    if is_dataclass(value):
        check_limits(value, f"{name}.")
    elif get_origin(hint) is Annotated:
        kind, *limits = get_args(hint)
        for limit in limits:
            if isinstance(limit, Limit) and not limit.holds(value):
                raise UserError(f"{name} is {value}, expected {limit.expected}")
        _check(name, value, kind)
    elif isinstance(value, list | tuple) and get_origin(hint) in (list, tuple):
        for item, kind in zip(value, cycle(get_args(hint))):
            _check(name, item, kind)
    else:
        for kind in get_args(hint):  # of a union
            _check(name, value, kind)
