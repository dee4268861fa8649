"""Attention against torch.nn.MultiheadAttention, F.scaled_dot_product_attention and a softmax written with loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cdit.model.attention import (
    KeysValues,
    MultiHeadAttention,
    Observation,
    Part,
    attention_weights,
    joint_attention,
    scaled_dot_product_attention,
)

B, H, N, M, K = 2, 3, 5, 7, 4
CAUSAL = torch.ones(N, M, dtype=torch.bool).tril(M - N)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, KeysValues]:
    return draw(B, H, N, K, seed=1, dtype=dtype), KeysValues(
        draw(B, H, M, K, seed=2, dtype=dtype), draw(B, H, M, K, seed=3, dtype=dtype)
    )


def padding_mask() -> torch.Tensor:
    """(B, 1, 1, M): the second sample has no key but the last three."""
    mask = torch.ones(B, 1, 1, M, dtype=torch.bool)
    mask[1, ..., :4] = False
    return mask


def shared_parts(dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (1, 2, 6)) -> list[Part]:
    """Keys for six rows of queries: 3, 4 and 5 of them, shared by all, by three rows each, and each row's own."""
    return [
        Part(KeysValues(*(draw(n, H, 3 + i, K, seed=10 + 2 * i + j, dtype=dtype) for j in range(2))))
        for i, n in enumerate(rows)
    ]


def hidden(part: Part, *places: tuple[int, int]) -> Part:
    """The part with the keys at these (row, key) masked."""
    mask = torch.ones(part.rows, 1, 1, part.kv.k_BHMK.shape[2], dtype=torch.bool)
    for row, key in places:
        mask[row, ..., key] = False
    return Part(part.kv, mask)


