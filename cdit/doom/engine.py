"""ViZDoom as a walking camera: frames, depth and poses in metres and radians; no monsters, HUD, weapon or damage."""

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cdit.common.errors import UserError
from cdit.data.layout import Camera
from cdit.doom.maps import MapFile, find_map
from cdit.doom.wad import WadMap, read_wad_map

try:
    import vizdoom
except ImportError:
    vizdoom = None

FPS = 4
TICS_PER_SECOND = 35

UNITS_PER_METRE = 32.0
PIXEL_STRETCH = 1.2
"""The renderer draws a vertical map unit 1.2 times as tall as a horizontal one (on a 4:3 screen of square pixels, as
320x200 did on the monitors of 1993). The picture is exactly that of a pinhole camera in a world with 32 / 1.2 vertical
units per metre, which defines the metre of height here."""
HEIGHT_UNITS_PER_METRE = UNITS_PER_METRE / PIXEL_STRETCH
EYE_HEIGHT = 41 / HEIGHT_UNITS_PER_METRE

RENDER_WIDTH, RENDER_HEIGHT = 512, 384
RENDER_FOV = math.radians(90)

DEPTH_UNITS_PER_LEVEL, DEPTH_UNITS_AT_ZERO = 7.13, 14.5
"""The 8-bit depth buffer in map units: a linear fit to walls at known distances, with errors up to 6 units."""

# Doom adds thrust * move to the velocity every tic and keeps 29/32 of it, so a steady speed is thrust * move * 32 / 3.
UNITS_PER_TIC_OF_MOVE_1 = 2048 / 65536 * 32 / 3

SETTLING_TICS = 20
"""Enough for a warped player to land on the floor and for the freeze at the start to pass."""

PACIFIST_PATCH = """Patch File for DeHackEd v3.0
Doom version = 19
Patch format = 6

Thing 1 (Player)
Bits = SOLID+SHOOTABLE+DROPOFF+NOTDMATCH
"""
"""The player without the flag PICKUP: items stay in place, so none makes the screen flash or ends an episode."""


@dataclass(frozen=True)
class Observation:
    """What the camera sees, and its pose at the same time."""

    frame: np.ndarray
    """(size, size, 3) uint8 RGB."""
    depth: np.ndarray
    """(size, size) float32: distance along the optical axis in metres, in steps of about 0.22 m, at most about 57 m."""
    position: np.ndarray
    """(2,) float64: world position in metres."""
    yaw: float
    """Heading in radians, in [0, 2 pi): 0 along +x, growing counter-clockwise."""
    eye: float
    """Height of the camera in metres, including lifts, steps being climbed and ledges being jumped from."""


def engine_version() -> str:
    """The version of ViZDoom.

    Raises:
        UserError: it is not installed.
    """
    if vizdoom is None:
        raise UserError("recording Doom needs ViZDoom: pip install 'cdit[doom]'")
    return vizdoom.__version__


def camera(size: int) -> Camera:
    """The camera of `Engine(map, size)`: the central square of a 4:3 picture 90 degrees wide, with pitch 0."""
    half_width = math.tan(RENDER_FOV / 2) * RENDER_HEIGHT / RENDER_WIDTH
    return Camera(size, size, horizontal_fov=2 * math.atan(half_width), eye_height=EYE_HEIGHT)


