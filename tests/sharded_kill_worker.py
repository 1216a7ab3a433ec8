"""Killed at every moment of a save: `python sharded_kill_worker.py FOLDER`, for test_sharded.py.

One process after the other, forked from this one, saves step 2 beside a complete step 1 and is killed (SIGKILL) at the
next event that Python's audit hooks tell of: opening, renaming, removing a file or making a folder. After each the
checkpoints that look complete must load with what was saved. Prints how many moments there were; last, a save that
never ends must not keep the interpreter from ending.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading

import torch
from sharded_helpers import assert_equal, build, train, whole_state

from open_lm import storage
from open_lm.checkpoint.sharded import ShardedWriter, TrainingState, folder_name, incompleteness, load

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def save_and_die(state: TrainingState, folder: str, moment: int) -> None:
    """End by SIGKILL at the `moment`-th event, or with exit code 0 where there are fewer."""
    seen = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        if event in EVENTS and threading.current_thread().name == "checkpoint-write":
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    ShardedWriter().save(state, os.path.join(folder, folder_name(2)), 2, wait=True)
    os._exit(0)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    state = build("alone", 0)
    train(state, range(1))
    ShardedWriter().save(state, os.path.join(folder, folder_name(1)), 1, wait=True)
    saved = {1: whole_state(state)}
    train(state, range(1, 2))
    saved[2] = whole_state(state)
    complete = []
    status = signal.SIGKILL
    while status == signal.SIGKILL:
        second = os.path.join(folder, folder_name(2))
        if complete and complete[-1]:
            shutil.rmtree(second)
        child = os.fork()
        if child == 0:
            save_and_die(state, folder, len(complete) + 1)
        status = os.waitpid(child, 0)[1]
        complete.append(incompleteness(second) is None)
        for step in (1, 2) if complete[-1] else (1,):
            target = build("alone", 9)
            load(target, os.path.join(folder, folder_name(step)))
            assert_equal(whole_state(target), saved[step])
    assert status == 0 and complete[-1] and not complete[0]
    assert sorted(os.listdir(folder)) == [folder_name(1), folder_name(2)], "what was left behind is cleared away"
    print(f"killed {len(complete) - 1} times", flush=True)

    def never_ends(*args: object) -> object:
        print("blocked", flush=True)
        threading.Event().wait()

    storage.atomic_write = never_ends  # type: ignore[assignment]
    ShardedWriter().save(state, os.path.join(folder, folder_name(3)), 3)


if __name__ == "__main__":
    main(sys.argv[1])
