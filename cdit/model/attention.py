"""Scaled dot-product attention and multi-head attention (Vaswani et al. 2017, "Attention Is All You Need").

Shape suffixes: B batch, H heads, N query tokens, M key tokens, D width, K width of one head (D / H).
A mask is boolean, broadcastable to (B, H, N, M), True where a query may attend to a key.

Keys may come in parts that are shared by different numbers of queries: a part with S rows serves B queries, B / S
consecutive ones per row. Nothing is copied: `joint_attention` attends to each part separately and merges the results.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdit.model.rotary import Rotation, rotate


class KeysValues(NamedTuple):
    """What queries attend to: keys and values of all heads, each (B, H, M, K)."""

    k_BHMK: Tensor
    v_BHMK: Tensor


class Part(NamedTuple):
    """Some of the keys and values of an attention, in S rows, with their mask."""

    kv: KeysValues
    mask: Tensor | None = None
    """None: no mask. With several parts, the mask of each is the same for all queries, (S, 1, 1, M)."""

    @property
    def rows(self) -> int:
        """S."""
        return len(self.kv.k_BHMK)


def attention_scores(q_BHNK: Tensor, k_BHMK: Tensor, mask: Tensor | None = None) -> Tensor:
    """q·kᵀ / √K in float32, (B, H, N, M); -inf where masked."""
    with torch.autocast(q_BHNK.device.type, enabled=False):
        scores_BHNM = (q_BHNK.float() * q_BHNK.shape[-1] ** -0.5) @ k_BHMK.float().transpose(-1, -2)
    return scores_BHNM if mask is None else torch.where(mask, scores_BHNM, -torch.inf)


def attention_weights(q_BHNK: Tensor, k_BHMK: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ / √K) in float32, (B, H, N, M).

    Masked scores are -inf before the softmax, so their weights are exactly 0; rows without any key are zeros.
    """
    weights_BHNM = attention_scores(q_BHNK, k_BHMK, mask).softmax(-1)
    return weights_BHNM if mask is None else torch.where(mask.any(-1, keepdim=True), weights_BHNM, 0.0)


def scaled_dot_product_attention(q_BHNK: Tensor, kv: KeysValues, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ / √K)·v by a fused kernel, (B, H, N, K). A query whose row is fully masked yields zeros.

    Masked keys and values must be finite: kernels multiply them by zero.
    """
    if mask is None:
        return _fused(q_BHNK, *kv, None)
    mask, empty = _never_empty(mask)
    return _fused(q_BHNK, *kv, mask).masked_fill(empty, 0.0)


def joint_attention(q_BHNK: Tensor, parts: Sequence[Part]) -> Tensor:
    """`scaled_dot_product_attention` with one softmax over the keys of all parts, (B, H, N, K).

    The outputs of the parts are averaged by their shares of the softmax's denominator (online softmax: Milakov &
    Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135).

    Args:
        q_BHNK: queries.
        parts: keys and values; the number of rows of each divides B·N; consecutive queries share a row.
    """
    if len(parts) == 1:
        return scaled_dot_product_attention(q_BHNK, *parts[0])
    outs, sums = [], []
    for part in parts:
        out_SHNK, sum_SHN = attention_and_logsumexp(fold_queries(q_BHNK, part.rows), *part)
        outs.append(fold_queries(out_SHNK, len(q_BHNK)))
        sums.append(fold_queries(sum_SHN[..., None], len(q_BHNK)))
    shares = torch.stack(sums).softmax(0)
    return (shares * torch.stack(outs)).sum(0).to(q_BHNK.dtype)


def attention_and_logsumexp(q_BHNK: Tensor, kv: KeysValues, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`scaled_dot_product_attention`, and the logarithm of its softmax's denominator, (B, H, N), in float32 or wider.

    For a row without any key the logarithm is the lowest number of the dtype, so that it gets no weight when merged.
    """
    if mask is None:
        return _fused_with_logsumexp(q_BHNK, *kv, None)
    mask, empty = _never_empty(mask)
    out_BHNK, sum_BHN = _fused_with_logsumexp(q_BHNK, *kv, mask)
    lowest = torch.finfo(sum_BHN.dtype).min
    return out_BHNK.masked_fill(empty, 0.0), sum_BHN.masked_fill(empty[..., 0], lowest)


