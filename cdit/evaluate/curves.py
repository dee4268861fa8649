"""How rollouts drift: control and return, and every measure as a curve over the seconds of a rollout.

*Control* asks for a turn on the spot after every second of a rollout, to the left and to the right, and measures how
far the picture turned. *Return* turns by 90° to the left and back: the last frame should be the first.
"""

import math
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from cdit.batch import Batch, Condition
from cdit.common.errors import UserError
from cdit.common.frames import to_float
from cdit.common.randomness import generator
from cdit.data.action_space import ActionSpace
from cdit.data.frames import focal_lengths
from cdit.data.source import TrajectorySource
from cdit.data.windows import WindowDataset
from cdit.diffusion import SamplerConfig
from cdit.evaluate.cases import Case
from cdit.evaluate.config import RolloutConfig
from cdit.evaluate.image_flow import measured_turn
from cdit.evaluate.metrics import HIGHER_IS_BETTER
from cdit.evaluate.protocols import Direct, Rollout, whole_seconds
from cdit.evaluate.results import ProtocolResult, difference
from cdit.evaluate.study import Judge, Study
from cdit.evaluate.tables import NAMES, Row
from cdit.world_model import WorldModel

QUARTER = math.pi / 2
COLOURS = ("#0969da", "#8250df", "#1a7f37", "#bc4c00", "#6e7781")


@dataclass(frozen=True)
class Control(Rollout):
    """The recorded actions; at each horizon, the current frame included, a turn on the spot is tried both ways."""

    turn: float = 0.0
    """Radians within one step."""
    focal: tuple[float, float] = (1.0, 1.0)
    """Horizontal and vertical focal length in pixels."""


@dataclass(frozen=True)
class Return(Rollout):
    """90° to the left and back, on the spot; the truth is the current frame all along."""

    @property
    def reach(self) -> int:
        """0: nothing that follows is needed."""
        return 0

    def actions(self, space: ActionSpace, trajectory: TrajectorySource | None, now: int) -> np.ndarray:
        """(G, 3): half of the steps to the left, half to the right."""
        half = len(self.offsets) // 2
        return np.outer(np.repeat([QUARTER / half, -QUARTER / half], half), [0.0, 0.0, 1.0])

    def motion(self, dataset: WindowDataset, case: Case) -> Condition:
        """The same for every case, and known."""
        action = torch.tensor(self.actions(dataset.info.actions, None, case.now), dtype=torch.float32)
        return Condition(action=action, known=torch.ones(len(action), dtype=torch.bool))

    def window(self, dataset: WindowDataset, case: Case) -> Batch:
        """The case's window with the current frame as every target."""
        window, motion = dataset.window(case.window, [0] * len(self.offsets)), self.motion(dataset, case)
        return replace(window, condition=replace(window.condition, action=motion.action, known=motion.known))


@dataclass(frozen=True)
class ControlStudy(Study):
    """Turns in predicted frames, by `Control`."""

    @torch.no_grad()
    def compute(
        self, batch: int, world: WorldModel, dataset: WindowDataset, judge: Judge, sampler: SamplerConfig | None = None
    ) -> dict[str, Tensor]:
        """`model/right_sign`, the share of turns in the correct direction, and `model/turn`, the mean of the measured
        turn divided by the commanded one, each (B, S).
        """
        protocol = self.protocol
        windows = [protocol.window(dataset, self.cases[i]) for i in self.batches[batch]]
        items = Batch.collate(windows).to(world.device)
        noise = generator(self.seed, zlib.crc32(protocol.name.encode()), batch)
        asked = torch.tensor([protocol.turn, -protocol.turn], device=world.device)
        turns = torch.zeros(len(items), 2, 3, device=world.device)
        turns[..., 2] = asked
        state = world.begin(to_float(items.context), items.mask, items.condition.spacing, text=items.condition.text)
        frame, measured = to_float(items.context[:, -1]), []
        recorded = replace(items.condition, time_shift=None)
        for i, offset in enumerate(protocol.offsets):
            if offset:
                step = recorded.map_goals(lambda x, i=i: x[:, i, None])
                state, sampled = world.step(state, step, sampler, noise)
                frame = world.decode(sampled)[:, 0]
            if i in protocol.measured:
                now = {name: x[:, i, None].expand(-1, 2, *x.shape[2:]) for name, x in recorded.extra.items()}
                turned = world.predict(state, Condition(action=turns, extra=now), sampler=sampler, generator=noise)
                before = frame[:, None].expand_as(turned)
                found = measured_turn(before.flatten(0, 1), turned.flatten(0, 1), protocol.focal)
                measured.append(found.unflatten(0, (-1, 2)))
        found = torch.stack(measured, dim=1)  # (B, S, 2)
        right = (found.sign() == asked.sign()).float().mean(-1)
        return {"model/right_sign": right.cpu(), "model/turn": (found / asked).mean(-1).cpu()}


