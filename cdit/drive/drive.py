"""What one user drives: dreams side by side, the truth beside them, and what the page shows of them."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdit.common.errors import UserError, writing
from cdit.common.files import locked
from cdit.common.frames import to_float
from cdit.common.pictures import rollout_video, save_mp4
from cdit.data.layout import DatasetInfo, split_file, write_split, write_trajectory
from cdit.data.trajectory import read_names
from cdit.data.windows import WindowDataset
from cdit.diffusion.config import check_sampler, sampled_as
from cdit.doom.engine import camera
from cdit.drive.config import DriveConfig
from cdit.drive.dream import Dream, step_bytes
from cdit.drive.plan import Planned, Run, plan
from cdit.drive.truth import Place, Truth, map_of, truth_of
from cdit.evaluate.metrics import Metric, load_metrics
from cdit.heads.measures import Layout, frame_mass
from cdit.loading import load_world, past_of_image, spread, windows_for
from cdit.plan.candidates import recorded_actions
from cdit.plan.config import PlannerConfig
from cdit.plan.planner import Planner, WorldScore

THUMBNAILS = 8
SHOWN = ("entropy", "effective tokens", "distance", "same place", "edge lift")
"""Measures of heads on the page."""
ENOUGH = 64
"""Number of recorded windows from which the candidates of plans are drawn; with fewer, arcs at any speed that the page
allows are drawn instead."""


class Stage:
    """What all drives share, read once: worlds, start frames, metrics.

    Raises:
        UserError: a checkpoint or the dataset cannot be used, or the worlds do not fit together.
    """

    def __init__(self, config: DriveConfig):
        self.config = config
        self.names = [config.checkpoint, *config.also]
        self.worlds = [load_world(name, config.device, text=config.text) for name in self.names]
        world = self.worlds[0]
        self.description, self.space = world.description, world.description.actions
        for name, other in zip(self.names, self.worlds, strict=True):
            if not other.description.has_actions:
                raise UserError(f"{name} was trained without actions: there is nothing to drive")
            facts = [
                (x.image_size, x.fps, x.actions.kind, x.actions.names) for x in (self.description, other.description)
            ]
            for field_, ours, theirs in zip(("image_size", "fps", "kind of actions", "actions"), *facts, strict=True):
                if ours != theirs:
                    raise UserError(f"also: {field_} of {name} is {theirs}, that of {self.names[0]} {ours}")
        self.description.sampler = config.sampler.over(self.description)
        self.spacing = config.spacing or self.description.units.spacing
        self.data: WindowDataset | None = None
        self.starts: list[int] = []
        """Windows of the data that have their full past."""
        info = None
        if config.data is not None:
            self.data = windows_for(world, config, acting=True, with_text=False)
            self.starts = self.data.windows_with([0])
            info = DatasetInfo.load(Path(config.data))
            self.spacing = self.spacing or self.data.info.spacing
        if self.spacing is None:
            raise UserError("spacing: the model was trained on datasets of different spacings; pass --spacing")
        self.has_decoder = all(world.codec.has_decoder for world in self.worlds)
        self.simplest_cost = "pixels" if self.has_decoder else "latents"
        learned = ["distance"] if config.planner.learned else []
        costs = [config.planner.cost, *learned, self.simplest_cost]
        if not self.has_decoder and config.planner.cost == PlannerConfig().cost:  # compares pictures
            costs.reverse()
        self.costs = list(dict.fromkeys(costs)) if self.drives else []
        """Costs of plans that the page can choose."""
        self._scores: dict[str, WorldScore] = {}
        self.engine_size = info.camera.width if info and info.camera else max(self.description.image_size)
        self.maps: list[str] = []
        self.no_truth = ""
        """Why the truth is not available."""
        try:
            if not self.drives:
                raise UserError("the actions of this world are not the motion of a camera")
            self.maps = truth_of(info, self.description)
        except UserError as error:
            self.no_truth = str(error)

    @property
    def drives(self) -> bool:
        """Whether actions are the motion of a camera; if not, commands are the numbers of each step."""
        return self.space.kind == "motion"

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """The range of each number of a command, if actions are not motion."""
        pairs = zip(self.space.low, self.space.high, strict=True)
        if self.space.kind == "absolute":
            return list(pairs)
        if self.space.kind == "relative":
            return [(low - high, high - low) for low, high in pairs]
        return [(min(low, 0.0), max(high, 0.0)) for low, high in pairs]

    def action(self, command: Sequence[float]) -> tuple[float, ...]:
        """The action of one step of a command: m/s forward and left and rad/s, or the action's own numbers."""
        return arc(*command, self.description.fps) if self.drives else tuple(command)

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """PSNR and, where its weights are available, LPIPS; loaded at first use. Empty if a codec has no decoder."""
        if not self.has_decoder:
            return {}
        return load_metrics(self.worlds[0].device, tuple(self.description.image_size), ("psnr", "lpips"))

    @cached_property
    def planner(self) -> Planner:
        """Finds plans."""
        horizon, fps = self.config.horizon, self.description.fps
        recorded = recorded_actions(self.data.trajectories if self.data else [], horizon)
        if len(recorded) < ENOUGH:
            speeds, turns = np.linspace(0, self.spacing * fps, 5), np.radians(np.linspace(-90, 90, 13))
            arcs = torch.tensor([arc(speed, 0.0, turn, fps) for speed in speeds for turn in turns])
            recorded = arcs[:, None].expand(-1, horizon, -1)
        return Planner.fit(self.config.planner, recorded)

    def score(self, cost: str) -> WorldScore:
        """Scores plans by one of `costs`, which is loaded at first use.

        Raises:
            UserError: weights of the cost are not available.
        """
        if cost not in self._scores:
            planner = replace(self.config.planner, cost=cost)
            try:
                self._scores[cost] = WorldScore.of(self.worlds[0], planner, self.planner.moments)
            except UserError as error:
                raise UserError(
                    f"cannot plan with the cost {cost}: {error}. {self.simplest_cost} needs no weights"
                ) from error
        return self._scores[cost]

    def longest(self, dreams: int) -> int:
        """Steps of a drive that fit into a session's memory."""
        height, width = self.description.image_size
        engine = (3 + 4) * self.engine_size**2 + 3 * height * width  # picture and depth
        return max(16, int(self.config.session_mb * 1e6 / (max(map(step_bytes, self.worlds)) * dreams + engine)))

    def thumbnails(self) -> tuple[list[int], list[str], Tensor]:
        """Some of `starts`, spread over the split: their indices, trajectories and newest frames (n, 3, H, W)."""
        chosen = spread(list(range(len(self.starts))), THUMBNAILS)
        windows = [self.starts[i] for i in chosen]
        frames = [self.data.window(window, []).context[-1] for window in windows]
        height, width = self.description.image_size
        pictures = torch.stack(frames) if frames else torch.zeros(0, 3, height, width, dtype=torch.uint8)
        return chosen, [self.data.trajectories[self.data.locate(w)[0]].name for w in windows], pictures


