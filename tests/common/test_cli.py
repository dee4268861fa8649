"""Command lines: where values come from, and that every mistake is named and ends with code 2."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from cdit.common.cli import Command, parse_command, parse_config, parser_instance, run
from cdit.common.errors import DataError, UserError


@dataclass
class Part:
    """A part of the configuration."""

    depth: int = 4
    """How deep it goes."""
    kind: Literal["a", "b"] = "a"
    """Which of the two."""
    size: tuple[int, int] = (8, 8)
    """Height and width."""


@dataclass
class Whole:
    """All of it."""

    part: Part = field(default_factory=Part)
    """The part."""
    rate: float = 0.5
    """How fast."""
    name: str | None = None
    """What it is called."""


def parse(*argv: str, default_file: Path | None = None) -> Whole:
    return parse_config(Whole, "A test.", argv, default_file)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text("rate: 0.25\npart:\n  depth: 6\n  size: [4, 6]\n")
    return path


def test_defaults_then_file_then_overrides(config):
    assert parse() == Whole()
    assert parse("--config", str(config)) == Whole(Part(depth=6, size=(4, 6)), rate=0.25)
    assert parse("--config", str(config), "--part.depth", "7", "--name=x").part == Part(depth=7, size=(4, 6))
    assert parse(f"--config={config}", "--part.depth=7").part.depth == 7


def test_the_default_file_is_read_when_no_other_is_given(config, tmp_path):
    assert parse(default_file=config).rate == 0.25
    assert parse("--rate", "2", default_file=config) == Whole(Part(depth=6, size=(4, 6)), rate=2.0)
    other = tmp_path / "other.yaml"
    other.write_text("name: other\n")
    assert parse("--config", str(other), default_file=config) == Whole(name="other")


def test_tuples_and_literals_come_typed(config):
    whole = parse("--config", str(config), "--part.kind", "b", "--part.size", "[1, 2]")
    assert whole.part.size == (1, 2)
    assert isinstance(whole.part, Part)


def test_some_sections_of_another_programs_file(tmp_path, capsys):
    file = tmp_path / "training.yaml"
    file.write_text("steps: 9\nrate: fast\nname: x\npart: {depth: 6}\n")
    for argv in (["--config", str(file)], [f"--config={file}"]):
        whole = parse_config(Whole, "A test.", [*argv, "--part.kind", "b"], sections=("part", "absent"))
        assert whole == Whole(Part(depth=6, kind="b"))
    mistakes = {"part: {width: 3}": "width", "part: [": "Problems parsing config", "[1, 2]": "Unexpected config"}
    for text, named in mistakes.items():
        file.write_text(text)
        with pytest.raises(SystemExit) as stop:
            parse_config(Whole, "A test.", ["--config", str(file)], sections=("part",))
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert named in error
        assert str(file) in error


@dataclass
class Move:
    """What to move where."""

    source: str
    """What."""
    target: str
    """Where."""
    part: Part = field(default_factory=Part)
    """The part."""


def test_fields_without_defaults_by_position(capsys):
    move = parse_config(Move, "A test.", ["a", "--part.depth", "5", "b"], positional=True)
    assert move == Move("a", "b", Part(depth=5))
    assert move == parse_config(Move, "A test.", ["--target", "b", "--source", "a", "--part.depth", "5"])
    for argv in (["a"], ["a", "b", "c"], ["--source", "a", "--target", "b"]):
        with pytest.raises(SystemExit) as stop:
            parse_config(Move, "A test.", argv, positional=True)
        assert stop.value.code == 2
    assert "target" in capsys.readouterr().err


@dataclass
class Switches:
    """What is on."""

    fast: bool = False
    """Whether it is fast."""
    name: str = "x"
    """What it is called."""


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--fast"], Switches(True)),
        (["--fast", "--name", "y"], Switches(True, "y")),
        (["--name", "y", "--fast"], Switches(True, "y")),
        (["--fast", "true"], Switches(True)),
        (["--fast", "false"], Switches(False)),
        (["--fast=false"], Switches(False)),
        ([], Switches(False)),
    ],
)
def test_a_bare_flag_means_true(argv, expected):
    assert parse_config(Switches, "A test.", argv) == expected


def test_subcommands_have_options_of_their_own(config, tmp_path, capsys):
    commands = {"move": Command(Move, "moves it", positional=True), "show": Command(Whole, "shows it", config)}
    assert parse_command(commands, "A test.", ["move", "a", "b"]) == ("move", Move("a", "b"))
    shown = Whole(Part(depth=9, size=(4, 6)), rate=0.25)
    assert parse_command(commands, "A test.", ["show", "--part.depth", "9"]) == ("show", shown)
    other = tmp_path / "other.yaml"
    other.write_text("rate: 2\n")
    assert parse_command(commands, "A test.", ["show", "--config", str(other)]) == ("show", Whole(rate=2.0))
    positional = {"show": Command(Whole, "shows it", file="SPEC.yaml")}
    assert parse_command(positional, "A test.", ["show", str(other), "--name", "x"]) == (
        "show",
        Whole(rate=2.0, name="x"),
    )
    for argv, named in (([], "move"), (["other"], "other"), (["show", "--part.width", "3"], "part.width")):
        with pytest.raises(SystemExit) as stop:
            parse_command(commands, "A test.", argv)
        assert stop.value.code == 2
        assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--part.width", "3"], "part.width"),
        (["--part.depth", "many"], "part.depth"),
        (["--part.dep", "3"], "--part.dep"),
        (["--part.depth", "2.5"], "part.depth"),
        (["--part.kind", "c"], "part.kind"),
        (["--part.size", "[1, 2, 3]"], "part.size"),
        (["--rate", "fast"], "rate"),
        (["--config", "no/such/file.yaml"], "no/such/file.yaml"),
    ],
)
def test_wrong_arguments_are_named_and_end_with_code_2(argv, named, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("part:\n  width: 3\n", "width"),
        ("part:\n  depth: many\n", "depth"),
        ("speed: 1\n", "speed"),
        ("- 1\n", "- 1"),
        ("part: [1, 2\n", "line 1"),
        ('part: "\\0"\n', r"'\x00' has a zero byte"),
    ],
)
def test_wrong_files_are_named_and_end_with_code_2(text, named, config, capsys):
    config.write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse("--config", str(config))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert "experiment.yaml" in error


def test_a_missing_default_file_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(default_file=tmp_path / "missing.yaml")
    assert stop.value.code == 2
    assert "missing.yaml" in capsys.readouterr().err


def test_help_is_made_of_docstrings(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(words in text for words in ("A test.", "--part.depth", "How deep it goes.", "(type: int, default: 4)"))


def test_instances_of_plain_values_are_checked_alike():
    assert parser_instance(Whole, {"part": {"size": [1, 2]}}) == Whole(Part(size=(1, 2)))
    with pytest.raises(Exception, match="depth"):
        parser_instance(Whole, {"part": {"depth": "many"}})


def test_user_errors_become_one_line_and_code_2(capsys):
    def main() -> None:
        raise DataError("data/x: no trajectories here")

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: data/x: no trajectories here\n"


def test_other_errors_keep_their_traceback():
    assert not issubclass(ZeroDivisionError, UserError)
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_an_interrupt_ends_quietly(capsys):
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 130
    assert capsys.readouterr().err == ""


@dataclass
class Several:
    """What to do."""

    tasks: list[Literal["read", "write"]] = field(default_factory=lambda: ["read"])
    """Which."""
    fast: bool = False
    """Whether it is fast."""


def test_a_list_by_position(capsys):
    def parse(*argv: str) -> Several:
        return parse_config(Several, "A test.", argv, listed="tasks")

    assert parse() == Several(["read"])
    assert parse("write", "read", "--fast") == Several(["write", "read"], True)
    assert parse("--fast", "write") == Several(["write"], True)
    with pytest.raises(SystemExit) as stop:
        parse("sleep")
    assert stop.value.code == 2
    assert "sleep" in capsys.readouterr().err
