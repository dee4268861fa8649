import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cdit.common.errors import DataError, UserError
from cdit.data.source import TrajectorySource
from cdit.data.windows import WindowDataset
from cdit.evaluate.cases import Case, content_hash, others, read_index, spread_cases


@pytest.fixture
def read(tmp_path: Path, dataset: WindowDataset) -> Callable[..., list[Case]]:
    def read(entries: Any, reach: int = 4, **options: int) -> list[Case]:
        (tmp_path / "time.pkl").write_bytes(pickle.dumps(entries))
        return read_index(tmp_path / "time.pkl", dataset, reach, **options)

    return read


def test_an_index_file_is_read_as_it_says(read: Callable[..., list[Case]], dataset: WindowDataset):
    cases = read([("b", 5, -5, 20), ("a", np.int64(25), -25, 4), ("b", 5, -5, 20), ("c", 0, 0, 4)])
    assert [(case.name, case.now) for case in cases] == [("b", 5), ("a", 25), ("b", 5), ("c", 0)]
    for case in cases:
        assert dataset.locate(case.window) == (case.trajectory, case.now)
        assert dataset.trajectories[case.trajectory].name == case.name


def nested() -> list:
    """A list that takes no memory and no end of time to print."""
    entry: list = []
    for _ in range(60):
        entry = [entry, entry]
    return [entry]


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([], "expected a list"),
        ({"a": 1}, "expected a list"),
        ([("a", 5, 0, 4), ("a", 5, 0)], "entry 1 .*whole numbers"),
        ([("a", 5.0, 0, 4)], "entry 0 .*whole numbers"),
        ([(7, 5, 0, 4)], "entry 0 .*whole numbers"),
        ([("a", True, 0, 4)], "entry 0 .*whole numbers"),
        (nested(), "entry 0 .*whole numbers"),
        ([("zzz", 5, 0, 4)], "no usable trajectory 'zzz'"),
        ([("../a", 5, 0, 4)], "no usable trajectory"),
        ([("a", -1, 0, 4)], "time -1"),
        ([("a", 30, 0, 4)], "from 0 to 29"),
        ([("a", 5, 4, 0)], "offsets in order"),
        ([("a", 26, 0, 4)], "4 frames after time 26 are predicted, but a ends with 29"),
    ],
)
def test_an_index_file_that_cannot_be_used(read: Callable[..., list[Case]], entries: Any, complaint: str):
    with pytest.raises(DataError, match=complaint) as raised:
        read(entries)
    assert "time.pkl" in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_model_that_was_never_trained_on_less_history(read: Callable[..., list[Case]]):
    assert read([("a", 2, 0, 4)], min_history=3)
    with pytest.raises(DataError, match="from 2 to 29"):
        read([("a", 1, 0, 4)], min_history=3)


def test_cases_are_spread_over_what_reaches_far_enough(dataset: WindowDataset):
    cases = spread_cases(dataset, 10, 5, "time.seconds")
    assert len(cases) == 5
    assert {case.name for case in cases} == {"a", "b", "c"}
    for case in cases:
        assert case.now >= 2  # a full context
        assert case.now + 10 < len(dataset.trajectories[case.trajectory])
    every = spread_cases(dataset, 10, 10**6, "time.seconds")
    assert len(every) == sum(length - 10 - 2 for length in (30, 26, 23))


def test_horizons_that_no_trajectory_reaches_name_the_longest(dataset: WindowDataset):
    assert spread_cases(dataset, 27, 5, "time.seconds")  # 30 frames, 3 of them past
    with pytest.raises(UserError, match=r"time.seconds.* 7 s \(28 frames\).* the longest possible is 6.75 s"):
        spread_cases(dataset, 28, 5, "time.seconds")


def case(trajectory: int, now: int) -> Case:
    return Case(0, trajectory, "abc"[trajectory], now)


def test_another_case_is_one_of_another_trajectory():
    cases = [case(0, now) for now in range(7)] + [case(1, now) for now in range(2)] + [case(2, 0)]
    assert all(cases[j].trajectory != cases[i].trajectory for i, j in enumerate(others(cases)))
    # Where all are of one, it is at least another time.
    same = [case(0, now) for now in range(5)]
    assert all(i != j for i, j in enumerate(others(same)))
    assert others([case(0, 0)]) == [0]


def test_the_content_of_any_source_is_hashed():
    """A trajectory may have nothing but a name, a length and frames."""

    class Clip(TrajectorySource):
        def __init__(self, shade: int, text: str = "", light: float | None = None):
            self.name, self.shade, self.texts = "clip", shade, [text] * 5
            self.conditions = {} if light is None else {"light": np.full(5, light)}

        def __len__(self) -> int:
            return 5

        def frames(self, times):
            return torch.full((len(times), 3, 4, 4), self.shade, dtype=torch.uint8)

    def hashed(*content: object) -> str:
        return content_hash(SimpleNamespace(trajectories=[Clip(*content)]), [Case(0, 0, "clip", 1)], 2)

    assert hashed(7) == hashed(7)
    assert len({hashed(7), hashed(8), hashed(7, "walk"), hashed(7, "run"), hashed(7, "", 1.0), hashed(7, "", 2.0)}) == 6
