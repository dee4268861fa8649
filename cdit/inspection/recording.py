"""Recording the attention weights of a CDiT: a context manager that watches and changes nothing.

Shape suffixes: B contexts, G goals of a context, H heads, N target patches, M context tokens (for self-attention, N),
plus one for the extra key where there is one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cdit.attention import MultiHeadAttention, Observation
from cdit.errors import UserError
from cdit.model import CDiT


def unwrap(model: nn.Module) -> CDiT:
    """The CDiT within `DistributedDataParallel` and `torch.compile`."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            return model
        model = inner


@contextmanager
def record_attention(
    cdit: nn.Module,
    layers: Sequence[int],
    kind: Literal["cross", "self"] = "cross",
    on_weights: Callable[[int, Tensor], None] | None = None,
) -> Iterator[dict[int, Tensor]]:
    """Records the weights of chosen layers at every call of the model within the context.

    Outputs are bit-identical with and without it, and nothing is left on the model afterwards. Call the model that
    `unwrap` gives: a compiled one would be compiled anew.

    Args:
        cdit: a CDiT, bare or wrapped in `DistributedDataParallel` or `torch.compile`.
        layers: indices of blocks, from 0.
        kind: cross-attention to the past frames, or self-attention within the target.
        on_weights: called with (layer, weights) as each layer runs, the weights (B, G, H, N, M[+1]) float32 on the
            model's device; nothing is then kept, so that no more than one layer's weights are held.

    Yields:
        By layer, the weights of the last call, (B, G, H, N, M[+1]) float32 on the CPU; a row sums to 1 and the extra
        key comes last. G is 1 where targets were given without goals. Stays empty with `on_weights`.

    Raises:
        UserError: a layer that the model does not have.
    """
    cdit = unwrap(cdit)
    for layer in layers:
        if not 0 <= layer < len(cdit.blocks):
            raise UserError(f"attention layer {layer}: the model has layers 0 to {len(cdit.blocks) - 1}")
    patches = cdit.grid[0] * cdit.grid[1]
    leading: tuple[int, int] = (1, 1)
    recorded: dict[int, Tensor] = {}

    def note_goals(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal leading
        sample = args[0] if args else kwargs["sample"]
        leading = (sample.shape[0], sample.shape[1] if sample.ndim == 5 else 1)

    @torch.no_grad()
    def observe(layer: int, observation: Observation) -> None:
        weights = observation.weights()
        # Goals are folded into the queries or, where keys follow the condition, into the batch.
        weights = weights.unflatten(2, (-1, patches)).transpose(1, 2)
        weights = weights.reshape(*leading, *weights.shape[2:])
        if on_weights is None:
            recorded[layer] = weights.cpu()
        else:
            on_weights(layer, weights)

    with ExitStack() as stack:
        hook = cdit.register_forward_pre_hook(note_goals, with_kwargs=True)
        stack.callback(hook.remove)
        for layer in layers:
            attention: MultiHeadAttention = getattr(cdit.blocks[layer], f"{kind}_attn")
            stack.callback(setattr, attention, "observer", attention.observer)
            attention.observer = partial(observe, layer)
        yield recorded
