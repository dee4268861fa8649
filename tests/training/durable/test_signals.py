"""Signals as a training gets them; how train.py as a whole ends by them is in tests/faults."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from cdit.common.errors import Interrupted, UserError
from cdit.training.durable.signals import SIGNALS, StopSignals

SECOND = """
import os, signal, sys, time
from cdit.training.durable.signals import StopSignals
with StopSignals() as signals:
    signals.defer()
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


def told_while_busy(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_for_the_loop(number: signal.Signals, capfd: pytest.CaptureFixture[str]):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        signals.defer()
        assert signals.received is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # as passed on by a launcher
        assert signals.received is number
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.count(number.name) == 1


def test_before_the_loop_it_ends_what_goes_on():
    started = time.monotonic()
    with pytest.raises(Interrupted, match="SIGTERM"), StopSignals():
        told_while_busy(signal.SIGTERM)
    assert time.monotonic() - started < 3


def test_one_that_was_swallowed_on_the_way_comes_again():
    with StopSignals() as signals:
        with suppress(Exception):  # as libraries do
            told_while_busy(signal.SIGUSR1)
        with pytest.raises(Interrupted, match="SIGUSR1"):
            signals.defer()


def test_one_that_was_taken_for_another_error_is_told_of_as_it_was():
    """A signal while a checkpoint is read, whose readers raise as they please, does not damage it."""
    with pytest.raises(Interrupted, match="SIGTERM"), StopSignals():  # noqa: PT012
        try:
            told_while_busy(signal.SIGTERM)
        except Exception as error:
            raise UserError("cannot be continued from") from error
    with pytest.raises(UserError), StopSignals():
        raise UserError("without a signal")


@pytest.mark.slow
def test_a_second_one_ends_the_process_at_once():
    process = subprocess.Popen([sys.executable, "-c", SECOND], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 128 + signal.SIGINT
