"""Loads a trained model and matching windows, for commands that use one."""

import sys
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from cdit.common.errors import UserError
from cdit.common.options import DataOptions
from cdit.data.actions import DEFAULT_STEP, read_actions
from cdit.data.config import DataConfig
from cdit.data.layout import DESCRIPTION
from cdit.data.windows import WindowDataset
from cdit.world_model import WorldModel


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA if available, otherwise the CPU.

    Raises:
        UserError: no such device.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not available ({str(error).splitlines()[0]})") from error
    return device


def load_world(checkpoint: str, device: str, moving: bool = False, text: str | None = None) -> WorldModel:
    """A trained world model on a device, see `find_device`.

    Args:
        moving: whether its actions must be the motion of the camera.
        text: describes what is done; all predictions are conditioned on it. None: the texts of the dataset are used.

    Raises:
        UserError: no such device, no world model in the folder, or one with other actions or without texts.
    """
    chosen = find_device(device)
    world = WorldModel.from_pretrained(checkpoint).to(chosen)
    actions = world.description.actions
    if moving and actions.kind != "motion":
        raise UserError(
            f"{checkpoint}: expected a world whose actions are dx, dy, dyaw, not {', '.join(actions.names)}"
        )
    if text is not None:
        world.text = world.encode_text(text)
    return world


def windows_for(world: WorldModel, options: DataOptions, acting: bool = False, with_text: bool = True) -> WindowDataset:
    """The windows of a split in the format of the model: frame size, crop, context length, frames per second.

    Prints a note on stderr if the frame rate of the dataset differs.

    Args:
        acting: whether the model is conditioned on given actions even if the dataset has none.
        with_text: whether the texts of the dataset are used, unless the world has one of its own.

    Raises:
        UserError: the dataset cannot be used, or the model needs a spacing and none is given.
    """
    description = world.description
    config = DataConfig(
        folder=options.data,
        splits=options.splits,
        follow_links=options.follow_links,
        image_size=tuple(description.image_size),
        crop=description.crop,
        context_frames=world.cdit.config.max_context,
        fps=description.fps,
        spacing=options.spacing,
        source=options.source,
        camera=options.camera,
        action_key=options.action_key,
        text_encoder=description.text_encoder if with_text and world.text is None else None,
        **({} if description.actions.kind == "motion" else {"action_kind": description.actions.kind}),
        workers=0,
    )
    dataset = WindowDataset(config, options.split)
    is_sampled = options.source in ("video", "lerobot")  # at the model's frame rate
    undescribed = options.source in ("auto", "folder") and Path(options.data).is_dir()
    undescribed = undescribed and not Path(options.data, DESCRIPTION).is_file()
    if not (is_sampled or undescribed) and abs(dataset.info.recorded_fps - description.fps) > 1e-6:
        tqdm.write(
            f"{options.data}: recorded at {dataset.info.recorded_fps:g} frames per second, but the model expects "
            f"{description.fps:g}; frames are not resampled",
            file=sys.stderr,
        )
    if description.has_actions and dataset.info.has_actions:
        for name in ("kind", "names", "units"):
            theirs, ours = getattr(dataset.info.actions, name), getattr(description.actions, name)
            if theirs != ours:
                raise UserError(f"{options.data}: {name} of actions {theirs}, but the model was trained with {ours}")
    needs_spacing = description.units.spacing is None and (acting or dataset.info.has_actions)
    if needs_spacing and not dataset.info.has_spacing:
        raise UserError(
            f"spacing: the model was trained on datasets of different spacings, and {options.data} gives none "
            "(metric_waypoint_spacing): pass --spacing, the metres between consecutive frames"
        )
    return dataset


def actions_for(world: WorldModel, source: str, spacing: float | None) -> Tensor:
    """Actions (L, K) of a world, from words or a file; see `read_actions`.

    Args:
        world: the model.
        source: the words, or the file.
        spacing: metres of a word such as `forward`; None: the model's.

    Raises:
        UserError: they cannot be read.
    """
    step = spacing or world.description.units.spacing or DEFAULT_STEP
    return torch.from_numpy(read_actions(source, step, world.description.actions))


def past_of_image(
    world: WorldModel, frame: Tensor, history: Literal["auto", "missing", "still"] = "auto"
) -> tuple[Tensor, Tensor]:
    """One frame as the past of a model: (T, 3, H, W) and the mask (T,), True where a past frame exists.

    Args:
        world: the model.
        frame: (3, H, W) uint8.
        history: the frames before it: missing, or the same view with the camera standing still; "auto": missing for a
            model that was trained with min_history 1.
    """
    past = world.cdit.config.max_context
    still = history == "still" or (history == "auto" and world.description.min_history > 1)
    mask = torch.ones(past, dtype=torch.bool) if still else torch.arange(past) == past - 1
    return torch.where(mask[:, None, None, None], frame, torch.zeros_like(frame)), mask


def spread(items: list[int], count: int) -> list[int]:
    """At most `count` of the items, evenly spaced over all of them."""
    count = min(count, len(items))
    return [items[round((i + 0.5) * len(items) / count - 0.5)] for i in range(count)]
