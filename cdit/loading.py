"""What command lines that use a trained model have in common: device, model, sampler, test windows."""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from cdit.common.errors import UserError
from cdit.data.config import DataConfig
from cdit.data.layout import DatasetInfo
from cdit.data.windows import WindowDataset
from cdit.world_model import WorldModel


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        UserError: no such device.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not to be had here ({str(error).splitlines()[0]})") from error
    return device


def load_world(checkpoint: str, device: str) -> WorldModel:
    """A trained world model on a device, see `find_device`.

    Raises:
        UserError: no such device, or no world model in the folder.
    """
    chosen = find_device(device)
    return WorldModel.from_pretrained(checkpoint).to(chosen)


def windows_for(
    world: WorldModel,
    folder: str,
    split: str,
    splits: str | None = None,
    follow_links: bool = False,
    spacing: float | None = None,
    acting: bool = False,
) -> WindowDataset:
    """The windows of a split as the model takes them: its frame size and crop, its context, its frames a second.

    Args:
        world: the model.
        folder: the dataset.
        split: name of the split.
        splits: folder with <split>/traj_names.txt, where that is not <folder>/splits.
        follow_links: whether links within the dataset's folder may lead out of it.
        spacing: metres between consecutive frames, by default what dataset.json says.
        acting: whether the model is given actions even where the dataset has none.

    Says so on stderr where the dataset's own frames a second differ.

    Raises:
        UserError: the dataset cannot be used, or the model has to be told a spacing that nobody knows.
    """
    description = world.description
    config = DataConfig(
        folder=folder,
        splits=splits,
        follow_links=follow_links,
        image_size=tuple(description.image_size),
        crop=description.crop,
        context_frames=world.cdit.config.max_context,
        fps=description.fps,
        spacing=spacing,
        workers=0,
    )
    recorded = DatasetInfo.load(Path(folder))
    if recorded is not None and abs(recorded.fps - description.fps) > 1e-6:
        tqdm.write(
            f"{folder}: dataset.json says {recorded.fps:g} frames a second; taken for the model's {description.fps:g}",
            file=sys.stderr,
        )
    dataset = WindowDataset(config, split)
    known = spacing or (recorded is not None and recorded.metric_waypoint_spacing)
    if description.units.spacing is None and not known and (acting or dataset.info.has_actions):
        raise UserError(
            f"spacing: the model was trained on datasets of different spacings, and {folder}/dataset.json does not say "
            "that of this one: give spacing, the metres between consecutive frames"
        )
    return dataset


def spread(items: list[int], count: int) -> list[int]:
    """At most `count` of the items, evenly spaced over all of them."""
    count = min(count, len(items))
    return [items[round((i + 0.5) * len(items) / count - 0.5)] for i in range(count)]
