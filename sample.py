"""Samples futures from a trained world model.

    python sample.py --checkpoint runs/quickstart --data data/doom/quickstart --out samples
    python sample.py --checkpoint runs/quickstart --image photo.jpg --actions "forward*8,turn_left(10)*8" --out samples

For every sample OUT gets a video (.mp4 and .gif) and a strip (.png: context, truth, prediction) of its rollout, frame
by frame; direct.png shows all samples again, each future predicted in one jump; samples.json says what was sampled.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cdit.common.cli import parse_config, run
from cdit.common.errors import UserError
from cdit.common.output import finished_folder
from cdit.common.pictures import comparison_grid, rollout_video, save_gif, save_mp4, strip, to_float, to_uint8
from cdit.common.randomness import generator
from cdit.data.actions import DEFAULT_STEP, compose, read_actions
from cdit.data.frames import crop_and_resize, decode
from cdit.data.layout import DatasetInfo
from cdit.data.loader import collate
from cdit.diffusion.config import SamplerOptions
from cdit.evaluate.metrics import psnr
from cdit.heads.config import AttentionConfig
from cdit.heads.probe import inspect_attention
from cdit.heads.report import AttentionReport
from cdit.loading import load_world, spread, windows_for
from cdit.world_model import WorldModel


@dataclass
class SampleConfig:
    """What to sample, and from what."""

    checkpoint: str
    """A training run's folder, or a world model's."""
    out: str
    """Folder for the results. Files of the same names are replaced, others stay."""
    data: str | None = None
    """A dataset folder: contexts from it, with the truth beside the predictions."""
    split: str = "test"
    """Split of the dataset."""
    splits: str | None = None
    """Folder with <split>/traj_names.txt, where that is not <data>/splits."""
    follow_links: bool = False
    """Whether links within the dataset's folder may lead out of it."""
    image: str | None = None
    """In place of data, an image file as the only past frame; then actions have to be given."""
    history: Literal["auto", "missing", "still"] = "auto"
    """What was before the image: nothing (missing); the same view, the camera standing still; or auto: missing for a
    model that was trained with data.min_history 1, else still."""
    samples: int = 4
    """How many: contexts spread over the split, or futures of the one image that differ in their noise."""
    length: int = 16
    """Frames to predict; of no account where actions are given."""
    actions: str | None = None
    """What to do, a frame each, in place of the recorded actions: words such as forward*8,turn_left*4 or a file.
    Words: forward, back, left, right (in metres; forward(0.5); by default the dataset's metric_waypoint_spacing, or
    0.3), turn_left, turn_right (in degrees; turn_left(30); by default 15), stay; forward+turn_left(5)*8 does both at
    once. Files: .csv, .json or .npy with rows dx, dy, dyaw in metres and radians (x forward, y left, yaw
    counter-clockwise)."""
    horizons: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Frames ahead of the predictions in one jump; those beyond the length are left out. Best within the offsets that
    the model was trained on (data.max_offset)."""
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    """How frames are sampled."""
    spacing: float | None = None
    """Metres between frames, for models trained on datasets of different spacings; by default the dataset's."""
    fps: float | None = None
    """Frames a second at which videos play; by default the model's, which is real time."""
    attention: bool = False
    """Also write where each head looks while the first frame is predicted, to OUT/attention (see cdit.heads)."""
    inspect: AttentionConfig = field(default_factory=AttentionConfig)
    """With attention: what of it."""
    compile: bool = False
    """Whether to compile the network, which takes a while and pays where much is sampled."""
    seed: int = 0
    """Of the noise; the same seed gives the same files."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1 …"""


@dataclass
class Scenes:
    """N contexts and what is done in each."""

    names: list[str]
    """For files and labels."""
    sources: list[str]
    """The trajectory or image that each is of."""
    context: Tensor
    """(N, T, 3, H, W) uint8, oldest first."""
    context_mask: Tensor
    """(N, T), True where a frame exists."""
    actions: Tensor | None
    """(N, L, 3), the motion of each step in metres and radians; None where it is unknown."""
    truth: Tensor | None
    """(N, L, 3, H, W) uint8; None where nobody knows."""
    length: int
    """L."""
    spacing: Tensor | None
    """(N,) metres between frames, for models that ask for it."""


