"""Rays and correspondences against what the engine draws: its depth buffer, and its pictures from both poses.

The poses are random; maps of Freedoom hold trees, lamps and barrels, which are drawn, but not known to the geometry.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from cdit.data.config import DataConfig
from cdit.data.layout import DatasetInfo, write_split, write_trajectory
from cdit.data.windows import WindowDataset
from cdit.doom.correspondence import Correspondence, Sight, WindowCorrespondence, correspondences
from cdit.doom.dataset import Job, map_path
from cdit.doom.engine import Engine, Observation, camera
from cdit.doom.geometry import MapGeometry
from cdit.doom.raycast import Hits, Surface, View, cast
from cdit.doom.record import record

pytest.importorskip("vizdoom", reason="the engine is part of the extra 'doom'")
pytestmark = pytest.mark.slow

MAPS = ["my_way_home", "freedoom2/MAP15", "freedoom1/E2M3", "freedoom2/MAP01"]
WOOD = "freedoom2/MAP01"
"""Full of trees, which hide what the geometry calls visible."""
SIZE, GRID, PAIRS = 128, 16, 10
PATCH = SIZE // GRID
PIXELS = slice(None, None, 7)
"""Of the pixels row by row, those whose distance is compared."""
DEEPEST = 45.0
"""The engine's depth buffer has sky at 45.9 m, and nothing deeper."""
QUANTISATION = 0.3
"""Metres: the buffer's steps of 0.22 m, and 6 map units by which the line through them is off."""


@dataclass
class Pair:
    """Two views of about the same place, and what the geometry makes of them."""

    target: Observation
    past: Observation
    hits: Hits
    """Of the rays through `PIXELS` of the target."""
    seen: Correspondence
    has_trees: bool


@pytest.fixture(scope="module", params=MAPS)
def pairs(request) -> list[Pair]:
    rng = np.random.default_rng(5)
    with Engine(request.param, SIZE) as engine:
        geometry, pairs = MapGeometry.of(engine), []
        while len(pairs) < PAIRS:
            here = geometry.random_free_point(rng)
            there = here + rng.normal(0, 1.2, 2)
            if (geometry.sectors_at(np.stack((here, there))) < 0).any() or not geometry.is_free(there):
                continue
            yaw = rng.uniform(0, 2 * math.pi)
            target = engine.reset(1, *here, yaw)
            past = engine.reset(1, *there, yaw + rng.uniform(-0.5, 0.5))
            pairs.append(pair(geometry, target, past, request.param == WOOD))
    return pairs


def pair(geometry: MapGeometry, target: Observation, past: Observation, has_trees: bool) -> Pair:
    pixels = View.of(camera(SIZE), (SIZE, SIZE), "aspect", (SIZE, SIZE))
    patches = View.of(camera(SIZE), (SIZE, SIZE), "aspect", (GRID, GRID))
    hits = cast(geometry, eye(target)[None], pixels.centre_rays(np.array(target.yaw))[PIXELS])
    seen = correspondences(geometry, patches, eye(target), np.array(target.yaw), eye(past)[None], np.array([past.yaw]))
    return Pair(target, past, hits, seen, has_trees)


def eye(seen: Observation) -> np.ndarray:
    return np.array([*seen.position, seen.eye])


def patch_centres() -> np.ndarray:
    """(N, 2) row and column in patches."""
    return np.stack(np.meshgrid(np.arange(GRID) + 0.5, np.arange(GRID) + 0.5, indexing="ij"), axis=-1).reshape(-1, 2)


