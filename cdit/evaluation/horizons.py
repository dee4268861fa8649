"""How good predictions are at several horizons, beside baselines that a world model has to beat."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from cdit.diffusion import SamplerConfig
from cdit.evaluation.metrics import HIGHER_IS_BETTER, Metric
from cdit.pictures import to_float
from cdit.randomness import generator
from cdit.world_model import WorldModel

METHODS = {
    "model": "model",
    "copy_last": "last context frame",
    "shuffled_actions": "model, another's actions",
    "shuffled_contexts": "model, another's context",
}
"""The methods compared, and what tables call them."""


class Row(NamedTuple):
    """One number of the table."""

    method: str
    """A key of `METHODS`."""
    seconds: float
    """How far ahead."""
    frames: int
    """How far ahead, in frames of the model's fps."""
    metric: str
    """Name of the metric."""
    values: Tensor
    """(B,) float32 on the CPU, one for each sample, in the order of the batch."""

    @property
    def mean(self) -> float:
        """Mean over the samples."""
        return float(self.values.mean())


@dataclass(frozen=True)
class HorizonResult:
    """What `evaluate_horizons` measured."""

    rows: list[Row]
    """Method by method, then horizon by horizon, then metric by metric."""
    predictions: Tensor
    """(B, G, 3, H, W) in [-1, 1] on the CPU: the model's frames, the very ones that were measured."""

    def mean(self, method: str, metric: str) -> list[float]:
        """The means of one method and metric, horizon by horizon."""
        return [row.mean for row in self.rows if (row.method, row.metric) == (method, metric)]


def evaluate_horizons(
    world: WorldModel,
    batch: dict[str, Tensor],
    metrics: Mapping[str, Metric],
    seed: int,
    sampler: SamplerConfig | None = None,
    chunk: int = 32,
    progress: bool = False,
) -> HorizonResult:
    """Measures one prediction for each sample and horizon, all of them made by one sampler from the same noise.

    Beside the model stand the last context frame taken for a prediction, and the model given the actions, or the
    context, of another sample of the batch (the time shift stays its own). What it loses by wrong actions is what it
    knows of them. Actions are shuffled where any is known; there is nothing to shuffle in a batch of one.

    Args:
        world: the model, on the device where all is computed.
        batch: stacked items of `WindowDataset.window(index, offsets)` with the same G offsets: context
            (B, T, 3, H, W) uint8, context_mask (B, T), target (B, G, 3, H, W) uint8, action (B, G, 3) in metres and
            radians, action_mask (B, G), time_shift (B, G) in seconds, spacing (B,) in metres. Take
            samples from all over the dataset: another's actions and context are those of the sample half a batch away.
        metrics: what to measure, by name; see `cdit.evaluation.metrics`.
        seed: of the noise.
        sampler: scheduler, steps and guidance; by default those of training.
        chunk: samples computed at a time. It does not change the noise.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the samples' horizons differ.
    """
    time_shift = batch["time_shift"]
    if not torch.equal(time_shift, time_shift[:1].expand_as(time_shift)):
        raise ValueError("the samples of a batch must have the same horizons")
    others = torch.arange(len(time_shift)).roll(len(time_shift) // 2)
    variants = {"model": batch}
    if len(others) > 1:
        if bool(batch["action_mask"].any()):
            variants["shuffled_actions"] = batch | {key: batch[key][others] for key in ("action", "action_mask")}
        variants["shuffled_contexts"] = batch | {key: batch[key][others] for key in ("context", "context_mask")}

    chunks = -(-len(others) // chunk)
    bar = tqdm(total=chunks * len(variants), desc="horizons", unit="batch", disable=not progress, leave=False)
    values: dict[tuple[str, str], list[Tensor]] = {}
    predictions = []

    def measure(method: str, prediction: Tensor, target: Tensor) -> None:
        truth = to_float(target.to(prediction.device))
        for name, metric in metrics.items():
            scores = metric(prediction.flatten(0, 1), truth.flatten(0, 1)).unflatten(0, truth.shape[:2])
            values.setdefault((method, name), []).append(scores.float().cpu())

    with bar:
        for method, variant in variants.items():
            noise = generator(
                seed
            )  # on the CPU and from the start: the same numbers for every method, device and chunk
            for part in _split(variant, chunk, _device(world)):
                prediction = world.predict(
                    to_float(part["context"]),
                    part["action"],
                    part["time_shift"],
                    context_mask=part["context_mask"],
                    action_mask=part["action_mask"],
                    spacing=part["spacing"],
                    sampler=sampler,
                    generator=noise,
                )
                measure(method, prediction, part["target"])
                if method == "model":
                    predictions.append(prediction.float().cpu())
                    measure("copy_last", to_float(part["context"][:, -1:]).expand_as(prediction), part["target"])
                bar.update()

    rows = []
    for method in (m for m in METHODS if (m, next(iter(metrics))) in values):
        scores = {name: torch.cat(values[method, name]) for name in metrics}
        for goal, seconds in enumerate(time_shift[0].tolist()):
            frames = round(seconds * world.description.fps)
            rows += [Row(method, seconds, frames, name, scores[name][:, goal]) for name in metrics]
    return HorizonResult(rows, torch.cat(predictions))


def markdown_table(rows: list[Row]) -> str:
    """The means as Markdown: for each metric a table, methods down and horizons across."""
    tables = []
    for metric in dict.fromkeys(row.metric for row in rows):
        chosen = [row for row in rows if row.metric == metric]
        horizons = dict.fromkeys(row.seconds for row in chosen)
        arrow = {True: " ↑", False: " ↓", None: ""}[HIGHER_IS_BETTER.get(metric)]
        digits = 2 if metric == "psnr" else 3
        lines = [
            f"| {metric.upper()}{arrow} | " + " | ".join(f"{seconds:g} s" for seconds in horizons) + " |",
            "|---|" + "---:|" * len(horizons),
        ]
        for method in dict.fromkeys(row.method for row in chosen):
            means = [f"{row.mean:.{digits}f}" for row in chosen if row.method == method]
            lines.append(f"| {METHODS.get(method, method)} | " + " | ".join(means) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"


def _split(batch: dict[str, Tensor], size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(batch["context"]), size):
        yield {key: value[start : start + size].to(device) for key, value in batch.items()}


def _device(world: WorldModel) -> torch.device:
    return next(world.parameters()).device
