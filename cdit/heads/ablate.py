"""Taking heads out: their output before W_O replaced by zeros, or by what they put out on average."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from cdit.common.errors import UserError
from cdit.heads.config import Kind
from cdit.heads.recording import attention_of, unwrap
from cdit.model.attention import MultiHeadAttention

Site = tuple[int, Kind]
"""One attention of the network: its block, from 0, and its kind."""

Mode = Literal["zero", "mean"]


@contextmanager
def ablate_heads(
    cdit: nn.Module,
    heads: Mapping[Site, Sequence[int]],
    mode: Mode = "zero",
    means: Mapping[Site, Tensor] | None = None,
) -> Iterator[None]:
    """The network without chosen heads, at every call within the context; nothing is left on it afterwards.

    A head's output that is zero is the same as W_O without the head's columns. Contexts may be nested: heads of both
    are out. Call the model that `unwrap` gives: a compiled one would be compiled anew.

    Args:
        cdit: a CDiT, bare or wrapped in `DistributedDataParallel` or `torch.compile`.
        heads: numbers of heads, from 0, by block and kind.
        mode: what takes the place of a head's output: zeros, or its mean, which keeps what the head adds whatever the
            input is.
        means: for `mean`, (H, K) by block and kind, such as `cdit.heads.outputs.HeadOutputs.means`.

    Raises:
        UserError: a layer or head that the model does not have.
    """
    cdit = unwrap(cdit)
    with ExitStack() as stack:
        for (layer, kind), numbers in heads.items():
            attention = attention_of(cdit, layer, kind)
            if not all(0 <= head < attention.heads for head in numbers):
                raise UserError(f"attention heads {list(numbers)}: layer {layer} has heads 0 to {attention.heads - 1}")
            index = torch.tensor(list(numbers), dtype=torch.long, device=attention.out.weight.device)
            value = means[layer, kind].to(index.device)[index, None] if mode == "mean" else 0.0
            _edit(stack, attention, partial(_replace, index, value))
        yield


@contextmanager
def watch_outputs(
    cdit: nn.Module, sites: Sequence[Site], on_output: Callable[[Site, MultiHeadAttention, Tensor], None]
) -> Iterator[None]:
    """Shows what heads put out, and changes nothing.

    Args:
        cdit: a CDiT, bare or wrapped.
        sites: which attentions.
        on_output: called without gradients with the site, its module and the output of its heads before W_O,
            (B, H, N, K), as the module gets it: goals of a context are folded into the queries or into the batch.

    Raises:
        UserError: a layer that the model does not have.
    """
    cdit = unwrap(cdit)

    def look(site: Site, attention: MultiHeadAttention, out_BHNK: Tensor) -> Tensor:
        with torch.no_grad():
            on_output(site, attention, out_BHNK)
        return out_BHNK

    with ExitStack() as stack:
        for site in sites:
            attention = attention_of(cdit, *site)
            _edit(stack, attention, partial(look, site, attention))
        yield


def _edit(stack: ExitStack, attention: MultiHeadAttention, editor: Callable[[Tensor], Tensor]) -> None:
    """Sets an editor that follows the one that is there, until the stack is left."""
    before = attention.editor
    stack.callback(setattr, attention, "editor", before)
    attention.editor = editor if before is None else lambda out_BHNK: editor(before(out_BHNK))


def _replace(index: Tensor, value: Tensor | float, out_BHNK: Tensor) -> Tensor:
    out_BHNK = out_BHNK.clone()
    out_BHNK[:, index] = torch.as_tensor(value, dtype=out_BHNK.dtype, device=out_BHNK.device)
    return out_BHNK