class Engine:
    """One map, open for walking. A context manager: leaving it ends the engine's process.

    Args:
        map_name: a name of `cdit.doom.maps.MAPS`.
        size: width and height of the frames in pixels.

    Raises:
        UserError: unknown map, or ViZDoom is not installed.
    """

    def __init__(self, map_name: str, size: int):
        map_file = find_map(map_name)
        engine_version()
        self.map_name = map_name
        self.size = size
        self._scratch = tempfile.TemporaryDirectory(prefix="cdit-doom-")
        self._game = self._open(map_file, Path(self._scratch.name))
        self._start_clock()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine's process."""
        self._game.close()
        self._scratch.cleanup()

    def reset(self, seed: int, x: float | None = None, y: float | None = None, yaw: float | None = None) -> Observation:
        """Restarts the map; everything that follows depends only on `seed` and the steps.

        Args:
            seed: of the engine's own randomness (flickering lights, random spawns), below 2^31.
            x, y: where to stand, in metres, rounded to a map unit; by default the map's player start.
            yaw: heading in radians; by default that of the player start.
        """
        self._game.set_seed(seed)
        self._game.new_episode()
        self._start_clock()
        for cheat in ("god", "give keys"):
            self._game.send_game_command(cheat)
        if x is not None and y is not None:
            self._game.send_game_command(f"warp {round(x * UNITS_PER_METRE)} {round(y * UNITS_PER_METRE)}")
        self._game.make_action([0, 0, 0, 0], SETTLING_TICS)
        if yaw is not None:
            self._game.make_action([0, 0, math.degrees(self.observe().yaw - yaw), 0], 1)
        return self.observe()

    def step(self, forward: float, left: float, turn: float, use: bool = False) -> Observation | None:
        """Moves for one recorded frame, 1 / FPS seconds on average (8 or 9 tics of 1/35 s).

        Args:
            forward: speed along the heading in m/s, reached with a lag of about 0.3 s because Doom's players have
                inertia.
            left: speed to the left in m/s, with the same lag.
            turn: yaw rate in rad/s, counter-clockwise, held from the first tic on (to 0.3 %, the engine rounds angles).
            use: whether to press "use", which opens doors and works switches.

        Returns:
            What is seen afterwards, or None when the episode has ended (death, or the map's exit).
        """
        self._frames += 1
        tics = self._frames * TICS_PER_SECOND // FPS - self._tics
        for tic in range(tics):
            moves = self._whole_moves(np.array([forward, -left]))
            self._game.set_action([*moves, math.degrees(-turn) / TICS_PER_SECOND, use])
            self._game.advance_action(1, tic == tics - 1)
        self._tics += tics
        return None if self._game.is_episode_finished() else self.observe()

    def observe(self) -> Observation:
        """What the camera sees now."""
        state = self._game.get_state()
        x, y, z, degrees = state.game_variables
        return Observation(
            frame=np.asarray(Image.fromarray(_central_square(state.screen_buffer)).resize((self.size,) * 2, Image.BOX)),
            depth=_metres(_central_square(state.depth_buffer), self.size),
            position=np.array([x, y]) / UNITS_PER_METRE,
            yaw=math.radians(degrees),
            eye=z / HEIGHT_UNITS_PER_METRE,
        )

    def sectors(self) -> list:
        """The current sectors of the map (`vizdoom.Sector`, in map units)."""
        return self._game.get_state().sectors

    def wad_map(self) -> WadMap:
        """The lines and sectors of the map file, the sectors in the order of `sectors`."""
        map_file = find_map(self.map_name)
        return read_wad_map(Path(vizdoom.__file__).parent / map_file.path, map_file.code)

    def _start_clock(self) -> None:
        self._frames = self._tics = 0
        self._move_owed = np.zeros(2)

    def _whole_moves(self, speed: np.ndarray) -> list[int]:
        """The engine accepts integers only: carries the remainder over, so that the mean is exact."""
        self._move_owed += speed * UNITS_PER_METRE / TICS_PER_SECOND / UNITS_PER_TIC_OF_MOVE_1
        moves = np.round(self._move_owed)
        self._move_owed -= moves
        return [int(m) for m in moves]

    @staticmethod
    def _open(map_file: MapFile, scratch: Path) -> "vizdoom.DoomGame":
        package = Path(vizdoom.__file__).parent
        game = vizdoom.DoomGame()
        game.set_doom_game_path(str(package / map_file.game))
        if map_file.scenario:
            game.set_doom_scenario_path(str(package / "scenarios" / map_file.scenario))
        game.set_doom_map(map_file.code)
        game.set_doom_config_path(str(scratch / "engine.ini"))
        game.set_screen_resolution(getattr(vizdoom.ScreenResolution, f"RES_{RENDER_WIDTH}X{RENDER_HEIGHT}"))
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_depth_buffer_enabled(True)
        game.set_sectors_info_enabled(True)
        game.set_render_hud(False)
        game.set_render_weapon(False)
        game.set_render_crosshair(False)
        game.set_render_decals(False)
        game.set_render_particles(False)
        game.set_render_effects_sprites(False)
        game.set_render_messages(False)
        game.set_render_corpses(False)
        game.set_render_screen_flashes(False)
        button, variable = vizdoom.Button, vizdoom.GameVariable
        game.set_available_buttons(
            [
                button.MOVE_FORWARD_BACKWARD_DELTA,
                button.MOVE_LEFT_RIGHT_DELTA,
                button.TURN_LEFT_RIGHT_DELTA,
                button.USE,
            ]
        )
        game.set_available_game_variables(
            [variable.POSITION_X, variable.POSITION_Y, variable.CAMERA_POSITION_Z, variable.ANGLE]
        )
        game.set_episode_timeout(0)
        game.set_window_visible(False)
        game.set_mode(vizdoom.Mode.PLAYER)
        patch = scratch / "pacifist.deh"
        patch.write_text(PACIFIST_PATCH)
        game.add_game_args(f"-nomonsters +sv_cheats 1 +movebob 0 +stillbob 0 -deh {patch}")
        with _working_directory(scratch):  # where the engine creates a folder, and fails if it appears at the same time
            game.init()
        return game


@contextmanager
def _working_directory(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _central_square(picture: np.ndarray) -> np.ndarray:
    margin = (picture.shape[1] - picture.shape[0]) // 2
    return picture[:, margin : margin + picture.shape[0]]


def _metres(levels: np.ndarray, size: int) -> np.ndarray:
    """(R, R) uint8 depth levels -> (size, size) float32 metres at the pixel centres."""
    centres = ((np.arange(size) + 0.5) * len(levels) / size).astype(int)
    units = levels[np.ix_(centres, centres)] * np.float32(DEPTH_UNITS_PER_LEVEL) + np.float32(DEPTH_UNITS_AT_ZERO)
    return units / np.float32(UNITS_PER_METRE)
