"""Predicts futures and draws them."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cdit.batch import Batch, Condition
from cdit.common.errors import UserError
from cdit.common.files import write_json
from cdit.common.frames import to_float, to_uint8
from cdit.common.output import finished_folder
from cdit.common.pictures import comparison_grid, rollout_video, save_gif, save_mp4, strip
from cdit.common.randomness import generator
from cdit.data.frames import crop_and_resize, decode
from cdit.evaluate.metrics import psnr
from cdit.heads.inspection import inspect_attention
from cdit.heads.report import AttentionReport
from cdit.loading import actions_for, load_world, past_of_image, spread, windows_for
from cdit.sample.config import SampleConfig
from cdit.world_model import WorldModel


@dataclass
class Scenes:
    """N contexts and the actions taken in each."""

    names: list[str]
    """For files and labels."""
    sources: list[str]
    """The trajectory or image of each."""
    context: Tensor
    """(N, T, 3, H, W) uint8, oldest first."""
    mask: Tensor
    """(N, T), True where a past frame exists."""
    actions: Tensor | None
    """(N, L, K) of each step, in the units of the model's actions; None if unknown."""
    truth: Tensor | None
    """(N, L, 3, H, W) uint8; None if unknown."""
    length: int
    """L."""
    spacing: Tensor | None
    """(N,) metres between frames, for models of several datasets."""
    text: Tensor | None = None
    """(N, E) embeddings of the texts of the dataset."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Further conditions of each step, (N, L, …): recorded ones, or with given actions those of the last past frame."""

    def condition(self, steps: slice | list[int]) -> Condition:
        """The condition of some steps: (N, G, …)."""
        extra = {name: value[:, steps] for name, value in self.extra.items()}
        actions = None if self.actions is None else self.actions[:, steps]
        return Condition(action=actions, spacing=self.spacing, text=self.text, extra=extra)


def sample(config: SampleConfig) -> None:
    """Predicts and draws.

    Raises:
        UserError: the model, the data or the actions cannot be used; nothing is written.
    """
    world = load_world(config.checkpoint, config.device, text=config.text)
    description = world.description
    if config.attention:
        config.inspect.resolve(world.cdit, "inspect")
    description.sampler = config.sampler.over(description)
    if config.actions is not None and not description.has_actions:
        raise UserError(f"{config.checkpoint} was trained without actions: leave actions out")
    scenes = scenes_of_image(config, world) if config.image else scenes_of_dataset(config, world)
    horizons = [h for h in config.horizons if h <= scenes.length]
    if config.horizons and not horizons:
        raise UserError(f"horizons is {config.horizons}, expected one of at most the length, {scenes.length} frames")
    if config.compile:
        world.compile()

    with finished_folder(Path(config.out)) as folder:
        rollout = predict_rollout(world, scenes, config.seed)
        if horizons:
            direct = predict_direct(world, scenes, horizons, config.seed)
            truth = None if scenes.truth is None else scenes.truth[:, [h - 1 for h in horizons]]
            labels = [f"{h / description.fps:+g} s in one jump" for h in horizons]
            comparison_grid(scenes.context, truth, direct, labels, rows=scenes.names).save(folder / "direct.png")
        if config.attention:
            inspect_first_frame(world, scenes, rollout, config).save(folder / "attention")
        write_rollouts(folder, scenes, rollout, config.fps or description.fps, description.fps)
        write_summary(folder, scenes, rollout, config, world)
    print(f"{len(scenes.names)} futures of {scenes.length} frames: {config.out}/{scenes.names[0]}.mp4, …")


def scenes_of_dataset(config: SampleConfig, world: WorldModel) -> Scenes:
    """Contexts spread over the split, with the recorded actions and the truth, or with the given actions."""
    acting = config.actions is not None
    dataset = windows_for(world, config, acting)
    recorded = 0 if acting else config.length  # frames of the trajectory that are needed after the context
    windows = spread(dataset.windows_with([recorded]), config.samples)
    if not windows:
        past = dataset.config.context_frames
        where = f"no trajectory of split {config.split!r} of {config.data} has"
        if acting:
            raise UserError(f"actions: {where} {past + 1} frames, {past} past ones and one more")
        raise UserError(f"length is {recorded}: {where} {past} past frames and that many after them")
    batch = Batch.collate([dataset.window(w, [0]) if acting else dataset.path(w, recorded) for w in windows])
    names, sources = [], []
    for i, window in enumerate(windows):
        trajectory, now = dataset.locate(window)
        sources.append(dataset.trajectories[trajectory].name)
        names.append(f"{i:02}_{Path(sources[-1]).name}_{now:04}")
    given, extra = batch.condition, batch.condition.extra
    if acting:
        spacing = dataset.info.spacing if dataset.info.has_spacing else None
        steps = actions_for(world, config.actions, spacing)
        actions, truth = steps.expand(len(windows), -1, -1), None
        extra = {name: value.repeat_interleave(len(steps), 1) for name, value in extra.items()}
    else:
        known = dataset.info.has_actions and world.description.has_actions
        actions, truth = given.action if known else None, batch.target
    length = len(steps) if acting else recorded
    return Scenes(names, sources, batch.context, batch.mask, actions, truth, length, given.spacing, given.text, extra)


