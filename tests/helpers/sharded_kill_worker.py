"""Killed at every moment of a save: `python sharded_kill_worker.py FOLDER`, for test_sharded.py.

One process after the other, forked from this one, saves step 2 beside a complete step 1 and is killed (SIGKILL) at the
next event that Python's audit hooks tell of: opening, renaming, removing a file or making a folder. After each the
checkpoints that look complete must load with what was saved. Then the same with a complete step 2 that is replaced: it
is always there, as it was before or as it is to be. Prints how many moments there were; last, a save that never ends
must not keep the interpreter from ending.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from typing import Any

import torch
from sharded_helpers import assert_equal, build, train, whole_state

from open_lm import storage
from open_lm.checkpoint.folders import remove_folder, step_folder, unfinished_folders
from open_lm.checkpoint.sharded import ShardedWriter, TrainingState, incomplete_reason, load

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
    ShardedWriter().save(state, os.path.join(folder, step_folder(2)), 2, wait=True)
    os._exit(0)


def killed(state: TrainingState, folder: str, moment: int) -> int:
    """The status with which a process ends that is to die at this moment."""
    child = os.fork()
    if child == 0:
        save_and_die(state, folder, moment)
    return os.waitpid(child, 0)[1]


def loaded(folder: str, step: int) -> Any:
    state = build("alone", 9)
    load(state, os.path.join(folder, step_folder(step)))
    return whole_state(state)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    state = build("alone", 0)
    train(state, range(1))
    ShardedWriter().save(state, os.path.join(folder, step_folder(1)), 1, wait=True)
    saved = {1: whole_state(state)}
    train(state, range(1, 2))
    saved[2] = whole_state(state)
    second = os.path.join(folder, step_folder(2))
    complete = []
    status = signal.SIGKILL
    while status == signal.SIGKILL:
        if complete and complete[-1]:
            shutil.rmtree(second)
        status = killed(state, folder, len(complete) + 1)
        complete.append(incomplete_reason(second) is None)
        for step in (1, 2) if complete[-1] else (1,):
            assert_equal(loaded(folder, step), saved[step])
        for left in unfinished_folders(folder):
            remove_folder(left)
        assert sorted(os.listdir(folder)) == [step_folder(step) for step in ((1, 2) if complete[-1] else (1,))]
    assert status == 0 and complete[-1] and not complete[0]

    train(state, range(2, 3))
    before, after = saved[2], whole_state(state)
    replaced = []
    status = signal.SIGKILL
    while status == signal.SIGKILL:
        if replaced and replaced[-1]:
            shutil.rmtree(second)
            shutil.copytree(f"{folder}.kept", second)
        elif not replaced:
            shutil.copytree(second, f"{folder}.kept")
        status = killed(state, folder, len(replaced) + 1)
        found = loaded(folder, 2)
        replaced.append(any(not torch.equal(found[name], value) for name, value in before.items()))
        assert_equal(found, after if replaced[-1] else before)
        assert unfinished_folders(folder) == []
    assert status == 0 and replaced[-1] and not replaced[0]
    assert len(os.listdir(second)) == 2, "what was left behind is cleared away"
    print(f"killed {len(complete) + len(replaced) - 2} times", flush=True)

    reached = threading.Event()

    def never_ends(*args: object) -> object:
        print("blocked", flush=True)
        reached.set()
        threading.Event().wait()

    storage.atomic_write = never_ends  # type: ignore[assignment]
    ShardedWriter().save(state, os.path.join(folder, step_folder(3)), 3)
    reached.wait()


if __name__ == "__main__":
    main(sys.argv[1])
