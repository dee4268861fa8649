"""Recording the attention of a CDiT: context managers that watch and change nothing.

Shape suffixes: B contexts, G goals of a context, H heads, N target patches, M context tokens (for self-attention, N),
plus one for the extra key where there is one; K width of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cdit.common.errors import UserError
from cdit.heads.config import Kind
from cdit.model import CDiT
from cdit.model.attention import MultiHeadAttention, Observation

"""Cross-attention to the past frames, or self-attention within the target."""


def unwrap(model: nn.Module) -> CDiT:
    """The CDiT within `DistributedDataParallel` and `torch.compile`."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            return model
        model = inner


def attention_of(cdit: CDiT, layer: int, kind: Kind) -> MultiHeadAttention:
    """A block's attention of that kind.

    Raises:
        UserError: a layer that the model does not have.
    """
    if not 0 <= layer < len(cdit.blocks):
        raise UserError(f"attention layer {layer}: the model has layers 0 to {len(cdit.blocks) - 1}")
    return getattr(cdit.blocks[layer], f"{kind}_attn")


class LayerAttention:
    """One call of one layer's attention, goals told apart; G is 1 where targets were given without goals.

    Each method computes anew, so that nothing lasts longer than its caller keeps it.
    """

    def __init__(self, layer: int, attention: MultiHeadAttention, observation: Observation, patches: int, goals: int):
        self.layer = layer
        self._attention, self._observation = attention, observation
        self._patches, self._goals = patches, goals

    def weights(self) -> Tensor:
        """(B, G, H, N, M[+1]) float32; a row sums to 1 and the extra key comes last."""
        return self._by_goal(self._observation.weights())

    def scores(self) -> Tensor:
        """q·kᵀ / √K, what the softmax is taken of: (B, G, H, N, M[+1]) float32 in nats; -inf where masked."""
        return self._by_goal(self._observation.scores())

    def values(self) -> Tensor:
        """(B, G, H, M[+1], K); the goals of a context share theirs unless keys and values follow the condition."""
        v_BHMK = self._observation.kv.v_BHMK
        folded = self._observation.q_BHNK.shape[2] // self._patches
        return v_BHMK[:, None].expand(-1, folded, -1, -1, -1).reshape(-1, self._goals, *v_BHMK.shape[1:])

    def output_maps(self) -> Tensor:
        """The columns of W_O that each head's output meets, (H, D, K)."""
        weight_DD = self._attention.out.weight
        return weight_DD.unflatten(1, (self._attention.heads, -1)).transpose(0, 1)

    def _by_goal(self, x_BHNM: Tensor) -> Tensor:
        # Goals are folded into the queries or, where keys follow the condition, into the batch.
        x = x_BHNM.unflatten(2, (-1, self._patches)).transpose(1, 2)
        return x.reshape(-1, self._goals, *x.shape[2:])


@contextmanager
def watch_attention(
    cdit: nn.Module, layers: Sequence[int], kind: Kind, on_layer: Callable[[LayerAttention], None]
) -> Iterator[None]:
    """Calls `on_layer` without gradients as each of the chosen layers runs, at every call of the model within.

    Outputs are bit-identical with and without it, and nothing is left on the model afterwards. Call the model that
    `unwrap` gives: a compiled one would be compiled anew.

    Args:
        cdit: a CDiT, bare or wrapped in `DistributedDataParallel` or `torch.compile`.
        layers: indices of blocks, from 0.
        kind: which attention.
        on_layer: given what ran.

    Raises:
        UserError: a layer that the model does not have.
    """
    cdit = unwrap(cdit)
    chosen = {layer: attention_of(cdit, layer, kind) for layer in layers}
    goals = 1

    def note_goals(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
def record_attention(
    cdit: nn.Module,
    layers: Sequence[int],
    kind: Kind = "cross",
    on_weights: Callable[[int, Tensor], None] | None = None,
) -> Iterator[dict[int, Tensor]]:
    """Records the weights of chosen layers at every call of the model within the context; see `watch_attention`.

    Args:
        cdit: a CDiT, bare or wrapped in `DistributedDataParallel` or `torch.compile`.
        layers: indices of blocks, from 0.
        kind: which attention.
        on_weights: called with (layer, weights) as each layer runs, the weights (B, G, H, N, M[+1]) float32 on the
            model's device; nothing is then kept, so that no more than one layer's weights are held.

    Yields:
        By layer, the weights of the last call, (B, G, H, N, M[+1]) float32 on the CPU; a row sums to 1 and the extra
        key comes last. G is 1 where targets were given without goals. Stays empty with `on_weights`.

    Raises:
        UserError: a layer that the model does not have.
    """
    recorded: dict[int, Tensor] = {}

    def note(attention: LayerAttention) -> None:
        if on_weights is None:
            recorded[attention.layer] = attention.weights().cpu()
        else:
            on_weights(attention.layer, attention.weights())

    with watch_attention(cdit, layers, kind, note):
        yield recorded
