"""Signals to stop and the clock of saving."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from open_lm.errors import STOP_SIGNALS
from open_lm.training.control import RunControl


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_asks_to_stop_and_goes_back_to_who_had_it(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with RunControl() as control:
        assert control.requests() == (0, 0)
        for _ in range(2):
            os.kill(os.getpid(), number)
            assert control.requests() == (1, 0), "and a second signal changes nothing"
    assert signal.getsignal(number) == before


def test_a_launcher_that_has_gone_counts_as_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    alone = RunControl()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    launched = RunControl()
    assert launched.requests() == alone.requests() == (0, 0)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launched.requests() == (1, 0)
    assert alone.requests() == (0, 0), "whoever started a process by hand may go"


def test_another_thread_leaves_signals_alone() -> None:
    found = []

    def enter() -> None:
        with RunControl() as control:
            found.append((signal.getsignal(signal.SIGTERM), control.requests()))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGTERM), (0, 0))]


def test_the_clock_of_the_master_asks_to_save() -> None:
    now = [0.0]
    master, other = (RunControl(is_master, save_every_minutes=2, clock=lambda: now[0]) for is_master in (True, False))
    wishes = []
    for second in (0, 119, 120, 121, 239, 241, 361):
        now[0] = second
        wishes.append(master.requests()[1])
        assert other.requests() == (0, 0)
    assert wishes == [0, 0, 1, 0, 0, 1, 1]
    assert RunControl(clock=lambda: 1e9).requests() == (0, 0), "0 minutes are never"
