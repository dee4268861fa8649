import pytest
import torch

from cdit.common.errors import UserError
from cdit.heads.record import record_attention, watch_attention

DIALECTS = {
    "native": {},
    "sink": {"extra_kv": True, "qk_norm": True, "context_depth": 1},
    "nwm": {"extra_kv": True, "context_modulation": True, "position": "learned"},
}


@pytest.fixture(params=DIALECTS)
def dialect(request):
    return DIALECTS[request.param]


def observers(cdit):
    return [a.observer for block in cdit.blocks for a in (block.self_attn, block.cross_attn)]


@torch.no_grad()
def test_outputs_are_bit_identical_and_nothing_is_left(make_cdit, make_inputs, dialect):
    cdit = make_cdit(**dialect)
    inputs = make_inputs(cdit)
    before = cdit(**inputs)
    with record_attention(cdit, [0, 1, 2]), record_attention(cdit, [1], kind="self"):
        during = cdit(**inputs)
    assert torch.equal(before, during)
    assert torch.equal(before, cdit(**inputs))
    with pytest.raises(RuntimeError, match="mine"), record_attention(cdit, [0]):
        raise RuntimeError("mine")
    assert observers(cdit) == [None] * 6
    assert not cdit._forward_pre_hooks


def test_gradients_are_bit_identical(make_cdit, make_inputs):
    cdit = make_cdit()
    inputs = make_inputs(cdit)
    gradients = []
    for layers in ([], [0, 2]):
        with record_attention(cdit, layers) as recording:
            gradients.append(torch.autograd.grad(cdit(**inputs).square().sum(), list(cdit.blocks.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not recording[0].requires_grad


@torch.no_grad()
def test_rows_sum_to_one_and_missing_frames_get_exactly_nothing(make_cdit, make_inputs, dialect):
    cdit = make_cdit(**dialect)
    with record_attention(cdit, [0, 2]) as cross, record_attention(cdit, [0, 2], kind="self") as itself:
        cdit(**make_inputs(cdit))
    assert set(cross) == set(itself) == {0, 2}
    for layer in (0, 2):
        extra = int(cdit.config.extra_kv)
        assert cross[layer].shape == (2, 3, 4, 24, 72 + extra)
        assert itself[layer].shape == (2, 3, 4, 24, 24)
        assert cross[layer].dtype == torch.float32
        for weights in (cross[layer], itself[layer]):
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert cross[layer][0, ..., :24].eq(0).all()
        assert cross[layer][1, ..., :24].gt(0).all()


@torch.no_grad()
def test_goals_are_separate(make_cdit, make_inputs, dialect):
    cdit = make_cdit(**dialect)
    inputs = make_inputs(cdit)
    for kind in ("cross", "self"):
        with record_attention(cdit, [2], kind=kind) as together:
            cdit(**inputs)
        for goal in range(3):
            one = inputs | {name: inputs[name][:, goal] for name in ("sample", "timestep")}
            one["condition"] = {name: value[:, goal] for name, value in inputs["condition"].items()}
            with record_attention(cdit, [2], kind=kind) as alone:
                cdit(**one)
            assert alone[2].shape[:2] == (2, 1)
            torch.testing.assert_close(alone[2][:, 0], together[2][:, goal], atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_weights_are_float32_under_autocast(make_cdit, make_inputs):
    cdit = make_cdit()
    with torch.autocast("cpu", torch.bfloat16), record_attention(cdit, [0]) as recording:
        cdit(**make_inputs(cdit))
    assert recording[0].dtype == torch.float32
    torch.testing.assert_close(recording[0].sum(-1), torch.ones(2, 3, 4, 24))


def test_a_layer_that_does_not_exist_is_named(make_cdit):
    with pytest.raises(UserError, match="layer 3: the model has layers 0 to 2"), record_attention(make_cdit(), [3]):
        pass


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cross", "self"])
def test_weights_values_and_output_maps_explain_what_the_branch_adds(make_cdit, make_inputs, dialect, kind):
    """Σ_h W_O^h Σ_j w_j V_j + bias, of every goal, is what the attention put out."""
    cdit = make_cdit(**dialect)
    attention = getattr(cdit.blocks[1], f"{kind}_attn")
    seen, outputs = [], []
    hook = attention.out.register_forward_hook(lambda module, args, output: outputs.append(output))
    with watch_attention(cdit, [1], kind, lambda layer: seen.append((layer.weights(), layer.values(), layer))):
        cdit(**make_inputs(cdit))
    hook.remove()
    weights, values, layer = seen[0]
    assert layer.layer == 1
    assert values.shape[:3] == (2, 3, 4)
    assert layer.output_maps().shape == (4, 32, 8)
    added = torch.einsum("bghnm,bghmk,hdk->bgnd", weights, values, layer.output_maps()) + attention.out.bias
    torch.testing.assert_close(added, outputs[0].reshape(2, 3, 24, 32), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_scores_are_what_the_softmax_is_taken_of(make_cdit, make_inputs, dialect):
    cdit = make_cdit(**dialect)
    seen = []
    with watch_attention(cdit, [2], "cross", lambda layer: seen.append((layer.scores(), layer.weights()))):
        cdit(**make_inputs(cdit))
    scores, weights = seen[0]
    assert scores[0, ..., :24].eq(-torch.inf).all()  # the missing frame
    assert scores[1].isfinite().all()
    torch.testing.assert_close(scores.softmax(-1), weights)
