"""The documents: links lead somewhere, commands and rooms exist, and imports point the way the map says."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
ROOMS = sorted(path.stem for path in (ROOT / "cdit").iterdir() if not path.name.startswith("__"))
LAYERS = [
    {"common", "worlds"},
    {"batch"},
    {"codec", "data", "diffusion", "model"},
    {"world_model"},
    {"doom", "loading", "nwm"},
    {"evaluate"},
    {"heads", "studies"},
    {"benchmark", "drive", "plan", "sample", "training"},
]
"""Rooms import from their own layer and those above it in this list; commands (`__main__`) from any."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_commands_lead_somewhere(document: Path):
    text = document.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text):
        target = document.parent / link[0] if link[0] else document
        assert target.exists(), link
        if link[1]:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert link[1][1:] in anchors, link
    for module in re.findall(r"python -m (cdit[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for path in re.findall(r"(?:--config|--config_file) ((?:configs|data)/[\w/.]+\.yaml)", text):
        if not path.endswith("mine.yaml"):
            assert (ROOT / path).is_file(), path


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_map_shows_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    missing = [room for room in ROOMS if f"`cdit/{room}/`" not in text and f"`cdit/{room}.py`" not in text]
    assert missing == []


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str):
    layer = next(i for i, rooms in enumerate(LAYERS) if room in rooms)
    allowed = set().union(*LAYERS[: layer + 1])
    files = [ROOT / "cdit" / f"{room}.py", *(ROOT / "cdit" / room).rglob("*.py")]
    for file in files:
        if file.is_file() and file.name != "__main__.py":
            assert set(imported_rooms(ast.parse(file.read_text()))) <= allowed, file


def imported_rooms(tree: ast.AST) -> Iterator[str]:
    """Rooms of cdit that are imported anywhere in a module, except for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cdit."):
            yield node.module.split(".")[1]
        yield from imported_rooms(node)
