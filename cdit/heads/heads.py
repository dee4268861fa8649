"""What every head does, measured over a probe batch while its targets are denoised."""

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from cdit.common.pictures import to_float
from cdit.heads.config import Kind
from cdit.heads.denoising import encoded_batches, evaluating
from cdit.heads.edges import edge_patches, gradient_magnitude
from cdit.heads.measures import Layout
from cdit.heads.recording import LayerAttention, unwrap, watch_attention
from cdit.heads.statistics import HeadStatistics
from cdit.world_model import WorldModel


def measure_heads(
    world: WorldModel,
    batch: dict[str, Tensor],
    trajectories: Sequence[Hashable],
    times: Sequence[float],
    seed: int,
    kind: Kind = "cross",
    layers: Sequence[int] | None = None,
    truth: Tensor | None = None,
    watch: Callable[[int, float, LayerAttention], None] | None = None,
) -> HeadStatistics:
    """Goes through a probe batch one sample at a time; no more than one layer's weights of one sample are held.

    Args:
        world: the model, bare or with a wrapped network.
        batch: S stacked items of a `WindowDataset`.
        trajectories: S names, over which intervals are bootstrapped.
        times: diffusion times.
        seed: of the noise and of the resamples.
        kind: which attention.
        layers: blocks, from 0; by default all.
        truth: for cross-attention, (S, G, N, M) bool, `cdit.heads.correspondence.true_tokens`, where known.
        watch: is shown everything, too: sample, diffusion time and a layer's attention, as it runs.

    Raises:
        UserError: a layer that the model does not have.
    """
    cdit = unwrap(world.cdit)
    layers = range(len(cdit.blocks)) if layers is None else layers
    context = batch["context"][:, -cdit.config.max_context :]
    layout = Layout(context.shape[1] if kind == "cross" else 1, *cdit.grid)
    looked_at = context if kind == "cross" else batch["target"]
    edges = edge_patches(gradient_magnitude(to_float(looked_at), layout))
    actions = batch["action"] if kind == "cross" and bool(batch["action_mask"].all()) else None
    statistics = HeadStatistics(
        layout, trajectories, edges if kind == "cross" else edges[:, :, None, None], actions, truth, seed
    )
    with evaluating(world):
        for rows, encoded in encoded_batches(world, batch, 1, seed):
            for time in times:

                def note(attention: LayerAttention, sample: int = rows.start, time: float = time) -> None:
                    statistics.add(sample, time, attention)
                    if watch is not None:
                        watch(sample, time, attention)

                with watch_attention(cdit, layers, kind, note):
                    encoded.loss(world, time)
    return statistics