def scenes_of_image(config: SampleConfig, world: WorldModel) -> Scenes:
    """The same image and actions for every sample."""
    actions = actions_for(world, config.actions, config.spacing)
    frame = crop_and_resize(decode(Path(config.image)), tuple(world.description.image_size), world.description.crop)
    context, mask = past_of_image(world, frame, config.history)
    return Scenes(
        names=[f"{i:02}_{Path(config.image).stem}" for i in range(config.samples)],
        sources=[config.image] * config.samples,
        context=context.expand(config.samples, -1, -1, -1, -1),
        mask=mask.expand(config.samples, -1),
        actions=actions.expand(config.samples, -1, -1),
        truth=None,
        length=len(actions),
        spacing=None if config.spacing is None else torch.full((config.samples,), config.spacing),
    )


def predict_rollout(world: WorldModel, scenes: Scenes, seed: int) -> Tensor:
    """Frame by frame, each prediction joining the past: (N, L, 3, H, W) in [-1, 1] on the CPU."""
    rollout = world.rollout(
        to_float(scenes.context),
        scenes.condition(slice(None)).map_goals(lambda x: x[:, None]),
        scenes.mask,
        scenes.length,
        generator=generator(seed),
        progress=True,
    )
    return rollout[:, 0].cpu()


def predict_direct(world: WorldModel, scenes: Scenes, horizons: list[int], seed: int) -> Tensor:
    """Each horizon in one jump: (N, G, 3, H, W) in [-1, 1] on the CPU."""
    ends = [h - 1 for h in horizons]
    time_shift = torch.tensor(horizons).expand(len(scenes.names), -1) / world.description.fps
    condition = replace(scenes.condition(ends), time_shift=time_shift)
    if scenes.actions is not None:
        motions = np.stack([world.description.actions.compose(steps) for steps in scenes.actions.numpy()])
        condition = replace(condition, action=torch.from_numpy(motions)[:, ends])
    context, noise = to_float(scenes.context), generator(seed, 1)
    return world.predict(context, condition, scenes.mask, generator=noise, progress=True).cpu()


def inspect_first_frame(world: WorldModel, scenes: Scenes, rollout: Tensor, config: SampleConfig) -> AttentionReport:
    """Attention while the first future frame is denoised: the true one, or the predicted one if it is unknown."""
    target = to_uint8(rollout[:, :1]) if scenes.truth is None else scenes.truth[:, :1]
    time_shift = torch.full((len(scenes.names), 1), 1 / world.description.fps)
    condition = replace(scenes.condition(slice(1)), time_shift=time_shift)
    batch = Batch(scenes.context, scenes.mask, target, condition)
    return inspect_attention(world, batch, config.inspect, config.seed, scenes.sources)


def write_rollouts(folder: Path, scenes: Scenes, rollout: Tensor, play_fps: float, fps: float) -> None:
    """A strip, labelled by the model's fps, and a video at play_fps, in both formats, of every sample."""
    for i, name in enumerate(tqdm(scenes.names, desc="writing", unit="sample", leave=False)):
        context, mask = scenes.context[i], scenes.mask[i]
        truth = None if scenes.truth is None else scenes.truth[i]
        strip(context, truth, rollout[i], fps, context_mask=mask).save(folder / f"{name}.png")
        video = list(rollout_video(context[mask], truth, rollout[i], fps))
        save_mp4(video, folder / f"{name}.mp4", play_fps)
        save_gif(video, folder / f"{name}.gif", play_fps)


def write_summary(folder: Path, scenes: Scenes, rollout: Tensor, config: SampleConfig, world: WorldModel) -> None:
    """samples.json: options and actions, and the PSNR of a rollout's frames if the truth and a decoder are
    available."""
    samples: list[dict] = []
    for i, name in enumerate(scenes.names):
        entry: dict = {"name": name, "actions": None if scenes.actions is None else scenes.actions[i].tolist()}
        if scenes.truth is not None and world.codec.has_decoder:
            entry["psnr"] = [round(value, 3) for value in psnr(rollout[i], to_float(scenes.truth[i])).tolist()]
        samples.append(entry)
    how = {**asdict(config), "sampler": asdict(world.description.sampler), "fps": world.description.fps}
    del how["out"]
    write_json(folder / "samples.json", {"config": how, "samples": samples})
