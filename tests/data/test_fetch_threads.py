"""Test the background threads that fetch shards."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from functools import partial

import pytest

from open_lm.data.fetch_threads import FetchThreads


def test_actions_run_in_order_with_urgent_ones_first() -> None:
    threads, release, done = FetchThreads(1), threading.Event(), list[int]()
    started = threading.Event()

    def block() -> None:
        started.set()
        release.wait()

    running = threads.submit(block)
    futures = [threads.submit(partial(done.append, number)) for number in range(3)]
    started.wait()
    urgent = threads.submit(partial(done.append, 3), first=True)
    assert futures[1].cancel() and not running.cancel()
    release.set()
    wait([running, urgent, *futures])
    assert done == [3, 0, 2]


def test_only_some_actions_run_at_a_time() -> None:
    threads, lock, running, most = FetchThreads(2), threading.Lock(), [0], [0]
    both = threading.Barrier(2)  # passes only if two actions run at the same time

    def action() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        both.wait()
        with lock:
            running[0] -= 1

    wait([threads.submit(action) for _ in range(8)])
    assert most == [2]


def test_threads_start_again_after_they_were_idle_and_errors_stay_with_their_action() -> None:
    threads = FetchThreads(1)

    def fail() -> None:
        raise ValueError("broken")

    for number in range(3):
        assert threads.submit(partial(int, number)).result() == number
        with pytest.raises(ValueError, match="broken"):
            threads.submit(fail).result()
    futures = [threads.submit(fail), threads.submit(lambda: 1)]
    assert futures[1].result() == 1
    with pytest.raises(ValueError, match="broken"):
        futures[0].result()
