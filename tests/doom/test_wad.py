import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cdit.doom.engine import HEIGHT_UNITS_PER_METRE, UNITS_PER_METRE, Engine
from cdit.doom.geometry import MapGeometry
from cdit.doom.wad import NOWHERE, WadMap, read_wad_map


def write_wad(path: Path, lumps: list[tuple[str, bytes]]) -> Path:
    """A WAD file: header, lumps, directory."""
    body, directory = b"", b""
    for name, content in lumps:
        directory += struct.pack("<ii8s", 12 + len(body), len(content), name.encode())
        body += content
    path.write_bytes(struct.pack("<4sii", b"PWAD", len(lumps), 12 + len(body)) + body + directory)
    return path


def sidedef(sector: int, middle: str = "-") -> bytes:
    return struct.pack("<hh8s8s8sH", 0, 0, b"-", b"-", middle.encode(), sector)


def sector(tag: int = 0, ceiling: str = "CEIL1_1", special: int = 0) -> bytes:
    return struct.pack("<hh8s8shhh", 0, 128, b"FLOOR0_1", ceiling.encode(), 160, special, tag)


def linedef(
    start: int, end: int, right: int, left: int = 0xFFFF, flags: int = 0, special: int = 0, tag: int = 0
) -> bytes:
    return struct.pack("<7H", start, end, flags, special, tag, right, left)


@pytest.fixture
def binary(tmp_path: Path) -> WadMap:
    """Not a sensible shape; comments explain the lines. Another map follows."""
    lines = [
        linedef(0, 1, 0, flags=1),  # a wall
        linedef(1, 2, 1, 2),  # open
        linedef(2, 0, 1, 2, special=1),  # a door by hand: sector 1 behind it
        linedef(0, 1, 1, 3, special=62, tag=7),  # a lift that lowers what has tag 7
        linedef(1, 2, 1, 4, special=97, tag=8),  # a teleport to tag 8: nothing moves
        linedef(2, 0, 5, 0, flags=1),  # a grating
    ]
    sides = [sidedef(0, "STONE"), sidedef(0), sidedef(1), sidedef(2), sidedef(3), sidedef(0, "GRATE")]
    sectors = [sector(), sector(), sector(7), sector(8, "F_SKY1"), sector(special=10)]
    lumps = {
        "THINGS": b"",
        "LINEDEFS": b"".join(lines),
        "SIDEDEFS": b"".join(sides),
        "VERTEXES": struct.pack("<6h", 0, 0, -64, 128, 32, -8),
        "SECTORS": b"".join(sectors),
    }
    other = [("E1M2", b""), *((name, b"") for name in lumps)]
    path = write_wad(tmp_path / "a.wad", [("COLORMAP", b"x"), ("E1M1", b""), *lumps.items(), *other])
    return read_wad_map(path, "E1M1")


def test_doom_format(binary):
    assert binary.lines[:2].tolist() == [[0, 0, -64, 128], [-64, 128, 32, -8]]
    assert binary.sides.tolist() == [[0, NOWHERE], [0, 1], [0, 1], [0, 2], [0, 3], [0, 0]]
    assert binary.blocking.tolist() == [True, False, False, False, False, True]
    assert binary.grating.tolist() == [False] * 5 + [True]
    assert binary.sky.tolist() == [False, False, False, True, False]
    assert binary.moving.tolist() == [False, True, True, False, True]


def test_text_format(tmp_path):
    text = """namespace = "zdoom"; // a comment { with braces }
        vertex // 0
        { x = 0.000; y = -16.5; }
        vertex { x = 64.0; y = 0; } vertex { x = 8; y = 8; }
        linedef { v1 = 0; v2 = 1; sidefront = 0; blocking = true; }
        linedef { v1 = 1; v2 = 2; sidefront = 0; sideback = 1; special = 62; arg0 = 5; }
        linedef { v1 = 2; v2 = 0; sidefront = 1; sideback = 2; }
        sidedef { sector = 0; texturemiddle = "STONE2"; }
        sidedef { sector = 1; }
        sidedef { sector = 0; texturemiddle = "GRATE"; offsetx = 3; }
        sector { heightceiling = 128; texturefloor = "FLAT1"; textureceiling = "FLAT1"; }
        sector { textureceiling = "F_SKY1"; id = 5; }"""
    path = write_wad(tmp_path / "a.wad", [("MAP01", b""), ("TEXTMAP", text.encode()), ("ENDMAP", b"")])
    found = read_wad_map(path, "MAP01")
    assert found.lines.tolist() == [[0, -16.5, 64, 0], [64, 0, 8, 8], [8, 8, 0, -16.5]]
    assert found.sides.tolist() == [[0, NOWHERE], [0, 1], [1, 0]]
    assert found.blocking.tolist() == [True, False, False]
    assert found.grating.tolist() == [False, True, True]
    assert found.sky.tolist() == [False, True]
    assert found.moving.tolist() == [False, True]


@pytest.mark.parametrize("name", ["my_way_home", "freedoom1/E1M1"])
def test_the_file_has_what_the_engine_has(name):
    """Every line that the engine lists with a sector borders it here, and has the sector on its right."""
    pytest.importorskip("vizdoom", reason="the engine is part of the extra 'doom'")
    with Engine(name, 64) as engine:
        geometry, sectors = MapGeometry.of(engine), engine.sectors()

    def line(ends: tuple[float, ...], index: int, blocking: bool) -> tuple:
        (x1, y1, x2, y2) = ends
        return frozenset([(x1, y1), (x2, y2)]), index, blocking

    listed = Counter(
        line((w.x1, w.y1, w.x2, w.y2), index, w.is_blocking) for index, s in enumerate(sectors) for w in s.lines
    )
    ends = (geometry.segments * UNITS_PER_METRE).tolist()
    found = Counter(map(line, map(tuple, ends), geometry.sector.tolist(), geometry.blocking.tolist()))
    assert listed == found
    np.testing.assert_allclose(geometry.floor * HEIGHT_UNITS_PER_METRE, [s.floor_height for s in sectors])
    assert len(geometry.sky) == len(geometry.moving) == len(sectors)
    assert geometry.sky.any() == geometry.moving.any() == (name != "my_way_home")
