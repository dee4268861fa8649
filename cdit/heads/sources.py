"""What is inspected: a world model, on windows of a dataset or a folder of images."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cdit.batch import Batch, Condition
from cdit.codec import load_codec
from cdit.codec.config import DEFAULT_WEIGHTS, CodecConfig
from cdit.common.errors import UserError
from cdit.data.frames import crop_and_resize, decode
from cdit.data.windows import WindowDataset
from cdit.heads.config import HeadsConfig
from cdit.heads.correspondence import true_places
from cdit.loading import actions_for, find_device, load_world, spread, windows_for
from cdit.nwm.checkpoint import load_checkpoint
from cdit.nwm.world import published_world
from cdit.world_model import WorldModel

IMAGES = (".jpg", ".jpeg", ".png")


@dataclass
class Source:
    """S samples with G goals each."""

    batch: Batch
    trajectories: list[str]
    """S names."""
    places: Tensor | None
    unknown: str
    """Why they are not known; otherwise empty."""


def open_world(config: HeadsConfig) -> WorldModel:
    """The world model of a folder or of a published checkpoint.

    Raises:
        UserError: it cannot be read, or there is no such device.
    """
    if not Path(config.checkpoint).is_file():
        return load_world(config.checkpoint, config.device)
    device = find_device(config.device)
    cdit = load_checkpoint(config.checkpoint, config.weights or "ema", config.num_heads)
    codec = load_codec(CodecConfig("kl", config.codec or DEFAULT_WEIGHTS["kl"]))
    return published_world(cdit, codec, config.spacing).to(device)


def open_source(config: HeadsConfig, world: WorldModel) -> Source:
    """The samples.

    Raises:
        UserError: data or images cannot be used.
    """
    if config.frames is not None:
        offsets = config.offsets or [1]
        return images_source(Path(config.frames), world, offsets, config.samples, config.actions, config.spacing)
    dataset = windows_for(world, config)
    named = f"split {config.split!r} of {config.data}"
    return windows_source(dataset, world.cdit.grid, config.offsets or [1, 4, 8], config.samples, named)


def windows_source(
    dataset: WindowDataset, grid: tuple[int, int], offsets: Sequence[int], samples: int, named: str
) -> Source:
    """Windows spread evenly over a dataset, with true places if it provides them.

    Raises:
        UserError: no trajectory is long enough.
    """
    windows = spread(dataset.windows_with(offsets), samples)
    if not windows:
        past = dataset.config.context_frames
        raise UserError(f"offsets is {list(offsets)}: no trajectory of {named} has {past} past frames and these goals")
    batch = Batch.collate([dataset.window(window, offsets) for window in windows])
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
        folder: of images in natural order of their names (10 after 9).
        world: gives frame size, crop, longest context and frames per second.
        offsets: of the goals in frames, at least 1.
        actions: the action from each image to the next, words or a file, see `read_actions`; None if unknown.
        spacing: metres between consecutive frames, for models that need it.

    Raises:
        UserError: no such folder, too few images, a wrong number of actions, or actions for a model without them.
    """
    if not folder.is_dir():
        raise UserError(f"frames is {folder}: expected a folder of images")
    files = sorted((file for file in folder.iterdir() if file.suffix.lower() in IMAGES), key=_natural)
    if min(offsets) < 1:
        raise UserError(f"offsets is {list(offsets)}: with frames, expected numbers of at least 1")
    past, farthest = world.cdit.config.max_context, max(offsets)
    fewest = min(world.description.min_history, past)
    if len(files) < fewest + farthest:
        raise UserError(
            f"frames is {folder}: {len(files)} images, expected at least {fewest + farthest}: {fewest} past frames and "
            f"{farthest} after them (offsets)"
        )
    steps = None if actions is None else actions_for(world, actions, spacing)
    if steps is not None and len(steps) != len(files) - 1:
        raise UserError(f"actions has {len(steps)} steps, expected {len(files) - 1}: from each image to the next")
    if steps is not None and not world.description.has_actions:
        raise UserError("actions: the model was trained without actions")
    if steps is not None and spacing is None and world.description.units.spacing is None:
        raise UserError("spacing: this model was trained on several spacings; give the metres between these images")
    first = min(past, len(files) - farthest) - 1  # full contexts if possible
    frames = torch.stack([
        crop_and_resize(decode(file), tuple(world.description.image_size), world.description.crop) for file in files
    ])  # fmt: skip
    items = []
    for now in spread(list(range(first, len(files) - farthest)), samples):
        history = frames[max(0, now + 1 - past) : now + 1]
        missing = past - len(history)
        motion = torch.zeros(len(offsets), len(world.description.actions.names))
        if steps is not None:
            composed = world.description.actions.compose(steps[now : now + farthest].numpy())
            motion = torch.from_numpy(composed)[[offset - 1 for offset in offsets]].float()
        condition = Condition(
            time_shift=torch.tensor(offsets) / world.description.fps,
            action=motion,
            known=torch.full((len(offsets),), steps is not None),
            spacing=torch.tensor(1.0 if spacing is None else spacing),
        )
        items.append(
            Batch(
                context=torch.cat((frames.new_zeros(missing, *frames.shape[1:]), history)),
                mask=torch.arange(past) >= missing,
                target=frames[[now + offset for offset in offsets]],
                condition=condition,
            )
        )
    return Source(Batch.collate(items), [folder.name] * len(items), None, "images have no poses and no map")


def _natural(file: Path) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]
