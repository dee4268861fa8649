"""How few network calls are enough?

Every scheduler, number of steps and shift samples the same cases from the same noise, and so does a reference of many
steps. LPIPS and PSNR to the truth, LPIPS to the reference's frames and the calls of the network are measured. The
recommended setting is the best one with the fewest calls whose LPIPS to the truth is statistically indistinguishable
from the best of all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, product
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cdit.batch import Batch
from cdit.common.errors import UserError
from cdit.common.frames import to_float
from cdit.common.randomness import generator
from cdit.data.windows import WindowDataset
from cdit.diffusion import Flow, SamplerConfig, make_objective
from cdit.diffusion.config import SamplerOptions, sampled_as
from cdit.evaluate.evaluation import build_judge, build_studies, describe, find_missing, made_of
from cdit.evaluate.metrics import score
from cdit.evaluate.parts import Parts, weights_hash
from cdit.evaluate.study import Judge, Study
from cdit.loading import load_world, windows_for
from cdit.studies.config import StepsConfig
from cdit.studies.steps_report import summarize, write
from cdit.world_model import WorldDescription, WorldModel

SHIFTS = (0.5, 1.0, 2.0, 3.0)
REFERENCES = ("euler", "ddim")
"""Schedulers that add no noise during sampling, so that frames depend only on the initial noise."""


def compare_steps(config: StepsConfig) -> None:
    """Computes the batches that are missing in OUT/parts, and writes results.json, results.md and steps.png.

    Raises:
        UserError: checkpoint, data and options are incompatible; nothing was computed.
    """
    evaluation = config.evaluation
    world = load_world(config.checkpoint, config.device)
    samplers = settings(config, world.description)
    dataset = windows_for(world, config)
    (study,) = build_studies(evaluation, world, dataset)
    if len({case.trajectory for case in study.cases}) < 2:
        raise UserError("time: the cases are of one trajectory, expected more: intervals are over trajectories")
    judge = build_judge(evaluation, world, [study], world.device)
    if "lpips" not in judge.names:
        raise UserError("settings are compared by LPIPS, which is not available (see above)")

    weights = weights_hash(world)
    depends_on = made_of(study, evaluation, dataset, judge, samplers[0], weights)
    depends_on["settings"] = [asdict(sampler) for sampler in samplers]
    parts = Parts(Path(config.out, "parts"), depends_on, len(study.batches))
    missing = find_missing([parts], config.overwrite)
    if isinstance(missing, UserError):
        raise missing
    with tqdm(total=len(missing) * sum(sampler.steps for sampler in samplers), unit="step") as bar:
        for _, batch in missing:
            with torch.autocast(world.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                parts.write(batch, measure(batch, study, world, dataset, judge, samplers, bar))
    about = describe(evaluation, samplers[0], weights, world.device) | {"config": asdict(config)}
    del about["sampler"]  # there are many
    findings = summarize(samplers, parts.read(), [case.name for case in study.cases], config.seed)
    print(write(findings, about, Path(config.out)))


def settings(config: StepsConfig, description: WorldDescription) -> list[SamplerConfig]:
    """The reference, then all others that are tried, each with the model's own guidance.

    Raises:
        UserError: the objective does not allow one of them; the message names the field.
    """
    objective, grid = make_objective(description), config.sampler
    is_flow = isinstance(getattr(objective, "base", objective), Flow)
    if not is_flow and grid.shift is not None:
        raise UserError(f"sampler.shift is {grid.shift}, but the model is a {description.objective}: expected none")
    schedulers = grid.scheduler or list(objective.schedulers)
    if config.reference.scheduler == "ddpm":
        raise UserError("reference.scheduler is ddpm, expected one that adds no noise during sampling, such as ddim")
    try:
        usual = next((name for name in REFERENCES if name in objective.schedulers), schedulers[0])
        scheduler = config.reference.scheduler or usual
        reference = SamplerOptions(scheduler, config.reference.steps, 1.0).over(description)
    except UserError as error:
        raise UserError(f"reference: {error}") from error

    def shifts(scheduler: str) -> list[float]:
        is_shifted = is_flow and (sampled_as(description), scheduler) != ("shortcut", "average")
        return grid.shift or (list(SHIFTS) if is_shifted else [1.0])

    grid_of = (product([scheduler], grid.steps, shifts(scheduler)) for scheduler in schedulers)
    tried = [SamplerOptions(*values).over(description) for values in chain.from_iterable(grid_of)]
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
    """Measures a batch of B cases with each sampler, the first of which is the reference.

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
    """Inside the `with`, the list gets an element for every call of the network."""
    calls: list[None] = []
    hook = network.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()
