"""Command lines from typed dataclasses: help from docstrings, YAML files, one clear error, exit code 2."""

import re
import signal
import sys
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import Any, NamedTuple, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader, set_parsing_settings
from tqdm import tqdm

from cdit.common.errors import DISK_ERRORS, Interrupted, UserError
from cdit.common.limits import check_limits, readable
from cdit.common.plain import check_plain, safe_loader

set_parsing_settings(docstring_parse_attribute_docstrings=True)
set_loader("yaml", load_yaml := safe_loader(get_loader("yaml")), (yaml.YAMLError,))

T = TypeVar("T")


class Command(NamedTuple):
    """A subcommand."""

    config_class: type
    help: str
    default_file: Path | None = None
    """See `parse_config`."""
    positional: bool = False
    """See `parse_config`."""
    file: str | None = None
    """Name that `--help` shows for a config file given as the first argument, such as SPEC.yaml."""


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Help that keeps the line breaks of descriptions and states limits in words."""

    def _expand_help(self, action: Action) -> str:
        return readable(super()._expand_help(action))


class _Parser(ArgumentParser):
    """Names the config file that was read in every error; reads only some sections of it, if it is given any."""

    files: Sequence[str] = ()
    sections: Sequence[str] | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)  # an abbreviation could change its meaning

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        with suppress(yaml.YAMLError):  # which is reported below
            values = load_yaml(content)
            if self.sections is not None and isinstance(values, dict):
                content = yaml.safe_dump({name: values[name] for name in self.sections if name in values})
        return super().parse_string(content, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(
            _on_one_line(readable(message.rstrip())) + "".join(f" (config file: {file})" for file in self.files), ex
        )


def parse_config(
    config_class: type[T],
    description: str,
    argv: Sequence[str] | None = None,
    default_file: Path | str | None = None,
    positional: bool = False,
    listed: str | None = None,
    sections: Sequence[str] | None = None,
) -> T:
    """Reads a dataclass from `--config FILE` (YAML) and overrides such as `--model.depth 6`.

    A field that is a bool can be given as a bare flag: `--compile` stands for `--compile true`.

    Args:
        config_class: the dataclass; its attribute docstrings become the help text.
        description: what `--help` says about the program; paragraphs are filled, indented lines kept.
        argv: the arguments, by default those of the process.
        default_file: the YAML file that is read if there is no `--config`.
        positional: whether fields without a default are positional arguments, in their order.
        listed: a list field that takes any number of positional arguments.
        sections: the only fields that are read from a config file, which may belong to another program and have more.

    Unknown or ill-typed fields end the process with a message that names them and exit code 2.
    """
    parser = _parser(config_class, description, positional, listed=listed)
    parser.sections = sections
    arguments = _complete(sys.argv[1:] if argv is None else argv, parser, config_class, default_file)
    return _instance(config_class, _parse(parser, arguments))


def parse_command(
    commands: Mapping[str, Command], description: str, argv: Sequence[str] | None = None
) -> tuple[str, Any]:
    """Reads a subcommand and its options, see `parse_config`.

    Returns:
        The subcommand's name, and an instance of its dataclass.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog=_program(), description=_filled(description), formatter_class=_Formatter)
    subcommands = parser.add_subcommands(dest="command", title="commands")
    for name, (config_class, text, default_file, positional, file) in commands.items():
        subparser = _parser(
            config_class, f"{text[0].upper()}{text[1:]}.", positional, f"{_program()} {name}", file=file
        )
        subcommands.add_subcommand(name, subparser, help=text)
        if argv[:1] == [name]:
            if file and argv[1:] and not argv[1].startswith("-"):
                argv.insert(1, "--config")
            argv[1:] = _complete(argv[1:], subparser, config_class, default_file)
    values = _parse(parser, argv)
    name = values["command"]
    return name, _instance(commands[name].config_class, values[name])