def copied(parts: list[Part], rows: int = 6) -> tuple[KeysValues, torch.Tensor]:
    """All keys of each row, and a mask, row after row."""
    keys, values, masks = ([], [], [])
    for row in range(rows):
        mine = [(part, row * part.rows // rows) for part in parts]
        keys.append(torch.cat([part.kv.k_BHMK[i] for part, i in mine], dim=1))
        values.append(torch.cat([part.kv.v_BHMK[i] for part, i in mine], dim=1))
        seen = [torch.ones(part.kv.k_BHMK.shape[2]) if part.mask is None else part.mask[i, 0, 0] for part, i in mine]
        masks.append(torch.cat([x.bool() for x in seen]))
    return KeysValues(torch.stack(keys), torch.stack(values)), torch.stack(masks)[:, None, None]


def loop_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention in Python numbers, looking at a key only where the mask says so."""
    out = torch.zeros_like(q)
    mask = mask.broadcast_to(*q.shape[:3], k.shape[2])
    for b, h, n in [(b, h, n) for b in range(len(q)) for h in range(q.shape[1]) for n in range(q.shape[2])]:
        allowed = [m for m in range(k.shape[2]) if mask[b, h, n, m]]
        exps = [math.exp(sum((q[b, h, n] * k[b, h, m]).tolist()) / math.sqrt(q.shape[-1])) for m in allowed]
        for e, m in zip(exps, allowed, strict=True):
            out[b, h, n] += e / sum(exps) * v[b, h, m]
    return out


def torch_attention(ours: MultiHeadAttention) -> nn.MultiheadAttention:
    """torch's module holding the same weights."""
    width = ours.out.in_features
    theirs = nn.MultiheadAttention(width, ours.heads, batch_first=True, add_bias_kv=ours.extra_k is not None)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat((ours.q.weight, ours.kv.weight)))
        theirs.in_proj_bias.copy_(torch.cat((ours.q.bias, ours.kv.bias)))
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
        if ours.extra_k is not None:
            theirs.bias_k.copy_(ours.extra_k.reshape(1, 1, width))
            theirs.bias_v.copy_(ours.extra_v.reshape(1, 1, width))
    return theirs


def attention(width: int = 12, heads: int = 3, **options: bool) -> MultiHeadAttention:
    torch.manual_seed(0)
    module = MultiHeadAttention(width, heads, **options)
    for p in module.parameters():  # biases and the extra key start at zero, which would hide them
        nn.init.normal_(p, std=0.5)
    return module


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 1, N, M, dtype=torch.bool),
        padding_mask(),
        CAUSAL,
        draw(B, H, N, M, seed=9) > 0,
    ],
    ids=["full", "padding", "causal", "random"],
)
def test_fused_and_explicit_attention_agree_with_a_loop(mask):
    q, kv = qkv()
    expected = loop_attention(q, *kv, mask)
    torch.testing.assert_close(scaled_dot_product_attention(q, kv, mask), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(attention_weights(q, kv.k_BHMK, mask) @ kv.v_BHMK, expected, atol=1e-5, rtol=0)


def test_without_a_mask_it_is_torchs_kernel():
    q, kv = qkv()
    torch.testing.assert_close(scaled_dot_product_attention(q, kv), F.scaled_dot_product_attention(q, *kv))
    torch.testing.assert_close(
        scaled_dot_product_attention(q, kv, CAUSAL),
        F.scaled_dot_product_attention(q, *kv, attn_mask=CAUSAL),
        atol=1e-6,
        rtol=0,
    )


def test_weights_sum_to_one_and_masked_ones_are_exactly_zero():
    q, kv = qkv()
    mask = draw(B, H, N, M, seed=9) > 0
    mask[0, 0, 0] = False
    weights = attention_weights(q, kv.k_BHMK, mask)
    assert (weights[~mask] == 0).all()
    assert (weights[mask] > 0).all()
    torch.testing.assert_close(weights.sum(-1), mask.any(-1).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_keys_yields_zeros(dtype):
    q, kv = qkv(dtype)
    mask = padding_mask()
    mask[1] = False
    out = scaled_dot_product_attention(q, kv, mask)
    assert (out[1] == 0).all()
    torch.testing.assert_close(out[0], scaled_dot_product_attention(q, kv)[0])
    assert (attention_weights(q, kv.k_BHMK, mask)[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_through_masks_are_finite_and_masked_keys_get_none(dtype):
    q, (k, v) = qkv(dtype)
    mask = padding_mask().expand(B, 1, N, M).clone()
    mask[0, :, 2] = False  # a query that sees nothing
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    scaled_dot_product_attention(q, KeysValues(k, v), mask).float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert (q.grad[0, :, 2] == 0).all()
    assert (k.grad[1, :, :4] == 0).all()
    assert (v.grad[1, :, :4] == 0).all()
    assert (v.grad[1, :, 4:] != 0).all()


@pytest.mark.parametrize("mask", [None, padding_mask()], ids=["full", "padding"])
def test_bfloat16_is_near_float32(mask):
    """On CPUs bfloat16 takes a path of its own."""
    q, kv = qkv(torch.bfloat16)
    out = scaled_dot_product_attention(q, kv, mask)
    assert out.dtype == torch.bfloat16
    exact = scaled_dot_product_attention(q.float(), KeysValues(*(x.float() for x in kv)), mask)
    torch.testing.assert_close(out.float(), exact, atol=4e-2, rtol=0)  # values up to 3, 8 bits of mantissa


# --- keys in parts ---


@pytest.mark.parametrize(
    ("rows", "places"),
    [
        ((1, 2, 6), ([], [], [])),
        ((2, 6, 6), ([], [], [])),
        ((6, 2, 1), ([], [(0, 1)], [(0, 4)])),
        ((1, 2, 6), ([], [(1, 0), (1, 2)], [(3, 1), (3, 4), (5, 0)])),
        ((1, 2, 6), ([(0, 0), (0, 1), (0, 2)], [], [])),  # a whole part
        ((1, 2, 6), ([], [(0, 0), (0, 1), (0, 2), (0, 3)], [])),  # a whole row of one
    ],
)
def test_attention_to_parts_is_torchs_to_their_concatenation(rows, places):
    """In float64, with the gradients of queries, keys and values."""
    q = draw(6, H, N, K, seed=1, dtype=torch.float64).requires_grad_()
    parts = [hidden(part, *x) if x else part for part, x in zip(shared_parts(torch.float64, rows), places, strict=True)]
    inputs = [q, *(x.requires_grad_() for part in parts for x in part.kv)]
    kv, mask = copied(parts)
    out, expected = joint_attention(q, parts), F.scaled_dot_product_attention(q, *kv, attn_mask=mask)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    weights = draw(*out.shape, seed=8, dtype=torch.float64)
    found, right = (torch.autograd.grad((weights * x).sum(), inputs) for x in (out, expected))
    torch.testing.assert_close(found, right, atol=1e-12, rtol=0)


def test_queries_grouped_by_a_shared_part_are_the_same_queries():
    q, parts = draw(6, H, N, K, seed=1), shared_parts()
    grouped = q.view(2, 3, H, N, K).transpose(1, 2).flatten(2, 3)  # (2, H, 3·N, K)
    expected = joint_attention(q, parts).view(2, 3, H, N, K).transpose(1, 2).flatten(2, 3)
    torch.testing.assert_close(joint_attention(grouped, parts), expected)


def test_scores_far_apart_do_not_overflow():
    """By thousands, in float64, where exp(710) is infinite."""
    q = draw(6, H, N, K, seed=1, dtype=torch.float64).abs()
    high, low = shared_parts(torch.float64, (1, 6))
    high = Part(KeysValues(high.kv.k_BHMK.abs() + 5000, high.kv.v_BHMK))
    out = joint_attention(q, [low, high])
    torch.testing.assert_close(out, joint_attention(q, [high, low]))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, *(x.repeat(6, 1, 1, 1) for x in high.kv)))


def test_one_part_is_the_fused_kernel_bit_for_bit():
    q, kv = qkv()
    for mask in (None, padding_mask()):
        assert torch.equal(joint_attention(q, [Part(kv, mask)]), scaled_dot_product_attention(q, kv, mask))


def test_bfloat16_parts_are_near_float32():
    q, parts = draw(6, H, N, K, seed=1, dtype=torch.bfloat16), shared_parts(torch.bfloat16)
    out = joint_attention(q, parts)
    assert out.dtype == torch.bfloat16
    exact = joint_attention(q.float(), [Part(KeysValues(*(x.float() for x in part.kv))) for part in parts])
    torch.testing.assert_close(out.float(), exact, atol=4e-2, rtol=0)


def test_rows_without_a_key_in_any_part_yield_zeros():
    q, (first, second) = draw(6, H, N, K, seed=1), shared_parts(rows=(2, 6))
    first = hidden(first, (0, 0), (0, 1), (0, 2))
    out = joint_attention(q, [first, hidden(second, *((row, key) for row in (0, 1, 4) for key in range(4)))])
    assert (out[:2] == 0).all()
    assert (out[2:] != 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_heads_attend_to_parts_as_to_their_concatenation(masked):
    """What an observer sees is one softmax over all keys."""
    ours = attention()
    parts = shared_parts(rows=(2, 6))[:2]
    parts = [hidden(parts[0], (1, 0)), parts[1]] if masked else parts
    q, (kv, mask) = ours.project_q(draw(6, N, 12, seed=4)), copied(parts)
    seen: list[Observation] = []
    ours.observer = seen.append
    out = ours.attend(q, parts)
    torch.testing.assert_close(out, ours.attend(q, [Part(kv, mask if masked else None)]), atol=1e-5, rtol=0)

    in_parts, at_once = seen
    weights = in_parts.weights()
    assert weights.shape == (6, 3, N, 3 + 4)
    torch.testing.assert_close(weights, at_once.weights())
    torch.testing.assert_close(weights.sum(-1), torch.ones(6, 3, N))
    torch.testing.assert_close(in_parts.kv, at_once.kv)
    mixed = (weights @ in_parts.kv.v_BHMK).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours.out(mixed), out, atol=1e-5, rtol=0)
    ours.observer = None
    assert torch.equal(ours.attend(q, parts), out)


# --- heads ---


@pytest.mark.parametrize("extra_kv", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_multi_head_attention_is_torchs(cross, padded, extra_kv):
    ours = attention(extra_kv=extra_kv)
    theirs = torch_attention(ours)
    x = draw(B, N, 12, seed=4)
    context = draw(B, M, 12, seed=5) if cross else x
    mask = draw(B, context.shape[1], seed=6) > 0 if padded else None
    seen: list[Observation] = []
    ours.observer = seen.append

    out = ours(x, context if cross else None, None if mask is None else mask[:, None, None])
    expected, expected_weights = theirs(
        x, context, context, key_padding_mask=None if mask is None else ~mask, average_attn_weights=False
    )

    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0].weights(), expected_weights, atol=1e-5, rtol=0)


def test_masked_self_attention_is_torchs():
    ours = attention()
    x = draw(B, N, 12, seed=4)
    mask = CAUSAL[:, M - N :]
    expected, _ = torch_attention(ours)(x, x, x, attn_mask=~mask)
    torch.testing.assert_close(ours(x, mask=mask), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(B, 1, 1, 1), (B, 1, N, 1), (B, 1, 1, M), (1, H, N, M), (M,)])