def drift_studies(study: Study, options: RolloutConfig, world: WorldModel, dataset: WindowDataset) -> list[Study]:
    """Jumps, control and return on the cases of a rollout's study; a line on stderr names what cannot be measured.

    Raises:
        UserError: the turn is as large as half the field of view.
    """
    fps, name = study.protocol.fps, "jump"
    seconds = whole_seconds(options.seconds, fps)
    jump = Direct(name, seconds, fps, [round(second * fps) for second in seconds], shown=options.seconds)
    studies = [replace(study, protocol=jump, methods=("model", "copy_last"))]
    if not world.description.has_actions:
        print("control and return are left out: the model was trained without actions", file=sys.stderr)
        return studies
    half = round(90 / options.turn)
    horizons = [(i + 1) / fps for i in range(2 * half)]
    back = Return("return", horizons, fps, list(range(1, 2 * half + 1)), shown=[half / fps, 2 * half / fps])
    studies.append(replace(study, protocol=back, methods=("model",)))
    if dataset.info.camera is None:
        print("control is left out: dataset.json has no camera, which relates turns to pixels", file=sys.stderr)
        return studies
    focal = focal_lengths(dataset.info.camera, dataset.config.image_size, dataset.config.crop)
    half_view = math.degrees(math.atan(dataset.config.image_size[1] / 2 / focal[0]))
    if options.turn >= half_view:
        raise UserError(f"rollout.turn is {options.turn:g}, expected less than {half_view:.0f}, half the field of view")
    control = Control(
        "control",
        [0.0, *seconds],
        fps,
        list(range(round(max(seconds) * fps) + 1)),
        shown=[0.0, *options.seconds],
        turn=math.radians(options.turn),
        focal=focal,
    )
    shared = {name: getattr(study, name) for name in ("cases", "batch_size", "seed")}
    return [*studies, ControlStudy(control, pictures=0, **shared)]


def side_by_side(results: Mapping[str, ProtocolResult]) -> ProtocolResult:
    """In one jump, frame by frame, and the last frame held: every measure of the same cases in one table."""
    ways = {name: result for name, result in results.items() if name == "jump" or name.startswith("rollout_")}
    jump, rows = ways["jump"], []
    for metric in HIGHER_IS_BETTER:
        for name, result in ways.items():
            rows += _rows(result, "model", metric, _label(name))
        rows += _rows(jump, "copy_last", metric, "last context frame")
        for name, result in ways.items():
            for row in _rows(result, "model", metric, f"{_label(name)} − in one jump"):
                if result is not jump and row.values is not None:
                    mean = difference(result, jump, metric, row.seconds)
                    rows.append(row._replace(mean=mean.mean, low=mean.low, high=mean.high, values=None))
    return ProtocolResult("curves", jump.fps, jump.cases, rows, jump.shown)


def draw_curves(results: Mapping[str, ProtocolResult], path: Path) -> None:
    """Draws each measure over the seconds, with bands for the intervals: *curves*, *control* and *return*."""
    panels = []
    for metric, rows in _by_metric(results["curves"]):
        rows = [row for row in rows if " − " not in row.method]
        panels.append((metric, NAMES.get(metric, metric.upper()), "seconds of rollout", rows))
    own = _label(f"rollout_{results['curves'].fps:g}fps")
    for metric, rows in _by_metric(results["control"]) if "control" in results else ():
        rows = [row._replace(method=own) for row in rows]
        panels.append((metric, NAMES[metric], "seconds of rollout before the turn", rows))
    found = dict(_by_metric(results["return"])) if "return" in results else {}
    for metric in [name for name in ("lpips", "psnr") if name in found][:1]:
        title = f"{metric.upper()} to the first frame: 90° left, then back"
        panels.append((metric, title, "seconds", [row._replace(method=own) for row in found[metric]]))

    columns, height = 3, math.ceil(len(panels) / 3)
    figure = Figure(figsize=(12, 3.2 * height), dpi=100, layout="constrained")
    places = figure.subplots(height, columns, squeeze=False).flatten()
    lines: dict[str, Line2D] = {}
    for place in places[len(panels) :]:
        place.set_axis_off()
    for place, (metric, title, axis, rows) in zip(places, panels, strict=False):
        for method in dict.fromkeys(row.method for row in rows):
            line = sorted((row for row in rows if row.method == method), key=lambda row: row.seconds)
            seconds, colour = [row.seconds for row in line], COLOURS[len(lines) % len(COLOURS)]
            colour = lines[method].get_color() if method in lines else colour
            (lines[method],) = place.plot(seconds, [row.mean for row in line], color=colour, marker="o", markersize=3)
            if all(row.low is not None for row in line):
                ends = ([row.low for row in line], [row.high for row in line])
                place.fill_between(seconds, *ends, color=colour, alpha=0.12, linewidth=0)
        if HIGHER_IS_BETTER[metric] is None:
            place.axhline(1, color="#1f2328", linewidth=0.8)
        if metric == "right_sign":
            place.set_ylim(0, 1.03)
        place.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        place.set_title(title, fontsize=10)
        place.set_xlabel(axis, fontsize=8)
        place.grid(alpha=0.3)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines), fontsize=8)
    figure.savefig(path)


def _by_metric(result: ProtocolResult) -> list[tuple[str, list[Row]]]:
    metrics = dict.fromkeys(row.metric for row in result.rows)
    return [(metric, [row for row in result.rows if row.metric == metric]) for metric in metrics]


def _rows(result: ProtocolResult, method: str, metric: str, label: str) -> list[Row]:
    return [row._replace(method=label) for row in result.rows if (row.method, row.metric) == (method, metric)]


def _label(protocol: str) -> str:
    return (
        "in one jump"
        if protocol == "jump"
        else f"rollout at {protocol.removeprefix('rollout_').replace('fps', ' fps')}"
    )
