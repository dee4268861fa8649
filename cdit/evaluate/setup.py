"""Builds what an evaluation is made of from its config: the studies, the judge, and what results depend on."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from cdit.data.windows import WindowDataset
from cdit.diffusion import SamplerConfig
from cdit.evaluate.cases import read_index, spread_cases
from cdit.evaluate.config import EvaluateConfig
from cdit.evaluate.frechet import Features
from cdit.evaluate.metrics import load_metrics
from cdit.evaluate.protocols import Protocol, direct, rollout
from cdit.evaluate.study import Judge, Study
from cdit.world_model import WorldModel


def build_studies(config: EvaluateConfig, world: WorldModel, dataset: WindowDataset) -> list[Study]:
    """Every protocol with its cases.

    Raises:
        UserError: a horizon or a rate does not fit the model or the data.
        DataError: an index file does not.
    """
    studies = []
    for protocol in _protocols(config, world, dataset):
        section = "time" if protocol.name == "time" else "rollout"
        options, reach = getattr(config, section), max(protocol.offsets)
        if options.index:
            cases = read_index(options.index, dataset, reach, world.description.min_history)
        else:
            cases = spread_cases(dataset, reach, options.samples, f"{section}.seconds")
        studies.append(Study(protocol, cases, config.batch_size, config.pictures, config.seed))
    return studies


def build_judge(config: EvaluateConfig, world: WorldModel, studies: Sequence[Study], device: torch.device) -> Judge:
    """The metrics; what the frames are too small for, or rollouts too short, is left out with one line on stderr.

    Raises:
        UserError: a package or weights are missing.
    """
    judge = Judge(
        load_metrics(device, tuple(world.description.image_size), config.metrics),
        Features(config.fid_network, "fid_network").to(device) if "fid" in config.metrics else None,
        Features(config.fvd_network, "fvd_network").to(device) if "fvd" in config.metrics else None,
        truncate=config.nwm_compat,
    )
    for protocol in (study.protocol for study in studies if study.protocol.name != "time"):
        if judge.films and not judge.sees(protocol):
            print(
                f"FVD is left out of {protocol.name}: {config.fvd_network} needs films of {judge.films.min_frames} "
                f"frames, not {len(protocol.offsets)}",
                file=sys.stderr,
            )
    return judge


def made_of(
    study: Study, config: EvaluateConfig, spacing: float, judge: Judge, sampler: SamplerConfig, weights: str
) -> dict[str, Any]:
    """Everything that the results of a study depend on, with the dataset's spacing in metres and the weights' hash."""
    return {
        "weights": weights,
        "data": config.data,
        "spacing": spacing,
        "protocol": asdict(study.protocol),
        "cases": [(case.name, case.now) for case in study.cases],
        "sampler": asdict(sampler),
        "metrics": judge.names,
        "networks": [config.fid_network if judge.images else None, config.fvd_network if judge.films else None],
        "nwm_compat": config.nwm_compat,
        "mixed_precision": config.mixed_precision,
        "batch_size": study.batch_size,
        "pictures": study.pictures,
        "seed": study.seed,
    }


def describe(config: EvaluateConfig, sampler: SamplerConfig, weights: str, device: torch.device) -> dict[str, Any]:
    """What results.json says beside the numbers."""
    return {
        "checkpoint": config.checkpoint,
        "weights": weights,
        "sampler": asdict(sampler),
        "config": asdict(config),
        "versions": {name: version(name) for name in ("cdit", "torch", "diffusers", "torchmetrics")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _protocols(config: EvaluateConfig, world: WorldModel, dataset: WindowDataset) -> list[Protocol]:
    fps, units = world.description.fps, world.description.units
    found: list[Protocol] = []
    if "time" in config.protocols:
        found.append(direct(config.time.seconds, fps))
    if "rollout" in config.protocols:
        release = (units, dataset.info.spacing) if config.nwm_compat else None
        found += [rollout(config.rollout.seconds, rate, fps, release) for rate in config.rollout.fps]
    return found
