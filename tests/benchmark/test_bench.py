"""What a benchmark adds to what was timed."""

from types import SimpleNamespace

import numpy as np
import pytest

from cdit.benchmark.bench import Bench
from cdit.benchmark.config import BenchmarkConfig
from cdit.benchmark.measure import Stopwatch
from cdit.diffusion import SamplerConfig


@pytest.mark.parametrize(("measured", "run"), [(None, {1, 4, 8}), (2, {1, 2}), (300, {4, 250})])
def test_denoising_steps_that_are_not_run_are_added_in_proportion(measured, run, monkeypatch):
    ran = set()

    def costs(contender, sampler):
        ran.add(sampler.steps)
        return 3 + 2 * sampler.steps, 5 * sampler.steps

    monkeypatch.setattr(Stopwatch, "times", lambda self, calls: {key: np.array(call()) for key, call in calls.items()})
    bench = Bench(BenchmarkConfig(measured_steps=measured, device="cpu"))
    seconds = bench.sampling_times([SimpleNamespace(name="peer", sampler=SamplerConfig(steps=250))], costs, [4])
    assert ran == run
    assert seconds.keys() == {("peer", 4), ("peer", 250)}
    assert seconds["peer", 4] == pytest.approx([11, 20])
    assert seconds["peer", 250] == pytest.approx([503, 1250])
