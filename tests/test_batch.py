"""Batches of windows, and what `WorldModel.encode` and the loss make of them."""

# ruff: noqa: F811 (fixtures)

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from cdit.batch import Batch, Condition, KeyedDraws
from cdit.codec import KLCodec
from cdit.data.windows import WindowDataset, WindowKey
from cdit.world_model import Units, WorldModel

sys.path.append(str(Path(__file__).parent))
from noised import Noised, noised
from tiny_world import SIDE, dataset, make_world, walks  # noqa: F401

KEYS = [WindowKey(3, 1, 0), WindowKey(40, 1, 1), WindowKey(9, 1, 2)]
CPU = torch.device("cpu")


@pytest.fixture
def latent_world() -> WorldModel:
    """A world of the latents of a small AutoencoderKL, random but with some spread in its posterior."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    return make_world(KLCodec(autoencoder))


def stacked(dataset: WindowDataset, keys: list[WindowKey]) -> Batch:
    return Batch.collate([dataset[key] for key in keys])


# The dataclasses.


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


def sample(start: int, message: str) -> Batch:
    """Three goals of one context of two frames; every number says to which sample it belongs."""
    condition = Condition(start + numbers(3), start + numbers(3, 3), extra={"hour": start + numbers(3, 2)})
    mask = torch.tensor([start > 0, True])
    return Batch(start + numbers(2, 3), mask, start + numbers(3, 3), condition, torch.tensor(start), skipped=[message])


def test_samples_are_stacked_indexed_and_moved_as_a_whole():
    batch = Batch.collate([sample(0, "first"), sample(100, "second")])
    assert len(batch) == 2
    assert batch.condition.extra["hour"].shape == (2, 3, 2)
    assert batch.condition.known is None
    assert batch.weight is None
    assert batch.skipped == ["first", "second"]
    second, expected = batch[1].named_tensors(), sample(100, "second").named_tensors()
    assert set(second) == {
        "context", "mask", "target", "key", "condition.time_shift", "condition.action", "condition.extra.hour"
    }  # fmt: skip
    assert all(torch.equal(second[name], tensor) for name, tensor in expected.items())
    assert batch[1:].context.shape == (1, 2, 3)
    moved = batch.to("meta").named_tensors()
    assert set(moved) == set(second)
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}
    assert not batch.context.is_meta  # the batch itself stays where it is


def test_one_step_of_a_condition_keeps_its_spacing_and_text():
    spacing, text = torch.tensor([0.25, 0.5]), numbers(2, 7)
    condition = Condition(action=numbers(2, 4, 5, 3), spacing=spacing, text=text, extra={"hour": numbers(2, 4, 5)})
    assert condition.shape(3) == (2, 4, 5)
    step = condition.select(2, 3)
    assert torch.equal(step.action, condition.action[:, :, 3])
    assert torch.equal(step.extra["hour"], condition.extra["hour"][:, :, 3])
    assert step.spacing is spacing
    assert step.text is text
    assert (step.time_shift, step.known) == (None, None)


# Draws.


def same_sample(batch: Noised, place: int, other: Noised, other_place: int) -> bool:
    names = ("sample", "timestep", "context", "clean", "noise", "time")
    pairs = [(getattr(batch, name), getattr(other, name)) for name in names]
    pairs += [(batch.condition[name], other.condition[name]) for name in ("action", "action_known", "time_shift")]
    return all(torch.equal(one[place], two[other_place]) for one, two in pairs)


def test_draws_belong_to_the_sample_wherever_it_stands(dataset: WindowDataset):
    world = make_world()
    together = noised(world, stacked(dataset, KEYS), action_dropout=0.5)
    alone = noised(world, stacked(dataset, KEYS[2:]), action_dropout=0.5)
    torch.manual_seed(17)  # what the process drew before is nobody's key
    swapped = noised(world, stacked(dataset, [KEYS[2], KEYS[0]]), action_dropout=0.5)
    assert same_sample(together, 2, alone, 0)
    assert same_sample(together, 2, swapped, 0)
    assert same_sample(together, 0, swapped, 1)


def test_another_step_or_place_in_the_batch_draws_other_numbers(dataset: WindowDataset):
    keys = [WindowKey(3, 1, 0), WindowKey(3, 2, 0), WindowKey(3, 1, 1)]
    batch = noised(make_world(), stacked(dataset, keys))
    noises, times = batch.noise.flatten(0, 1).flatten(1), batch.time.flatten()
    assert len(set(times.tolist())) == len(times) == 3 * dataset.config.goals
    correlation = torch.corrcoef(noises).fill_diagonal_(0).abs().max()
    assert correlation < 0.1  # 3072 numbers each: 0.018 is one standard deviation


@pytest.mark.parametrize("draw", [KeyedDraws.rand, KeyedDraws.randn])
def test_numbers_are_those_of_each_keys_own_generator(draw: Callable[..., torch.Tensor]):
    draws = KeyedDraws(torch.tensor([5, 9]), CPU)
    found = [draw(draws, 2, 3), draw(draws, 4)]
    for row, key in enumerate((5, 9)):
        generator = torch.Generator().manual_seed(key)
        plain = {KeyedDraws.rand: torch.rand, KeyedDraws.randn: torch.randn}[draw]
        assert torch.equal(found[0][row], plain(2, 3, generator=generator))
        assert torch.equal(found[1][row], plain(4, generator=generator))


# What the network gets.


def test_noisy_frames_are_mixed_in_proportion_to_time(dataset: WindowDataset):
    windows = stacked(dataset, KEYS)
    batch = noised(make_world(), windows)
    frames = windows.target.double() / 255 * 2 - 1
    assert (batch.clean - frames).abs().max() < 1e-6
    assert (batch.context - (windows.context.double() / 255 * 2 - 1)).abs().max() < 1e-6
    t = batch.time.double()
    assert ((t > 0) & (t < 1)).all()
    t = t[..., None, None, None]
    torch.testing.assert_close(batch.sample.double(), (1 - t) * frames + t * batch.noise.double(), rtol=0, atol=1e-5)
    assert abs(batch.noise.mean().item()) < 0.04
    assert abs(batch.noise.std().item() - 1) < 0.04
    torch.testing.assert_close(batch.timestep, 1000 * batch.time)


def test_given_times_replace_the_drawn_ones_and_nothing_else(dataset: WindowDataset):
    world, windows = make_world(), stacked(dataset, KEYS)
    drawn = noised(world, windows, action_dropout=0.5)
    time = torch.linspace(0.1, 0.9, drawn.time.numel()).reshape(drawn.time.shape)
    given = noised(world, windows, action_dropout=0.5, time=time)
    assert torch.equal(given.time, time)
    assert torch.equal(given.noise, drawn.noise)
    assert torch.equal(given.condition["action_known"], drawn.condition["action_known"])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_share_of_hidden_actions(share: float):
    many, goals = 500, 4
    known = torch.ones(many, goals, dtype=torch.bool)
    known[0] = False
    batch = Batch(
        context=torch.zeros(many, 1, 3, SIDE, SIDE, dtype=torch.uint8),
        mask=torch.ones(many, 1, dtype=torch.bool),
        target=torch.zeros(many, goals, 3, SIDE, SIDE, dtype=torch.uint8),
        condition=Condition(torch.ones(many, goals), torch.ones(many, goals, 3), known, torch.ones(many)),
        key=torch.arange(many) * 7919,
    )
    hidden = ~noised(make_world(), batch, action_dropout=share).condition["action_known"]
    assert hidden[0].all()  # what is unknown cannot be shown
    measured = hidden[1:].double().mean().item()
    assert measured == 0 if share == 0 else abs(measured - share) < 4 * math.sqrt(share * (1 - share) / (many * goals))
    if share:  # goal by goal, not sample by sample
        assert not (hidden[1:].all(1) | ~hidden[1:].any(1)).all()


def test_a_model_without_actions_is_trained_without(dataset: WindowDataset):
    world, windows = make_world(), stacked(dataset, KEYS)
    world.description.has_actions = False
    assert set(noised(world, windows, action_dropout=0.5).condition) == {"time_shift"}


def test_further_conditions_reach_the_network_as_they_are(dataset: WindowDataset):
    windows = stacked(dataset, KEYS)
    hour = torch.rand(windows.target.shape[:2])
    windows = replace(windows, condition=replace(windows.condition, extra={"hour": hour}))
    assert torch.equal(noised(make_world(), windows).condition["hour"], hour)


def test_a_mask_is_given_only_where_a_frame_is_missing(dataset: WindowDataset):
    world = make_world()
    assert noised(world, stacked(dataset, KEYS)).mask is None
    assert dataset.locate(0)[1] < dataset.config.context_frames - 1
    windows = stacked(dataset, [WindowKey(0, 1, 0), *KEYS])
    mask = noised(world, windows).mask
    assert torch.equal(mask, windows.mask)
    assert not mask.all()


def test_actions_are_in_units_of_each_windows_dataset(dataset: WindowDataset):
    world, windows = make_world(), stacked(dataset, KEYS)
    world.description.units = Units((2.0, 3.0, 0.5), (-0.25, 0.0, 0.0), spacing=None)
    windows.condition.spacing = torch.tensor([0.2, 0.4, 0.8])
    found = noised(world, windows).condition["action"]
    for place, spacing in enumerate((0.2, 0.4, 0.8)):
        dx, dy, dyaw = windows.condition.action[place].unbind(-1)
        expected = torch.stack((2 * dx / spacing - 0.25, 3 * dy / spacing, 0.5 * dyaw), dim=-1)
        torch.testing.assert_close(found[place], expected)


# Latents.


def test_latents_are_drawn_from_the_posterior(latent_world: WorldModel, dataset: WindowDataset):
    windows = stacked(dataset, [WindowKey(9, step, place) for step in range(1, 4) for place in range(4)])
    batch = noised(latent_world, windows)
    with torch.no_grad():
        frames = torch.cat((windows.context, windows.target), 1).double() / 127.5 - 1
        posterior = latent_world.codec.autoencoder.encode(frames.float().flatten(0, 1)).latent_dist
    latents = torch.cat((batch.context, batch.clean), 1).flatten(0, 1) / 0.5 + 0.25
    draws = (latents - posterior.mean) / posterior.std
    assert batch.clean.shape == batch.noise.shape == (12, dataset.config.goals, 4, 16, 16)
    assert abs(draws.mean().item()) < 0.02  # 12 · (3 + goals) · 1024 numbers
    assert abs(draws.std().item() - 1) < 0.02
    noises = torch.cat((draws.flatten(1), batch.noise.flatten(0, 1).flatten(1)))
    assert torch.corrcoef(noises).fill_diagonal_(0).abs().max() < 0.2  # 1024 numbers each: six standard deviations


def test_codec_noise_belongs_to_the_sample(latent_world: WorldModel, dataset: WindowDataset):
    together = noised(latent_world, stacked(dataset, KEYS))
    alone = noised(latent_world, stacked(dataset, KEYS[1:2]))
    torch.testing.assert_close(together.clean[1], alone.clean[0])
    torch.testing.assert_close(together.context[1], alone.context[0])
    torch.testing.assert_close(together.sample[1], alone.sample[0])
    assert torch.equal(together.noise[1], alone.noise[0])
