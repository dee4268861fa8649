"""Out of memory: advice, and a run that goes on."""

from pathlib import Path

import pytest
from harness import Table, Trainer, survive


@pytest.mark.parametrize(
    ("phase", "entry"),
    [("step", 5), *(pytest.param(*p, marks=pytest.mark.faults("all")) for p in [("write", 2), ("evaluation", 2)])],
)
def test_out_of_memory(trainer: Trainer, table: Table, tmp_path: Path, phase: str, entry: int):
    fault = {"act": "limit_memory", "argument": 100_000_000, "phase": phase, "entry": entry}
    survive(trainer, table, f"out of memory: {phase}", tmp_path, faults=[fault], code=2, says="micro_batch_size")
