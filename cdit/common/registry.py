"""Named implementations that a user's module can add to."""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Generic, TypeVar

from cdit.common.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """Implementations of one interface by name.

    A user's class is registered under a name, or named by its import path, `my_package.module:Class`. Modules are
    imported only if a person names them: in a training config (`load`), or in the environment variable CDIT_PLUGINS (a
    comma-separated list, imported when `get` meets an unknown name). A name in a saved world model imports nothing, and
    paths resolve to subclasses of the interface only, so such a file cannot cause anything else to be called.

    Args:
        field: the config field that chooses, for messages.
        interface: what a class named by its path must derive from.
    """

    def __init__(self, field: str, interface: type):
        self.field, self.interface = field, interface
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
        """The implementation of a name, or of a path whose module is already imported or listed in CDIT_PLUGINS.

        Raises:
            UserError: there is none, it is not a subclass of the interface, or a plug-in cannot be imported.
        """
        if name not in self._entries:
            for plugin in filter(None, os.environ.get("CDIT_PLUGINS", "").split(",")):
                _import(plugin, "CDIT_PLUGINS")
        if name in self._entries:
            return self._entries[name]
        module, _, attribute = name.partition(":")
        if not attribute:
            raise UserError(f"{self.field} is {name!r}, expected one of {', '.join(self.names)}, or my_module:Class")
        if module not in sys.modules:
            raise UserError(f"{self.field} is {name!r}: to allow importing {module}, set CDIT_PLUGINS={module}")
        found = getattr(sys.modules[module], attribute, None)
        if not (isinstance(found, type) and issubclass(found, self.interface)):
            raise UserError(f"{self.field} is {name!r}, expected a subclass of {self.interface.__name__}")
        return found

    def load(self, name: str) -> T:
        """As `get`, after importing the module of a path.

        Raises:
            UserError: the module cannot be imported, or has no such class.
        """
        module, _, attribute = name.partition(":")
        if attribute:
            _import(module, self.field)
        return self.get(name)


def _import(module: str, field: str) -> None:
    try:
        import_module(module)
    except (ImportError, TypeError, ValueError) as error:  # the last two: not a name, such as a path
        raise UserError(f"{field} names the module {module}, which cannot be imported ({error})") from error
