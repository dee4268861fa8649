"""On any bytes a reader works or raises its documented error, and soon. The long run:

pytest tests/fuzz --fuzz_examples 100000
"""

import contextlib
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from readers import READERS, make

from cdit.common.errors import UserError

LONGEST = 20.0
"""Seconds of processor time that an input may take. The slowest are images and the building of networks."""


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_reader_raises_documented_errors_only(
    name: str, tmp_path: Path, pytestconfig: pytest.Config, capfd: pytest.CaptureFixture
) -> None:
    reader = make(name, tmp_path)
    for seed in reader.seeds:  # else nothing but errors would be tried
        reader.path.write_bytes(seed)
        if name != "checkpoint of NWM":  # whose seed lacks most tensors
            reader.read()

    @settings(
        max_examples=pytestconfig.getoption("--fuzz_examples"),
        deadline=None,
        database=None,
        derandomize=pytestconfig.getoption("--fuzz_examples") <= 1000,  # the short run is the same every time
        suppress_health_check=list(HealthCheck),
    )
    @given(reader.inputs)
    def feed(data: bytes) -> None:
        reader.path.write_bytes(data)
        begun = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(UserError):
                reader.read()
        assert time.process_time() - begun < LONGEST

    feed()
