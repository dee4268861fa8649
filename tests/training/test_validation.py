from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from noised import noised

from cdit.batch import Batch
from cdit.data.windows import WindowDataset
from cdit.training import validation
from cdit.training.config import ValidationConfig
from cdit.training.validation import Validation
from cdit.world_model import WorldModel


def one_by_one(world: WorldModel, measured: Validation, dataset: WindowDataset, bins: int) -> list[list[float]]:
    """The losses in each bin: one goal at a time through the network, the error of the velocity by hand."""
    losses: list[list[float]] = [[] for _ in range(bins)]
    for key, times in zip(measured.keys, measured.times.tolist(), strict=True):
        window = Batch.collate([dataset[key]])
        noise = noised(world, window).noise[0].double()
        clean = window.target[0].double() / 127.5 - 1
        context = window.context.float() / 127.5 - 1
        units = world.description.units
        for goal, t in enumerate(times):
            noisy = (1 - t) * clean[goal] + t * noise[goal]
            with torch.no_grad():
                action = window.condition.action[:, goal] * torch.tensor(units.action_scale)
                condition = {
                    "action": action / torch.tensor([units.spacing, units.spacing, 1.0]),
                    "time_shift": window.condition.time_shift[:, goal] * units.time_scale,
                }
                timestep = torch.tensor([1000 * t])
                prediction = world.cdit(noisy[None].float(), timestep, condition, context, window.mask)[0]
            # From the clean frame to the velocity: (x_t - x0) / t, t no smaller than 0.05.
            error = (prediction.double() - clean[goal]) / max(t, 0.05)
            losses[min(int(t * bins), bins - 1)].append(error.square().mean().item())
    return losses


@pytest.mark.parametrize("chunk", [32, 4])
def test_losses_are_those_of_a_plain_loop(
    world: WorldModel,
    train_set: WindowDataset,
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
):
    monkeypatch.setattr(validation, "CHUNK", chunk)
    measured = Validation(train_set, ValidationConfig(samples=10, time_bins=4), seed=3)
    result = measured.run(world, world.cdit, accelerator)
    losses = one_by_one(world, measured, train_set, bins=4)
    assert [len(bin) for bin in losses] == [5, 5, 5, 5]
    means = [sum(bin) / len(bin) for bin in losses]
    edges = ["0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00"]
    expected = {f"validation/loss_t{edge}": mean for edge, mean in zip(edges, means, strict=True)}
    expected["validation/loss"] = sum(means) / 4
    assert result == pytest.approx(expected, rel=1e-4)
    assert len({round(mean, 6) for mean in means}) == 4


@pytest.mark.parametrize("processes", [2, 4])
def test_what_fills_up_a_process_is_not_counted(
    world: WorldModel, train_set: WindowDataset, accelerator: Accelerator, processes: int
):
    """Seven windows of several processes, one after the other in this one: their sums are those of one process."""
    measured = Validation(train_set, ValidationConfig(samples=7, time_bins=2), seed=3)
    expected = measured.run(world, world.cdit, accelerator)
    sums: list[torch.Tensor] = []

    def reduce(mine: torch.Tensor, _: str) -> torch.Tensor:
        sums.append(mine)
        return torch.stack(sums).sum(dim=0)

    for index in range(processes):
        process = SimpleNamespace(
            process_index=index, num_processes=processes, device=accelerator.device, reduce=reduce
        )
        found = measured.run(world, world.cdit, process)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("samples", "bins"), [(10, 5), (15, 3), (6, 4)])
def test_times_are_even_and_bins_equally_full(train_set: WindowDataset, samples: int, bins: int):
    times = Validation(train_set, ValidationConfig(samples=samples, time_bins=bins), seed=0).times.double()
    count = samples * train_set.config.goals
    grid = (torch.arange(count) + 0.5) / count
    torch.testing.assert_close(times.flatten().sort().values, grid.double())
    assert set(Counter((times * bins).long().flatten().tolist()).values()) == {count // bins}
    assert not torch.equal(times.flatten(), grid.double())  # no window has always the small times


def test_windows_are_drawn_once_from_the_whole_split(train_set: WindowDataset):
    config = ValidationConfig(samples=12)
    first = Validation(train_set, config, seed=0)
    torch.rand(5)
    again, other = Validation(train_set, config, seed=0), Validation(train_set, config, seed=1)
    windows = [key.window for key in first.keys]
    assert len(set(windows)) == 12
    assert max(windows) > 20  # of the second trajectory, too
    assert again.keys == first.keys
    assert torch.equal(again.times, first.times)
    assert [key.window for key in other.keys] != windows


def test_more_samples_than_windows_are_all_windows(test_set: WindowDataset):
    keys = Validation(test_set, ValidationConfig(samples=1000), seed=0).keys
    assert sorted(key.window for key in keys) == list(range(len(test_set)))


def test_measuring_again_gives_the_same(world: WorldModel, test_set: WindowDataset, accelerator: Accelerator):
    measured = Validation(test_set, ValidationConfig(samples=5), seed=0)
    first = measured.run(world, world.cdit, accelerator)
    torch.manual_seed(99)
    assert measured.run(world, world.cdit, accelerator) == first


def test_a_bin_that_holds_nothing_is_not_reported(world: WorldModel, test_set: WindowDataset, accelerator: Accelerator):
    result = Validation(test_set, ValidationConfig(samples=1, time_bins=4), seed=0).run(world, world.cdit, accelerator)
    assert set(result) == {"validation/loss", "validation/loss_t0.25-0.50", "validation/loss_t0.75-1.00"}


def test_no_device_needs_float64(
    world: WorldModel, test_set: WindowDataset, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
):
    """Apple's has none. What is reduced is on the device."""
    reduced = []
    monkeypatch.setattr(accelerator, "reduce", lambda tensor, how: reduced.append(tensor) or tensor)
    Validation(test_set, ValidationConfig(samples=5), seed=0).run(world, world.cdit, accelerator)
    assert [(tensor.dtype, tensor.device) for tensor in reduced] == [(torch.float32, accelerator.device)]
