"""Reads from a WAD file which sectors are on both sides of a line, where the sky is, and what may move.

The engine exposes none of these. Formats: https://doomwiki.org/wiki/WAD and https://doomwiki.org/wiki/UDMF.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SKY = "F_SKY1"
"""The ceiling texture of open sky."""
NOWHERE = -1
"""Marks a missing sector."""
BLOCKING_FLAG = 1
MIDDLE = 2
"""Index of the middle texture of a side, between two sectors."""

KEEP_HEIGHTS = {0, 11, 51, 52, 124, 39, 97, 125, 126, 12, 13, 17, 35, 79, 80, 81, 104, 138, 139, 48, 85}
"""Line specials of Doom that move no floor or ceiling: none, exits, teleports, lights, scrolling textures."""
DOOR_SECTORS = [10, 14]
"""Sector specials of Doom: doors that close after half a minute, and open after five."""

NO_SIDE, NO_TEXTURE = 0xFFFF, "-"
LINEDEF = np.dtype([("ends", "<u2", 2), ("flags", "<u2"), ("special", "<u2"), ("tag", "<u2"), ("sides", "<u2", 2)])
SIDEDEF = np.dtype([("offset", "<i2", 2), ("textures", "S8", 3), ("sector", "<u2")])
SECTOR = np.dtype(
    [
        ("heights", "<i2", 2),
        ("floor_texture", "S8"),
        ("ceiling_texture", "S8"),
        ("light", "<i2"),
        ("special", "<i2"),
        ("tag", "<i2"),
    ]
)


@dataclass(frozen=True)
class WadMap:
    """Lines and sectors of a map, in the order and units of the file."""

    lines: np.ndarray
    """(L, 4) float64: x1, y1, x2, y2 in map units."""
    sides: np.ndarray
    """(L, 2) int64: the sectors on the right and left of the direction from (x1, y1) to (x2, y2), or `NOWHERE`."""
    blocking: np.ndarray
    """(L,) bool: the line is impassable, whatever the heights on both sides."""
    grating: np.ndarray
    """(L,) bool: between two sectors, with a partly transparent texture: gratings, fences, vines."""
    sky: np.ndarray
    """(S,) bool: open sky instead of a ceiling."""
    moving: np.ndarray
    """(S,) bool: the floor or ceiling may move: doors, lifts, crushers; of stairs that rise, the first step."""


def read_wad_map(path: Path, code: str) -> WadMap:
    """Reads the map `code` (such as "E1M1") of a WAD file, in the format of Doom or in UDMF."""
    lumps = list(_lumps(path.read_bytes()))
    start = [name for name, _ in lumps].index(code) + 1
    map_lumps = dict(reversed(lumps[start : start + 10]))  # the first lump of each name belongs to this map
    return _from_text(map_lumps["TEXTMAP"]) if lumps[start][0] == "TEXTMAP" else _from_binary(map_lumps)


def _lumps(wad: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each lump."""
    count, directory = struct.unpack_from("<ii", wad, 4)
    for start, size, name in struct.iter_unpack("<ii8s", wad[directory : directory + 16 * count]):
        yield name.rstrip(b"\0").decode("latin-1"), wad[start : start + size]


def _from_binary(lumps: dict[str, bytes]) -> WadMap:
    vertices = np.frombuffer(lumps["VERTEXES"], "<i2").reshape(-1, 2).astype(np.float64)
    lines = np.frombuffer(lumps["LINEDEFS"], LINEDEF)
    sidedefs = np.frombuffer(lumps["SIDEDEFS"], SIDEDEF)
    sectors = np.frombuffer(lumps["SECTORS"], SECTOR)
    there = lines["sides"] != NO_SIDE
    sides, hung = np.full(there.shape, NOWHERE), np.zeros(there.shape, bool)
    sides[there] = sidedefs["sector"][lines["sides"][there]]
    hung[there] = sidedefs["textures"][lines["sides"][there], MIDDLE] != NO_TEXTURE.encode()
    moves = ~np.isin(lines["special"], list(KEEP_HEIGHTS))
    moving = np.isin(sectors["special"], DOOR_SECTORS)
    moving |= np.isin(sectors["tag"], lines["tag"][moves & (lines["tag"] != 0)])
    behind = sides[moves & (lines["tag"] == 0), 1]  # a manual door is behind its line
    moving[behind[behind != NOWHERE]] = True
    return WadMap(
        lines=vertices[lines["ends"]].reshape(-1, 4),
        sides=sides,
        blocking=(lines["flags"] & BLOCKING_FLAG != 0) | (sides == NOWHERE).any(1),
        grating=there.all(1) & hung.any(1),
        sky=sectors["ceiling_texture"] == SKY.encode(),
        moving=moving,
    )


def _from_text(text: bytes) -> WadMap:
    blocks: dict[str, list[dict[str, str]]] = {"vertex": [], "linedef": [], "sidedef": [], "sector": []}
    plain = re.sub(r"//[^\n]*", "", text.decode("latin-1"))
    for kind, content in re.findall(r"(\w+)\s*\{([^}]*)\}", plain):
        blocks.setdefault(kind, []).append(dict(re.findall(r'(\w+)\s*=\s*"?([^";]*)"?\s*;', content)))
    vertices = np.array([(float(v["x"]), float(v["y"])) for v in blocks["vertex"]])
    sidedefs = blocks["sidedef"]
    lines = blocks["linedef"]
    ends = np.array([(int(line["v1"]), int(line["v2"])) for line in lines])
    line_sides = [[sidedefs[int(line[key])] for key in ("sidefront", "sideback") if key in line] for line in lines]
    sides = np.array([[int(side["sector"]) for side in both] + [NOWHERE] * (2 - len(both)) for both in line_sides])
    tags = {line.get("arg0") for line in lines if int(line.get("special", 0))} - {None, "0"}
    return WadMap(
        lines=vertices[ends].reshape(-1, 4),
        sides=sides,
        blocking=np.array([line.get("blocking") == "true" for line in lines]) | (sides == NOWHERE).any(1),
        grating=np.array(
            [
                len(both) == 2 and any(side.get("texturemiddle", NO_TEXTURE) != NO_TEXTURE for side in both)
                for both in line_sides
            ]
        ),
        sky=np.array([sector["textureceiling"] == SKY for sector in blocks["sector"]]),
        moving=np.array([sector.get("id") in tags for sector in blocks["sector"]]),
    )
