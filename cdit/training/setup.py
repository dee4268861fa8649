"""Builds the parts of a run from its config: the data, the world model, the optimizer."""

import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from cdit.codec.codec import Codec, load_codec
from cdit.common.errors import UserError, writing
from cdit.common.files import locked
from cdit.data.config import DataConfig
from cdit.data.frames import focal_lengths
from cdit.data.latents import Encoding
from cdit.data.layout import missing
from cdit.data.windows import WindowDataset
from cdit.diffusion.objective import make_objective
from cdit.model import CDiT
from cdit.model.describe import HIDDEN_MATRIX
from cdit.nwm.normalization import normalization
from cdit.training.config import OptimizerConfig, TrainConfig
from cdit.training.durable.tensors import trainable
from cdit.training.muon import Muon
from cdit.training.sharding import take_wish
from cdit.world_model import Units, WorldDescription, WorldModel


def build_accelerator(config: TrainConfig) -> tuple[Accelerator, bool]:
    """The accelerator (device, processes, precision, micro-batches), and whether to shard the weights.

    Raises:
        UserError: the device or sharding does not support the precision, or the processes are not connected.
    """
    sharded = take_wish()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
        torch.use_deterministic_algorithms(True)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            dynamo_backend="inductor" if config.compile and not sharded else "no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes))],
        )
    except ValueError as error:
        if config.mixed_precision in str(error):
            raise UserError(f"mixed_precision is {config.mixed_precision}: {error}") from error
        raise
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:  # each would train on its own, all in the same folder
        raise UserError(
            f"{launched} processes were launched, but there are no GPUs for them (torch finds "
            f"{torch.cuda.device_count()}); to train on CPUs, accelerate launch --cpu, or ACCELERATE_USE_CPU=true"
        )
    if accelerator.num_processes > 2 and (config.deterministic or accelerator.device.type == "cpu"):
        # After its first step DDP rebuilds its gradient buckets, and the order in which processes add up a number
        # depends on its position: a resumed run would differ. It builds them only once if it searches for unused
        # parameters. Usually there are none, as it says in a warning.
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    if config.deterministic and config.model.reprojection and accelerator.device.type == "cuda":
        raise UserError("deterministic: the gradient of model.reprojection has no deterministic algorithm on a GPU")
    if config.mixed_precision == "fp16" and sharded:  # each process would choose a scale for its own rows
        raise UserError("mixed_precision is fp16, expected no or bf16 with sharded weights")
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate trains in full precision
        raise UserError("mixed_precision is fp16, expected no or bf16 on a CPU")
    accelerator.gradient_accumulation_steps = micro_batches(config, accelerator.num_processes)
    if accelerator.device.type == "cpu":  # the launcher leaves each process one thread
        torch.set_num_threads(max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    return accelerator, sharded


def available_cpus() -> int:
    """Number of CPUs this process may use, possibly fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def micro_batches(config: TrainConfig, processes: int) -> int:
    """The number of parts into which each process splits its share of a batch."""
    share = math.ceil(config.batch_size / processes)
    return math.ceil(share / (config.micro_batch_size or share))


def prepare_data(config: DataConfig, accelerator: Accelerator) -> None:
    """Runs the config's `prepare` command if the dataset does not exist yet.

    One process per machine tries; a lock beside the folder makes the machines of a shared file system, and runs that
    start at the same time, take turns, so that only the first one runs the command.

    Raises:
        UserError: the command failed.
    """
    where = config.folder or "", config.source
    if config.prepare and accelerator.is_local_main_process and missing(*where):
        folder = Path(where[0])
        with locked(folder.with_name(f".{folder.name}.lock")):
            if missing(*where):
                print(f"{config.folder} does not exist yet: python {config.prepare}", file=sys.stderr)
                done = subprocess.run([sys.executable, *shlex.split(config.prepare)])
                if done.returncode:
                    raise UserError(f"data.prepare: `python {config.prepare}` failed with exit code {done.returncode}")
    accelerator.wait_for_everyone()


def prepare_folder(config: TrainConfig, accelerator: Accelerator) -> None:
    """Creates the run's folder and writes the config to it.

    Raises:
        UserError: it cannot be written to, or not all processes see it.
    """
    path = config.folder / "config.yaml"
    if accelerator.is_main_process:
        with writing(path):
            config.folder.mkdir(parents=True, exist_ok=True)
            config.save(path)
    accelerator.wait_for_everyone()
    if not path.is_file():
        raise UserError(f"output is {config.output!r}: expected a folder shared by all machines")


def _focal(config: TrainConfig, dataset: WindowDataset) -> tuple[float, float]:
    """The focal lengths of the dataset's camera, if the model needs them, in half widths and half heights."""
    if not config.model.reprojection:
        return 1.0, 1.0
    if dataset.info.camera is None or not dataset.info.has_actions or dataset.info.actions.kind != "motion":
        missing = "camera in its dataset.json" if dataset.info.camera is None else "poses"
        raise UserError(
            f"model.reprojection: the dataset has no {missing} (docs/data.md): pass --model.reprojection false"
        )
    height, width = config.data.image_size
    focal_x, focal_y = focal_lengths(dataset.info.camera, config.data.image_size, config.data.crop)
    return 2 * focal_x / width, 2 * focal_y / height


def build_world(config: TrainConfig, dataset: WindowDataset, units: Units | None = None) -> WorldModel:
    """The world model to train: weights from the seed and units from the dataset, or both from `init_from`.

    Actions are normalised by the distance of the farthest goal at typical speed and by π radians, or by their recorded
    range; time shifts by that of the farthest goal, so that the network sees numbers of about -1 to 1.

    Args:
        config: of the run.
        dataset: to train on.
        units: those of a checkpoint that will be loaded; `init_from` is then not read.

    Raises:
        UserError: sizes are not compatible, or `init_from` is another model.
    """
    if config.data.text_encoder and not dataset.text_size:
        raise UserError(f"data.text_encoder is {config.data.text_encoder}, but the dataset has no texts (docs/data.md)")
    codec, actions = load_codec(config.codec), dataset.info.actions
    channels, *size = codec.latent_shape(config.data.image_size)
    torch.manual_seed(config.seed)
    objective = make_objective(config)
    cdit = CDiT(
        image_size=tuple(size),
        in_channels=channels,
        max_context=config.data.context_frames,
        learn_variance=objective.outputs == 2,
        focal=_focal(config, dataset),
        action_size=len(actions.names),
        text_size=dataset.text_size,
        **config.model.arguments(objective.conditioners),
    )
    start = None if config.init_from is None or units else WorldModel.from_pretrained(config.init_from)
    if start is not None:
        _take_weights(cdit, codec, start, config.init_from)
    if config.activation_checkpointing:
        cdit.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))  # which torch.compile supports
    if start is not None:
        units = start.description.units
        if start.description.actions.names != actions.names or start.description.actions.kind != actions.kind:
            raise UserError(
                f"init_from is {config.init_from}, whose actions are {', '.join(start.description.actions.names)}, but "
                f"the dataset has {', '.join(actions.names)}"
            )
        if start.description.text_encoder not in (None, config.data.text_encoder):
            raise UserError(
                f"init_from is {config.init_from}, whose text encoder is {start.description.text_encoder}, but "
                f"data.text_encoder is {config.data.text_encoder}"
            )
    description = WorldDescription(
        image_size=config.data.image_size,
        fps=dataset.info.fps,
        crop=config.data.crop,
        has_actions=dataset.info.has_actions and config.model.use_action,
        actions=actions,
        action_dropout=config.action_dropout,
        text_encoder=config.data.text_encoder,
        min_history=config.data.min_history,
        units=units or _units(config, dataset),
        objective=config.objective,
        flow=config.flow,
        few_step=config.few_step,
        ddpm=config.ddpm,
        self_rollout=config.self_rollout,
        objective_options=config.objective_options,
        sampler=config.sampler,
    )
    if config.flow.perceptual.weight and not codec.has_decoder:
        raise UserError("flow.perceptual.weight: the codec has no decoder (python -m cdit.codec train makes one)")
    world = WorldModel(cdit, codec, description)
    world.objective.attach(cdit, codec.decode)
    if config.optimizer.only:
        chosen = re.compile(config.optimizer.only)
        for name, parameter in cdit.named_parameters():
            parameter.requires_grad_(bool(chosen.search(name)))
        if not any(p.requires_grad for p in cdit.parameters()):
            raise UserError(f"optimizer.only is {config.optimizer.only}, which matches no parameter")
    return world