def concatenated(parts: Sequence[Part]) -> Part:
    """All keys as one part, with a copy of shared keys for every row of the largest part."""
    if len(parts) == 1:
        return parts[0]
    rows = max(part.rows for part in parts)
    kv = KeysValues(*(side_by_side(x, rows, 2) for x in zip(*(part.kv for part in parts), strict=True)))
    if all(part.mask is None for part in parts):
        return Part(kv)
    masks = [k.new_ones(len(k), 1, 1, k.shape[2], dtype=torch.bool) if m is None else m for (k, _), m in parts]
    return Part(kv, side_by_side(masks, rows, -1))


def side_by_side(tensors: Sequence[Tensor], rows: int, dim: int) -> Tensor:
    """Concatenates along a dimension, after repeating rows consecutively to `rows` of them."""
    tensors = [_repeated(x, rows) for x in tensors]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _repeated(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else x.repeat_interleave(rows // len(x), 0)


def fold_queries(x_BHNK: Tensor, rows: int) -> Tensor:
    """The same queries (or their angles) regrouped into `rows` rows of consecutive ones: (rows, H, B·N / rows, K)."""
    return x_BHNK.transpose(1, 2).reshape(rows, -1, x_BHNK.shape[1], x_BHNK.shape[3]).transpose(1, 2)


def _never_empty(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask with rows without any key unmasked (fused kernels disagree about them), and which rows these are."""
    empty = ~mask.any(-1, keepdim=True)
    return mask | empty, empty


def _fused(q_BHNK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], q_BHNK.shape[2], k_BHMK.shape[2])
    if q_BHNK.device.type == "cpu" and q_BHNK.dtype == torch.bfloat16:
        # On CPUs the fused bfloat16 kernels are several times slower than two products and a softmax
        # (`python -m cdit.benchmark attention`).
        scores_BHNM = (q_BHNK * q_BHNK.shape[-1] ** -0.5) @ k_BHMK.transpose(-1, -2)
        if mask is not None:
            scores_BHNM = scores_BHNM.masked_fill(~mask, -torch.inf)
        return scores_BHNM.softmax(-1) @ v_BHMK
    return F.scaled_dot_product_attention(q_BHNK, k_BHMK, v_BHMK, attn_mask=mask)


def _fused_with_logsumexp(q_BHNK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    keys = k_BHMK.shape[2]
    # torch's kernel needs heads of aligned width, and has no gradient for the logarithm.
    if q_BHNK.is_cuda and q_BHNK.dtype != torch.float64 and q_BHNK.shape[3] % 8 == 0 and not torch.is_grad_enabled():
        bias = None
        if mask is not None:
            bias = q_BHNK.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
            bias = F.pad(bias, (0, -keys % 16))[..., :keys]  # rows begin at aligned addresses
            bias = bias.expand(*q_BHNK.shape[:3], keys)
        out_BHNK, sum_BHN, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q_BHNK, k_BHMK, v_BHMK, bias, compute_log_sumexp=True
        )
        return out_BHNK, sum_BHN[..., : q_BHNK.shape[2]]  # which are padded
    scores_BHNM = (q_BHNK * q_BHNK.shape[3] ** -0.5) @ k_BHMK.transpose(-1, -2)
    scores_BHNM = scores_BHNM.to(torch.promote_types(scores_BHNM.dtype, torch.float32))
    if mask is not None:
        scores_BHNM = scores_BHNM.masked_fill(~mask, -torch.inf)
    weights_BHNM = scores_BHNM.softmax(-1)
    # The largest weight is exp(largest score - logarithm), so the exponentials need not be summed a second time.
    return weights_BHNM.to(v_BHMK.dtype) @ v_BHMK, scores_BHNM.amax(-1) - weights_BHNM.amax(-1).log()


@dataclass
class Observation:
    """What an observer of a `MultiHeadAttention` receives at each call: the tensors passed to the kernel.

    Keys in several parts are concatenated.
    """

    q_BHNK: Tensor
    kv: KeysValues
    mask: Tensor | None

    def scores(self) -> Tensor:
        """The input of the softmax in this call, (B, H, N, M), float32; -inf where masked."""
        return attention_scores(self.q_BHNK, self.kv.k_BHMK, self.mask)

    def weights(self) -> Tensor:
        """The attention weights of this call, (B, H, N, M), float32; the extra key, if any, comes last."""
        return attention_weights(self.q_BHNK, self.kv.k_BHMK, self.mask)


class MultiHeadAttention(nn.Module):
    """h heads of width D / h in parallel, concatenated and mixed by W_O.

    Args:
        width: D, width of queries, context and output.
        heads: h; must divide D.
        qk_norm: normalise q and k per head by RMSNorm before rotation (Dehghani et al. 2023, ViT-22B).
        extra_kv: one learned key and value without projection or position, appended by `project_kv`: a sink for
            queries that match nothing (`add_bias_kv` of `torch.nn.MultiheadAttention`).

    `observer`, when set, is called with an `Observation` at every `attend`. The output still comes from the fused
    kernel, so observing changes nothing.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False, extra_kv: bool = False):
        super().__init__()
        if width % heads:
            raise ValueError(f"hidden_size {width} must be a multiple of num_heads {heads}")
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.extra_k = nn.Parameter(torch.zeros(heads, 1, width // heads)) if extra_kv else None
        self.extra_v = nn.Parameter(torch.zeros(heads, 1, width // heads)) if extra_kv else None
        self.observer: Callable[[Observation], None] | None = None

    def project_q(self, x_BND: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Queries of x, (B, H, N, K), rotated to their positions."""
        q_BND = self.q(x_BND)
        return rotate(self.q_norm(self._split(q_BND)).to(q_BND.dtype), rotation)

    def project_kv(
        self,
        context_BMD: Tensor,
        rotation: Rotation | None = None,
        key_norm: nn.Module | None = None,
        extra_rotation: Rotation | None = None,
    ) -> KeysValues:
        """Keys (rotated to their positions) and values of a context, the extra key and value last.

        With `key_norm`, keys are computed from the normalised context, values from the unnormalised one. If queries are
        rotated, `extra_rotation`, (1, K / 2), of a position that moves with them makes the extra key's scores
        independent of the queries' absolute coordinates.
        """
        if key_norm is None:
            k_BMD, v_BMD = self.kv(context_BMD).chunk(2, dim=-1)
        else:
            halves = zip(self.kv.weight.chunk(2), self.kv.bias.chunk(2), strict=True)
            sources = (key_norm(context_BMD), context_BMD)
            k_BMD, v_BMD = (F.linear(x, *half) for x, half in zip(sources, halves, strict=True))
        k_BHMK = self.k_norm(self._split(k_BMD)).to(k_BMD.dtype)
        kv = KeysValues(rotate(k_BHMK, rotation), self._split(v_BMD))
        if self.extra_k is None:
            return kv
        # Appended here: at each attention every block would copy the cache at every step. A separate part would avoid
        # the copy, but not all fused kernels return the logarithm that merging needs.
        extra = (rotate(self.extra_k, extra_rotation), self.extra_v)
        extra = (e.to(x.dtype).expand(len(x), -1, -1, -1) for x, e in zip(kv, extra, strict=True))
        return KeysValues(*(torch.cat(pair, dim=2) for pair in zip(kv, extra, strict=True)))

    def attend(self, q_BHNK: Tensor, parts: Sequence[Part]) -> Tensor:
        """Attention from projected queries to projected keys (see `joint_attention`), mixed by W_O: (B, N, D)."""
        out_BHNK = joint_attention(q_BHNK, parts)
        if self.observer is not None:
            self.observer(Observation(q_BHNK, *concatenated(parts)))
        return self.out(out_BHNK.transpose(1, 2).flatten(2))

    def forward(
        self,
        x_BND: Tensor,
        context_BMD: Tensor | None = None,
        mask: Tensor | None = None,
        rotation: Rotation | None = None,
        context_rotation: Rotation | None = None,
    ) -> Tensor:
        """Self-attention over x, or cross-attention from x to a context: (B, N, D). The extra key is never masked."""
        if context_BMD is None:
            context_BMD, context_rotation = x_BND, rotation
        kv = self.project_kv(context_BMD, context_rotation)
        if mask is not None and self.extra_k is not None:
            mask = F.pad(mask.expand(*mask.shape[:-1], context_BMD.shape[1]), (0, 1), value=True)
        return self.attend(self.project_q(x_BND, rotation), [Part(kv, mask)])

    def _split(self, x_BND: Tensor) -> Tensor:
        return x_BND.unflatten(-1, (self.heads, -1)).transpose(1, 2)
