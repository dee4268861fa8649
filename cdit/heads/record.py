"""Recording the attention of a CDiT, and denoising samples while it is recorded.

Shape suffixes: B contexts, G goals of a context, H heads, N target patches, M context tokens (for self-attention, N),
plus one for the extra key if there is one; K width of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cdit.batch import Batch, EncodedBatch, KeyedDraws
from cdit.common.errors import UserError
from cdit.common.frames import to_float
from cdit.common.randomness import seed_of
from cdit.heads.config import Kind
from cdit.model import CDiT
from cdit.model.attention import MultiHeadAttention, Observation
from cdit.world_model import WorldModel, WorldState


def attention_of(cdit: CDiT, layer: int, kind: Kind) -> MultiHeadAttention:
    """A block's attention of that kind.

    Raises:
        UserError: a layer that the model does not have.
    """
    if not 0 <= layer < len(cdit.blocks):
        raise UserError(f"attention layer {layer}: the model has layers 0 to {len(cdit.blocks) - 1}")
    return getattr(cdit.blocks[layer], f"{kind}_attn")


class LayerAttention:
    """One call of one layer's attention, with a dimension for goals; G is 1 if targets were passed without goals.

    Each method recomputes its result, so that nothing outlives the caller's reference.
    """

    def __init__(self, layer: int, attention: MultiHeadAttention, observation: Observation, patches: int, goals: int):
        self.layer = layer
        self._attention, self._observation = attention, observation
        self._patches, self._goals = patches, goals

    def weights(self) -> Tensor:
        """(B, G, H, N, M[+1]) float32; a row sums to 1 and the extra key comes last."""
        return self._by_goal(self._observation.weights())

    def scores(self) -> Tensor:
        """q·kᵀ / √K, the input of the softmax: (B, G, H, N, M[+1]) float32 in nats; -inf where masked."""
        return self._by_goal(self._observation.scores())

    def values(self) -> Tensor:
        """(B, G, H, M[+1], K); the goals of a context share them unless keys and values depend on the condition."""
        v_BHMK = self._observation.kv.v_BHMK
        folded = self._observation.q_BHNK.shape[2] // self._patches
        return v_BHMK[:, None].expand(-1, folded, -1, -1, -1).reshape(-1, self._goals, *v_BHMK.shape[1:])

    def output_maps(self) -> Tensor:
        """The columns of W_O that multiply each head's output, (H, D, K)."""
        weight_DD = self._attention.out.weight
        return weight_DD.unflatten(1, (self._attention.heads, -1)).transpose(0, 1)

    def _by_goal(self, x_BHNM: Tensor) -> Tensor:
        # Goals are folded into the queries or, if keys depend on the condition, into the batch.
        x = x_BHNM.unflatten(2, (-1, self._patches)).transpose(1, 2)
        return x.reshape(-1, self._goals, *x.shape[2:])


@contextmanager
def watch_attention(
    cdit: CDiT, layers: Sequence[int], kind: Kind, on_layer: Callable[[LayerAttention], None]
) -> Iterator[None]:
    """Calls `on_layer`, without gradients, whenever one of the layers runs within the context.

    Outputs are bit-identical with and without it, and the model is left as it was. A compiled copy of the model is not
    watched.

    Raises:
        UserError: a layer that the model does not have.
    """
    chosen = {layer: attention_of(cdit, layer, kind) for layer in layers}
    goals = 1

    def note_goals(module: CDiT, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal goals
        sample = args[0] if args else kwargs["sample"]
        goals = sample.shape[1] if sample.ndim == 5 else 1

    @torch.no_grad()
    def observe(layer: int, observation: Observation) -> None:
        on_layer(LayerAttention(layer, chosen[layer], observation, cdit.grid[0] * cdit.grid[1], goals))

    with ExitStack() as stack:
        hook = cdit.register_forward_pre_hook(note_goals, with_kwargs=True)
        stack.callback(hook.remove)
        for layer, attention in chosen.items():
            stack.callback(setattr, attention, "observer", attention.observer)
            attention.observer = partial(observe, layer)
        yield


@contextmanager
def record_attention(cdit: CDiT, layers: Sequence[int], kind: Kind = "cross") -> Iterator[dict[int, Tensor]]:
    """Records the weights of chosen layers at every call of the model within the context; see `watch_attention`.

    Yields:
        By layer, the weights of the last call, (B, G, H, N, M[+1]) float32 on the CPU; a row sums to 1 and the extra
        key comes last. G is 1 if targets were passed without goals.

    Raises:
        UserError: a layer that the model does not have.
    """
    recorded: dict[int, Tensor] = {}

    def note(attention: LayerAttention) -> None:
        recorded[attention.layer] = attention.weights().cpu()

    with watch_attention(cdit, layers, kind, note):
        yield recorded


class FixedNoise(KeyedDraws):
    """Draws whose noise for the goals' latents, (B, G, C, h, w), is given, whatever else an objective draws."""

    def __init__(self, noise: Tensor, keys: Sequence[int]):
        super().__init__(keys, noise.device)
        self._noise = noise

    def randn(self, *shape: int) -> Tensor:
        """(B, *shape), standard normal."""
        return self._noise if shape == self._noise.shape[1:] else super().randn(*shape)


@dataclass
class Probe:
    """Samples to denoise again and again: encoded once, their noise fixed."""

    state: WorldState
    encoded: EncodedBatch
    """Its context is the cache of the state."""
    noise: Tensor
    keys: list[int]

    def loss(self, world: WorldModel, time: float) -> Tensor:
        """The objective's loss of each target at one diffusion time, (B, G)."""
        times = self.noise.new_full(self.noise.shape[:2], time)
        return world.objective.loss(world.cdit, self.encoded, FixedNoise(self.noise, self.keys), times)


def probes(world: WorldModel, batch: Batch, size: int, seed: int) -> Iterator[tuple[slice, Probe]]:
    """A batch of frames, `size` samples at a time: their slice, and the samples ready to be denoised.

    A sample's noise depends on its index and the seed, not on `size`.
    """
    for start in range(0, len(batch), size):
        rows = slice(start, start + size)
        items = batch[rows].to(world.device)
        state = world.begin(to_float(items.context), items.mask, items.condition.spacing)
        clean = world.codec.encode(to_float(items.target))
        keys = [seed_of(seed, start + i) for i in range(len(clean))]
        noise = [torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(key)) for key in keys]
        encoded = EncodedBatch(state.cache, None, clean, world.network_condition(items.condition))
        yield rows, Probe(state, encoded, torch.stack(noise).to(clean), keys)


@contextmanager
def evaluating(world: WorldModel) -> Iterator[None]:
    """The network in evaluation mode, without gradients; its mode is restored."""
    training = world.cdit.training
    world.cdit.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        world.cdit.train(training)
