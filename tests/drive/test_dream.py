"""A dream against `WorldModel.rollout` and `cdit.heads`."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from cdit.batch import Condition
from cdit.codec import PixelCodec
from cdit.common.frames import to_float, to_uint8
from cdit.common.randomness import generator
from cdit.diffusion import SamplerConfig
from cdit.drive.dream import KEPT_STATES, Dream
from cdit.heads.importance import Head, ablate_heads
from cdit.heads.measures import entropy
from cdit.heads.record import record_attention
from cdit.model import CDiT
from cdit.world_model import WorldDescription, WorldModel

SIZE, SAMPLER, SEED = 16, SamplerConfig(steps=2), 5
LENGTH = KEPT_STATES + 8
"""Longer than the interval between states that are kept."""
ACTIONS = torch.randn(LENGTH, 3, generator=torch.Generator().manual_seed(1)) * 0.3
CONTEXT = torch.randint(0, 256, (3, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
ALL = torch.ones(3, dtype=torch.bool)


def make(**options) -> WorldModel:
    torch.manual_seed(0)
    cdit = CDiT(
        (SIZE, SIZE), max_context=3, in_channels=3, patch_size=4, hidden_size=16, depth=2, num_heads=2, **options
    )
    for parameter in cdit.parameters():
        nn.init.normal_(parameter, std=0.1)
    return WorldModel(cdit, PixelCodec(), WorldDescription((SIZE, SIZE), 4.0)).eval()


@pytest.fixture(params=[{}, {"position": "learned"}, {"extra_kv": True}], ids=["rotary", "learned", "extra key"])
def small(request) -> WorldModel:
    """With a cache that can be pushed, and one that is rebuilt at every step."""
    return make(**request.param)


def rolled_out(
    world: WorldModel, actions: torch.Tensor, mask: torch.Tensor | None = None, sampler: SamplerConfig = SAMPLER
) -> torch.Tensor:
    condition = Condition(action=actions[None, None])
    mask = None if mask is None else mask[None]
    frames = world.rollout(to_float(CONTEXT)[None], condition, mask, sampler=sampler, generator=generator(SEED))
    return to_uint8(frames[0, 0])


def begun(world: WorldModel, mask: torch.Tensor = ALL, sampler: SamplerConfig = SAMPLER) -> Dream:
    dream = Dream(world, sampler, SEED)
    dream.begin(CONTEXT, mask)
    return dream


@pytest.mark.parametrize("mask", [ALL, torch.tensor([False, True, True])], ids=["full", "missing"])
def test_the_frames_are_those_of_a_rollout(small, mask):
    dream = begun(small, mask)
    frames = torch.stack([dream.step(action) for action in ACTIONS.tolist()])
    assert torch.equal(frames, rolled_out(small, ACTIONS, None if mask.all() else mask))


@pytest.mark.parametrize("steps", [1, 6, 9, LENGTH])
@pytest.mark.parametrize("sampler", [SAMPLER, replace(SAMPLER, hold=3)], ids=["joining", "held"])
def test_going_back_and_on_is_exact(small, steps, sampler):
    dream = begun(small, sampler=sampler)
    for action in ACTIONS.tolist():
        dream.step(action)
    for _ in range(steps):
        dream.back()
    other = ACTIONS.flip(0)[:steps]
    frames = torch.stack([dream.step(action) for action in other.tolist()])
    expected = rolled_out(small, torch.cat((ACTIONS[: LENGTH - steps], other)), sampler=sampler)
    assert torch.equal(frames, expected[-steps:])


def test_going_back_beyond_the_start_stays_there(small):
    dream = begun(small)
    dream.back()
    assert torch.equal(dream.frame, CONTEXT[-1])


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("off", [frozenset(), frozenset({Head(0, "cross", 1)})])
def test_attention_is_that_of_cdit_heads(small, watched, off):
    """Whether it is watched while the frame is sampled, or the frame is sampled again for it."""
    dream = begun(small)
    dream.watched, dream.off = (frozenset({0, 1}), off) if watched else (frozenset(), off)
    for action in ACTIONS[:5].tolist():
        dream.step(action)
    dream.off = frozenset()  # as of now; the frame shown was sampled with the others
    look = dream.look([0, 1])

    noise = generator(SEED)
    state = small.begin(to_float(CONTEXT)[None])
    with ablate_heads(small.cdit, off), record_attention(small.cdit, [0, 1]) as recorded:
        for action in ACTIONS[:5]:
            state, sampled = small.step(state, Condition(action=action[None, None]), SAMPLER, noise)
    assert torch.equal(dream.frame, to_uint8(small.decode(sampled)[0, 0]))
    for layer in (0, 1):
        assert torch.equal(look.weights[layer], recorded[layer][0, 0])
        for row in look.rows:
            if row.layer == layer:
                expected = entropy(recorded[layer])[0, 0, row.head].mean()
                assert row.measures["entropy"].mean == pytest.approx(float(expected), rel=1e-5)
    after = dream.step(ACTIONS[5].tolist())  # the noise went on where it was
    state, sampled = small.step(state, Condition(action=ACTIONS[5][None, None]), SAMPLER, noise)
    assert torch.equal(after, to_uint8(small.decode(sampled)[0, 0]))


def test_each_call_of_the_network_has_its_own_attention():
    dream = begun(make())
    dream.step(ACTIONS[0].tolist())
    first, last = (dream.look([1], call).weights[1] for call in (0, -1))
    assert not torch.equal(first, last)
    assert torch.equal(last, dream.look([1], 1).weights[1])
    assert dream.moments[0].calls == 2


def test_before_the_first_step_there_is_nothing_to_look_at(small):
    assert begun(small).look([0]) is None


def test_the_past_is_what_the_frame_was_predicted_from():
    dream = begun(make())
    frames = [dream.step(action) for action in ACTIONS[:2].tolist()]
    assert torch.equal(dream.past(), torch.stack([*CONTEXT[1:], frames[0]]))
    dream = begun(make(), sampler=replace(SAMPLER, hold=3))
    frames = [dream.step(action) for action in ACTIONS[:6].tolist()]
    assert torch.equal(dream.past(), torch.stack(frames[:3]))  # of the last three, which are held


def test_samples_of_the_next_second_differ_and_change_nothing(small):
    dream = begun(small)
    dream.step(ACTIONS[0].tolist())
    ends = dream.ends(ACTIONS[1].tolist(), 3)
    assert ends.shape == (3, 3, SIZE, SIZE)
    assert not torch.equal(ends[0], ends[1])
    assert torch.equal(ends, dream.ends(ACTIONS[1].tolist(), 3))
    assert torch.equal(dream.step(ACTIONS[1].tolist()), rolled_out(small, ACTIONS[:2])[-1])


def test_a_head_that_is_off_changes_what_follows():
    dream = begun(make())
    dream.step(ACTIONS[0].tolist())
    dream.off = frozenset({Head(1, "cross", 0)})
    dream.step(ACTIONS[1].tolist())
    assert not torch.equal(dream.frame, rolled_out(dream.world, ACTIONS[:2])[-1])
    dream.back()
    dream.off = frozenset()
    dream.step(ACTIONS[1].tolist())
    assert torch.equal(dream.frame, rolled_out(dream.world, ACTIONS[:2])[-1])
