"""How good predictions are at several horizons, beside baselines that a world model has to beat."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from cdit.common.pictures import to_float
from cdit.common.randomness import generator
from cdit.diffusion import SamplerConfig
from cdit.evaluate.methods import METHODS, predict_goals, predictions
from cdit.evaluate.metrics import Metric, score
from cdit.evaluate.tables import Row
from cdit.world_model import WorldModel


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
        metrics: what to measure, by name; see `cdit.evaluate.metrics`.
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
    if len(others) > 1:
        keys = ["context", "context_mask"]
        if bool(batch["action_mask"].any()):
            keys += ["action", "action_mask"]
        batch = batch | {f"other_{key}": batch[key][others] for key in keys}

    # On the CPU and from the start: the same numbers for every method, device and chunk.
    noises = {method: generator(seed) for method in METHODS}
    values: dict[tuple[str, str], list[Tensor]] = {}
    kept = []
    chunks = list(_split(batch, chunk))
    for part in tqdm(chunks, desc="horizons", unit="batch", disable=not progress, leave=False):
        part = {key: value.to(_device(world)) for key, value in part.items()}
        truth = to_float(part["target"])
        found = predictions(part, lambda method, seen: predict_goals(world, seen, sampler, noises[method]))
        for method, prediction in found:
            for name, scores in score(metrics, prediction, truth).items():
                values.setdefault((method, name), []).append(scores)
            if method == "model":
                kept.append(prediction.float().cpu())

    rows = []
    for method in (m for m in METHODS if (m, next(iter(metrics))) in values):
        scores = {name: torch.cat(values[method, name]) for name in metrics}
        for goal, seconds in enumerate(time_shift[0].tolist()):
            frames = round(seconds * world.description.fps)
            for name in metrics:
                value = scores[name][:, goal]
                rows.append(Row(method, seconds, frames, name, float(value.mean()), value))
    return HorizonResult(rows, torch.cat(kept))


def _split(batch: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(batch["context"]), size):
        yield {key: value[start : start + size] for key, value in batch.items()}


def _device(world: WorldModel) -> torch.device:
    return next(world.parameters()).device
