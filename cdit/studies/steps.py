"""How few network calls do? `python -m cdit.evaluate steps --checkpoint RUN --data FOLDER --out OUT`

Samples the same test cases from the same noise by every scheduler, number of steps and shift that is asked for, and by
a reference of many steps. Measured are LPIPS and PSNR to the truth, LPIPS to the reference's frames, and the calls of
the network. OUT gets results.json, results.md and steps.png; recommended is the best setting of the fewest calls with
which LPIPS to the truth is not told apart from the best of all. What was computed stays in OUT/parts: the same command
goes on after an interruption.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cdit.batch import Batch
from cdit.common.cli import parse_config
from cdit.common.errors import UserError
from cdit.common.frames import to_float
from cdit.common.randomness import generator
from cdit.data.windows import WindowDataset
from cdit.diffusion import SamplerConfig, make_objective
from cdit.diffusion.config import SamplerOptions
from cdit.evaluate.config import EvaluateConfig, TimeConfig
from cdit.evaluate.metrics import score
from cdit.evaluate.parts import Parts, weights_hash
from cdit.evaluate.setup import build_judge, build_studies, describe, made_of
from cdit.evaluate.study import Judge, Study
from cdit.loading import load_world, windows_for
from cdit.studies.steps_report import summarize, write
from cdit.world_model import WorldDescription, WorldModel

SHIFTS = (0.5, 1.0, 2.0, 3.0)
REFERENCE = {"flow": "euler", "ddpm": "ddim"}
"""Of each objective a scheduler that draws nothing on its way: its frames follow from the first noise."""


@dataclass
class GridConfig:
    """Which settings are tried: each scheduler with each number of steps and each shift."""

    scheduler: list[Literal["euler", "heun", "dpm", "unipc", "ddpm", "ddim"]] | None = None
    """By default all that the model's objective allows."""
    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    """Numbers of denoising steps; one is a network call, but for Heun."""
    shift: list[float] | None = None
    """Of a flow, by default 0.5, 1, 2 and 3."""


@dataclass
class ReferenceConfig:
    """What the settings are to reach, one of them itself."""

    scheduler: Literal["euler", "heun", "dpm", "unipc", "ddim"] | None = None
    """By default euler for a flow, ddim for a DDPM."""
    steps: int = 250
    """Number of denoising steps."""


@dataclass
class StepsConfig:
    """What is sampled, by which settings."""

    checkpoint: str
    """A training run's folder, or a world model's."""
    data: str
    """The dataset folder."""
    out: str
    """Folder for the results."""
    split: str = "test"
    """Split of the dataset."""
    splits: str | None = None
    """Folder with <split>/traj_names.txt, where that is not <data>/splits."""
    follow_links: bool = False
    """Whether links within the dataset's folder may lead out of it."""
    spacing: float | None = None
    """Metres between consecutive frames, for models trained on several datasets; by default what dataset.json says."""
    time: TimeConfig = field(default_factory=lambda: TimeConfig([0.5, 2.0], 64))
    """The cases; a number of a case is the mean over the horizons."""
    sampler: GridConfig = field(default_factory=GridConfig)
    """Settings that are tried."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """Setting that the others are to reach."""
    batch_size: int = 16
    """Contexts predicted at a time. The noise depends on it."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast precision of predictions."""
    seed: int = 0
    """Of the noise and of the bootstrap."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1 …"""
    overwrite: bool = False
    """Whether to compute anew what OUT/parts holds, even of another study."""

    @property
    def evaluation(self) -> EvaluateConfig:
        """The evaluation whose cases and metrics these are."""
        shared = ("checkpoint", "data", "out", "split", "splits", "follow_links", "spacing", "time", "batch_size")
        values = {name: getattr(self, name) for name in (*shared, "mixed_precision", "seed")}
        return EvaluateConfig(**values, protocols=["time"], metrics=["psnr", "lpips"], pictures=0)