def main() -> None:
    """Reads contexts and actions, predicts, draws."""
    title, _, results = __doc__.split("\n\n")
    config = parse_config(SampleConfig, f"{title} {results}", argv=bare_flags(sys.argv[1:], "--attention", "--compile"))
    check(config)
    world = load_world(config.checkpoint, config.device)
    if config.attention:
        config.inspect.resolve(world.cdit, "inspect")
        if config.inspect.samples < 1:
            raise UserError(f"inspect.samples is {config.inspect.samples}, expected at least 1")
    world.description.sampler = config.sampler.over(world.description)
    if config.actions is not None and not world.description.has_actions:
        raise UserError(f"{config.checkpoint} was trained without actions: leave actions out")
    scenes = scenes_of_image(config, world) if config.image else scenes_of_dataset(config, world)
    horizons = [h for h in config.horizons if h <= scenes.length]
    if config.compile:
        world.compile()

    with finished_folder(Path(config.out)) as folder:
        rollout = predict_rollout(world, scenes, config.seed)
        direct = predict_direct(world, scenes, horizons, config.seed)
        if config.attention:
            inspect_first_frame(world, scenes, rollout, config).save(folder / "attention")
        write_rollouts(folder, scenes, rollout, config.fps or world.description.fps, world.description.fps)
        if horizons:
            truth = None if scenes.truth is None else scenes.truth[:, [h - 1 for h in horizons]]
            labels = [f"{h / world.description.fps:+g} s in one jump" for h in horizons]
            comparison_grid(scenes.context, truth, direct, labels, rows=scenes.names).save(folder / "direct.png")
        write_summary(folder, scenes, rollout, config, world)
    print(f"{len(scenes.names)} futures of {scenes.length} frames: {config.out}/{scenes.names[0]}.mp4, …")


