"""Plain values from YAML: nothing in it is run, repeated, hidden or nested beyond what a person writes.

jsonargparse reads configs and command lines by what `safe_loader` gives (see `cdit.common.cli`). Its own loader admits
two keys of the same name, nesting that ends the process, and aliases that unfold to more than any memory.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import yaml

MAX_CHARACTERS = 2**20
MAX_DEPTH = 50
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
RUN = {"class_path", "init_args"}
"""Keys by which jsonargparse imports and calls what they name."""


def safe_loader(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """A loader of YAML that gives a text to another one when it has been found harmless.

    The new one raises yaml.YAMLError for a text that is not YAML, not plain values, or too large.
    """

    def load_yaml(text: str) -> Any:
        if len(text) > MAX_CHARACTERS:
            raise yaml.YAMLError(f"longer than {MAX_CHARACTERS} characters")
        try:
            if is_nested(text):
                raise yaml.YAMLError(f"nested more than {MAX_DEPTH} deep")
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=LOADER)):
                raise yaml.YAMLError("aliases (*name) are not admitted")
            _check_nodes(yaml.compose(text, Loader=LOADER))
            values = load(text)
            check_plain(values)
        except yaml.YAMLError:
            raise
        except Exception as error:  # of numbers with thousands of digits, of dates that are none
            raise yaml.YAMLError(str(error)) from error
        return values

    return load_yaml


def check_plain(values: Any, depth: int = 0) -> None:
    """Refuses values, of YAML or JSON, that jsonargparse would run, or that numbers elsewhere cannot hold.

    Raises:
        ValueError: they are such values.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(values, dict):
        if any(not isinstance(key, str) for key in values):
            raise ValueError(f"{next(key for key in values if not isinstance(key, str))!r} is no name of a field")
        if named := RUN & values.keys():
            raise ValueError(f"{min(named)} is not admitted: configs hold plain values")
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            check_plain(value, depth + 1)
    elif isinstance(values, str) and "\0" in values:  # which no path and no name can hold
        raise ValueError(f"{values[:50]!r} has a zero byte")
    elif isinstance(values, str) and is_nested(values):  # jsonargparse looks for YAML in strings, too
        raise ValueError(f"a string of YAML nested more than {MAX_DEPTH} deep")
    elif isinstance(values, int) and not -(2**63) <= values < 2**63:
        raise ValueError("a whole number of more than 64 bits")


def is_nested(text: str) -> bool:
    """Whether YAML is nested more than `MAX_DEPTH` deep, by its events: building it may end the process."""
    depth = 0
    with suppress(yaml.YAMLError):  # what stands before is all that will be built
        for event in yaml.parse(text, Loader=LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                return True
    return False


def _check_nodes(node: yaml.Node | None) -> None:
    """Refuses a key that is there twice, and so one of its values that nobody will see.

    Raises:
        yaml.YAMLError: there is one.
    """
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_nodes(item)
    elif isinstance(node, yaml.MappingNode):
        names = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value!r} is there twice")
            names.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            _check_nodes(value)
