"""One thread for every process of the tests: on tensors this small, more threads only wait for each other."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults",
        choices=("short", "all"),
        default="short",
        help="how much of tests/faults to run: a selection, or the whole suite (minutes), which prints its table",
    )
    parser.addoption(
        "--fuzz_examples",
        type=int,
        default=150,
        help="inputs for each reader in tests/fuzz, the long run has 100000",
    )