def _units(config: TrainConfig, dataset: WindowDataset) -> Units:
    actions = dataset.info.actions
    farthest = max(abs(config.data.min_offset), abs(config.data.max_offset), 1)
    scale, offset = actions.normalization(farthest)
    units = Units(tuple(scale), tuple(offset), time_scale=dataset.info.fps / farthest, spacing=None)
    if config.units == "nwm":
        if actions.kind != "motion":
            raise UserError(f"units is nwm, expected farthest_goal for actions such as {actions.names[0]}")
        units = normalization(dataset.info.fps)
    units.spacing = dataset.info.spacing
    return units


def _take_weights(cdit: CDiT, codec: Codec, start: WorldModel, name: str) -> None:
    """Loads the weights of a trained world.

    Raises:
        UserError: its codec or its network differs, except for conditioners and noise levels that it lacks, and for a
            place embedding that the config turns off.
    """
    if (start.codec.kind, start.codec.fingerprint()) != (codec.kind, codec.fingerprint()):
        raise UserError(f"init_from is {name}, whose codec ({start.codec.kind}) is not the config's ({codec.kind})")
    own, given = (
        {name: tuple(value) if isinstance(value, list) else value for name, value in network.config.items()}
        for network in (cdit, start.cdit)
    )
    free = {
        "dropout",
        "init",
        "extra_conditioners",
        "context_noise",
        *(() if cdit.pos_embed is not None else ("max_context",)),
        *(() if start.cdit.config.text_size else ("text_size",)),
        *(("place_embedding",) if cdit.place_embed is None else ()),
    }
    for field in sorted(own.keys() & given.keys() - free):
        if not field.startswith("_") and own[field] != given[field]:
            raise UserError(f"init_from is {name}, whose {field} is {given[field]}, but the config's is {own[field]}")
    weights = start.cdit.state_dict()
    if cdit.place_embed is None and "place_embed" in weights:  # what all patches share is kept
        weights["patch_embed.proj.bias"] = weights["patch_embed.proj.bias"] + weights.pop("place_embed").mean(0)
    missing, unexpected = cdit.load_state_dict(weights, strict=False)
    wrong = [*unexpected, *(weight for weight in missing if not weight.startswith(("conditioners.", "noise_embed.")))]
    if wrong:
        raise UserError(f"init_from is {name}, whose network differs from the config's in {wrong[0]}")


