"""What is inspected: windows of a dataset, or a person's own images."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cdit.common.errors import UserError
from cdit.data.actions import compose, read_actions
from cdit.data.frames import crop_and_resize, decode
from cdit.data.loader import collate
from cdit.data.windows import WindowDataset
from cdit.heads.truth import true_places
from cdit.loading import spread
from cdit.world_model import WorldModel

IMAGES = (".jpg", ".jpeg", ".png")


@dataclass
class Source:
    """S samples with G goals each."""

    batch: dict[str, Tensor]
    """Stacked items as of a `WindowDataset`."""
    trajectories: list[str]
    """S names."""
    places: Tensor | None
    """`true_places`, where they are known."""
    unknown: str
    """Why they are not; empty where they are."""


def windows_source(
    dataset: WindowDataset, grid: tuple[int, int], offsets: Sequence[int], samples: int, named: str
) -> Source:
    """Windows spread over a dataset, with true places where it knows them.

    Args:
        dataset: with the model's frame size and context.
        grid: rows and columns of patches.
        offsets: of the goals in frames.
        samples: how many windows.
        named: the dataset and split, for messages.

    Raises:
        UserError: no trajectory is long enough.
    """
    windows = spread(dataset.windows_with(offsets), samples)
    if not windows:
        raise UserError(
            f"offsets is {list(offsets)}: no trajectory of {named} has {dataset.config.context_frames} past frames and "
            "these"
        )
    batch = collate([dataset.window(window, offsets) for window in windows])
    names = [dataset.trajectories[dataset.locate(window)[0]].name for window in windows]
    try:
        return Source(batch, names, true_places(dataset, grid, windows, offsets), "")
    except UserError as error:
        return Source(batch, names, None, str(error))


def images_source(
    folder: Path, world: WorldModel, offsets: Sequence[int], samples: int, actions: str | None, spacing: float | None
) -> Source:
    """Consecutive images as past frames, later ones as targets.

    Args:
        folder: of images in the order of their names, numbers in them counting as numbers.
        world: gives frame size, crop, longest context and frames a second.
        offsets: of the goals in frames, from 1 up.
        samples: how many contexts, spread over the images.
        actions: the motion from each image to the next, words or a file, see `read_actions`; None where unknown.
        spacing: metres between consecutive frames, for models that ask for it.

    Raises:
        UserError: no such folder, too few images, another number of actions than of steps, or actions that the model
            cannot be told.
    """
    if not folder.is_dir():
        raise UserError(f"frames is {folder}: expected a folder of images")
    files = sorted((file for file in folder.iterdir() if file.suffix.lower() in IMAGES), key=_natural)
    if min(offsets) < 1:
        raise UserError(f"offsets is {list(offsets)}, expected numbers of frames from 1 up")
    past, fewest = world.cdit.config.max_context, min(world.description.min_history, world.cdit.config.max_context)
    if len(files) < fewest + max(offsets):
        raise UserError(
            f"frames is {folder}: {len(files)} images, expected at least {fewest + max(offsets)}: {fewest} past frames "
            f"and {max(offsets)} after them (offsets)"
        )
    steps = None if actions is None else torch.from_numpy(read_actions(actions))
    if steps is not None and len(steps) != len(files) - 1:
        raise UserError(f"actions has {len(steps)} steps, expected {len(files) - 1}: from each image to the next")
    if steps is not None and not world.description.has_actions:
        raise UserError("the model was trained without actions: leave actions out")
    if steps is not None and spacing is None and world.description.units.spacing is None:
        raise UserError("spacing: the model was trained on datasets of different spacings: give that of these images")
    first = min(past, len(files) - max(offsets)) - 1  # full contexts, where there are any
    nows = spread(list(range(first, len(files) - max(offsets))), samples)
    frames = torch.stack([
        crop_and_resize(decode(file), tuple(world.description.image_size), world.description.crop) for file in files
    ])  # fmt: skip
    items = []
    for now in nows:
        history = frames[max(0, now + 1 - past) : now + 1]
        missing = past - len(history)
        motion = torch.zeros(len(offsets), 3)
        if steps is not None:
            composed = compose(steps[now : now + max(offsets)].numpy())
            motion = torch.from_numpy(composed)[[offset - 1 for offset in offsets]].float()
        items.append({
            "context": torch.cat((frames.new_zeros(missing, *frames.shape[1:]), history)),
            "context_mask": torch.arange(past) >= missing,
            "target": frames[[now + offset for offset in offsets]],
            "action": motion,
            "action_mask": torch.full((len(offsets),), steps is not None),
            "time_shift": torch.tensor(offsets) / world.description.fps,
            "spacing": torch.tensor(1.0 if spacing is None else spacing),
        })  # fmt: skip
    return Source(collate(items), [folder.name] * len(items), None, "images have no poses and no map")


def _natural(file: Path) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]
