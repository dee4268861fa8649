import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cdit.training.batch import NoisyBatch, noisy_batch
from diffusers import AutoencoderKL
from torch import Tensor

from cdit.data.loader import collate
from cdit.data.windows import WindowDataset, WindowKey
from cdit.training.config import TrainConfig
from cdit.training.setup import build_world
from cdit.world_model import Units, WorldModel

CPU = torch.device("cpu")
KEYS = [WindowKey(3, 1, 0), WindowKey(27, 1, 1), WindowKey(9, 1, 2)]


@pytest.fixture
def latent_world(config: Callable[..., TrainConfig], train_set: WindowDataset, tmp_path: Path) -> WorldModel:
    """A world of the latents of a small AutoencoderKL, random but with some spread in its posterior."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    return build_world(config("--codec.kind", "kl", "--codec.name", str(tmp_path / "autoencoder")), train_set)


def stacked(dataset: WindowDataset, keys: list[WindowKey]) -> dict[str, Tensor]:
    return collate([dataset[key] for key in keys])


def same_sample(batch: NoisyBatch, place: int, other: NoisyBatch, other_place: int) -> bool:
    names = ("sample", "time", "action", "time_shift", "context", "action_mask", "clean", "noise")
    return all(torch.equal(getattr(batch, n)[place], getattr(other, n)[other_place]) for n in names)


def test_draws_belong_to_the_sample_wherever_it_stands(world: WorldModel, train_set: WindowDataset):
    together = noisy_batch(world, stacked(train_set, KEYS), CPU, action_dropout=0.5)
    alone = noisy_batch(world, stacked(train_set, KEYS[2:]), CPU, action_dropout=0.5)
    torch.manual_seed(17)  # what the process drew before is nobody's key
    swapped = noisy_batch(world, stacked(train_set, [KEYS[2], KEYS[0]]), CPU, action_dropout=0.5)
    assert same_sample(together, 2, alone, 0)
    assert same_sample(together, 2, swapped, 0)
    assert same_sample(together, 0, swapped, 1)


def test_another_step_or_place_in_the_batch_draws_other_numbers(world: WorldModel, train_set: WindowDataset):
    keys = [WindowKey(3, 1, 0), WindowKey(3, 2, 0), WindowKey(3, 1, 1)]
    batch = noisy_batch(world, stacked(train_set, keys), CPU)
    noises, times = batch.noise.flatten(0, 1).flatten(1), batch.time.flatten()
    assert len(set(times.tolist())) == 6
    correlation = torch.corrcoef(noises).fill_diagonal_(0).abs().max()
    assert correlation < 0.1  # 3072 numbers each: 0.018 is one standard deviation


def test_noisy_frames_are_mixed_in_proportion_to_time(world: WorldModel, train_set: WindowDataset):
    items = stacked(train_set, KEYS)
    batch = noisy_batch(world, items, CPU)
    frames = items["target"].double() / 255 * 2 - 1
    assert (batch.clean - frames).abs().max() < 1e-6
    assert (batch.context - (items["context"].double() / 255 * 2 - 1)).abs().max() < 1e-6
    for b in range(len(KEYS)):
        for g in range(2):
            t = batch.time[b, g].item()
            assert 0 < t < 1
            expected = (1 - t) * frames[b, g] + t * batch.noise[b, g].double()
            torch.testing.assert_close(batch.sample[b, g].double(), expected, rtol=0, atol=1e-5)
    assert abs(batch.noise.mean().item()) < 0.04
    assert abs(batch.noise.std().item() - 1) < 0.04
    torch.testing.assert_close(batch.inputs()["timestep"], 1000 * batch.time)


def test_given_times_replace_the_drawn_ones_and_nothing_else(world: WorldModel, train_set: WindowDataset):
    items = stacked(train_set, KEYS)
    time = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
    drawn, given = noisy_batch(world, items, CPU), noisy_batch(world, items, CPU, time=time)
    assert torch.equal(given.time, time)
    assert torch.equal(given.noise, drawn.noise)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_share_of_hidden_actions(world: WorldModel, share: float):
    many, goals = 500, 4
    items = {
        "context": torch.zeros(many, 1, 3, 32, 32, dtype=torch.uint8),
        "context_mask": torch.ones(many, 1, dtype=torch.bool),
        "target": torch.zeros(many, goals, 3, 32, 32, dtype=torch.uint8),
        "action": torch.ones(many, goals, 3),
        "action_mask": torch.ones(many, goals, dtype=torch.bool),
        "time_shift": torch.ones(many, goals),
        "spacing": torch.ones(many),
        "seed": torch.arange(many) * 7919,
        "weight": torch.ones(many),
    }
    items["action_mask"][0] = False
    hidden = ~noisy_batch(world, items, CPU, action_dropout=share).action_mask
    assert hidden[0].all()  # what is unknown cannot be shown
    measured = hidden[1:].double().mean().item()
    assert measured == 0 if share == 0 else abs(measured - share) < 4 * math.sqrt(share * (1 - share) / (many * goals))
    if share:  # goal by goal, not sample by sample
        assert not (hidden[1:].all(1) | ~hidden[1:].any(1)).all()


def test_context_mask_is_given_only_where_a_frame_is_missing(world: WorldModel, train_set: WindowDataset):
    assert noisy_batch(world, stacked(train_set, KEYS), CPU).context_mask is None
    first = WindowKey(0, 1, 0)
    assert train_set.locate(0)[1] < train_set.config.context_frames - 1
    items = stacked(train_set, [first, *KEYS])
    mask = noisy_batch(world, items, CPU).context_mask
    assert torch.equal(mask, items["context_mask"])
    assert not mask.all()


def test_units_of_actions_and_times(config: Callable[..., TrainConfig], train_set: WindowDataset):
    """Four frames of 0.2 m at 5 frames a second are the farthest goal: all it is measured in becomes 1."""
    world = build_world(config(), train_set)
    items = stacked(train_set, KEYS)
    items["action"] = torch.tensor([0.8, -0.4, math.pi / 2]).expand(3, 2, 3).clone()
    items["time_shift"] = torch.tensor([[0.8, -0.4]]).expand(3, 2).clone()
    batch = noisy_batch(world, items, CPU)
    torch.testing.assert_close(batch.action, torch.tensor([1.0, -0.5, 0.5]).expand(3, 2, 3))
    torch.testing.assert_close(batch.time_shift, torch.tensor([1.0, -0.5]).expand(3, 2))


def test_actions_are_in_units_of_each_windows_dataset(world: WorldModel, train_set: WindowDataset):
    world.description.units = Units((2.0, 3.0, 0.5), (-0.25, 0.0, 0.0), spacing=None)
    items = stacked(train_set, KEYS)
    items["spacing"] = torch.tensor([0.2, 0.4, 0.8])
    found = noisy_batch(world, items, CPU).action
    for sample, spacing in enumerate((0.2, 0.4, 0.8)):
        dx, dy, dyaw = items["action"][sample].unbind(-1)
        expected = torch.stack((2 * dx / spacing - 0.25, 3 * dy / spacing, 0.5 * dyaw), dim=-1)
        torch.testing.assert_close(found[sample], expected)


def test_the_farthest_goal_may_lie_in_the_past(config: Callable[..., TrainConfig], train_set: WindowDataset):
    units = build_world(config("--data.min_offset", "-8"), train_set).description.units
    action, time = units.normalize(torch.tensor([[[-1.6, 0.8, -math.pi]]]), torch.tensor([[-1.6]]))
    torch.testing.assert_close(action, torch.tensor([[[-1.0, 0.5, -1.0]]]))
    torch.testing.assert_close(time, torch.tensor([[-1.0]]))


def test_latents_are_drawn_from_the_posterior(latent_world: WorldModel, train_set: WindowDataset):
    keys = [WindowKey(9, step, sample) for step in range(1, 4) for sample in range(4)]
    items = stacked(train_set, keys)
    batch = noisy_batch(latent_world, items, CPU)
    with torch.no_grad():
        frames = torch.cat((items["context"], items["target"]), 1).double() / 127.5 - 1
        posterior = latent_world.codec.autoencoder.encode(frames.float().flatten(0, 1)).latent_dist
    latents = torch.cat((batch.context, batch.clean), 1).flatten(0, 1) / 0.5 + 0.25
    draws = (latents - posterior.mean) / posterior.std
    assert batch.clean.shape == batch.noise.shape == (12, 2, 4, 16, 16)
    assert abs(draws.mean().item()) < 0.02  # 61440 numbers
    assert abs(draws.std().item() - 1) < 0.02
    noises = torch.cat((draws.flatten(1), batch.noise.flatten(0, 1).flatten(1)))
    assert torch.corrcoef(noises).fill_diagonal_(0).abs().max() < 0.2  # 1024 numbers each: five standard deviations


def test_codec_noise_belongs_to_the_sample(latent_world: WorldModel, train_set: WindowDataset):
    together = noisy_batch(latent_world, stacked(train_set, KEYS), CPU)
    alone = noisy_batch(latent_world, stacked(train_set, KEYS[1:2]), CPU)
    torch.testing.assert_close(together.clean[1], alone.clean[0])
    torch.testing.assert_close(together.context[1], alone.context[0])
    torch.testing.assert_close(together.sample[1], alone.sample[0])
    assert torch.equal(together.noise[1], alone.noise[0])