def test_any_mask_that_broadcasts_leaves_the_extra_key_open(shape):
    ours = attention(extra_kv=True)
    x, context = draw(B, N, 12, seed=4), draw(B, M, 12, seed=5)
    mask = draw(*shape, seed=2) > 0
    full = F.pad(mask.broadcast_to(B, H, N, M), (0, 1), value=True)
    q, kv = ours.project_q(x), ours.project_kv(context)
    expected = ours.out(loop_attention(q, *kv, full).transpose(1, 2).reshape(B, N, 12))
    torch.testing.assert_close(ours(x, context, mask), expected, atol=1e-5, rtol=0)


def test_with_everything_masked_only_the_extra_value_remains():
    ours = attention(extra_kv=True)
    out = ours(draw(B, N, 12, seed=4), draw(B, M, 12, seed=5), torch.zeros(B, 1, 1, M, dtype=torch.bool))
    torch.testing.assert_close(out, ours.out(ours.extra_v.reshape(12)).expand(B, N, 12))


def test_qk_norm_makes_the_scale_of_queries_and_keys_irrelevant():
    ours = attention(qk_norm=True)
    nn.init.zeros_(ours.q.bias)
    x, context = draw(B, N, 12, seed=4), draw(B, M, 12, seed=5)
    q = ours.project_q(x)
    root_mean_square = (q / ours.q_norm.weight).square().mean(-1).sqrt()
    torch.testing.assert_close(root_mean_square, torch.ones(B, 3, N), atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.project_q(100 * x), q, atol=1e-3, rtol=0)
    v = ours.project_kv(context).v_BHMK
    expected = F.linear(context, ours.kv.weight[12:], ours.kv.bias[12:])  # values are not normalised
    torch.testing.assert_close(v.transpose(1, 2).flatten(2), expected)