def _parser(
    config_class: type,
    description: str,
    positional: bool,
    program: str | None = None,
    listed: str | None = None,
    file: str | None = None,
) -> _Parser:
    program = program or _program()
    required = [f.name for f in fields(config_class) if f.default is f.default_factory is MISSING and f.name != listed]
    shown = file or " ".join(name.upper() if positional else f"--{name} {name.upper()}" for name in required)
    if listed:
        default = next(f.default_factory for f in fields(config_class) if f.name == listed)
        item = listed.upper().removesuffix("S")
        shown = f"{f'{item} [{item} …]' if default is MISSING else f'[{item} …]'} {shown}"
    parser = _Parser(
        prog=program,
        usage=f"{program} {shown} [options]".replace("  ", " "),
        description=_filled(description),
        formatter_class=_Formatter,
        epilog="Without a value, an option of {true,false} means true." if any(_bools(config_class)) else None,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below.")
    alone = required if positional else []  # jsonargparse makes options of fields that follow those with defaults
    parser.add_class_arguments(config_class, fail_untyped=True, skip={listed, *alone} - {None})
    classes = filter(is_dataclass, reversed(config_class.__mro__))
    descriptions = {p.arg_name: p.description for each in classes for p in parse_from_object(each).params}
    for name in alone:
        parser.add_argument(name, type=get_type_hints(config_class)[name], help=descriptions[name])
    if listed:
        about = descriptions[listed]
        kind = get_args(get_type_hints(config_class)[listed])[0]
        count = {"nargs": "+"} if default is MISSING else {"nargs": "*", "default": default()}
        parser.add_argument(listed, type=kind, help=about, metavar=item, **count)
    return parser


def _on_one_line(message: str) -> str:
    """jsonargparse's several lines about a value of the wrong type as "name is value, expected type"."""
    name = re.match(r'Parser key "(.+?)":\n', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message, re.DOTALL)
    kinds = re.findall(r"Expected an? (.+?)(?:\. Got value.*)?$", message, re.MULTILINE)
    if not (name and value and kinds):
        return message
    written = " or ".join(re.sub(r"<class '(.+)'>", r"\1", kind) for kind in kinds)
    written = re.sub(r"typing\.Literal\[(.+?)\]", r"one of \1", written).replace("NoneType", "null")
    return f"{name[1]} is {value[1]}, expected {written}"


def _program() -> str:
    spec = sys.modules["__main__"].__spec__
    return Path(sys.argv[0]).name if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


def _filled(text: str) -> str:
    """Paragraphs filled to the width of the terminal; indented ones are unchanged."""
    width = get_terminal_size().columns - 2
    paragraphs = text.strip("\n").split("\n\n")
    return "\n\n".join(p.rstrip() if p.startswith(" ") else fill(p, width) for p in paragraphs)


def _complete(argv: Sequence[str], parser: _Parser, config_class: type, default_file: Path | str | None) -> list[str]:
    """Adds the default file and the values of bare flags to the arguments, and sets the parser's config files."""
    argv = list(argv)
    if default_file is not None and not any(a == "--config" or a.startswith("--config=") for a in argv):
        argv = ["--config", str(default_file), *argv]
    parser.files = [file for flag, file in pairwise(argv) if flag == "--config"]
    parser.files += [a.removeprefix("--config=") for a in argv if a.startswith("--config=")]
    flags = {f"--{name}" for name in _bools(config_class)}
    following = [*argv, ""][1:]
    return [
        f"{argument}=true" if argument in flags and value.lower() not in ("true", "false") else argument
        for argument, value in zip(argv, following, strict=True)
    ]


def _bools(config_class: type) -> Iterator[str]:
    """Dotted names of the fields that are bools."""
    for name, kind in get_type_hints(config_class).items():
        if kind is bool:
            yield name
        elif is_dataclass(kind):
            yield from (f"{name}.{inner}" for inner in _bools(kind))


def _parse(parser: _Parser, argv: list[str]) -> dict[str, Any]:
    try:
        return parser.parse_args(argv).as_dict()
    except (UnicodeDecodeError, RecursionError) as error:
        parser.error(str(error), error)


def _instance(config_class: type[T], values: dict[str, Any]) -> T:
    values.pop("config", None)
    return parser_instance(config_class, values)


def parser_instance(config_class: type[T], values: dict[str, Any]) -> T:
    """Builds a (nested) config dataclass from plain values, with the same checks as the command line.

    Raises:
        UserError: a value that no config can hold or that is out of its limits (see `cdit.common.limits`), or something
            else in place of a group of fields.
        Exception: jsonargparse's, for other fields or types than the dataclass has.
    """
    try:
        check_plain(values)
    except ValueError as error:
        raise UserError(str(error)) from error
    _check_groups(config_class, values)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class, "it", fail_untyped=True)
    config = parser.instantiate(parser.parse_object({"it": values})).it
    check_limits(config)
    return config


def _check_groups(config_class: type, values: Any, name: str = "") -> None:
    """Rejects null, and anything but fields where a group of them is expected, which jsonargparse overlooks."""
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
    """Runs a command's `main` and turns what ends it early into one line on stderr and an exit code.

    2: `UserError`, or a disk that is full or not writable. 75: `Interrupted`. 130: Ctrl-C.
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


def exit_on_sigterm() -> None:
    """Makes SIGTERM end this process as an exception does, so that what it has started is closed or killed, too."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _end(message: str, code: int) -> NoReturn:
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # otherwise the bar is drawn over the message
    print(message, file=sys.stderr)
    sys.exit(code)