def around(picture: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(9, N, …) the 3 × 3 pixels around places in patches."""
    row, column = (place * PATCH).astype(int).T
    offsets = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return np.stack([picture[(row + i).clip(0, SIZE - 1), (column + j).clip(0, SIZE - 1)] for i, j in offsets])


def landing_error(place: np.ndarray, source: Observation, other: Observation, expected: np.ndarray) -> np.ndarray:
    """How far from where it is expected a place is sent, in patches, at the best of the depths within a level: (N,)."""
    errors = [transfer(place, source, other, off) - expected for off in (-QUANTISATION / 2, 0, QUANTISATION / 2)]
    return np.min([abs(error).max(1) for error in errors], axis=0)


def transfer(place: np.ndarray, source: Observation, other: Observation, off: float) -> np.ndarray:
    """Where places (N, 2) of one picture are in the other, by the depth buffer plus `off` and the poses alone: (N, 2).

    Written out from the focal length: a pixel of depth d is d forward, -d·x/f to the left and -d·y/f up.
    """
    focal = camera(SIZE).focal_length
    depth = around(source.depth, place)[4] + off
    down, right = ((place * PATCH - SIZE / 2) * (depth / focal)[:, None]).T
    x = source.position[0] + depth * math.cos(source.yaw) + right * math.sin(source.yaw) - other.position[0]
    y = source.position[1] + depth * math.sin(source.yaw) - right * math.cos(source.yaw) - other.position[1]
    down = down - source.eye + other.eye
    forward = x * math.cos(other.yaw) + y * math.sin(other.yaw)
    right = x * math.sin(other.yaw) - y * math.cos(other.yaw)
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels = np.stack((down, right), axis=1) * (focal / forward)[:, None] + SIZE / 2
    return np.where(forward[:, None] > 0, pixels / PATCH, np.nan)


def test_distances_are_those_of_the_depth_buffer(pairs):
    agree = []
    for case in pairs:
        sure = ~case.hits.uncertain & np.isin(case.hits.surface, (Surface.WALL, Surface.FLOOR, Surface.CEILING))
        error = case.hits.distance.clip(max=DEEPEST) - case.target.depth.ravel()[PIXELS].clip(max=DEEPEST)
        agree.append(abs(error[sure]) < QUANTISATION)
    assert np.concatenate(agree).mean() > (0.9 if pairs[0].has_trees else 0.98)


def test_points_called_visible_land_within_one_patch(pairs):
    """Both ways: the target's depth buffer sends patches to where they are called visible, the past frame's back."""
    there, back = [], []
    for case in pairs:
        visible = case.seen.visible[:, 0]
        place, centre = case.seen.place[visible, 0], patch_centres()[visible]
        there.append(landing_error(centre, case.target, case.past, place) < 1)
        back.append(landing_error(place, case.past, case.target, centre) < 1)
    assert sum(map(len, there)) > 500
    assert np.concatenate(there).mean() > 0.96
    assert np.concatenate(back).mean() > 0.96


def test_hidden_points_are_recognised(pairs):
    """Hidden by the buffer: everything within a pixel is nearer than the point; shown: nothing is."""
    called, buffer = [], []
    for case in pairs:
        inside = np.isin(case.seen.sight[:, 0], (Sight.HIDDEN, Sight.VISIBLE)) & (case.seen.depth[:, 0] < DEEPEST)
        target_depth = around(case.target.depth, patch_centres())
        own = (case.seen.point - eye(case.target)) @ (math.cos(case.target.yaw), math.sin(case.target.yaw), 0)
        inside &= abs(target_depth - own).min(0) < QUANTISATION  # not behind a tree in the target itself
        depth, nearby = case.seen.depth[inside, 0], around(case.past.depth, case.seen.place[inside, 0])
        hidden, shown = (nearby < depth - QUANTISATION).all(0), (nearby > depth - QUANTISATION).all(0)
        shown &= (nearby < DEEPEST).all(0)  # sky that is drawn before something hides it, and is deep in the buffer
        called.append((case.seen.sight[inside, 0] == Sight.HIDDEN)[hidden | shown])
        buffer.append(hidden[hidden | shown])
    called, buffer = np.concatenate(called), np.concatenate(buffer)
    assert buffer.sum() > 20
    precision, recall = (called & buffer).sum() / called.sum(), (called & buffer).sum() / buffer.sum()
    assert precision > 0.95
    assert recall > (0.6 if pairs[0].has_trees else 0.95)


def test_corresponding_places_look_alike_more_than_the_same_places(pairs):
    true, same = [], []
    for case in pairs:
        visible = case.seen.visible[:, 0]
        place, centre = case.seen.place[visible, 0], patch_centres()[visible]
        far = abs(place - centre).max(1) > 1
        colour, there, here = (
            around(picture.astype(float), where).mean(0)
            for picture, where in (
                (case.target.frame, centre[far]),
                (case.past.frame, place[far]),
                (case.past.frame, centre[far]),
            )
        )
        true.append(abs(colour - there).mean(1))
        same.append(abs(colour - here).mean(1))
    true, same = np.concatenate(true), np.concatenate(same)
    assert true.mean() < 0.7 * same.mean()


@pytest.mark.parametrize(("map_name", "least"), [("my_way_home", 0.99), ("freedoom1/E2M3", 0.97)])
def test_windows_of_a_recorded_walk_know_true_places(tmp_path, map_name, least):
    """The depth recorded with each past frame is that of the points called visible in it."""
    with Engine(map_name, SIZE) as engine:
        geometry = MapGeometry.of(engine)
        walk = record(engine, geometry, np.random.default_rng(1), length=48, min_length=48)
    geometry.save(map_path(tmp_path, map_name))
    name = Job(map_name, 3, "test", 48, 48, SIZE, 0, True).name
    write_trajectory(tmp_path, name, walk.frames, walk.position, walk.yaw, eye=walk.eye)
    write_split(tmp_path, "test", [name])
    DatasetInfo("walk", metric_waypoint_spacing=0.3, camera=camera(SIZE)).save(tmp_path)

    windows = WindowDataset(DataConfig(str(tmp_path), image_size=(SIZE, SIZE)), "test")
    known, agree = WindowCorrespondence(windows, (GRID, GRID)), []
    for window in windows.windows_with([6])[::4]:
        seen, now = known(window, 6), windows.locate(window)[1]
        for back in range(4):
            visible = seen.visible[:, 3 - back]
            depth, place = seen.depth[visible, 3 - back], seen.place[visible, 3 - back]
            nearby = around(walk.depth[now - back].astype(float), place)
            near, far = nearby.min(0) - QUANTISATION, nearby.max(0) + QUANTISATION
            agree.append((near < depth.clip(max=DEEPEST)) & (depth.clip(max=DEEPEST) < far))
    assert sum(map(len, agree)) > 2000
    assert np.concatenate(agree).mean() > least
