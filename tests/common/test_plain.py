"""Configs and descriptions that somebody else wrote: nothing in them is imported, called, unfolded or overlooked."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from cdit.common.cli import parse_config, parser_instance
from cdit.common.errors import DataError, UserError
from cdit.data.layout import DatasetInfo


@dataclass
class Part:
    """A part."""

    size: int = 1
    """A number."""


@dataclass
class Whole:
    """All kinds of fields."""

    part: Part = field(default_factory=Part)
    """A group."""
    parts: list[Part] = field(default_factory=list)
    """Groups."""
    name: str | None = None
    """Text."""
    source: dict[str, Any] = field(default_factory=dict)
    """Anything."""


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that is there once the module `payload` has been imported, or anything in it called."""
    path = tmp_path / "it_ran"
    line = f"open({str(path)!r}, 'w')"
    (tmp_path / "payload.py").write_text(
        f"{line}\nclass Payload:\n    def __init__(self, **options):\n        {line}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "payload", raising=False)
    return path


CALL = '{class_path: payload.Payload, init_args: {"a": 1}}'
SHELL = '{class_path: subprocess.Popen, init_args: {args: [touch, "MARKER"]}}'
PLACES = [
    "part: CALL", "part: [CALL]", "parts: [CALL]", "parts: CALL", "name: CALL", "source: CALL", "source: {a: CALL}",
    "source: {a: [{b: CALL}]}", "part: {size: CALL}", "CALL", "part: 'CALL'", "source: 'CALL'", "parts: ['CALL']",
]  # fmt: skip


@pytest.mark.parametrize("call", [CALL, SHELL], ids=["import", "shell"])
@pytest.mark.parametrize("place", PLACES)
def test_no_class_is_imported_or_built(place, call, marker, tmp_path):
    path = tmp_path / "it.yaml"
    path.write_text(place.replace("CALL", call).replace("MARKER", str(marker)))
    with pytest.raises(SystemExit) as stop:
        parse_config(Whole, "A test.", ["--config", str(path)])
    assert stop.value.code == 2
    assert not marker.exists()


def test_the_description_of_a_dataset_runs_nothing(marker, tmp_path):
    """Beneath a field of any type, jsonargparse would."""
    args = f'{{"args": ["touch", "{marker}"]}}'
    (tmp_path / "dataset.json").write_text(
        f'{{"name": "it", "source": {{"a": {{"class_path": "subprocess.Popen", "init_args": {args}}}}}}}'
    )
    with pytest.raises(DataError, match=r"dataset\.json: .*class_path is not allowed"):
        DatasetInfo.load(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: !!python/object/apply:os.system ['touch MARKER']", "python/object/apply:os.system"),
        ("name: !!python/name:payload.Payload", "python/name:payload"),
        ("part: !!python/object:payload.Payload {}", "python/object:payload"),
        ("a: &a [1]\nsource: {b: *a, c: *a}", "aliases"),
        ("source: &a {b: *a}", "aliases"),
        ("a: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(30)), "aliases"),
        ("name: a\nname: b", "line 2: 'name' is a duplicate key"),
        ("part: {size: 1, 'size': 2}", "'size' is a duplicate key"),
        ("1: 2", "1 is not a field name"),
        ("source: {true: 2}", "True is not a field name"),
        ("source: {a: 99999999999999999999}", "more than 64 bits"),
        ("part: {size: 0x" + "9" * 9999 + "}", "more than 64 bits"),
        ("part: {size: " + "9" * 9999 + "}", "4300 digits"),
        ("name: " + "[" * 100_000, "nested more than 50 deep"),
        ("? " * 1000, "nested more than 50 deep"),
        ("part: {size: '" + "[" * 100_000 + "'}", "nested more than 50 deep"),
        ("name: " + "x" * 2**20, "longer than"),
        ("name: 2001-99-99", ""),
        ("name: !!timestamp 2001-99-99", ""),
        ("name: !!timestamp ", "groupdict"),
    ],
)  # fmt: skip
def test_yaml_that_is_no_plain_config_is_refused(text, message, marker, tmp_path):
    """In a process of its own: some of these end it, as PyYAML alone would."""
    path = tmp_path / "it.yaml"
    path.write_text(text.replace("MARKER", str(marker)))
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {sys.path[0]!r}]\n"
        "from cdit.common.cli import parse_config\n"
        "from dataclasses import dataclass, field\nfrom typing import Any\n"
        "@dataclass\nclass Part:\n    size: int = 1\n"
        "@dataclass\nclass Whole:\n    part: Part = field(default_factory=Part)\n    name: str | None = None\n"
        "    source: dict[str, Any] = field(default_factory=dict)\n"
        f"print(parse_config(Whole, 'A test.', ['--config', {str(path)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    if message or done.returncode:
        assert done.returncode == 2, done.stderr[-500:]
        assert message in done.stderr
        assert "it.yaml" in done.stderr
        assert "Traceback" not in done.stderr
    assert not marker.exists()


@pytest.mark.parametrize("values", [{"parts": None}, {"part": {"size": None}}])
def test_null_is_for_fields_that_have_it_alone(values):
    assert parser_instance(Whole, {"name": None}).name is None
    with pytest.raises(UserError, match=r"^part(s|\.size) is null"):
        parser_instance(Whole, values)


@pytest.mark.parametrize("values", [{"part": [1]}, {"part": None}, {"part": 3}, [1], None, {"part": "[]"}])
def test_a_group_is_not_silently_something_else(values):
    with pytest.raises(Exception, match=r"expected fields with values|Unable to load"):
        parser_instance(Whole, values)


def test_numbers_of_json_are_bounded():
    with pytest.raises(UserError, match="64 bits"):
        parser_instance(Whole, {"source": {"a": 10**400}})


def test_plain_configs_are_read_as_before(tmp_path):
    path = tmp_path / "it.yaml"
    path.write_text(
        "part: {size: 1_000}\nparts:\n- size: 2\n- size: 3\nname: 'a: [b'\nsource: {a: [1e-3, 2001-01-01, null]}\n"
    )
    assert parse_config(Whole, "A test.", ["--config", str(path)]) == Whole(
        Part(1000), [Part(2), Part(3)], "a: [b", {"a": [1e-3, "2001-01-01", None]}
    )
