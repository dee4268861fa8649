"""Inspects the attention heads of a world model: `python -m cdit.heads --checkpoint RUN --data FOLDER --out OUT`

Writes index.html (click a patch and see what each head attends to), summary.md (types of heads, the best heads,
whether they find where the same surface was), table.csv (every measure of every head), and figures. Also accepts a
published NWM checkpoint (*.pth.tar) and, with --frames FOLDER instead of --data, a folder of images.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from cdit.common.cli import parse_config, run
from cdit.heads.config import HeadsConfig, ImportanceConfig

if TYPE_CHECKING:  # everything that imports torch is imported where it is used, so that help and errors are fast
    from cdit.heads.report import AttentionReport
    from cdit.heads.sources import Source
    from cdit.world_model import WorldModel


def main() -> None:
    """Reads the command line, inspects, writes."""
    config = parse_config(HeadsConfig, __doc__)
    config.check()
    world = open_world(config)
    config.resolve(world.cdit, "")
    world.description.sampler = config.sampler.over(world.description)
    source = open_source(config, world)

    from cdit.common.output import finished_folder
    from cdit.heads.report import PAGE

    out = Path(config.out)
    with finished_folder(out) as folder:
        report = inspect(world, source, config)
        report.save(folder)
    if config.tracking == "wandb":
        track(report, config, out)
    print(report.summary)
    print(f"done: {out / PAGE if report.page else out}, {out / 'summary.md'} and {out / 'table.csv'}")


def open_world(config: HeadsConfig) -> "WorldModel":
    """The world model of a folder or of a published checkpoint.

    Raises:
        UserError: it cannot be read, or there is no such device.
    """
    from cdit.codec import load_codec
    from cdit.codec.config import CodecConfig
    from cdit.loading import find_device, load_world
    from cdit.nwm.checkpoint import load_checkpoint
    from cdit.nwm.world import published_world

    if not Path(config.checkpoint).is_file():
        return load_world(config.checkpoint, config.device)
    device = find_device(config.device)
    cdit = load_checkpoint(config.checkpoint, config.weights, config.num_heads)
    return published_world(cdit, load_codec(CodecConfig("kl", config.codec)), config.spacing).to(device)


def open_source(config: HeadsConfig, world: "WorldModel") -> "Source":
    """The samples.

    Raises:
        UserError: data or images cannot be used.
    """
    from cdit.heads.sources import images_source, windows_source
    from cdit.loading import windows_for

    if config.frames is not None:
        offsets = config.offsets or [1]
        return images_source(Path(config.frames), world, offsets, config.samples, config.actions, config.spacing)
    dataset = windows_for(world, config.data, config.split, config.splits, config.follow_links, config.spacing)
    named = f"split {config.split!r} of {config.data}"
    return windows_source(dataset, world.cdit.grid, config.offsets or [1, 4, 8], config.samples, named)


def inspect(world: "WorldModel", source: "Source", config: HeadsConfig) -> "AttentionReport":
    """The attention report, including importance if configured."""
    from cdit.evaluate.metrics import load_metrics
    from cdit.heads.choose import split_halves
    from cdit.heads.draw import pruning_picture
    from cdit.heads.importance import importance, pruning_curve
    from cdit.heads.inspection import inspect_attention
    from cdit.heads.report import importance_section

    batch, trajectories, seed = source.batch, source.trajectories, config.seed
    measured = further = None
    if config.importance != "no":
        how = ImportanceConfig(config.layers, config.kinds, config.ablation, config.times)
        lpips = None
        if config.importance == "lpips":
            lpips = load_metrics(world.device, tuple(world.description.image_size), ("lpips",)).get("lpips")
        measured = importance(world, batch, how, seed, lpips, progress=True)
        further = measured.measures(trajectories, seed)
    untrained = initial(world, seed) if config.untrained and source.places is not None else None
    title = f"Attention of {config.checkpoint} on {config.data or config.frames}"
    report = inspect_attention(world, batch, config, seed, trajectories, source.places, untrained, further, title)
    if source.places is None:
        report.summary += f"\nTrue places are unknown: {source.unknown}.\n"
    choosing = split_halves(trajectories, seed)
    if measured is not None and choosing is not None:
        curve = pruning_curve(world, batch, measured, choosing, trajectories, how, seed, progress=True)
        section = importance_section(measured, curve, choosing, trajectories, seed, config.ablation)
        report.summary += f"\n{section}\n"
        caption = "loss as more and more heads are ablated, on samples that did not choose their order"
        report.images["attention/importance/pruning"] = pruning_picture(curve), caption
    return report


def initial(world: "WorldModel", seed: int) -> "WorldModel":
    """The same network with initial weights."""
    import copy

    import torch

    from cdit.model import CDiT
    from cdit.world_model import WorldModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cdit = CDiT.from_config(world.cdit.config)
    return WorldModel(cdit.to(world.device).eval(), world.codec, copy.copy(world.description)).eval()


def track(report: "AttentionReport", config: HeadsConfig, out: Path) -> None:
    """Logs the files of the folder as a W&B run."""
    from dataclasses import asdict

    from cdit.common.wandb_run import WandbRun

    run = WandbRun(out, project=config.project, name=out.name, config=asdict(config))
    run.log(lambda: report.scalars | report.to_wandb(out))
    run.finish()


if __name__ == "__main__":
    run(main)