def check(config: SampleConfig) -> None:
    """Finds mistakes before anything is loaded.

    Raises:
        UserError: naming the field.
    """
    if (config.data is None) == (config.image is None):
        raise UserError("give either data, a dataset folder, or image, an image file")
    if config.image is not None and config.actions is None:
        raise UserError('an image has no recorded actions: give actions, such as --actions "forward*8"')
    for name in ("samples", "length"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}, expected at least 1")
    for name in ("fps", "spacing"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise UserError(f"{name} is {value:g}, expected more than 0")
    if any(horizon < 1 for horizon in config.horizons):
        raise UserError(f"horizons is {config.horizons}, expected numbers of frames from 1 up")


def scenes_of_dataset(config: SampleConfig, world: WorldModel) -> Scenes:
    """Contexts spread over the split; the actions are the recorded ones, and then the truth is known, or the given."""
    given = None
    if config.actions is not None:
        info = DatasetInfo.load(Path(config.data))
        given = read_actions(config.actions, step=(info and info.metric_waypoint_spacing) or DEFAULT_STEP)
    dataset = windows_for(
        world, config.data, config.split, config.splits, config.follow_links, config.spacing, acting=given is not None
    )
    recorded = config.length if given is None else 0  # frames of the trajectory that are needed after the context
    windows = spread(dataset.windows_with([recorded]), config.samples)
    if not windows:
        raise UserError(
            f"length is {recorded}: no trajectory of split {config.split!r} of {config.data} has "
            f"{dataset.config.context_frames} past frames and so many after them"
        )
    items = collate([dataset.path(window, recorded) for window in windows])
    names, sources = [], []
    for i, window in enumerate(windows):
        trajectory, now = dataset.locate(window)
        sources.append(dataset.trajectories[trajectory].name)
        names.append(f"{i:02}_{Path(sources[-1]).name}_{now:04}")
    if given is not None:
        actions, truth = torch.from_numpy(given).expand(len(windows), -1, -1), None
    else:
        known = dataset.info.has_actions and world.description.has_actions
        actions, truth = items["action"] if known else None, items["target"]
    length = recorded if given is None else len(given)
    return Scenes(names, sources, items["context"], items["context_mask"], actions, truth, length, items["spacing"])


def scenes_of_image(config: SampleConfig, world: WorldModel) -> Scenes:
    """The same image and actions for every sample."""
    actions = torch.from_numpy(read_actions(config.actions))
    frame = crop_and_resize(decode(Path(config.image)), tuple(world.description.image_size), world.description.crop)
    past = world.cdit.config.max_context
    still = config.history == "still" or (config.history == "auto" and world.description.min_history > 1)
    mask = torch.ones(past, dtype=torch.bool) if still else torch.arange(past) == past - 1
    context = torch.where(mask[:, None, None, None], frame, torch.zeros_like(frame))
    return Scenes(
        names=[f"{i:02}_{Path(config.image).stem}" for i in range(config.samples)],
        sources=[config.image] * config.samples,
        context=context.expand(config.samples, -1, -1, -1, -1),
        context_mask=mask.expand(config.samples, -1),
        actions=actions.expand(config.samples, -1, -1),
        truth=None,
        length=len(actions),
        spacing=None if config.spacing is None else torch.full((config.samples,), config.spacing),
    )


def predict_rollout(world: WorldModel, scenes: Scenes, seed: int) -> Tensor:
    """Frame by frame, each prediction joining the past: (N, L, 3, H, W) in [-1, 1] on the CPU."""
    device = next(world.parameters()).device
    rollout = world.rollout(
        to_float(scenes.context.to(device)),
        None if scenes.actions is None else scenes.actions.to(device)[:, None],
        context_mask=scenes.context_mask.to(device),
        length=scenes.length,
        spacing=scenes.spacing,
        generator=generator(seed),
        progress=True,
    )
    return rollout[:, 0].cpu()


def predict_direct(world: WorldModel, scenes: Scenes, horizons: list[int], seed: int) -> Tensor:
    """Each horizon in one jump: (N, G, 3, H, W) in [-1, 1] on the CPU."""
    device = next(world.parameters()).device
    if not horizons:
        return torch.zeros(len(scenes.names), 0)
    actions = None
    if scenes.actions is not None:
        motions = np.stack([compose(steps) for steps in scenes.actions.numpy()])
        actions = torch.from_numpy(motions)[:, [h - 1 for h in horizons]].to(device)
    time_shift = torch.tensor(horizons, device=device).expand(len(scenes.names), -1) / world.description.fps
    return world.predict(
        to_float(scenes.context.to(device)),
        actions,
        time_shift,
        context_mask=scenes.context_mask.to(device),
        spacing=scenes.spacing,
        generator=generator(seed, 1),
        progress=True,
    ).cpu()


def inspect_first_frame(world: WorldModel, scenes: Scenes, rollout: Tensor, config: SampleConfig) -> AttentionReport:
    """Attention while the first future frame is denoised: the true one, or the predicted where there is no truth."""
    count = len(scenes.names)
    batch = {
        "context": scenes.context,
        "context_mask": scenes.context_mask,
        "target": to_uint8(rollout[:, :1]) if scenes.truth is None else scenes.truth[:, :1],
        "action": torch.zeros(count, 1, 3) if scenes.actions is None else scenes.actions[:, :1],
        "action_mask": torch.full((count, 1), scenes.actions is not None),
        "time_shift": torch.full((count, 1), 1 / world.description.fps),
        "spacing": torch.ones(count) if scenes.spacing is None else scenes.spacing,
    }
    return inspect_attention(world, batch, config.inspect, config.seed, scenes.sources)


def write_rollouts(folder: Path, scenes: Scenes, rollout: Tensor, play_fps: float, fps: float) -> None:
    """A strip and a video, in both formats, for every sample.

    Args:
        folder: where to.
        scenes: what was predicted from.
        rollout: (N, L, 3, H, W) in [-1, 1].
        play_fps: at which the videos play.
        fps: of the frames, for the labels.
    """
    for i, name in enumerate(tqdm(scenes.names, desc="writing", unit="sample", leave=False)):
        context, mask = scenes.context[i], scenes.context_mask[i]
        truth = None if scenes.truth is None else scenes.truth[i]
        strip(context, truth, rollout[i], fps, context_mask=mask).save(folder / f"{name}.png")
        video = rollout_video(context[mask], truth, rollout[i], fps)
        save_mp4(video, folder / f"{name}.mp4", play_fps)
        save_gif(video, folder / f"{name}.gif", play_fps)


def write_summary(folder: Path, scenes: Scenes, rollout: Tensor, config: SampleConfig, world: WorldModel) -> None:
    """samples.json: how and what was sampled, with the PSNR of every frame of a rollout whose truth is known."""
    samples: list[dict] = []
    for i, name in enumerate(scenes.names):
        sample: dict = {"name": name, "actions": None if scenes.actions is None else scenes.actions[i].tolist()}
        if scenes.truth is not None:
            sample["psnr"] = [round(value, 3) for value in psnr(rollout[i], to_float(scenes.truth[i])).tolist()]
        samples.append(sample)
    how = {**asdict(config), "sampler": asdict(world.description.sampler), "fps": world.description.fps}
    del how["out"]
    (folder / "samples.json").write_text(json.dumps({"config": how, "samples": samples}, indent=2) + "\n")


def bare_flags(argv: list[str], *flags: str) -> list[str]:
    """Arguments in which a flag without a value says true."""
    after = [*argv[1:], "--"]
    return [
        f"{arg}=true" if arg in flags and then.startswith("--") else arg for arg, then in zip(argv, after, strict=True)
    ]


if __name__ == "__main__":
    run(main)
