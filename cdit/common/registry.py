"""Named implementations that a user's module can add to."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Generic, TypeVar

from cdit.common.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """Implementations of one interface by name.

    A user's class is registered under a name, or named by its import path, `my_package.module:Class`. Paths are
    imported where a person gives them (`load`), never because a file that was read names them (`get`).

    Args:
        field: the config field that chooses, for messages.
    """

    def __init__(self, field: str):
        self.field = field
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that adds an implementation."""

        def add(implementation: T) -> T:
            self._entries[name] = implementation
            return implementation

        return add

    @property
    def names(self) -> list[str]:
        """Of all that are registered."""
        return list(self._entries)

    def get(self, name: str) -> T:
        """The implementation of a name, or of a path whose module is already imported.

        Raises:
            UserError: there is none.
        """
        module, _, attribute = name.partition(":")
        if name not in self._entries and attribute and hasattr(sys.modules.get(module), attribute):
            self._entries[name] = getattr(sys.modules[module], attribute)
        if name not in self._entries:
            hint = f"; import {module} first" if attribute else ""
            raise UserError(f"{self.field} is {name!r}, expected one of {', '.join(self.names)}{hint}")
        return self._entries[name]

    def load(self, name: str) -> T:
        """As `get`, after importing the module of a path.

        Raises:
            UserError: the module cannot be imported, or has no such attribute.
        """
        module, _, attribute = name.partition(":")
        if attribute:
            try:
                import_module(module)
            except ImportError as error:
                raise UserError(f"{self.field} is {name!r}: cannot import {module} ({error})") from error
        return self.get(name)
