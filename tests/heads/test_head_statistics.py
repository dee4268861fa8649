import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cdit.common.statistics import estimates
from cdit.heads import measures
from cdit.heads.choose import best_column, split_halves, trends
from cdit.heads.correspondence import true_tokens
from cdit.heads.head_statistics import HeadStatistics, measure_heads
from cdit.heads.measures import (
    Layout,
    edge_lift,
    edge_patches,
    fit_motion,
    gradient_magnitude,
    head_distances,
    offset_fields,
)
from cdit.heads.record import LayerAttention, record_attention
from cdit.model.attention import KeysValues, MultiHeadAttention, Observation

LAYOUT = Layout(frames=2, rows=5, columns=7)
N, M, GOALS, FOCAL, DEPTH = 35, 70, 2, 10.0, 4.0
HEADS = ["broad", "sink", "same place", "fixed offset", "turning", "walking", "newest frame"]


def layer_attention(weights: Tensor, values: Tensor | None = None) -> LayerAttention:
    """A call whose attention is `weights` (G, H, N, M + 1), or nearly so where these are 0."""
    goals, heads, patches, keys = weights.shape
    width = goals * patches
    q = math.sqrt(width) * torch.eye(width).expand(1, heads, width, width)
    k = weights.transpose(0, 1).flatten(1, 2).log().clamp(min=-80).transpose(1, 2)[None]
    attention = MultiHeadAttention(heads * width, heads)
    nn.init.eye_(attention.out.weight)
    v = torch.ones(1, heads, keys, width) if values is None else values
    return LayerAttention(0, attention, Observation(q, KeysValues(k, v), None), patches, goals)


def looking_at(places: Tensor, frame: int) -> Tensor:
    """(N, M + 1) whose expected place is `places` (N, 2); patches that would attend outside attend to the extra key."""
    weights = torch.zeros(N, LAYOUT.frames, LAYOUT.rows, LAYOUT.columns)
    extra = torch.ones(N, 1)
    for query, (row, column) in enumerate(places.tolist()):
        if 0 <= row <= LAYOUT.rows - 1 and 0 <= column <= LAYOUT.columns - 1:
            top, left = min(int(row), LAYOUT.rows - 2), min(int(column), LAYOUT.columns - 2)
            down, right = row - top, column - left
            weights[query, frame, top : top + 2, left : left + 2] = torch.tensor(
                [[(1 - down) * (1 - right), (1 - down) * right], [down * (1 - right), down * right]]
            )
            extra[query] = 0
    return torch.cat((weights.flatten(1), extra), dim=1)


