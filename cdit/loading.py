"""What command lines that use a trained model have in common: device, model, sampler, test windows."""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from cdit.common.errors import UserError
from cdit.data.layout import DatasetInfo
from cdit.data.windows import DataConfig, WindowDataset
from cdit.diffusion import SamplerConfig, check_sampler
from cdit.world_model import WorldDescription, WorldModel


@dataclass
class SamplerOptions:
    """How frames are sampled; what is not given is the model's own."""

    scheduler: Literal["euler", "heun", "dpm", "unipc", "ddpm", "ddim"] | None = None
    """DPM-Solver++ (2M) or UniPC; for a flow also Euler or Heun (two network calls a step), for a DDPM also ancestral
    sampling (ddpm) or DDIM."""
    steps: int | None = None
    """Number of denoising steps."""
    shift: float | None = None
    """Moves the steps of a flow towards noise: t becomes shift·t / (1 + (shift - 1)·t)."""
    guidance: float | None = None
    """Classifier-free guidance on the action: 1 is off. Needs a model trained with action_dropout."""

    def over(self, description: WorldDescription) -> SamplerConfig:
        """The model's sampler with these options put over it.

        Raises:
            UserError: a value is out of its range.
        """
        if self.steps is not None and self.steps < 1:
            raise UserError(f"sampler.steps is {self.steps}, expected at least 1")
        if self.shift is not None and self.shift <= 0:
            raise UserError(f"sampler.shift is {self.shift}, expected more than 0")
        if self.guidance not in (None, 1.0) and not description.action_dropout:
            raise UserError(f"sampler.guidance is {self.guidance}, but the model was trained without action_dropout")
        given = {name: value for name, value in asdict(self).items() if value is not None}
        config = replace(description.sampler, **given)
        check_sampler(description.objective, config)
        return config


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
