"""Control and return of worlds that know what a turning camera sees, and the table of ways."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cylinder import FPS, SIZE, view, write_turning
from torch import Tensor

from cdit.batch import Condition
from cdit.common.errors import UserError
from cdit.common.statistics import paired_difference
from cdit.data.config import DataConfig
from cdit.data.windows import WindowDataset
from cdit.evaluate.cases import case_of
from cdit.evaluate.config import RolloutConfig
from cdit.evaluate.curves import draw_curves, drift_studies, side_by_side
from cdit.evaluate.metrics import psnr
from cdit.evaluate.protocols import rollout, whole_seconds
from cdit.evaluate.results import ProtocolResult
from cdit.evaluate.study import Judge, Study
from cdit.evaluate.tables import Row

YAW = torch.rand(18, generator=torch.Generator().manual_seed(3)).mul(0.3).cumsum(0)
WINDOWS = [1, 3, 4]


class World:
    """Sees the cylinder. For one second of a rollout it turns as it is asked to, then half as far to the other side."""

    def __init__(self, dataset: WindowDataset):
        self.device = torch.device("cpu")
        self.description = SimpleNamespace(fps=FPS, has_actions=True)
        self.nows = [dataset.locate(window)[1] for window in WINDOWS]
        self.path: list[Tensor] = []

    def begin(self, context: Tensor, mask: Tensor, spacing: Tensor, text: None) -> Tensor:
        self.path = [YAW[self.nows]]
        return self.path[0]

    def step(self, state: Tensor, condition: Condition, sampler, noise) -> tuple[Tensor, Tensor]:
        assert condition.action.shape == (len(WINDOWS), 1, 3)
        assert condition.time_shift is None  # that of a step
        self.path.append(state + condition.action[:, 0, 2])
        return self.path[-1], self.path[-1][:, None]

    def decode(self, sampled: Tensor) -> Tensor:
        return view(sampled.flatten()).unflatten(0, sampled.shape)

    def predict(self, state: Tensor, condition: Condition, sampler, generator) -> Tensor:
        obeys = 1.0 if len(self.path) - 1 <= FPS else -0.5
        return self.decode(state[:, None] + obeys * condition.action[..., 2])

    def rollout(self, context: Tensor, condition: Condition, **_) -> Tensor:
        yaw = YAW[self.nows][:, None, None] + condition.action[..., 2].cumsum(-1)
        return self.decode(yaw)


@pytest.fixture
def dataset(tmp_path: Path) -> WindowDataset:
    folder = write_turning(tmp_path / "data", YAW)
    return WindowDataset(DataConfig(str(folder), image_size=SIZE, context_frames=2), "test")


def studies(dataset: WindowDataset, **options) -> tuple[World, dict[str, Study]]:
    config = RolloutConfig(**{"seconds": [1.5, 3.0], "curves": True, "turn": 15.0, **options})
    protocol = rollout(config.seconds, FPS, FPS, every_second=True)
    study = Study(protocol, [case_of(dataset, window) for window in WINDOWS], len(WINDOWS), 1, seed=0)
    world = World(dataset)
    return world, {study.protocol.name: study for study in drift_studies(study, config, world, dataset)}


def test_control_follows_the_recorded_path_and_sees_whom_turns_obey(dataset: WindowDataset):
    world, found = studies(dataset)
    control = found["control"]
    assert control.protocol.seconds == [0.0, 1.0, 1.5, 2.0, 3.0]
    assert control.protocol.shown == [0.0, 1.5, 3.0]
    measured = control.compute(0, world, dataset, Judge({}))
    expected = torch.stack([YAW[[now + step for now in world.nows]] for step in range(13)])
    torch.testing.assert_close(torch.stack(world.path), expected, atol=1e-5, rtol=0)
    assert measured["model/right_sign"].tolist() == [[1, 1, 0, 0, 0]] * 3
    ratio = torch.tensor([1, 1, -0.5, -0.5, -0.5]).expand(3, -1)
    torch.testing.assert_close(measured["model/turn"], ratio, atol=0.06, rtol=0)


def test_a_world_without_drift_returns_to_where_it_was(dataset: WindowDataset):
    world, found = studies(dataset)
    back = found["return"]
    assert back.protocol.shown == [1.5, 3.0]
    measured = back.compute(0, world, dataset, Judge({"psnr": psnr}))
    assert measured.keys() >= {"model/psnr", "shown/model"}
    scores = measured["model/psnr"]
    assert scores.shape == (3, 12)
    torch.testing.assert_close(scores[:, :5], scores[:, 6:11].flip(1), atol=0.1, rtol=0)  # the same views on the way
    away = psnr(view(YAW[world.nows] + math.pi / 2), view(YAW[world.nows]))
    torch.testing.assert_close(scores[:, 5], away, atol=1.0, rtol=0)  # of JPEG frames
    assert (scores[:, 11] > scores[:, 5] + 12).all()  # of JPEG frames, too


def test_a_turn_larger_than_what_is_seen_is_refused(dataset: WindowDataset):
    with pytest.raises(UserError, match=r"rollout.turn is 40, expected less than 34, half the field of view"):
        studies(dataset, turn=40.0)


def test_what_cannot_be_measured_is_left_out(dataset: WindowDataset, capsys: pytest.CaptureFixture):
    dataset.info = replace(dataset.info, camera=None)
    assert list(studies(dataset)[1]) == ["jump", "return"]
    assert "control is left out: dataset.json has no camera" in capsys.readouterr().err


def test_whole_seconds():
    assert whole_seconds([0.5, 3.0], 4.0) == [0.5, 1.0, 2.0, 3.0]
    assert whole_seconds([2.0, 4.0], 0.5) == [2.0, 4.0]
    assert whole_seconds([0.75], 4.0) == [0.75]


def result(name: str, *methods: str) -> ProtocolResult:
    """Two samples of each of two trajectories, at 1 and 2 s."""
    draws, rows = torch.Generator().manual_seed(len(name)), []
    for method in methods:
        for seconds in (1.0, 2.0):
            values = torch.rand(4, generator=draws).tolist()
            rows.append(Row(method, seconds, 4, "psnr", sum(values) / 4, values, 0.0, 1.0))
        rows.append(Row(method, 2.0, 8, "fid", 5.0))
    return ProtocolResult(name, 4.0, [("a", 1), ("a", 2), ("b", 1), ("b", 2)], rows, [2.0])


def test_ways_side_by_side(tmp_path: Path):
    results = {
        "time": result("time", "model"),
        "rollout_4fps": result("rollout_4fps", "model", "copy_last", "shuffled_actions"),
        "jump": result("jump", "model", "copy_last"),
    }
    curves = side_by_side(results)
    named = {(row.method, row.metric, row.seconds): row for row in curves.rows}
    methods = ("rollout at 4 fps", "in one jump", "last context frame", "rollout at 4 fps − in one jump")
    assert named.keys() == {(m, "psnr", s) for m in methods for s in (1.0, 2.0)} | {
        (m, "fid", 2.0) for m in methods[:3]
    }
    assert {row.seconds for row in curves.shown_rows} == {2.0}
    first, second = (results[name].values("model", "psnr", 2.0) for name in ("rollout_4fps", "jump"))
    (expected,) = paired_difference(first, second, ["a", "a", "b", "b"])
    found = named[methods[3], "psnr", 2.0]
    assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))
    draw_curves(results | {"curves": curves}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