def use_latents(datasets: Iterable[WindowDataset], codec: Codec, config: TrainConfig) -> None:
    """Makes samples hold latents instead of frames if `python -m cdit.data.encode` has written them.

    Raises:
        DataError: some latents are missing, or were made with another codec, frame size or crop.
    """
    if codec.moments is None or config.data.latents == "no":
        return
    encoding = Encoding(codec.kind, config.codec.weights, codec.fingerprint(), config.data.image_size, config.data.crop)
    for dataset in datasets:
        dataset.use_latents(encoding)


def build_optimizer(
    networks: Mapping[str, nn.Module], config: OptimizerConfig, steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer of all networks, with weight decay on matrices only, and its schedule over the run's steps.

    Muon takes the matrices of attentions and MLPs; AdaLN, steering, embeddings and the final layer stay with AdamW.
    """
    parameters = trainable(networks)
    muon = {name: p for name, p in parameters.items() if config.name == "muon" and HIDDEN_MATRIX.fullmatch(name)}
    rest = [p for name, p in parameters.items() if name not in muon]
    others = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    options = {"lr": config.learning_rate, "betas": config.betas}
    if config.name == "muon":
        fused = [p for name, p in muon.items() if name.endswith(".kv.weight")]
        single = [p for name, p in muon.items() if not name.endswith(".kv.weight")]
        matrices = [{"params": single}, {"params": fused, "splits": 2}]
        matrices = [{**group, "weight_decay": config.weight_decay} for group in matrices]
        optimizer = Muon(matrices, others, config.momentum, **options)
    else:
        optimizer = torch.optim.AdamW(others, fused=True, **options)
    if config.schedule == "wsd":
        return optimizer, LambdaLR(optimizer, lambda step: _warmup_stable_decay(step, steps, config))
    name = {"cosine": "cosine", "constant": "constant_with_warmup"}[config.schedule]
    return optimizer, get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps)


def _warmup_stable_decay(step: float, steps: int, config: OptimizerConfig) -> float:
    """The share of the peak rate; `step` is not whole if the schedule follows the time (`train_seconds`)."""
    rise = step / config.warmup_steps if step < config.warmup_steps else 1.0
    return min(rise, max(0.0, (steps - step) / (config.decay_share * steps)))


def resume_schedule(schedule: LambdaLR, state: dict[str, Any], step: int | None = None) -> None:
    """Continues from a schedule's `state_dict`; peak rate and number of steps are the current ones.

    `step` replaces that of the state, which is a share of the time if the run had `train_seconds`.
    """
    own_peaks = schedule.base_lrs
    schedule.load_state_dict(state)
    schedule.base_lrs = own_peaks
    if step is not None:
        schedule.last_epoch = step
    set_rates(schedule)


def set_rates(schedule: LambdaLR) -> None:
    """Sets the optimizer's learning rates to those of `schedule.last_epoch`."""
    for group, rate, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = rate * factor(schedule.last_epoch)
