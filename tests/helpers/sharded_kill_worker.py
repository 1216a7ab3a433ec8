"""Kill processes at every event of a save: `python sharded_kill_worker.py FOLDER`, for test_sharded.py.

Forked processes sequentially save step 2 while a complete step 1 exists. The n-th process is killed (SIGKILL) at the
n-th event that Python's audit hooks report: opening, renaming or removing a file, or creating a folder. After each
kill, the checkpoints that look complete must load with the saved values. Then the same is done while a complete step 2
is replaced: it must always load, with the old or the new values. Prints the number of kills. Finally, a save that
never ends must not prevent the interpreter from exiting.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from typing import Any

import torch
from sharded_helpers import assert_equal, build, full_state, train

from open_lm import storage
from open_lm.checkpoint.folders import remove_folder, step_folder, unfinished_folders
from open_lm.checkpoint.sharded import ShardedWriter, TrainingState, incomplete_reason, load

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def save_and_die(state: TrainingState, folder: str, kill_at: int) -> None:
    """Save, and end by SIGKILL at event number `kill_at`, or with exit code 0 if there are fewer events."""
    num_events = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal num_events
        if event in EVENTS and threading.current_thread().name == "checkpoint-write":
            num_events += 1
            if num_events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    ShardedWriter().save(state, os.path.join(folder, step_folder(2)), 2, wait=True)
    os._exit(0)


def save_in_child(state: TrainingState, folder: str, kill_at: int) -> int:
    """Run `save_and_die` in a forked process, and return its exit status."""
    child = os.fork()
    if child == 0:
        save_and_die(state, folder, kill_at)
    return os.waitpid(child, 0)[1]


def loaded_state(folder: str, step: int) -> Any:
    state = build("single", 9)
    load(state, os.path.join(folder, step_folder(step)))
    return full_state(state)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    state = build("single", 0)
    train(state, range(1))
    ShardedWriter().save(state, os.path.join(folder, step_folder(1)), 1, wait=True)
    saved = {1: full_state(state)}
    train(state, range(1, 2))
    saved[2] = full_state(state)
    second = os.path.join(folder, step_folder(2))
    complete = []
    status = signal.SIGKILL
    while status == signal.SIGKILL:
        if complete and complete[-1]:
            shutil.rmtree(second)
        status = save_in_child(state, folder, len(complete) + 1)
        complete.append(incomplete_reason(second) is None)
        for step in (1, 2) if complete[-1] else (1,):
            assert_equal(loaded_state(folder, step), saved[step])
        for unfinished in unfinished_folders(folder):
            remove_folder(unfinished)
        assert sorted(os.listdir(folder)) == [step_folder(step) for step in ((1, 2) if complete[-1] else (1,))]
    assert status == 0 and complete[-1] and not complete[0]

    train(state, range(2, 3))
    before, after = saved[2], full_state(state)
    replaced = []
    status = signal.SIGKILL
    while status == signal.SIGKILL:
        if replaced and replaced[-1]:
            shutil.rmtree(second)
            shutil.copytree(f"{folder}.backup", second)
        elif not replaced:
            shutil.copytree(second, f"{folder}.backup")
        status = save_in_child(state, folder, len(replaced) + 1)
        loaded = loaded_state(folder, 2)
        replaced.append(any(not torch.equal(loaded[name], value) for name, value in before.items()))
        assert_equal(loaded, after if replaced[-1] else before)
        assert unfinished_folders(folder) == []
    assert status == 0 and replaced[-1] and not replaced[0]
    assert len(os.listdir(second)) == 2, "the files of the killed processes are removed"
    print(f"killed {len(complete) + len(replaced) - 2} times", flush=True)

    blocked = threading.Event()

    def block(*args: object) -> object:
        print("blocked", flush=True)
        blocked.set()
        threading.Event().wait()

    storage.atomic_write = block  # type: ignore[assignment]
    ShardedWriter().save(state, os.path.join(folder, step_folder(3)), 3)
    blocked.wait()


if __name__ == "__main__":
    main(sys.argv[1])