@pytest.mark.parametrize("extra_kv", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_observer_changes_nothing_and_its_weights_explain_the_output(extra_kv, dtype):
    ours = attention(extra_kv=extra_kv).to(dtype)
    x, context = draw(B, N, 12, seed=4, dtype=dtype), draw(B, M, 12, seed=5, dtype=dtype)
    unwatched = ours(x, context, padding_mask())
    seen: list[Observation] = []
    ours.observer = seen.append
    watched = ours(x, context, padding_mask())

    assert torch.equal(watched, unwatched)
    (observation,) = seen
    weights = observation.weights()
    assert weights.dtype == torch.float32
    assert weights.shape == (B, 3, N, M + extra_kv)
    mixed = (weights @ observation.kv.v_BHMK.float()).transpose(1, 2).flatten(2)
    explained = F.linear(mixed, ours.out.weight.float(), ours.out.bias.float())
    torch.testing.assert_close(explained, watched.float(), atol=1e-5 if dtype == torch.float32 else 5e-2, rtol=0)


def test_an_observer_sees_a_mask_that_only_some_parts_have():
    ours, (first, *rest) = attention(), shared_parts()
    seen: list[Observation] = []
    ours.observer = seen.append
    out = ours.attend(draw(6, H, N, K, seed=1), [hidden(first, (0, 1)), *rest])
    weights = seen[0].weights()
    assert (weights[..., 1] == 0).all()
    mixed = (weights @ seen[0].kv.v_BHMK).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours.out(mixed), out, atol=1e-5, rtol=0)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden_size 10 must be a multiple of num_heads 3"):
        MultiHeadAttention(10, 3)
