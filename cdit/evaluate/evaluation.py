"""Runs an evaluation, from its config to its pages. Studies are built from the same parts."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from tqdm import tqdm

from cdit.common.errors import Interrupted, UserError
from cdit.common.processes import is_lost_peer
from cdit.data.windows import WindowDataset
from cdit.diffusion import SamplerConfig
from cdit.evaluate.cases import content_hash, read_index, spread_cases
from cdit.evaluate.config import EvaluateConfig
from cdit.evaluate.curves import draw_curves, drift_studies, side_by_side
from cdit.evaluate.frechet import Features
from cdit.evaluate.metrics import load_metrics
from cdit.evaluate.page import draw, write_markdown, write_page
from cdit.evaluate.parts import Parts, weights_hash
from cdit.evaluate.protocols import direct, rollout
from cdit.evaluate.results import Results, summarize
from cdit.evaluate.study import Judge, Study
from cdit.loading import find_device, load_world, windows_for
from cdit.world_model import WorldDescription, WorldModel


def evaluate(config: EvaluateConfig) -> None:
    """Computes the batches that are missing in OUT/parts, and writes the results of all of them.

    Raises:
        UserError: checkpoint, data and options are incompatible; nothing was computed.
        Interrupted: another process does not answer.
    """
    accelerator = build_accelerator(config)
    is_main = accelerator.is_main_process
    world = load_world(config.checkpoint, str(accelerator.device))
    sampler, weights = config.sampler.over(world.description), weights_hash(world)
    dataset = windows_for(world, config)
    studies = build_studies(config, world, dataset)
    with waiting(), accelerator.local_main_process_first():  # which downloads weights for all
        judge = build_judge(config, world, studies, accelerator.device)
    parts = []
    for study in studies:
        depends_on = made_of(study, config, dataset, judge, sampler, weights)
        parts.append(Parts(Path(config.out, "parts", study.protocol.name), depends_on, len(study.batches)))

    # Processes share whole batches, whose results do not depend on the process.
    missing = [find_missing(parts, config.overwrite)] if is_main else [None]
    with waiting():
        broadcast_object_list(missing)
    if isinstance(missing[0], UserError):
        raise missing[0]
    mine = missing[0][accelerator.process_index :: accelerator.num_processes]
    total = sum(len(studies[number].batches[batch]) for number, batch in mine)
    with tqdm(total=total, unit="sample", disable=not is_main) as bar:
        for number, batch in mine:
            study = studies[number]
            bar.set_description(study.protocol.name)
            with accelerator.autocast():
                found = study.compute(batch, world, dataset, judge, sampler)
            parts[number].write(batch, found)
            bar.update(len(study.batches[batch]))
    with waiting():
        accelerator.wait_for_everyone()

    if is_main:
        out = Path(config.out)
        about = describe(config, sampler, weights, accelerator.device)
        results, pictures = Results(about | {"trained_on": trained_on(world.description)}), {}
        for study, part in zip(studies, parts, strict=True):
            found, name = part.read(), study.protocol.name
            results.protocols[name] = summarize(study.protocol, study.cases, found, config.seed)
            pictures[name] = draw(study.protocol, found, out / "pictures")
        if config.rollout.curves:
            results.protocols["curves"] = side_by_side(results.protocols)
            pictures["curves"] = {"every second; bands are 95 % intervals": out / "pictures" / "curves.png"}
            (out / "pictures").mkdir(exist_ok=True)
            draw_curves(results.protocols, *pictures["curves"].values())
        results.save(out)
        print(write_markdown(results, out / "results.md"))
        write_page(results, pictures, out / "index.html")
        if config.tracking == "wandb":
            from cdit.evaluate.tracking import track  # imports wandb

            track(results, pictures, config.project, asdict(config), out)
        print(f"done: {out / 'index.html'}, results.md and results.json")
    accelerator.end_training()


def build_accelerator(config: EvaluateConfig) -> Accelerator:
    """Device, processes and precision.

    Raises:
        UserError: the device is not available.
        Interrupted: another process does not answer.
    """
    if config.device != "auto":
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(find_device(config.device))
    timeout = InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes))
    with waiting():
        return Accelerator(
            cpu=config.device == "cpu", mixed_precision=config.mixed_precision, kwargs_handlers=[timeout]
        )


@contextmanager
def waiting() -> Iterator[None]:
    """Turns the errors of waiting for other processes into one line.

    Raises:
        Interrupted: another process is gone, or has not answered for `timeout_minutes`.
    """
    try:
        yield
    except RuntimeError as error:  # the base of torch.distributed.DistError, and raised by gloo itself
        if not is_lost_peer(error):
            raise
        reason = str(error).partition("\n")[0][:200]
        raise Interrupted(f"another process does not answer ({reason}); the same command continues") from error


def find_missing(parts: Sequence[Parts], overwrite: bool) -> list[tuple[int, int]] | UserError:
    """(index of the part, batch) of each batch to compute, or an error if the parts belong to another evaluation."""
    try:
        for part in parts:
            part.clear() if overwrite else part.check()
        for part in parts:
            part.begin()
    except UserError as error:
        return error
    return [(number, batch) for number, part in enumerate(parts) for batch in part.missing()]


def build_studies(config: EvaluateConfig, world: WorldModel, dataset: WindowDataset) -> list[Study]:
    """Every protocol with its cases.

    Raises:
        UserError: a horizon or a rate does not fit the model or the data.
        DataError: an index file does not.
    """
    fps, studies = world.description.fps, []
    for name, given in (("nwm_compat", config.nwm_compat), ("rollout.curves", config.rollout.curves)):
        if given and world.description.actions.kind != "motion":
            raise UserError(f"{name}: expected a world whose actions are dx, dy, dyaw")
    protocols = [("time", config.time, direct(config.time.seconds, fps))] if "time" in config.protocols else []
    if "rollout" in config.protocols:
        release = (world.description.units, dataset.info.spacing) if config.nwm_compat else None
        for rate in config.rollout.fps:
            protocol = rollout(config.rollout.seconds, rate, fps, release, config.rollout.curves)
            protocols.append(("rollout", config.rollout, protocol))
    for section, options, protocol in protocols:
        reach = protocol.reach
        if options.index:
            cases = read_index(options.index, dataset, reach, world.description.min_history)
        else:
            cases = spread_cases(dataset, reach, options.samples, f"{section}.seconds")
        studies.append(Study(protocol, cases, config.batch_size, config.pictures, config.seed))
    if config.rollout.curves:
        studies += drift_studies(studies[-1], config.rollout, world, dataset)
    return studies


def build_judge(config: EvaluateConfig, world: WorldModel, studies: Sequence[Study], device: torch.device) -> Judge:
    """The metrics, except those for which frames are too small or rollouts too short; a line on stderr names these.

    Raises:
        UserError: a package or weights are missing, or a metric is not available for the world's codec.
    """
    names = [*config.metrics, *(["sharpness"] if config.rollout.curves else [])]
    if not world.codec.has_decoder:
        print(
            "the codec has no decoder: pictures are the nearest recorded frames, latents and ranks are measured",
            file=sys.stderr,
        )
        return Judge.without_decoder(world.codec)
    rank = "rank" in config.metrics
    if rank and world.codec.rank is None:
        raise UserError("metrics: rank needs a world that predicts features, expected another metric")
    judge = Judge(
        load_metrics(device, tuple(world.description.image_size), names),
        Features(config.fid_network, "fid_network").to(device) if "fid" in config.metrics else None,
        Features(config.fvd_network, "fvd_network").to(device) if "fvd" in config.metrics else None,
        latents="latents" in config.metrics or rank,
        rank=rank,
        truncate=config.nwm_compat,
    )
    for protocol in (study.protocol for study in studies if study.protocol.name.startswith("rollout")):
        if judge.videos and not judge.sees(protocol):
            print(
                f"FVD is left out of {protocol.name}: {config.fvd_network} needs videos of {judge.videos.min_frames} "
                f"frames, not {len(protocol.offsets)}",
                file=sys.stderr,
            )
    return judge


def made_of(
    study: Study, config: EvaluateConfig, dataset: WindowDataset, judge: Judge, sampler: SamplerConfig, weights: str
) -> dict[str, Any]:
    """Everything that the results of a study depend on, with the hash of the weights."""
    return {
        "weights": weights,
        "data": content_hash(dataset, study.cases, study.protocol.reach),
        "spacing": dataset.info.spacing,
        "protocol": asdict(study.protocol),
        "cases": [(case.name, case.now) for case in study.cases],
        "sampler": asdict(sampler),
        "metrics": judge.names,
        "networks": [config.fid_network if judge.images else None, config.fvd_network if judge.videos else None],
        "nwm_compat": config.nwm_compat,
        "mixed_precision": config.mixed_precision,
        "batch_size": study.batch_size,
        "pictures": study.pictures,
        "seed": study.seed,
    }


def describe(config: EvaluateConfig, sampler: SamplerConfig, weights: str, device: torch.device) -> dict[str, Any]:
    """The part of results.json besides the numbers."""
    return {
        "checkpoint": config.checkpoint,
        "weights": weights,
        "sampler": asdict(sampler),
        "config": asdict(config),
        "versions": {name: version(name) for name in ("cdit", "torch", "diffusers", "torchmetrics")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def trained_on(description: WorldDescription) -> str | None:
    """The metric that the training minimised directly (see `PerceptualConfig`), if there is one."""
    perceptual = description.flow.perceptual
    return {"alex": "lpips", "vgg": "lpips_vgg"}[perceptual.backbone] if perceptual.weight else None
