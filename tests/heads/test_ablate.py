import pytest
import torch
from torch import nn

from cdit.common.errors import UserError
from cdit.heads.ablate import ablate_heads, watch_outputs
from cdit.heads.recording import watch_attention

DIALECTS = {
    "native": {},
    "sink": {"extra_kv": True, "qk_norm": True, "context_depth": 1},
    "nwm": {"extra_kv": True, "context_modulation": True, "position": "learned"},
}


@pytest.fixture(params=DIALECTS)
def dialect(request):
    return DIALECTS[request.param]


def attentions(cdit):
    return [a for block in cdit.blocks for a in (block.self_attn, block.cross_attn)]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cross", "self"])
@pytest.mark.parametrize("heads", [[0], [3, 1], [0, 1, 2, 3], []])
def test_zeroing_heads_is_removing_their_columns_exactly(make_cdit, make_inputs, dialect, kind, heads):
    cdit = make_cdit(**dialect)
    inputs = make_inputs(cdit)
    whole = cdit(**inputs)
    with ablate_heads(cdit, {(1, kind): heads}):
        ablated = cdit(**inputs)
    assert torch.equal(cdit(**inputs), whole)
    # Zeros in the place of a head's columns: every product and every sum is the same, so not a bit may differ.
    weight = getattr(cdit.blocks[1], f"{kind}_attn").out.weight
    for head in heads:
        weight[:, 8 * head : 8 * head + 8] = 0
    assert torch.equal(ablated, cdit(**inputs))
    assert torch.equal(ablated, whole) == (not heads)


@torch.no_grad()
def test_zeroing_a_head_is_a_projection_without_it_up_to_the_order_of_sums(make_cdit):
    """The columns truly taken away: the sums are shorter, so that they may be rounded otherwise."""
    attention = make_cdit().blocks[0].self_attn
    x = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
    seen = []
    attention.editor = lambda out: seen.append(out) or out.index_fill(1, torch.tensor([2]), 0.0)
    ablated = attention(x)
    kept = [0, 1, 3]
    shorter = attention.out.weight.unflatten(1, (4, 8))[:, kept].flatten(1)
    expected = seen[0][:, kept].transpose(1, 2).flatten(2) @ shorter.T + attention.out.bias
    torch.testing.assert_close(ablated, expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_the_mean_takes_the_place_of_what_heads_put_out(make_cdit, make_inputs, dialect):
    cdit = make_cdit(**dialect)
    inputs = make_inputs(cdit)
    mean = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    seen = []
    with (
        ablate_heads(cdit, {(2, "cross"): [0, 3]}, "mean", {(2, "cross"): mean}),
        watch_outputs(cdit, [(2, "cross")], lambda site, attention, out: seen.append(out)),
    ):
        ablated = cdit(**inputs)
    assert torch.equal(seen[0][:, [0, 3]], mean[[0, 3], None].expand_as(seen[0][:, [0, 3]]))
    assert not torch.equal(seen[0][:, [1, 2]], mean[[1, 2], None].expand_as(seen[0][:, [1, 2]]))
    # A constant before W_O is a bias after it.
    attention = cdit.blocks[2].cross_attn
    for head in (0, 3):
        columns = slice(8 * head, 8 * head + 8)
        attention.out.bias += attention.out.weight[:, columns] @ mean[head]
        attention.out.weight[:, columns] = 0
    torch.testing.assert_close(ablated, cdit(**inputs), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_nested_contexts_take_out_the_heads_of_both(make_cdit, make_inputs):
    cdit = make_cdit()
    inputs = make_inputs(cdit)
    with ablate_heads(cdit, {(0, "self"): [1, 2], (2, "cross"): [0]}):
        together = cdit(**inputs)
    with ablate_heads(cdit, {(0, "self"): [1]}), ablate_heads(cdit, {(0, "self"): [2], (2, "cross"): [0]}):
        nested = cdit(**inputs)
    assert torch.equal(nested, together)


@torch.no_grad()
def test_nothing_is_left_behind_even_by_an_error(make_cdit, make_inputs):
    cdit = make_cdit()
    with pytest.raises(RuntimeError, match="mine"), ablate_heads(cdit, {(0, "cross"): [0]}):
        raise RuntimeError("mine")
    with pytest.raises(UserError), ablate_heads(cdit, {(0, "cross"): [0], (0, "self"): [9]}):
        pass
    assert [a.editor for a in attentions(cdit)] == [None] * 6


@torch.no_grad()
def test_watching_outputs_changes_nothing_and_shows_what_the_weights_say(make_cdit, make_inputs, dialect):
    cdit = make_cdit(**dialect)
    inputs = make_inputs(cdit)
    before, outputs, explained = cdit(**inputs), {}, []
    with (
        watch_outputs(cdit, [(0, "self")], lambda site, attention, out: outputs.setdefault(site, out)),
        watch_attention(cdit, [0], "self", lambda layer: explained.append(layer.weights() @ layer.values())),
    ):
        assert torch.equal(cdit(**inputs), before)
    assert [a.editor for a in attentions(cdit)] == [None] * 6
    assert list(outputs) == [(0, "self")]
    torch.testing.assert_close(outputs[0, "self"], explained[0].flatten(0, 1), atol=1e-5, rtol=1e-4)


def test_gradients_flow_through_what_is_left(make_cdit, make_inputs):
    cdit = make_cdit()
    weight = cdit.blocks[0].cross_attn.out.weight
    with ablate_heads(cdit, {(0, "cross"): [1]}):
        (gradient,) = torch.autograd.grad(cdit(**make_inputs(cdit)).square().sum(), weight)
    assert gradient[:, 8:16].eq(0).all()
    assert gradient[:, :8].ne(0).any()


@pytest.mark.slow
def test_the_unused_hook_does_not_break_the_graph(make_cdit, make_inputs):
    cdit = make_cdit()
    inputs = make_inputs(cdit)
    explained = torch._dynamo.explain(cdit)(**inputs)
    assert explained.graph_count == 1
    assert explained.graph_break_count == 0


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({(0, "cross"): [0, 4]}, r"attention heads \[0, 4\]: layer 0 has heads 0 to 3"),
        ({(0, "self"): [-1]}, r"attention heads \[-1\]"),
        ({(3, "cross"): [0]}, "layer 3: the model has layers 0 to 2"),
    ],
)
def test_what_does_not_exist_is_named(make_cdit, heads, message):
    with pytest.raises(UserError, match=message), ablate_heads(make_cdit(), heads):
        pass


@torch.no_grad()
def test_wrapped_models_are_ablated(make_cdit, make_inputs):
    cdit = make_cdit()
    inputs = make_inputs(cdit)
    with ablate_heads(cdit, {(0, "cross"): [1]}):
        expected = cdit(**inputs)
    wrapped = nn.DataParallel(cdit)
    with ablate_heads(wrapped, {(0, "cross"): [1]}):
        assert torch.equal(cdit(**inputs), expected)
