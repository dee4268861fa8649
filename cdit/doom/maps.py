"""The maps that can be recorded: ViZDoom's maze `my_way_home` and the 68 maps of Freedoom, all part of its package."""

from dataclasses import dataclass

from cdit.common.errors import UserError


@dataclass(frozen=True)
class MapFile:
    """The location of a map for the engine."""

    game: str
    """WAD of the `vizdoom` package with the game's textures, and the map itself if `scenario` is None."""
    code: str
    """The engine's name of the map."""
    scenario: str | None = None
    """WAD among ViZDoom's scenarios that holds the map."""

    @property
    def path(self) -> str:
        """The WAD that holds the map, within the package `vizdoom`."""
        return f"scenarios/{self.scenario}" if self.scenario else self.game


FREEDOOM = {
    **{f"freedoom1/E{e}M{m}": MapFile("freedoom1.wad", f"E{e}M{m}") for e in range(1, 5) for m in range(1, 10)},
    **{f"freedoom2/MAP{m:02}": MapFile("freedoom2.wad", f"MAP{m:02}") for m in range(1, 33)},
}
MAPS = {"my_way_home": MapFile("freedoom2.wad", "MAP01", scenario="my_way_home.wad"), **FREEDOOM}


def find_map(name: str) -> MapFile:
    """The file of a map, such as "my_way_home", "freedoom1/E1M1" or "freedoom2/MAP01".

    Raises:
        UserError: there is no such map; the message lists all maps.
    """
    if name not in MAPS:
        raise UserError(f"unknown Doom map {name!r}; expected one of {', '.join(MAPS)}")
    return MAPS[name]


def find_maps(names: list[str] | str) -> list[str]:
    """Maps by name: a list, or a comma-separated string; "freedoom1" and "freedoom2" stand for all maps of a game.

    Raises:
        UserError: there is no such map; the message lists all maps.
    """
    found = []
    for name in names.split(",") if isinstance(names, str) else names:
        whole_game = [known for known in MAPS if known.startswith(f"{name}/")]
        if not whole_game:
            find_map(name)
        found += [known for known in whole_game or [name] if known not in found]
    return found


def file_name(name: str) -> str:
    """A map's name as one path component: "freedoom1/E1M1" becomes "freedoom1_E1M1"."""
    return name.replace("/", "_")
