"""Counts the inputs of each reader, and shows them at the end."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

COUNTS = pytest.StashKey[Counter]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COUNTS] = Counter()


@pytest.fixture
def counts(pytestconfig: pytest.Config) -> Counter:
    """Inputs so far, by reader and by how they ended."""
    return pytestconfig.stash[COUNTS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash[COUNTS]
    readers = dict.fromkeys(reader for reader, _ in counts)
    if not readers:
        return
    terminalreporter.section("fuzzing")
    terminalreporter.write_line(f"{'reader':28} {'inputs':>9} {'read':>9} {'refused':>9} {'slowest':>9}")
    for reader in readers:
        read, refused = counts[reader, "read"], counts[reader, "refused"]
        slowest = counts[reader, "slowest"]
        terminalreporter.write_line(f"{reader:28} {read + refused:9} {read:9} {refused:9} {slowest:7.2f} s")
