from pathlib import Path

import pytest
import torch

from cdit.plan.config import DiagnoseConfig, OptimizerConfig, PlannerConfig
from cdit.plan.diagnose import COLUMNS, diagnose, judge, ordered, signal_to_noise, spearman


def test_rank_correlation_by_hand():
    assert spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 20, 30, 4000])) == pytest.approx(1)
    ranks = torch.tensor([1.0, 2, 3, 4]), torch.tensor([2.0, 1, 4, 3])
    assert spearman(*ranks) == pytest.approx(1 - 6 * 4 / (4 * 15))


def test_pairs_in_order():
    distance, costs = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 3.0, 2.0])
    # Pairs 0-1 and 0-2 are in order, 1-2 is not.
    assert ordered(costs, distance, torch.tensor([True, True, True])) == pytest.approx(2 / 3)
    assert ordered(costs, distance, torch.tensor([False, True, False])) == 0


def test_signal_to_noise_of_known_deviations():
    random = torch.manual_seed(0)
    costs = 3.0 * torch.randn(1, 4000, generator=random) + 0.5 * torch.randn(8, 4000, generator=random)
    assert signal_to_noise(costs) == pytest.approx(6, rel=0.05)


def test_a_cost_that_is_the_distance_is_perfect():
    distance = torch.linspace(0, 4, 20)
    found = dict(zip(COLUMNS, judge(distance.expand(3, -1), distance), strict=True))
    assert found["rank correlation"] == pytest.approx(1)
    assert (found["chosen [m]"], found["ordered near"], found["ordered far"]) == (0, 1, 1)


def test_the_command_writes_a_row_for_each_cost(walks: Path, checkpoint: Path, tmp_path: Path):
    planner = PlannerConfig(optimizer=OptimizerConfig())
    options = {"data": str(walks), "checkpoint": str(checkpoint), "out": str(tmp_path), "device": "cpu"}
    config = DiagnoseConfig(
        **options, planner=planner, costs=["pixels", "latents"], candidates=6, noises=2, seconds=1.0, episodes=3,
        prior_split="test",
    )  # fmt: skip
    diagnose(config)
    lines = (tmp_path / "diagnose.md").read_text().splitlines()
    pixels, latents = (next(line for line in lines if line.startswith(f"| {name} |")) for name in ("pixels", "latents"))
    assert pixels.split("|")[2:] == latents.split("|")[2:]  # the codec is that of pixels
