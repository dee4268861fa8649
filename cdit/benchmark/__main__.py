"""`python -m cdit.benchmark [MODE]`: how fast this is here, against what else people run and against the machine.

Modes: train, sample, rollout, plan, data, scale, profile; and for choices within the package attention, context,
checkpoints, probes, latents. Without a mode: train and sample.

Who is compared: `ours`; `ours-nwm`, the published network and its DDPM by our code; `NWM-as-published`, the same
network and its use written as plainly as it was published; `DiT-concat`, a DiT over past and predicted frames together.
All have the same width, depth, heads and patches. Weights are random.

Prints Markdown tables. Only ratios travel between machines: the alternatives are run in turn, round after round, and a
number is the median over rounds, with its middle half in brackets.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from cdit.benchmark.attention import attention
from cdit.benchmark.bench import Bench, Mode
from cdit.benchmark.checkpoints import checkpoints
from cdit.benchmark.config import BenchmarkConfig
from cdit.benchmark.context import context
from cdit.benchmark.data import data
from cdit.benchmark.latents import latents
from cdit.benchmark.operations import profile
from cdit.benchmark.plan import plan
from cdit.benchmark.probes import probes
from cdit.benchmark.rollout import rollout
from cdit.benchmark.sample import sample
from cdit.benchmark.scale import scale
from cdit.benchmark.stopwatch import machine
from cdit.benchmark.tables import Table
from cdit.benchmark.train import train
from cdit.common.cli import parse_config, run
from cdit.common.errors import UserError
from cdit.common.output import finished_folder

MODES: dict[str, Mode] = {
    mode.__name__: mode
    for mode in (train, sample, rollout, plan, data, scale, profile, attention, context, checkpoints, probes, latents)
}


def main() -> None:
    """The command line."""
    names, argv = [], sys.argv[1:]
    while argv and not argv[0].startswith("-"):
        names.append(argv.pop(0))
    for name in names:
        if name not in MODES:
            raise UserError(f"{name!r}: expected one of {', '.join(MODES)}")
    config = parse_config(BenchmarkConfig, __doc__, argv)
    config.validate()
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bench = Bench(config, device)
    size = "×".join(map(str, (config.channels, *config.image_size)))
    about = f"{machine(device)}; CDiT-{config.model.preset}/{config.model.patch_size} on {size}"
    print(f"{about}\n")
    tables = []
    for name in names or ["train", "sample"]:
        for table in MODES[name](bench):
            print(table, flush=True)
            tables.append(table)
    if config.out is not None:
        write(Path(config.out), about, tables, bench)


def write(out: Path, about: str, tables: list[Table], bench: Bench) -> None:
    """results.json, tables.md and a PNG of every plot."""
    with finished_folder(out) as folder:
        values = {"machine": about, "config": asdict(bench.config), "tables": [asdict(table) for table in tables]}
        (folder / "results.json").write_text(json.dumps(values, indent=1) + "\n")
        (folder / "tables.md").write_text("\n".join([f"{about}\n", *map(str, tables)]))
        for name, figure in bench.figures.items():
            figure.savefig(folder / f"{name}.png")


if __name__ == "__main__":
    run(main)
