"""Does the predicted picture turn with the camera?

A turn to the left by Δyaw moves the picture to the right, by f·tan(Δyaw) at its centre, independent of its content.
For test contexts and turns of several sizes the next frame is predicted and the turn in it measured. True pairs of
frames between which the camera hardly moved show how precise the measurement is.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cdit.batch import Batch
from cdit.common.errors import UserError
from cdit.common.frames import to_float
from cdit.common.output import finished_folder
from cdit.common.randomness import generator
from cdit.common.tables import markdown_table
from cdit.data.frames import focal_lengths
from cdit.data.motion import local_motion
from cdit.data.windows import WindowDataset
from cdit.evaluate.image_flow import measured_turn
from cdit.loading import load_world, spread, windows_for
from cdit.studies.config import TurningConfig
from cdit.world_model import WorldModel

PURE_TURN = 0.12
"""Metres; true pairs of frames count as pure turns if the camera moved by less than this between them."""


@dataclass
class Turn:
    """Turns of one size, and what was measured."""

    name: str
    asked: Tensor
    """(N,) radians, counter-clockwise."""
    measured: Tensor
    """(N,) radians, counter-clockwise."""

    @property
    def right_sign(self) -> float:
        """Share of the frames in which the picture moved in the right direction."""
        return float((self.measured.sign() == self.asked.sign()).float().mean())


def measure_turning(config: TurningConfig) -> None:
    """Predicts, measures and prints the table.

    Raises:
        UserError: checkpoint, data and options are incompatible; nothing was computed.
    """
    world = load_world(config.checkpoint, config.device, moving=True)
    if not world.description.has_actions:
        raise UserError(f"{config.checkpoint}: was trained without actions")
    # Turns on the spot are the same in any unit of length.
    dataset = windows_for(world, replace(config, spacing=config.spacing or 1.0))
    if dataset.info.camera is None:
        raise UserError(f"{config.data}/dataset.json: has no camera, which relates turns to pixels")
    focal = focal_lengths(dataset.info.camera, dataset.config.image_size, dataset.config.crop)
    half_view = math.degrees(math.atan(dataset.config.image_size[1] / 2 / focal[0]))
    if not all(0 < turn < half_view for turn in config.turns):
        raise UserError(
            f"turns is {config.turns}, expected degrees between 0 and {half_view:.0f}, half the field of view"
        )
    windows = spread(dataset.windows_with([1]), config.contexts)
    if not windows:
        raise UserError(
            f"{config.data}: no trajectory of split {config.split!r} has a full context and a frame after it"
        )
    turns = [*true_turns(dataset, focal), *predicted_turns(world, dataset, windows, focal, config)]
    trajectories = len({dataset.locate(window)[0] for window in windows})
    text = (
        f"{len(windows)} contexts of {trajectories} trajectories of {config.data}, split {config.split}; turns within "
        f"one frame\n\n{turning_table(turns, focal[0])}"
    )
    print(text, end="")
    if config.out is not None:
        with finished_folder(Path(config.out)) as folder:
            (folder / "turning.md").write_text(text)


def true_turns(dataset: WindowDataset, focal: tuple[float, float]) -> list[Turn]:
    """The turns between true frames that are nearly pure and larger than 3°; none in a dataset without poses."""
    chosen, asked = [], []
    for window in dataset.windows_with([1]) if dataset.info.has_actions else []:
        index, now = dataset.locate(window)
        position, yaw = dataset.trajectories[index].position, dataset.trajectories[index].yaw
        dx, dy, dyaw = local_motion(position[now], yaw[now], position[now + 1], yaw[now + 1])
        if math.hypot(dx, dy) < PURE_TURN and math.radians(3) < abs(dyaw) < math.atan(
            dataset.config.image_size[1] / 2 / focal[0]
        ):
            chosen.append(window)
            asked.append(dyaw)
    if not chosen:
        return []
    kept = spread(list(range(len(chosen))), 512)
    pairs = Batch.collate([dataset.window(chosen[i], [1]) for i in kept])
    measured = measured_turn(to_float(pairs.context[:, -1]), to_float(pairs.target[:, 0]), focal)
    return [Turn("true frames", torch.tensor([asked[i] for i in kept], dtype=torch.float32), measured)]


def predicted_turns(
    world: WorldModel,
    dataset: WindowDataset,
    windows: list[int],
    focal: tuple[float, float],
    config: TurningConfig,
) -> list[Turn]:
    """The turns in predicted frames, for each of `config.turns` both ways."""
    sampler = config.sampler.over(world.description)
    asked = torch.tensor([sign * math.radians(turn) for turn in config.turns for sign in (1, -1)])
    actions = torch.stack((torch.zeros_like(asked), torch.zeros_like(asked), asked), dim=-1).to(world.device)
    noise, measured = generator(config.seed), []
    with tqdm(total=len(windows) * len(asked), desc="turning", unit="frame") as bar:
        for start in range(0, len(windows), config.batch_size):
            chosen = windows[start : start + config.batch_size]
            pasts = Batch.collate([dataset.window(i, [0]) for i in chosen]).to(world.device)
            context = to_float(pasts.context)
            given = pasts.condition
            extra = {name: value.expand(-1, len(asked), *value.shape[2:]) for name, value in given.extra.items()}
            turns = replace(given, time_shift=None, action=actions.expand(len(chosen), -1, -1), known=None, extra=extra)
            frames = world.predict(context, turns, sampler=sampler, generator=noise)
            before = context[:, -1:].expand_as(frames).flatten(0, 1)
            found = measured_turn(before, frames.flatten(0, 1), focal)
            measured.append(found.unflatten(0, (len(chosen), len(asked))).cpu())
            bar.update(len(found))
    by_turn = torch.cat(measured).unflatten(1, (len(config.turns), 2)).transpose(0, 1).flatten(1)
    asked = asked.unflatten(0, (len(config.turns), 2))
    return [
        Turn(f"predicted, ±{turn:g}°", asked[i].repeat(len(windows)), by_turn[i]) for i, turn in enumerate(config.turns)
    ]


def turning_table(turns: list[Turn], focal: float) -> str:
    """Share of correct signs, and the shift at the picture's centre relative to f·tan(Δyaw), f (`focal`) in pixels."""
    columns = [
        "turn",
        "frames",
        "right sign",
        "f·tan(Δyaw) in px",
        "measured in px (median)",
        "measured / commanded (median)",
    ]
    rows = []
    for turn in turns:
        sign = turn.asked.sign()
        expected, shift = focal * turn.asked.abs().tan(), focal * (turn.measured * sign).tan()
        ratio = (turn.measured / turn.asked).median()
        cells = (f"{turn.right_sign:.1%}", f"{expected.median():.1f}", f"{shift.median():.1f}", f"{ratio:.2f}")
        rows.append([turn.name, len(sign), *cells])
    return markdown_table(columns, rows)
