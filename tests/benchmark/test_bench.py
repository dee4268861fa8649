"""What a benchmark adds to what was timed."""

import numpy as np
import pytest
import torch

from cdit.benchmark.bench import Bench
from cdit.benchmark.config import BenchmarkConfig
from cdit.benchmark.stopwatch import Stopwatch


@pytest.mark.parametrize(("measured", "run"), [(None, {1, 4, 8}), (2, {1, 2}), (300, {4, 250})])
def test_denoising_steps_that_are_not_run_are_added_in_proportion(measured, run, monkeypatch):
    ran = set()

    def costs(n):
        ran.add(n)
        return 3 + 2 * n, 5 * n

    monkeypatch.setattr(Stopwatch, "times", lambda self, calls: {key: np.array(call()) for key, call in calls.items()})
    bench = Bench(BenchmarkConfig(measured_steps=measured), torch.device("cpu"))
    seconds = bench.sampling_times({"few": (costs, 4), "many": (costs, 250)})
    assert ran == run
    assert seconds["few"] == pytest.approx([11, 20])
    assert seconds["many"] == pytest.approx([503, 1250])
