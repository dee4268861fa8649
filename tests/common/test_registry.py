"""Registries: what a name may resolve to, and when modules are imported."""

import sys
from pathlib import Path

import pytest

from cdit.common.errors import UserError
from cdit.common.registry import Registry

SOURCE = "import collections\nclass Mine(collections.OrderedDict): pass\nprint = print\n"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "plugin_for_tests.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plugin_for_tests", raising=False)
    registry = Registry("some.field", dict)
    registry.register("builtin")(dict)
    yield registry
    sys.modules.pop("plugin_for_tests", None)


def test_a_name_alone_imports_nothing(registry: Registry):
    with pytest.raises(UserError, match=r"some\.field.*CDIT_PLUGINS=plugin_for_tests"):
        registry.get("plugin_for_tests:Mine")
    assert "plugin_for_tests" not in sys.modules


def test_a_config_or_the_environment_imports(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    assert registry.load("plugin_for_tests:Mine").__name__ == "Mine"
    del sys.modules["plugin_for_tests"]
    monkeypatch.setenv("CDIT_PLUGINS", "json,plugin_for_tests")
    assert registry.get("plugin_for_tests:Mine").__name__ == "Mine"


@pytest.mark.parametrize(
    "name", ["plugin_for_tests:print", "plugin_for_tests:absent", "no_such_module:Mine", "./mine.py:Mine", "unknown"]
)
def test_other_names_are_errors(registry: Registry, name: str):
    with pytest.raises(UserError, match=r"some\.field"):
        registry.load(name)