def compare_steps(argv: Sequence[str]) -> None:
    """The command line: `python -m cdit.evaluate steps --checkpoint RUN --data FOLDER --out OUT`.

    Raises:
        UserError: something does not fit together; nothing was computed.
    """
    config = parse_config(StepsConfig, __doc__, argv)
    evaluation = config.evaluation
    evaluation.validate()
    world = load_world(config.checkpoint, config.device)
    samplers = settings(config, world.description)
    dataset = windows_for(world, config.data, config.split, config.splits, config.follow_links, config.spacing)
    (study,) = build_studies(evaluation, world, dataset)
    if len({case.trajectory for case in study.cases}) < 2:
        raise UserError("time: the cases are of one trajectory, expected more: intervals are over trajectories")
    device = world.device
    judge = build_judge(evaluation, world, [study], device)
    if "lpips" not in judge.names:
        raise UserError("settings are compared by LPIPS, which cannot be measured here (see above)")

    weights = weights_hash(world)
    depends_on = made_of(study, evaluation, dataset.info.spacing, judge, samplers[0], weights)
    depends_on["settings"] = [asdict(sampler) for sampler in samplers]
    parts = Parts(Path(config.out, "parts"), depends_on, len(study.batches))
    if config.overwrite:
        parts.clear()
    parts.check()
    parts.begin()
    missing = parts.missing()
    with tqdm(total=len(missing) * sum(sampler.steps for sampler in samplers), unit="step") as bar:
        for batch in missing:
            with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                parts.write(batch, measure(batch, study, world, dataset, judge, samplers, bar))
    about = describe(evaluation, samplers[0], weights, device) | {"config": asdict(config)}
    del about["sampler"]  # there are many
    findings = summarize(samplers, parts.read(), [case.name for case in study.cases], config.seed)
    print(write(findings, about, Path(config.out)))


def settings(config: StepsConfig, description: WorldDescription) -> list[SamplerConfig]:
    """The reference, then all others that are tried; the model's own guidance goes with each.

    Raises:
        UserError: the objective does not allow one of them; the message names the field.
    """
    objective, grid = description.objective, config.sampler
    if objective != "flow" and grid.shift is not None:
        raise UserError(f"sampler.shift is {grid.shift}, but the model is a {objective}: expected none")
    schedulers = grid.scheduler
    if schedulers is None:
        schedulers = list(make_objective(description).schedulers)
    shifts = grid.shift
    if shifts is None:
        shifts = list(SHIFTS) if objective == "flow" else [1.0]
    for name, values in (("scheduler", schedulers), ("steps", grid.steps), ("shift", shifts)):
        if not values or len(set(values)) < len(values):
            raise UserError(f"sampler.{name} is {values}, expected at least one, each of them once")
    try:
        scheduler = config.reference.scheduler or REFERENCE[objective]
        reference = SamplerOptions(scheduler, config.reference.steps, 1.0).over(description)
    except UserError as error:
        raise UserError(f"reference: {error}") from error
    tried = [SamplerOptions(*values).over(description) for values in product(schedulers, grid.steps, shifts)]
    return [reference, *(sampler for sampler in tried if sampler != reference)]


@torch.no_grad()
def measure(
    batch: int,
    study: Study,
    world: WorldModel,
    dataset: WindowDataset,
    judge: Judge,
    samplers: Sequence[SamplerConfig],
    bar: tqdm,
) -> dict[str, Tensor]:
    """What is found of a batch of B cases by each of the samplers, the first being the reference.

    Returns:
        For sampler i of the list `i/lpips`, `i/psnr` (to the truth) and `i/lpips_to_reference`, (B, S) for S horizons,
        and `i/calls` (B,), how often the network was called. On the CPU.
    """
    cases = [study.cases[i] for i in study.batches[batch]]
    items = Batch.collate([study.protocol.window(dataset, case) for case in cases]).to(world.device)
    truth, reference, found = to_float(items.target), None, {}
    for i, sampler in enumerate(samplers):
        with counting(world.cdit) as calls:
            frames = study.protocol.predict(world, items, sampler, generator(study.seed, batch))
        frames = to_float(judge.eight_bits(frames))
        reference = frames if reference is None else reference
        found |= {f"{i}/{name}": value for name, value in score(judge.metrics, frames, truth).items()}
        found |= score({f"{i}/lpips_to_reference": judge.metrics["lpips"]}, frames, reference)
        found[f"{i}/calls"] = torch.full((len(cases),), len(calls))
        bar.update(sampler.steps)
    return found


@contextmanager
def counting(network: nn.Module) -> Iterator[list[None]]:
    """Inside, the list grows by an element with every call of the network."""
    calls: list[None] = []
    hook = network.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()
