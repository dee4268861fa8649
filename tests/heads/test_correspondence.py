import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cdit.heads.correspondence import baselines, correspondence_score, true_tokens
from cdit.heads.measures import Layout

LAYOUT = Layout(frames=3, rows=6, columns=8)
N, M = 48, 144
SAME_PLACE, EVEN = baselines(LAYOUT).values()


def tokens(place: Tensor, visible: Tensor) -> Tensor:
    return true_tokens(torch.where(visible[..., None], place, math.nan), LAYOUT)


def judge(weights: Tensor, truth: Tensor) -> SimpleNamespace:
    score = correspondence_score(weights, truth, LAYOUT)
    lift, share, accuracy = score.ratios().values()
    return SimpleNamespace(lift=lift, share=share, accuracy=accuracy, patches=score.visible.sum())


def moved(rows: float, columns: float, layout: Layout = LAYOUT) -> tuple[Tensor, Tensor]:
    """The picture of all past frames lies (rows, columns) patches further: places, and where they are in the frame."""
    place = layout.positions()[:, None].expand(-1, layout.frames, -1) + 0.5 + torch.tensor([rows, columns])
    visible = ((place >= 0) & (place < torch.tensor([layout.rows, layout.columns]))).all(-1)
    return place, visible


def looking_at(place: Tensor, frame: int, layout: Layout = LAYOUT) -> Tensor:
    """One-hot weights on the patch that holds the place in a frame; places outside are moved to the border."""
    row, column = place[:, frame].floor().long().unbind(-1)
    index = row.clamp(0, layout.rows - 1) * layout.columns + column.clamp(0, layout.columns - 1)
    return torch.nn.functional.one_hot(frame * layout.patches + index, layout.frames * layout.patches).float()


def test_true_tokens_are_the_patch_and_its_neighbours():
    place = torch.full((N, 3, 2), math.nan)
    visible = torch.zeros(N, 3, dtype=torch.bool)
    place[5, 1], visible[5, 1] = torch.tensor([2.99, 4.01]), True
    place[6, 0], visible[6, 0] = torch.tensor([0.0, 7.9]), True
    place[7, 2] = torch.tensor([3.0, 3.0])  # hidden
    truth = tokens(place, visible).unflatten(-1, LAYOUT)
    assert truth[5].nonzero().tolist() == [[1, row, column] for row in (1, 2, 3) for column in (3, 4, 5)]
    assert truth[6].nonzero().tolist() == [[0, row, column] for row in (0, 1) for column in (6, 7)]
    assert truth.sum() == 13


def test_even_weights_have_lift_1_and_the_accuracy_of_chance():
    place, visible = moved(1.2, -2.6)
    visible[:, 0] = False
    truth = tokens(place, visible)
    score = judge(EVEN, truth)
    assert score.lift.item() == pytest.approx(1, abs=1e-6)
    expected = truth.sum(-1)[visible.any(-1)].float().mean() / M
    assert score.accuracy.item() == pytest.approx(expected.item(), rel=1e-5)
    assert score.share.item() == pytest.approx(expected.item(), rel=1e-5)
    assert score.patches == visible.any(-1).sum()


@pytest.mark.parametrize("favourite", range(3))
def test_preferring_a_frame_without_choosing_places_in_it_is_no_merit(favourite):
    """Here two frames show nothing of the target, so that any weight on the third is on the right frame."""
    place, visible = moved(0, 2)
    visible[:, [t for t in range(3) if t != favourite]] = False
    weights = torch.zeros(N, 3, N)
    weights[:, favourite] = 1 / N
    score = judge(weights.flatten(1), tokens(place, visible))
    assert score.lift.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("motion", "hits"), [((0, 0), 1), ((1, 1), 1), ((0.9, -0.6), 1), ((0, 2), 0), ((-2, 1), 0)])
def test_the_same_place_is_right_up_to_one_patch_of_motion(motion, hits):
    place, visible = moved(*motion)
    truth = tokens(place, visible)
    score = judge(SAME_PLACE, truth)
    assert score.accuracy == hits
    assert score.share.item() == pytest.approx(hits)
    assert (score.lift > 4) if hits else (score.lift == 0)
    found = judge(looking_at(place, 1), truth)
    assert found.accuracy == 1


def test_mixtures_lie_between():
    place, visible = moved(0, 0)
    row, column = LAYOUT.positions().unbind(-1)
    visible &= ((row > 0) & (row < 5) & (column > 0) & (column < 7))[:, None]
    truth = tokens(place, visible)
    mixed = 0.3 * SAME_PLACE + 0.7 * EVEN
    score = judge(mixed, truth)
    assert score.lift.item() == pytest.approx(0.3 * N / 9 + 0.7, rel=1e-5)
    assert score.share.item() == pytest.approx(0.3 + 0.7 * 9 / N, rel=1e-5)
    assert score.accuracy == 1


def test_looking_into_a_frame_that_hides_the_point_is_a_miss_but_no_loss_of_lift():
    place, visible = moved(0, 0)
    visible[:, 0] = False
    weights = 0.6 * looking_at(place, 0) + 0.4 * looking_at(place, 2)
    score = judge(weights, tokens(place, visible))
    best = judge(looking_at(place, 2), tokens(place, visible))
    assert score.accuracy == 0
    assert score.share.item() == pytest.approx(0.4)
    assert score.lift.item() == pytest.approx(best.lift.item(), rel=1e-5)


def test_the_extra_key_takes_from_the_share_alone():
    place, visible = moved(0, 1)
    truth = tokens(place, visible)
    weights = 0.5 * looking_at(place, 1) + 0.5 * EVEN
    plain = judge(weights, truth)
    score = judge(torch.cat((0.25 * weights, torch.full((N, 1), 0.75)), dim=-1), truth)
    assert score.lift.item() == pytest.approx(plain.lift.item(), rel=1e-5)
    assert score.accuracy == plain.accuracy == 1
    assert score.share.item() == pytest.approx(0.25 * plain.share.item(), rel=1e-5)


def test_heads_and_goals_are_judged_apart_and_frames_add_up():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 5, N, M, generator=generator).softmax(-1)  # goals, heads
    cases = [moved(0, 1), moved(-1, 0)]
    truth = torch.stack([tokens(*case) for case in cases])
    score = judge(weights, truth[:, None])
    assert score.lift.shape == score.accuracy.shape == (2, 5)
    for goal in range(2):
        for head in range(5):
            alone = judge(weights[goal, head], truth[goal])
            torch.testing.assert_close(alone.lift, score.lift[goal, head])
            torch.testing.assert_close(alone.accuracy, score.accuracy[goal, head])
    total = correspondence_score(weights, truth[:, None], LAYOUT).sum(0)
    parts = [correspondence_score(weights[goal], truth[goal], LAYOUT) for goal in range(2)]
    expected = (parts[0].mass + parts[1].mass).sum(-1) / (parts[0].even + parts[1].even).sum(-1)
    torch.testing.assert_close(total.ratios()["correspondence lift"], expected)


def test_patches_that_no_frame_shows_do_not_count():
    place, visible = moved(0, 3)
    weights = torch.where(visible.any(-1)[:, None], looking_at(place, 0), EVEN)
    score = judge(weights, tokens(place, visible))
    assert score.accuracy == score.share == 1
    assert judge(weights, tokens(place, torch.zeros_like(visible))).lift.isnan()
