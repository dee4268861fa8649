"""Packs a trained world model for shipping: half-precision weights and a model card.

    python -m cdit.worlds --checkpoint runs/maze --out cdit/worlds/maze --evaluation evaluation --starts data/doom/maze

Starts are a few short walks of a dataset, from which `python -m cdit.drive` begins. `--learned` adds a goal network for
`--planner.learned` of `python -m cdit.plan`. The card, README.md, holds the training config, steps and time of the run,
and the tables of `python -m cdit.evaluate`.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from cdit.common.cli import parse_config, run
from cdit.common.errors import UserError
from cdit.common.files import read_json, write_json
from cdit.common.options import CheckpointOptions, OutputOptions, check_options

WALKS, WALK_FRAMES = 8, 8
"""Number and least length of the walks to start from."""


@dataclass(kw_only=True)
class PackConfig(CheckpointOptions, OutputOptions):
    """What to pack."""

    evaluation: list[str]
    """Folders of results of `python -m cdit.evaluate`, whose tables go into the card."""
    starts: str | None = None
    """Dataset whose split `test` gives the walks to start from."""
    learned: str | None = None
    """Folder of a goal network that `python -m cdit.plan learn` wrote."""
    note: str = ""
    """A paragraph for the card: machine, data, licence of the contents of the frames."""


def main() -> None:
    """Writes the world model and its card."""
    config = parse_config(PackConfig, __doc__)
    check_options(config)
    tables = [Path(folder, "results.md") for folder in config.evaluation]
    for table in tables:
        if not table.is_file():
            raise UserError(f"evaluation: {table} does not exist; expected a folder of python -m cdit.evaluate")

    import torch

    from cdit.plan.goal_network import load_goal_network
    from cdit.world_model import WorldModel

    network = None if config.learned is None else load_goal_network(config.learned)
    world = WorldModel.from_pretrained(config.checkpoint)
    world.cdit.to(torch.float16)
    out = Path(config.out)
    world.save_pretrained(out)
    settings = out / "cdit" / "config.json"
    values = read_json(settings)
    values.pop("_name_or_path", None)  # the path that the weights were read from
    write_json(settings, values)
    run_folder = Path(config.checkpoint)
    card = [f"# {out.name}", config.note, _training(run_folder)]
    card += [table.read_text().replace(f"{run_folder}", out.name) for table in tables]
    (out / "README.md").write_text("\n\n".join(part.strip() for part in card if part) + "\n")
    if config.starts is not None:
        pack_starts(config.starts, out / "starts", max(WALK_FRAMES, world.cdit.config.max_context + 1))
    if network is not None:
        network.half().save(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")


def pack_starts(data: str, out: Path, length: int) -> None:
    """Writes shards of a few walks of this many frames, spread over the test split of a dataset.

    Raises:
        UserError: the dataset has problems.
    """
    from cdit.data.config import Source
    from cdit.data.layout import write_split, write_trajectory
    from cdit.data.shard_writer import convert
    from cdit.data.sources import open_source
    from cdit.loading import spread

    trajectories, info = open_source(Source(data), "test")
    names = []
    with TemporaryDirectory() as folder:
        for i in spread(list(range(len(trajectories))), WALKS):
            walk = trajectories[i]
            start = max(0, min(5 * len(walk) // 8, len(walk) - length))
            times = list(range(len(walk)))[start : start + length]
            names.append(f"{walk.name}_{start:04}")
            poses = () if walk.position is None else (walk.position[times], walk.yaw[times])
            frames, text = walk.frames(times).permute(0, 2, 3, 1).numpy(), walk.texts[start] if walk.texts else ""
            write_trajectory(Path(folder), names[-1], frames, *poses, text=text)
        write_split(Path(folder), "test", names)
        info.save(Path(folder))
        shutil.rmtree(out, ignore_errors=True)
        convert(Source(folder), out, None)


def _training(run_folder: Path) -> str:
    """The run's last step, validation losses and config, where the checkpoint is a training run's folder."""
    metrics, config = run_folder / "metrics.jsonl", run_folder / "config.yaml"
    if not metrics.is_file() or not config.is_file():
        return ""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [f"| {row['step']} | {row['validation/loss']:.5f} |" for row in rows if "validation/loss" in row]
    table = "\n".join(["| step | validation loss |", "|---:|---:|", *losses])
    origin = yaml.safe_load(config.read_text()).get("init_from")
    steps = f"{rows[-1]['step']} training steps{f', starting from {origin}' if origin else ''}."
    return f"{steps}\n\n{table}\n\nThe config:\n\n```yaml\n{config.read_text()}```"


if __name__ == "__main__":
    run(main)
