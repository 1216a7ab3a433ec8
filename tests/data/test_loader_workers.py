"""Worker processes: a dead worker is a clear error, and signals meant for the run do not end workers."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from data_helpers import SEQ_LEN, VOCAB_SIZE, write_source
from torch.utils.data import DataLoader

from open_lm.config.sections import DataConfig
from open_lm.data import workers
from open_lm.data.loader import TrainLoader, build_train_loader
from open_lm.errors import DataError

pytestmark = pytest.mark.processes


def loader_of(manifest: str, count: int, batch_size: int = 4, **options: object) -> TrainLoader:
    data = DataConfig(dataset_manifest=[manifest], data_key="npy", workers=count, **options)  # type: ignore[arg-type]
    return build_train_loader(data, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, batch_size=batch_size)


def test_the_error_for_a_killed_worker_names_it(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    loader = loader_of(write_source(tmp_path, [40, 40]), 2, multiple_data_passes=True)
    steps = loader.batches(10_000)
    next(steps)
    (victim, _) = multiprocessing.active_children()
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    with pytest.raises(DataError, match=rf"{victim.pid}.*killed from outside.*fewer --workers") as caught:
        list(steps)
    assert "Traceback" not in str(caught.value)
    assert signal.getsignal(signal.SIGCHLD) == handler
    state = loader.state  # the run can continue from there
    assert next(loader.batches(1))[1] != state


def die_with_lock(_worker: int) -> None:
    """Acquire the locks of all events of this process, and kill it."""
    for event in [item for item in gc.get_objects() if isinstance(item, Event)]:
        event._cond.acquire()  # type: ignore[attr-defined]
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.timeout(60)
def test_a_worker_that_is_killed_while_it_holds_a_lock_blocks_nobody() -> None:
    items: DataLoader[int] = DataLoader([1, 2, 3], batch_size=None, num_workers=1, worker_init_fn=die_with_lock)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="killed from outside"):
        list(workers.iterate_workers(items))


@pytest.mark.parametrize("has_sigtimedwait", [True, False])  # False: macOS
def test_workers_ignore_signals_to_all_processes_of_the_job(
    has_sigtimedwait: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_sigtimedwait:
        monkeypatch.delattr(signal, "sigtimedwait")
        monkeypatch.setattr(workers, "_PARENT_POLL_S", 0.01)
    manifest = write_source(tmp_path, [40, 40])
    expected = [batch.inputs for batch, _ in loader_of(manifest, 0, multiple_data_passes=True).batches(100)]
    steps = loader_of(manifest, 2, multiple_data_passes=True).batches(100)
    found = [next(steps)[0].inputs]
    children = multiprocessing.active_children()
    for name in ("TERM", "USR1", "INT"):
        subprocess.run(["kill", f"-{name}", *(str(child.pid) for child in children)], check=True)
    found += [batch.inputs for batch, _ in steps]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if not has_sigtimedwait:  # the sender is unknown, so the workers end after the grace time
        monkeypatch.setattr(workers, "_UNKNOWN_SENDER_GRACE_S", 0.0)
        more = loader_of(manifest, 2, multiple_data_passes=True).batches(100)
        next(more)
        children = [child for child in multiprocessing.active_children() if child not in children]
    for child in children:
        child.terminate()
        child.join(60)
        assert child.exitcode == 0


RUN_THAT_IS_KILLED = """
import multiprocessing, signal, sys
if len(sys.argv) > 2:
    del signal.sigtimedwait
from test_loader_workers import loader_of
steps = loader_of(sys.argv[1], 2, 4000, multiple_data_passes=True).batches(10_000)
next(steps)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("arguments", [[], ["without sigtimedwait"]])
def test_workers_end_with_a_killed_run(arguments: list[str], tmp_path: Path) -> None:
    """They wait to send batches larger than a pipe holds, and would keep the run's output open."""
    command = [sys.executable, "-c", RUN_THAT_IS_KILLED, write_source(tmp_path, [900] * 9), *arguments]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdout is not None
    pids = [int(pid) for pid in run.stdout.readline().split()]
    assert len(pids) == 2
    run.kill()
    try:
        run.communicate(timeout=60)  # the output ends when the workers do
    except subprocess.TimeoutExpired:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        raise


def test_one_rank_logs_what_a_run_does_not_train_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = write_source(tmp_path, [20, 20])
    data = DataConfig(
        dataset_manifest=[manifest], data_key="npy", workers=0, train_num_samples=15 * SEQ_LEN + 3, epochs=2
    )
    with caplog.at_level(logging.INFO):
        for rank in range(2):
            build_train_loader(data, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, batch_size=4, rank=rank, world_size=2)
    assert [record.message for record in caplog.records] == [
        "not trained on, of --train-num-samples x --epochs: 6 sequences that do not fill a last global batch of 8, and "
        "6 tokens that do not fill a sequence of 8",
        f"{manifest}: this run does not use 16 of its 40 sequences",
    ]