def hand_built(action: Tensor) -> Tensor:
    """(H, N, M + 1): one head of each type, under a motion."""
    dx, _, dyaw = action.tolist()
    place = LAYOUT.positions().float()
    centre = place.mean(0)
    broad = torch.full((N, M + 1), 1 / (M + 1))
    sink = torch.cat((torch.full((N, M), 0.2 / M), torch.full((N, 1), 0.8)), dim=1)
    newest = torch.cat((torch.zeros(N, N), torch.full((N, N), 1 / N), torch.zeros(N, 1)), dim=1)
    return torch.stack([
        broad,
        sink,
        looking_at(place, 0),
        looking_at(place + torch.tensor([0.0, 1]), 1),
        looking_at(place + torch.tensor([0.0, -FOCAL * dyaw]), 1),
        looking_at(place - dx / DEPTH * (place - centre), 1),
        newest,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def gathered() -> tuple[HeadStatistics, Tensor]:
    draws = torch.Generator().manual_seed(0)
    samples = 12
    actions = torch.zeros(samples, GOALS, 3)
    actions[..., 0] = 1 + 2 * torch.rand(samples, GOALS, generator=draws)
    actions[..., 2] = (torch.randint(-2, 3, (samples, GOALS), generator=draws)) / FOCAL
    edges = edge_patches(torch.rand(samples, 2, N, generator=draws))
    statistics = HeadStatistics("cross", LAYOUT, [f"t{i // 2}" for i in range(samples)], edges, actions)
    for sample in range(samples):
        weights = torch.stack([hand_built(action) for action in actions[sample]])
        statistics.add(sample, 0.5, layer_attention(weights))
    return statistics, actions


def test_heads_built_by_hand_get_their_types(gathered):
    rows = gathered[0].rows()
    assert [(row.layer, row.head, row.time) for row in rows] == [(0, head, 0.5) for head in range(len(HEADS))]
    assert [row.type.name for row in rows] == HEADS


def test_heads_built_by_hand_get_their_closed_forms(gathered):
    rows = {name: row for name, row in zip(HEADS, gathered[0].rows(), strict=True)}
    mean = {name: {key: value.mean for key, value in row.measures.items()} for name, row in rows.items()}
    assert mean["broad"]["entropy"] == pytest.approx(math.log(M + 1), rel=1e-4)
    assert mean["broad"]["effective share"] == pytest.approx(1, rel=1e-4)
    assert mean["broad"]["score range"] == pytest.approx(0, abs=1e-4)
    assert mean["broad"]["edge lift"] == pytest.approx(1, rel=0.05)
    assert mean["broad"]["same place"] == pytest.approx(1 / N, rel=1e-4)
    assert mean["sink"]["mass extra"] == pytest.approx(0.8, rel=1e-4)
    assert mean["sink"]["score range"] == pytest.approx(math.log(0.8 / (0.2 / M)), rel=1e-4)
    assert mean["sink"]["mass frame -1"] == pytest.approx(0.1, rel=1e-4)
    assert mean["same place"]["mass frame -1"] == pytest.approx(1, rel=1e-4)
    assert mean["same place"]["distance"] == pytest.approx(0, abs=1e-4)
    assert mean["same place"]["score range"] == pytest.approx(80, rel=1e-4)
    assert mean["fixed offset"]["mass extra"] == pytest.approx(1 / 7, rel=1e-4)
    assert (mean["fixed offset"]["offset rows"], mean["fixed offset"]["offset columns"]) == (0, 1)
    assert mean["fixed offset"]["offset share"] == pytest.approx(1, rel=1e-4)
    assert mean["newest frame"]["mass frame 0"] == pytest.approx(1, rel=1e-4)
    assert mean["newest frame"]["effective tokens"] == pytest.approx(N, rel=1e-4)
    for name in HEADS:  # all tokens give the same, so value-weighting changes nothing
        assert mean[name]["moved effective tokens"] == pytest.approx(mean[name]["effective tokens"], rel=1e-4)


def test_directions_have_the_slopes_of_the_motion(gathered):
    rows = {name: row for name, row in zip(HEADS, gathered[0].rows(), strict=True)}
    assert rows["turning"].measures["turning slope"].mean == pytest.approx(-FOCAL, rel=1e-3)
    assert rows["turning"].measures["turning slope"].high == pytest.approx(-FOCAL, rel=1e-2)
    assert rows["turning"].measures["turning correlation"].mean == pytest.approx(-1, abs=1e-3)
    assert rows["turning"].measures["walking slope"].mean == pytest.approx(0, abs=1e-2)
    assert rows["walking"].measures["walking slope"].mean == pytest.approx(-1 / DEPTH, rel=1e-3)
    assert rows["walking"].measures["walking correlation"].mean == pytest.approx(-1, abs=1e-3)
    for name in ("broad", "sink", "fixed offset", "newest frame"):
        assert rows[name].measures["turning slope"].mean == pytest.approx(0, abs=1e-2)
        assert rows[name].measures["walking slope"].mean == pytest.approx(0, abs=1e-3)


def test_heads_are_judged_by_true_places_where_these_are_known():
    """Nothing has moved, and the older frame alone shows it: all patches but those at borders have 9 true places."""
    place = LAYOUT.positions()[:, None].expand(GOALS, N, 2, 2) + 0.5
    place[:, :, 1] = math.nan
    truth = true_tokens(place, LAYOUT)
    statistics = HeadStatistics(
        "cross", LAYOUT, ["a", "b"], torch.full((2, 2, N), 0.25), truth=truth.expand(2, -1, -1, -1)
    )
    action = torch.tensor([1.0, 0, 0.2])
    for sample in range(2):
        statistics.add(sample, 0.5, layer_attention(hand_built(action).expand(GOALS, -1, -1, -1)))
    means = {name: row.measures for name, row in zip(HEADS, statistics.rows(), strict=True)}
    places = (3 * LAYOUT.rows - 2) * (3 * LAYOUT.columns - 2)
    assert means["same place"]["correspondence lift"].mean == pytest.approx(N**2 / places, rel=1e-3)
    assert means["same place"]["correspondence accuracy"].mean == 1
    assert means["broad"]["correspondence lift"].mean == pytest.approx(1, rel=1e-3)
    assert means["broad"]["correspondence share"].mean == pytest.approx(places / N / (M + 1), rel=1e-3)
    assert means["newest frame"]["correspondence share"].mean == pytest.approx(0, abs=1e-6)


def test_hits_are_counted_by_target_patch():
    """The left column is seen nowhere; of the rest, a head that looks at the same place misses what moved far away."""
    place = LAYOUT.positions()[:, None].repeat(1, 2, 1) + 0.5
    place[-1] = torch.tensor([0.5, 0.5])
    place.unflatten(0, LAYOUT[1:])[:, 0] = math.nan
    truth = true_tokens(place, LAYOUT).expand(2, GOALS, -1, -1)
    statistics = HeadStatistics("cross", LAYOUT, ["a", "b"], torch.full((2, 2, N), 0.25), truth=truth)
    for sample in range(2):
        weights = hand_built(torch.tensor([1.0, 0, 0.2]))
        statistics.add(sample, 0.5, layer_attention(weights.expand(GOALS, -1, -1, -1)))
    hits, visible = statistics.hits([1])
    expected = torch.full(LAYOUT[1:], float(GOALS))
    expected[:, 0] = 0
    torch.testing.assert_close(visible.float(), expected)
    expected[-1, -1] = 0
    torch.testing.assert_close(hits[list(HEADS).index("same place")], expected)
    accuracy = statistics.values("correspondence accuracy")[0][0]
    torch.testing.assert_close(hits.sum((1, 2)) / visible.sum(), torch.from_numpy(accuracy).float())


def test_an_objective_may_call_the_network_twice():
    attention = layer_attention(hand_built(torch.tensor([1.0, 0, 0.2]))[None])
    once, twice = (HeadStatistics("cross", LAYOUT, ["a"], torch.full((1, 2, N), 0.25)) for _ in range(2))
    for statistics in (once, twice, twice):
        statistics.add(0, 0.5, attention)
    assert once.rows() == twice.rows()
    torch.testing.assert_close(once.distances(), twice.distances())


def test_a_token_that_gives_nothing_moves_nothing():
    """Half on the extra key, whose value is zero: all that is moved comes from the past frames."""
    weights = torch.cat((torch.full((1, 1, N, M), 0.5 / M), torch.full((1, 1, N, 1), 0.5)), dim=-1)
    values = torch.ones(1, 1, M + 1, N)
    values[..., -1, :] = 0
    values[..., :N, :] = 3  # and tokens of the older frame give three times as much
    statistics = HeadStatistics("cross", LAYOUT, ["a"], torch.full((1, 2, N), 0.25))
    statistics.add(0, 0.1, layer_attention(weights, values))
    means = statistics.rows()[0].measures
    assert means["mass extra"].mean == pytest.approx(0.5, rel=1e-4)
    assert means["moved mass extra"].mean == 0
    assert means["moved mass frame -1"].mean == pytest.approx(0.75, rel=1e-4)
    assert means["mass frame -1"].mean == pytest.approx(0.25, rel=1e-4)
    assert (means["entropy"].low, means["entropy"].high) == (None, None)  # one trajectory


@pytest.mark.parametrize("kind", ["cross", "self"])
@pytest.mark.parametrize(
    "dialect", [{"extra_kv": True}, {"extra_kv": True, "context_modulation": True, "position": "learned"}]
)
@torch.no_grad()
def test_a_probe_batch_gives_the_measures_of_its_weights(make_world, make_batch, denoise, dialect, kind):
    world, batch, names = make_world(**dialect), make_batch(samples=4), ["a", "b", "b", "c"]
    statistics = measure_heads(world, batch, names, [0.25, 0.75], 5, kind, [0, 2])
    rows = statistics.rows()
    assert [(row.layer, row.time, row.head) for row in rows] == [
        (layer, time, head) for layer in (0, 2) for time in (0.25, 0.75) for head in range(4)
    ]

    with record_attention(world.cdit, [2], kind) as recording:
        denoise(world, batch, 0.75, 5)
    weights = recording[2]  # (S, G, H, N, M)
    attended = batch.context if kind == "cross" else batch.target
    layout = Layout(3 if kind == "cross" else 1, 4, 6)
    edges = edge_patches(gradient_magnitude(attended.float() / 127.5 - 1, layout))
    edges = edges[:, None, None] if kind == "cross" else edges[:, :, None, None]
    expected = {
        "entropy": measures.entropy(weights),
        "distance": measures.mean_distance(weights, layout),
        "mass frame 0": measures.frame_mass(weights, layout)[..., -1],
        "edge lift": edge_lift(weights, edges, layout, edges.mean(0)),
    }
    head = 3
    row = next(row for row in rows if (row.layer, row.time, row.head) == (2, 0.75, head))
    for name, value in expected.items():
        per_sample = value[:, :, head].flatten(1).nanmean(1).double().numpy()
        (estimate,) = estimates(per_sample, names, 5)
        assert row.measures[name].mean == pytest.approx(estimate.mean, rel=1e-3, abs=1e-5)
        assert row.measures[name].low == pytest.approx(estimate.low, rel=1e-3, abs=1e-5)
        assert row.measures[name].high == pytest.approx(estimate.high, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(
        statistics.distances()[2, 0.75], head_distances(weights).mean((0, 1)), atol=1e-4, rtol=1e-3
    )
    if kind == "self":
        assert not {"turning slope", "walking slope", "mass extra"} & set(row.measures)
    else:
        motion = fit_motion(offset_fields(weights[:, :, head], layout), layout)
        factors, each = batch.condition.action.flatten(0, 1).numpy(), [name for name in names for _ in range(2)]
        turning = trends(motion.translation[..., -1, 1].flatten().numpy(), factors, each, 5)[2]
        walking = trends(motion.divergence[..., -1].flatten().numpy(), factors, each, 5)[0]
        assert row.measures["turning slope"].mean == pytest.approx(turning.slope.mean, rel=1e-2, abs=1e-4)
        assert row.measures["walking correlation"].mean == pytest.approx(walking.correlation, abs=1e-2)

    values, columns = statistics.values("entropy")
    assert values.shape == (4, 16)
    column = columns.index(f"layer 2, head {head}, t = 0.75")
    np.testing.assert_allclose(
        values[:, column], measures.entropy(weights)[:, :, head].flatten(1).mean(1).numpy(), rtol=1e-4
    )
    choosing = split_halves(names, 0)
    best = best_column(values, choosing, names)
    assert best.chosen_at == values[choosing].mean(axis=0).max()
    assert best.estimate.mean == pytest.approx(values[~choosing, best.column].mean())


def test_motions_that_are_unknown_have_no_trend(make_world, make_batch):
    batch = make_batch()
    batch.condition.known[0, 0] = False
    rows = measure_heads(make_world(), batch, ["a", "b"], [0.5], 0, layers=[0]).rows()
    assert "turning slope" not in rows[0].measures
