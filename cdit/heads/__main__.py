"""Inspects the attention heads of a world model: `python -m cdit.heads --checkpoint RUN --data FOLDER --out OUT`

OUT gets index.html (click a patch, see where each head looks), summary.md (types of heads, best heads, whether they
find where the same surface was), table.csv (every measure of every head), and pictures. Also for a published NWM
checkpoint (*.pth.tar), and, with --frames FOLDER in place of data, on images of one's own.
"""

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from cdit.codec import CodecConfig, load_codec
from cdit.common.cli import parse_config, run
from cdit.common.errors import UserError
from cdit.common.output import finished_folder
from cdit.common.wandb_run import WandbRun
from cdit.diffusion.config import SamplerOptions
from cdit.evaluate.metrics import load_metrics
from cdit.heads.config import AttentionConfig, Kind
from cdit.heads.findings import halves
from cdit.heads.importance import ImportanceConfig, importance
from cdit.heads.needed import importance_measures, importance_section, pruning_picture
from cdit.heads.probe import inspect_attention
from cdit.heads.pruning import pruning_curve
from cdit.heads.report import PAGE, AttentionReport
from cdit.heads.sources import Source, images_source, windows_source
from cdit.loading import find_device, load_world, windows_for
from cdit.model import CDiT
from cdit.nwm.checkpoint import load_checkpoint
from cdit.nwm.world import published_world
from cdit.world_model import WorldModel


@dataclass(kw_only=True)
class InspectConfig(AttentionConfig):
    """What is inspected, on what, and how."""

    checkpoint: str
    """A training run's folder, a world model's, or a published NWM checkpoint (*.pth.tar)."""
    out: str
    """Folder for the results. Files of the same names are replaced, others stay."""
    data: str | None = None
    """A dataset folder. True places, by which heads are judged, are known in datasets of Doom."""
    split: str = "test"
    """Split of the dataset."""
    splits: str | None = None
    """Folder with <split>/traj_names.txt, where that is not <data>/splits."""
    follow_links: bool = False
    """Whether links within the dataset's folder may lead out of it."""
    spacing: float | None = None
    """Metres between frames, for models trained on datasets of different spacings; by default the dataset's."""
    frames: str | None = None
    """In place of data, a folder of images in the order of their names: past frames, and later ones as targets."""
    actions: str | None = None
    """With frames, the motion from each image to the next, as in sample.py: words such as forward*8,turn_left*4 or a
    file; by default unknown."""
    kinds: list[Kind] = field(default_factory=lambda: ["cross", "self"])
    """cross, to the past frames, and self, within the target. The page has the first."""
    samples: int = 32
    """Samples that are measured, each with all its goals."""
    drawn: int = 4
    """How many of them are drawn: on the page with their first and last goal, in figures with the first."""
    offsets: list[int] | None = None
    """Goals, in frames ahead; by default 1, 4 and 8, with frames 1."""
    importance: Literal["no", "loss", "lpips"] = "no"
    """Also take out each head by itself, and more and more of them: what the denoising loss says of it (loss), and how
    sampled frames change (lpips), which samples all targets once for each head."""
    untrained: bool = True
    """Whether the same network with initial weights is judged by true places, too."""
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    """How the predicted frames on the page are sampled."""
    codec: str = CodecConfig.name
    """Of a published checkpoint: hub name or local folder of its AutoencoderKL."""
    weights: Literal["ema", "model"] = "ema"
    """Of a published checkpoint: the averaged weights, or those that were trained."""
    num_heads: int | None = None
    """Of a published checkpoint: heads of each attention; by default those of the published network of that size."""
    tracking: Literal["wandb", "none"] = "wandb"
    """Weights & Biases (offline when nobody is logged in), or nothing."""
    project: str = "cdit"
    """Project name there."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1 …"""
    seed: int = 0
    """Of the noise, of the halves and of the bootstrap."""


def main() -> None:
    """Reads the command line, looks, writes."""
    config = parse_config(InspectConfig, __doc__)
    check(config)
    world = open_world(config)
    config.resolve(world.cdit, "")
    world.description.sampler = config.sampler.over(world.description)
    source = open_source(config, world)
    out = Path(config.out)
    with finished_folder(out) as folder:
        report = inspect(world, source, config)
        report.save(folder)
    if config.tracking == "wandb":
        track(report, config, out)
    print(report.summary)
    print(f"done: {out / PAGE if report.page else out}, {out / 'summary.md'} and {out / 'table.csv'}")


