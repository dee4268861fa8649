"""Command lines from typed dataclasses: help from docstrings, YAML files, one clear error, exit code 2."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings
from tqdm import tqdm

from cdit.common.errors import DISK_ERRORS, Interrupted, UserError
from cdit.common.plain import check_plain, safe_loader

set_parsing_settings(docstring_parse_attribute_docstrings=True)
set_loader("yaml", load_yaml := safe_loader(get_loader("yaml")), (yaml.YAMLError,))

T = TypeVar("T")


class _Parser(ArgumentParser):
    """Names in every error the config file that was read; reads only some sections of one, if told so."""

    files: Sequence[str] = ()
    sections: Sequence[str] | None = None

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        with suppress(yaml.YAMLError):  # which is reported below
            values = load_yaml(content)
            if self.sections is not None and isinstance(values, dict):
                content = yaml.safe_dump({name: values[name] for name in self.sections if name in values})
        return super().parse_string(content, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(message.rstrip() + "".join(f" (config file: {file})" for file in self.files), ex)


def parse_config(
    config_class: type[T],
    description: str,
    argv: Sequence[str] | None = None,
    default_file: Path | str | None = None,
    positional: bool = False,
    sections: Sequence[str] | None = None,
) -> T:
    """Reads a dataclass from `--config FILE` (YAML) and overrides such as `--model.depth 6`.

    Args:
        config_class: the dataclass; its attribute docstrings become the help text.
        description: what `--help` says of the program.
        argv: the arguments, by default those of the process.
        default_file: the YAML file read when no `--config` is given.
        positional: whether fields without a default are given by position, in their order, and not by name.
        sections: the fields that are read from a config file, which may be one of another program and have more.

    Unknown or ill-typed fields end the process with a message that names them and exit code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(description=description)
    parser.sections = sections
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below.")
    parser.add_class_arguments(config_class, as_positional=positional, fail_untyped=True)
    if default_file is not None and not any(a == "--config" or a.startswith("--config=") for a in argv):
        argv = ["--config", str(default_file), *argv]
    parser.files = [file for flag, file in pairwise(argv) if flag == "--config"]
    parser.files += [a.removeprefix("--config=") for a in argv if a.startswith("--config=")]
    try:
        values = parser.parse_args(argv).as_dict()
    except (UnicodeDecodeError, RecursionError) as error:
        parser.error(str(error), error)
    values.pop("config", None)
    return parser_instance(config_class, values)


def parser_instance(config_class: type[T], values: dict[str, Any]) -> T:
    """Builds a (nested) config dataclass from plain values, with the same checks as the command line.

    Raises:
        UserError: a value is none that a config can hold, or a group of fields is something else.
        Exception: of jsonargparse, for other fields or types than the dataclass has.
    """
    try:
        check_plain(values)
    except ValueError as error:
        raise UserError(str(error)) from error
    _check_groups(config_class, values)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class, "it", fail_untyped=True)
    return parser.instantiate(parser.parse_object({"it": values})).it


def _check_groups(config_class: type, values: Any, name: str = "") -> None:
    """Refuses null, and what is no group of fields where one is expected; jsonargparse would not see it."""
    if not isinstance(values, dict):
        raise UserError(f"{name or config_class.__name__} is {ascii(values)[:100]}, expected fields with values")
    for field, kind in get_type_hints(config_class).items():
        full_name = f"{name}.{field}".lstrip(".")
        if field not in values:
            continue
        if is_dataclass(kind):
            _check_groups(kind, values[field], full_name)
        elif values[field] is None and kind is not Any and type(None) not in get_args(kind):
            raise UserError(f"{full_name} is null, expected a value")


def run(main: Callable[[], Any]) -> None:
    """Runs a command line's `main`; what ends it early becomes one line on stderr and an exit code.

    `UserError`, or a disk that is full or cannot be written to: 2. `Interrupted`: 75. Ctrl-C: 130.
    """
    try:
        main()
    except UserError as error:
        _end(f"error: {error}", 2)
    except Interrupted as error:
        _end(f"stopped: {error}", 75)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _end(f"error: {where}{error.strerror}", 2)
    except KeyboardInterrupt:
        sys.exit(130)


def _end(message: str, code: int) -> NoReturn:
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # else the message stands behind it, and it is drawn again below
    print(message, file=sys.stderr)
    sys.exit(code)
