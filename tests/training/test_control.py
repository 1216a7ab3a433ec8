"""Stop signals and timed saves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from open_lm.training.control import RunControl


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_requests_a_stop_and_previous_handler_is_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with RunControl() as control:
        assert control.requests() == (0, 0)
        for _ in range(2):
            os.kill(os.getpid(), number)
            assert control.requests() == (1, 0), "a second signal changes nothing"
    assert signal.getsignal(number) == before


def test_exit_of_the_launcher_counts_as_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    unlaunched = RunControl()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    launched = RunControl()
    assert launched.requests() == unlaunched.requests() == (0, 0)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launched.requests() == (1, 0)
    assert unlaunched.requests() == (0, 0), "the parent of a process without a launcher may exit"


def test_other_threads_install_no_handlers() -> None:
    found = []

    def enter() -> None:
        with RunControl() as control:
            found.append((signal.getsignal(signal.SIGTERM), control.requests()))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGTERM), (0, 0))]


def test_master_clock_requests_saves() -> None:
    now = [0.0]
    master, other = (RunControl(is_master, save_every_minutes=2, clock=lambda: now[0]) for is_master in (True, False))
    saves = []
    for second in (0, 119, 120, 121, 239, 241, 361):
        now[0] = second
        saves.append(master.requests()[1])
        assert other.requests() == (0, 0)
    assert saves == [0, 0, 1, 0, 0, 1, 1]
    assert RunControl(clock=lambda: 1e9).requests() == (0, 0), "0 minutes means never"


@pytest.mark.processes
def test_first_interrupt_requests_a_stop_and_the_second_ends_the_process() -> None:
    before = signal.getsignal(signal.SIGINT)
    with RunControl() as control:
        os.kill(os.getpid(), signal.SIGINT)
        assert control.requests() == (1, 0)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "ends a process even while it waits for other ranks"
    assert signal.getsignal(signal.SIGINT) == before
    program = (
        "import os, signal\nfrom open_lm.training.control import RunControl\n"
        "with RunControl():\n    os.kill(os.getpid(), 2)\n    os.write(1, b'saving')\n    os.kill(os.getpid(), 2)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (-signal.SIGINT, "saving")
    assert "interrupted: saving and stopping after this step" in result.stderr