@dataclass
class Inside:
    """Which attention is shown."""

    patch: tuple[int, int] | None = None
    """Row and column of the patch of the dream; None: nothing is shown."""
    heads: list[tuple[int, int]] = field(default_factory=list)
    """(layer, head) of cross-attention."""
    call: int = -1
    """Of the network while a frame is denoised; the last is the least noisy."""


@dataclass
class Begin:
    """How a drive begins."""

    start: int | None = None
    """Which of the stage's `starts`."""
    picture: Tensor | None = None
    """(3, H, W) uint8, instead."""
    map_name: str | None = None
    """A map of the engine, at a random place, instead."""
    truth: bool = False
    """Whether the engine runs beside the dream; always with `map_name`, never with a picture."""
    seed: int = 0
    """Of the noise, and of the random place."""


@dataclass
class View:
    """What the page shows: facts, and arrays by name."""

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]


class Drive:
    """One person's drive. Except for `plan`, its methods are called by one thread at a time, and for only one drive at
    a time.

    Args:
        stage: what is shared.
    """

    def __init__(self, stage: Stage):
        self.stage = stage
        self.inside, self.doubt = Inside(), 0
        self.beginning: Begin | None = None
        self.begun = 0
        """How often a dream has begun."""
        self._resting: tuple[float, ...] = ()
        self.truth: Truth | None = None
        self.dreams = [Dream(stage.worlds[0], stage.description.sampler)]
        self._scores: list[list[dict[str, float]]] = []
        """By step, of each dream."""

    @property
    def steps(self) -> int:
        """Number of steps so far."""
        return len(self.dreams[0].moments)

    @property
    def action(self) -> tuple[float, ...]:
        """The newest action; before the first step, one that changes nothing."""
        return self.dreams[0].moments[-1].action if self.steps else self._resting

    @property
    def limit(self) -> int:
        """Largest number of steps."""
        return self.stage.longest(len(self.dreams))

    def close(self) -> None:
        """Ends the engine, if there is one."""
        truth, self.truth = self.truth, None
        if truth is not None:
            truth.close()

    # ---- beginning ----

    def begin(self, how: Begin) -> None:
        """Starts over.

        Raises:
            UserError: the truth is not available.
        """
        stage, place, context = self.stage, None, None
        if how.start is not None:
            window = stage.starts[how.start]
            item = stage.data.window(window, [])
            context, mask = item.context, item.mask
            index, now = stage.data.locate(window)
            trajectory = stage.data.trajectories[index]
            if how.truth:
                map_name = map_of(trajectory.name, stage.maps)
                if map_name is None or trajectory.position is None:
                    raise UserError(f"the place in the engine where {trajectory.name} was recorded is unknown")
                place = Place(map_name, tuple(trajectory.position[now].tolist()), float(trajectory.yaw[now]))
        elif how.picture is not None:
            context, mask = past_of_image(stage.worlds[0], how.picture)
        elif how.map_name is not None:
            place = Place(how.map_name)
        self.close()
        if place is not None:
            if stage.no_truth:
                raise UserError(stage.no_truth)
            self.truth = Truth(place, stage.engine_size, stage.description, how.seed)
            if context is None:
                context, mask = past_of_image(stage.worlds[0], self.truth.frame)
        self.beginning = how
        self._resting = self._resting_numbers(how)
        self._begin(context, mask)

    def _resting_numbers(self, how: Begin) -> tuple[float, ...]:
        """Zeros; for absolute numbers, those that led to the first frame or, if they are unknown, the middle."""
        stage = self.stage
        if stage.space.kind != "absolute":
            return (0.0,) * len(stage.space.names)
        if how.start is not None:
            index, now = stage.data.locate(stage.starts[how.start])
            trajectory = stage.data.trajectories[index]
            if stage.space.recorded(trajectory):
                return tuple(stage.space.between(trajectory, [now], [now])[0].tolist())
        return tuple((low + high) / 2 for low, high in stage.bounds)

    def from_here(self) -> None:
        """Restarts the dream from the newest true frames."""
        if self.truth is None:
            return
        dream, true = self.dreams[0], self._true_frames
        longest = len(dream.context)
        mask = torch.cat((dream.mask, dream.mask.new_ones(len(true))))[-longest:]
        self._begin(torch.stack([*dream.context, *true])[-longest:], mask)

    def _begin(self, context: Tensor, mask: Tensor) -> None:
        self._scores, self._true_frames, self.begun = [], [], self.begun + 1
        for dream in self.dreams:
            dream.seed, dream.spacing = self.beginning.seed, self.stage.spacing
            dream.begin(context, mask)

    # ---- driving ----

    def step(self, *command: float) -> bool:
        """Advances by one frame; False if the drive cannot continue.

        Args:
            command: see `Stage.action`.
        """
        walked = len(self.truth.walk) - 1 if self.truth is not None else 0
        if self.beginning is None or max(self.steps, walked) >= self.limit:
            return False
        action = self.stage.action(command)
        if self.truth is not None:
            action = self.truth.step(*command)
            if action is None:
                return False
            self._true_frames.append(self.truth.frame)
        layers = {layer for layer, _ in self.inside.heads} if self.inside.patch else ()
        for dream in self.dreams:
            dream.watched = frozenset(layers) if dream is self.dreams[0] else frozenset()
            dream.step(action)
        self._scores.append(self._score() if self.truth is not None else [])
        return True

    def back(self) -> None:
        """Undoes the last step."""
        if self.steps:
            for dream in self.dreams:
                dream.back()
            self._scores.pop()
            if self.truth is not None:
                self._true_frames.pop()
                self.truth.back()

    def compare(self, world: int | None) -> None:
        """Sets the world of a second dream beside the first, or removes it; the drive starts over."""
        del self.dreams[1:]
        if world is not None:
            chosen = self.stage.worlds[world]
            self.dreams.append(Dream(chosen, chosen.description.sampler))
        if self.beginning is not None:
            self.begin(self.beginning)

    def sample_with(self, number: int, scheduler: str, steps: int) -> None:
        """Sets how the next frames of a dream are sampled.

        Raises:
            UserError: its world has no such scheduler.
        """
        if number < len(self.dreams):
            dream = self.dreams[number]
            possible = dream.world.objective.schedulers
            if scheduler not in possible:
                raise UserError(f"{scheduler} is not one of this world's schedulers: {', '.join(possible)}")
            sampler = replace(dream.sampler, scheduler=scheduler, steps=steps)
            check_sampler(sampled_as(dream.world.description), sampler)
            dream.sampler = sampler

    def _score(self) -> list[dict[str, float]]:
        truth = to_float(self._true_frames[-1])[None]
        frames = [to_float(dream.frame)[None] for dream in self.dreams]
        metrics, device = self.stage.metrics, self.stage.worlds[0].device
        return [{name: float(m(x.to(device), truth.to(device))) for name, m in metrics.items()} for x in frames]

    def goal(self, start: int) -> Tensor:
        """A goal (3, H, W) uint8: the newest frame of one of the stage's `starts`."""
        return self.stage.data.window(self.stage.starts[start], []).context[-1]

    def ahead(self) -> Tensor:
        """A goal (3, H, W) uint8: the frame recorded a plan's length after the one that the drive began with, or the
        last one of that walk.

        Raises:
            UserError: there is none.
        """
        data, steps = self.stage.data, 0
        if self.beginning is not None and self.beginning.start is not None:
            window = self.stage.starts[self.beginning.start]
            index, now = data.locate(window)
            steps = min(self.stage.config.horizon, len(data.trajectories[index]) - 1 - now)
        if steps < 1:
            raise UserError("nothing was recorded after the frame that this drive began with")
        return data.window(window, [steps]).target[-1]

    def plan(self, goal: Tensor, run: Run, cost: str | None = None) -> Planned:
        """Plans to a goal (3, H, W) uint8, by one of the stage's `costs`; see `cdit.drive.plan.plan`.

        Raises:
            UserError: the drive has not begun, or weights of the cost are not available.
            Cancelled: by `run`.
        """
        if self.beginning is None:
            raise UserError("choose a start before a goal")
        if not self.stage.drives:
            raise UserError("plans here need a world whose actions are motion; cdit.plan open plans other numbers")
        planner, score = self.stage.planner, self.stage.score(cost or self.stage.costs[0])
        return plan(planner, score, self.dreams[0], goal, run)

    # ---- what is shown ----

    def view(self, command: Sequence[float] = ()) -> View:
        """The newest frames, and the views of them that were chosen.

        Args:
            command: see `Stage.action`; `doubt` assumes that it continues. By default the one that changes nothing.
        """
        if self.beginning is None:
            return View({"step": 0, "limit": self.limit, "dreams": []}, {})
        scores = self._scores[-1] if self._scores else []
        last = [dream.moments[-1] if dream.moments else None for dream in self.dreams]
        facts: dict[str, Any] = {
            "step": self.steps,
            "limit": self.limit,
            "action": self.action,
            "begun": self.begun,
            "dreams": [
                {"calls": moment.calls if moment else 0, **(scores[i] if scores else {})}
                for i, moment in enumerate(last)
            ],
            "off": sorted((head.layer, head.number) for head in self.dreams[0].off),
        }
        arrays = {f"dream {i}": shown(dream.frame) for i, dream in enumerate(self.dreams)}
        if self.truth is not None:
            arrays["truth"] = shown(self.truth.frame)
            x, y = self.truth.walk[-1].position
            facts["pose"] = (float(x), float(y), float(self.truth.walk[-1].yaw))
        if self.inside.patch is not None and self.inside.heads:
            self._look(facts, arrays)
        if self.doubt:
            still = self.action if self.stage.space.kind == "absolute" else self._resting
            ends = self.dreams[0].ends(self.stage.action(command or still), self.doubt)
            spread_ = ends.float().std(0).mean(0)  # of the 256 levels, over samples, mean over channels
            facts["spread"] = float(spread_.mean()) / 255
            arrays |= {"ends": shown(ends), "spread": spread_.clamp(0, 255).byte().numpy()}
        return View(facts, arrays)

    def _look(self, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        dream, inside = self.dreams[0], self.inside
        look = dream.look({layer for layer, _ in inside.heads}, inside.call)
        if look is None:
            return
        past = dream.past()
        layout = Layout(len(past), *dream.world.cdit.grid)
        rows = {(row.layer, row.head): row for row in look.rows}
        patch = inside.patch[0] * layout.columns + inside.patch[1]
        weights = [look.weights[layer][head, patch] for layer, head in inside.heads]
        facts["heads"] = [
            {
                "layer": layer,
                "head": head,
                "type": rows[layer, head].type.name,
                "reason": rows[layer, head].type.reason,
                "measures": {name: rows[layer, head].measures[name].mean for name in SHOWN},
                "masses": frame_mass(row, layout).tolist(),
            }
            for (layer, head), row in zip(inside.heads, weights, strict=True)
        ]
        arrays |= {"past": shown(past), "attention": torch.stack(weights).numpy()}

    # ---- what is saved ----

    def actions(self) -> list[tuple[float, ...]]:
        """The actions so far, one a step, in their units, rounded as the model received them."""
        return [tuple(np.float32(moment.action).tolist()) for moment in self.dreams[0].moments]

    def video(self) -> bytes:
        """An MP4 of the drive at the world's frame rate, truth beside dream.

        Raises:
            UserError: there is no step yet.
        """
        if not self.steps:
            raise UserError("there is no step to save yet")
        dream, fps = self.dreams[0], self.stage.description.fps
        frames = torch.stack([moment.frame for moment in dream.moments])
        truth = torch.stack(self._true_frames) if self.truth is not None else None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "drive.mp4")
            save_mp4(rollout_video(dream.context[dream.mask], truth, frames, fps), path, fps)
            return path.read_bytes()

    def record(self, folder: Path) -> str:
        """Adds the drive to a dataset in the folder: the engine's frames and poses or, without it, the dream's frames.

        Returns:
            The trajectory's folder.

        Raises:
            UserError: there are too few frames.
        """
        walk = self.truth.walk if self.truth is not None else None
        if (len(walk) if walk else self.steps + 1) < 2:
            raise UserError("there are too few frames to record yet")
        kind = self.truth.map_name.replace("/", "_") if walk else "dream"
        data = folder / kind
        description = self.stage.description
        info = DatasetInfo(
            name=f"{folder.name}/{kind}",
            fps=description.fps,
            metric_waypoint_spacing=self.stage.spacing if walk else None,
            has_actions=walk is not None,
            camera=camera(self.stage.engine_size) if walk else None,
            source={"recipe": "cdit.drive", "maps": [self.truth.map_name]} if walk else {"recipe": "cdit.drive"},
        )
        with writing(data):
            data.mkdir(parents=True, exist_ok=True)
            with locked(data / ".lock"):
                if DatasetInfo.load(data) not in (None, info):
                    raise UserError(f"record: {data} has drives of another world or rate; choose another folder")
                names = read_names(data, "train") if split_file(data, "train").is_file() else []
                name = f"{kind}_{len(names):04}"
                if walk:
                    poses = np.stack([seen.position for seen in walk]), np.unwrap([seen.yaw for seen in walk])
                    write_trajectory(data, name, np.stack([seen.frame for seen in walk]), *poses)
                else:
                    frames = torch.stack([self.dreams[0].context[-1], *(m.frame for m in self.dreams[0].moments)])
                    write_trajectory(data, name, shown(frames))
                write_split(data, "train", [*names, name])
                info.save(data)
        return str(data / name)


def arc(forward: float, left: float, turn: float, fps: float) -> tuple[float, float, float]:
    """The motion dx, dy, dyaw of a frame at constant speeds in m/s and yaw rate in rad/s, in the frame at its start."""
    angle = turn / fps
    along, across = (math.sin(angle) / angle, (1 - math.cos(angle)) / angle) if abs(angle) > 1e-6 else (1.0, angle / 2)
    return (forward * along - left * across) / fps, (forward * across + left * along) / fps, angle


def speeds(action: Sequence[float], fps: float) -> tuple[float, float, float]:
    """The constant speeds (m/s, rad/s) whose `arc` is this motion."""
    dx, dy, angle = action
    along, across, _ = arc(fps, 0.0, angle * fps, fps)
    scale = fps / (along**2 + across**2)
    return scale * (dx * along + dy * across), scale * (dy * along - dx * across), angle * fps


def shown(frames: Tensor) -> np.ndarray:
    """(…, 3, H, W) uint8 as (…, H, W, 3)."""
    return np.ascontiguousarray(frames.movedim(-3, -1).numpy())
