"""Attention of a world model on a probe batch: figures, a table per head, and scalars to follow over training."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from cdit.errors import UserError
from cdit.inspection import measures
from cdit.inspection.figures import HeadMaps, Scene, attention_figure, frame_name
from cdit.inspection.measures import Layout
from cdit.inspection.recording import record_attention, unwrap
from cdit.inspection.report import AttentionReport
from cdit.model import CDiT
from cdit.pictures import to_float
from cdit.randomness import generator
from cdit.world_model import WorldModel


@dataclass
class AttentionConfig:
    """Which attention is looked at."""

    layers: list[int] | None = None
    """Blocks, from 0; by default the first, the middle and the last."""
    times: list[float] = field(default_factory=lambda: [0.25, 0.75])
    """Diffusion times between 0 (clean) and 1 (noise)."""
    samples: int = 1
    """Samples of the batch that are drawn, each with its first goal. Numbers are means over the whole batch."""
    patch: tuple[int, int] | None = None
    """Row and column of the target patch whose attention is drawn, from 0 at the top left; by default the centre."""

    def resolve(self, cdit: CDiT, field: str = "attention") -> tuple[list[int], tuple[int, int]]:
        """The layers and the patch that this means for a network.

        Args:
            cdit: the network.
            field: what messages call this config.

        Raises:
            UserError: the network has no such layer or patch, or a time is outside (0, 1); the message names the field.
        """
        depth, (rows, columns) = len(cdit.blocks), cdit.grid
        layers = sorted({0, depth // 2, depth - 1} if self.layers is None else set(self.layers))
        row, column = (rows // 2, columns // 2) if self.patch is None else self.patch
        requirements = {
            "layers": (all(0 <= layer < depth for layer in layers), f"numbers from 0 to {depth - 1}"),
            "times": (all(0 < time < 1 for time in self.times), "numbers between 0 and 1"),
            "patch": (0 <= row < rows and 0 <= column < columns, f"one of the {rows} × {columns} patches of a frame"),
        }
        for name, (holds, expected) in requirements.items():
            if not holds:
                raise UserError(f"{field}.{name} is {getattr(self, name)}, expected {expected}")
        return layers, (row, column)


@torch.no_grad()
def inspect_attention(
    world: WorldModel, batch: dict[str, Tensor], config: AttentionConfig, seed: int
) -> AttentionReport:
    """Looks at the cross-attention while the true targets, noised to chosen diffusion times, are denoised.

    The batch is gone through one sample at a time, so that no more than one layer's weights of one sample are held.

    Args:
        world: the model; its `cdit` may be wrapped or compiled, what runs is the plain module in evaluation mode.
        batch: stacked items of a `WindowDataset`.
        config: layers, times and what is drawn.
        seed: of the noise; one draw per sample, the same at all times.

    Raises:
        UserError: a layer or patch that the model does not have, or a time outside (0, 1).
    """
    cdit = unwrap(world.cdit)
    layers, patch = config.resolve(cdit)
    batch = {name: value.to(next(cdit.parameters()).device) for name, value in batch.items()}
    context = batch["context"][:, -cdit.config.max_context :]
    context_mask = batch["context_mask"][:, -cdit.config.max_context :]
    layout = Layout(context.shape[1], *cdit.grid)
    summaries: dict[tuple[int, float], list[Tensor]] = defaultdict(list)
    images: dict[str, tuple[Image.Image, str]] = {}

    training = cdit.training
    cdit.eval()
    for i in range(len(context)):
        cache = cdit.encode_context(world.codec.encode(to_float(context[i : i + 1])), context_mask[i : i + 1])
        clean = world.codec.encode(to_float(batch["target"][i : i + 1]))
        noise = torch.randn(clean.shape, generator=generator(seed, i)).to(clean)
        seconds = batch["time_shift"][i : i + 1]
        action, time_shift = world.description.units.normalize(
            batch["action"][i : i + 1], seconds, batch["spacing"][i : i + 1]
        )
        scene = Scene(context[i].cpu(), context_mask[i].cpu(), batch["target"][i, 0].cpu(), patch)
        for time in config.times:

            def look(layer: int, weights: Tensor, i: int = i, time: float = time, scene: Scene = scene) -> None:
                summaries[layer, time].append(_summary(weights[0], layout))
                if i < config.samples:
                    where = f"sample {i}, goal {float(batch['time_shift'][i, 0]):+.2g} s"
                    name = f"attention/layer{layer:02d}/t{time:g}/sample{i}"
                    images[name] = _draw(weights[0, 0], layout, scene, layer, time, where)

            times = torch.full_like(seconds, time)
            with record_attention(cdit, layers, on_weights=look):
                cdit(
                    world.objective.add_noise(clean, noise, times),
                    world.objective.timestep(times),
                    action,
                    time_shift,
                    cache,
                    action_mask=batch["action_mask"][i : i + 1],
                )
    cdit.train(training)

    means = {key: torch.stack(values).nanmean(0).cpu() for key, values in sorted(summaries.items())}
    names = _summary_names(layout, cdit.config.extra_kv)
    scalars = {
        f"attention/layer{layer:02d}/head{head}/{name.replace(' ', '_')}": value
        for layer in layers
        for head, values in enumerate(torch.stack([means[layer, time] for time in config.times]).nanmean(0).tolist())
        for name, value in zip(names, values, strict=True)
    }
    rows = [
        [layer, head, time, *values]
        for (layer, time), heads in means.items()
        for head, values in enumerate(heads.tolist())
    ]
    return AttentionReport(images, ["layer", "head", "time", *names], rows, scalars)


def _summary(weights: Tensor, layout: Layout) -> Tensor:
    """(G, H, N, M[+1]) to the numbers of each head, (H, `_summary_names`): means over goals and patches."""
    columns = [
        measures.entropy(weights),
        measures.effective_tokens(weights),
        measures.mean_distance(weights, layout),
        *measures.frame_mass(weights, layout).unbind(-1),
    ]
    if weights.shape[-1] > layout.frames * layout.patches:
        columns.append(measures.extra_share(weights, layout))
    return torch.stack([column.transpose(0, 1).flatten(1).nanmean(1) for column in columns], dim=1)


def _summary_names(layout: Layout, extra: bool) -> list[str]:
    masses = [f"mass frame {frame_name(i, layout.frames).replace('−', '-')}" for i in range(layout.frames)]
    return ["entropy", "effective tokens", "distance", *masses, *(["mass extra"] if extra else [])]


def _draw(
    weights: Tensor, layout: Layout, scene: Scene, layer: int, time: float, where: str
) -> tuple[Image.Image, str]:
    """Figure and caption of the weights (H, N, M[+1]) of one target."""
    heads, _, keys = weights.shape
    has_extra = keys > layout.frames * layout.patches

    def maps(weights_HM: Tensor) -> HeadMaps:
        weights_HM = weights_HM.cpu()
        return HeadMaps(measures.frame_maps(weights_HM, layout), weights_HM[:, -1] if has_extra else None)

    row, column = scene.patch
    title = f"Layer {layer} · cross-attention to the past · diffusion time t = {time:g} · {where}"
    figure = attention_figure(scene, maps(weights[:, row * layout.columns + column]), maps(weights.mean(1)), title)
    first = frame_name(0, layout.frames)
    caption = (
        f"layer {layer}, heads 0 to {heads - 1} (rows), diffusion time {time:g}, frames {first} to 0 (columns), "
        f"{where}. Left: target, patch (row {row}, column {column}) outlined; where it looks; where all "
        f"{layout.patches} patches look on average. Bars: attention mass per frame"
        f"{' and on the extra key' if has_extra else ''}. Each row's colours run from 0 to its largest weight, for the "
        "patch and for the mean apart. One block is one patch."
    )
    return figure, caption
