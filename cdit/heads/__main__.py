"""Inspects the attention heads of a world model: `python -m cdit.heads --checkpoint RUN --data FOLDER --out OUT`

Writes index.html (click a patch and see what each head attends to), summary.md (types of heads, the best heads,
whether they find where the same surface was), table.csv (every measure of every head), and figures. Also accepts a
published NWM checkpoint (*.pth.tar) and, with --frames FOLDER instead of --data, a folder of images.
"""

from dataclasses import asdict
from pathlib import Path

from cdit.common.cli import parse_config, run
from cdit.heads.config import HeadsConfig


def main() -> None:
    """Reads the command line, inspects, writes."""
    config = parse_config(HeadsConfig, __doc__)
    config.check()

    from cdit.common.output import finished_folder  # from here on with torch
    from cdit.common.wandb_run import WandbRun
    from cdit.heads.inspection import inspect_source
    from cdit.heads.report import PAGE
    from cdit.heads.sources import open_source, open_world

    world = open_world(config)
    config.resolve(world.cdit, "")
    world.description.sampler = config.sampler.over(world.description)
    source = open_source(config, world)
    out = Path(config.out)
    with finished_folder(out) as folder:
        report = inspect_source(world, source, config)
        report.save(folder)
    if config.tracking == "wandb":
        wandb_run = WandbRun(out, project=config.project, name=out.name, config=asdict(config))
        wandb_run.log(lambda: report.scalars | report.to_wandb(out))
        wandb_run.finish()
    print(report.summary)
    print(f"done: {out / PAGE if report.page else out}, {out / 'summary.md'} and {out / 'table.csv'}")


if __name__ == "__main__":
    run(main)
