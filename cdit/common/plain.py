"""YAML restricted to plain values, for configs from untrusted sources.

jsonargparse reads configs and command lines with what `safe_loader` returns (see `cdit.common.cli`). PyYAML's safe
loader alone accepts a key twice, nesting that overflows the stack, and aliases that expand without bound; jsonargparse
alone imports and calls what `class_path` names.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import yaml

MAX_CHARACTERS = 2**20
MAX_DEPTH = 50
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def safe_loader(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wraps a YAML loader so that it raises yaml.YAMLError for anything but plain values of bounded size."""

    def load_yaml(text: str) -> Any:
        try:
            if len(text) > MAX_CHARACTERS:
                raise yaml.YAMLError(f"longer than {MAX_CHARACTERS} characters")
            _check_nesting(text)
            _check_nodes(yaml.compose(text, Loader=LOADER))
            values = load(text)
            check_plain(values)
        except yaml.YAMLError:
            raise
        except Exception as error:  # numbers of thousands of digits, invalid dates
            raise yaml.YAMLError(str(error)) from error
        return values

    return load_yaml


def check_plain(values: Any, depth: int = 0) -> None:
    """Checks values from YAML or JSON: string keys, no `class_path`, at most `MAX_DEPTH` levels and 64 bits.

    Raises:
        ValueError: a value is not plain.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(values, dict):
        for key in values:
            if not isinstance(key, str):
                raise ValueError(f"{key!r} is not a field name")
            if key in ("class_path", "init_args"):  # which jsonargparse imports and calls
                raise ValueError(f"{key} is not allowed: configs hold plain values")
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            check_plain(value, depth + 1)
    elif isinstance(values, str):
        if "\0" in values:
            raise ValueError(f"{values[:50]!r} has a zero byte")
        with suppress(yaml.YAMLError):
            _check_nesting(values)  # jsonargparse parses strings as YAML, too
    elif isinstance(values, int) and not -(2**63) <= values < 2**63:
        raise ValueError("an integer of more than 64 bits")


def _check_nesting(text: str) -> None:
    depth = 0
    try:
        for event in yaml.parse(text, Loader=LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                break
    except yaml.YAMLError as error:
        if "nesting depth" not in str(error):  # libyaml's own limit, which its look-ahead may reach first
            raise
        depth = MAX_DEPTH + 1
    if depth > MAX_DEPTH:
        raise ValueError(f"YAML nested more than {MAX_DEPTH} deep")


def _check_nodes(node: yaml.Node | None) -> None:
    """Raises for aliases (nodes visited twice) and for duplicate keys."""
    seen: set[int] = set()

    def visit(node: yaml.Node) -> None:
        if id(node) in seen:
            raise yaml.YAMLError("aliases (*name) are not allowed")
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                visit(item)
        elif isinstance(node, yaml.MappingNode):
            names = set()
            for key, value in node.value:
                visit(key)
                visit(value)
                if isinstance(key, yaml.ScalarNode) and key.value in names:
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value!r} is a duplicate key")
                names.add(key.value if isinstance(key, yaml.ScalarNode) else None)

    if node is not None:
        visit(node)