def check(config: InspectConfig) -> None:
    """Finds mistakes before anything is loaded.

    Raises:
        UserError: naming the field.
    """
    if (config.data is None) == (config.frames is None):
        raise UserError("give either data, a dataset folder, or frames, a folder of images")
    if config.actions is not None and config.frames is None:
        raise UserError("actions go with frames; a dataset has its own")
    if config.samples < 1:
        raise UserError(f"samples is {config.samples}, expected at least 1")
    if config.offsets is not None and (not config.offsets or 0 in config.offsets):
        raise UserError(f"offsets is {config.offsets}, expected non-zero numbers of frames")
    if config.spacing is not None and config.spacing <= 0:
        raise UserError(f"spacing is {config.spacing:g}, expected more than 0")


def open_world(config: InspectConfig) -> WorldModel:
    """The world model of a folder or of a published checkpoint.

    Raises:
        UserError: there is none, or no such device.
    """
    if not Path(config.checkpoint).is_file():
        return load_world(config.checkpoint, config.device)
    device = find_device(config.device)
    cdit = load_checkpoint(config.checkpoint, config.weights, config.num_heads)
    return published_world(cdit, load_codec(CodecConfig("kl", config.codec)), config.spacing).to(device)


def open_source(config: InspectConfig, world: WorldModel) -> Source:
    """The samples.

    Raises:
        UserError: data or images cannot be used.
    """
    if config.frames is not None:
        offsets = config.offsets or [1]
        return images_source(Path(config.frames), world, offsets, config.samples, config.actions, config.spacing)
    dataset = windows_for(world, config.data, config.split, config.splits, config.follow_links, config.spacing)
    named = f"split {config.split!r} of {config.data}"
    return windows_source(dataset, world.cdit.grid, config.offsets or [1, 4, 8], config.samples, named)


def inspect(world: WorldModel, source: Source, config: InspectConfig) -> AttentionReport:
    """Attention, and with `importance` which heads are needed."""
    choosing = halves(source.trajectories, config.seed)
    measured, further = None, None
    if config.importance != "no":
        how = ImportanceConfig(config.layers, config.kinds, times=config.times)
        lpips = None
        if config.importance == "lpips":
            lpips = load_metrics(device_of(world), tuple(world.description.image_size), ("lpips",)).get("lpips")
        measured = importance(world, source.batch, how, config.seed, lpips, progress=True)
        further = importance_measures(measured, source.trajectories, config.seed)
    untrained = initial(world, config.seed) if config.untrained and source.places is not None else None
    title = f"Attention of {config.checkpoint} on {config.data or config.frames}"
    report = inspect_attention(
        world, source.batch, config, config.seed, source.trajectories, source.places, untrained, further, title
    )
    if source.places is None:
        report.summary += f"\nWhere the same surface was is not known: {source.unknown}.\n"
    if measured is not None and choosing is not None:
        curve = pruning_curve(
            world, source.batch, measured, choosing, source.trajectories, how, config.seed, progress=True
        )
        section = importance_section(measured, curve, choosing, source.trajectories, config.seed)
        report.summary += f"\n{section}\n"
        caption = "loss as heads are taken out one after the other, on samples that did not choose the order"
        report.images["attention/importance/pruning"] = pruning_picture(curve), caption
    return report


def initial(world: WorldModel, seed: int) -> WorldModel:
    """The same network with the weights that training starts from."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cdit = CDiT.from_config(world.cdit.config)
    return WorldModel(cdit.to(device_of(world)).eval(), world.codec, copy.copy(world.description)).eval()


def device_of(world: WorldModel) -> torch.device:
    """Where the model is."""
    return next(world.parameters()).device


def track(report: AttentionReport, config: InspectConfig, out: Path) -> None:
    """A run at W&B with the very files of the folder."""
    run = WandbRun(out, project=config.project, name=out.name, config=asdict(config))
    run.log(lambda: report.scalars | report.to_wandb(out))
    run.finish()


if __name__ == "__main__":
    run(main)
