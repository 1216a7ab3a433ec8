"""The cache of downloaded shards: its limit, files in use, and killed processes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from open_lm.data import cache as cache_module
from open_lm.data.cache import Cache, CacheEntry, CacheFullError, Fill, StalledDownloadError

HELPERS = Path(__file__).parents[1] / "helpers"

BLOCK = 4096


def filling(data: bytes, log: list[bytes] | None = None) -> Fill:
    def fill(file: IO[bytes], grow: Callable[[int], None]) -> str:
        if log is not None:
            log.append(data)
        grow(len(data))
        file.write(data)
        file.flush()
        os.ftruncate(file.fileno(), len(data))
        return hashlib.sha256(data).hexdigest()

    return fill


def content(name: str, blocks: int = 1) -> bytes:
    return name.encode().ljust(BLOCK * blocks, b".")


def get(cache: Cache, name: str, blocks: int = 1, log: list[bytes] | None = None) -> CacheEntry | None:
    """Get a file; None if the cache has no space for it."""
    data = content(name, blocks)
    with contextlib.suppress(CacheFullError):
        return cache.get(name, len(data), filling(data, log))
    return None


def use(cache: Cache, name: str, blocks: int = 1, log: list[bytes] | None = None) -> bool:
    """Get a file and close it; return whether the cache had space for it."""
    entry = get(cache, name, blocks, log)
    if entry is None:
        return False
    with entry.file as file:
        file.seek(0)
        assert file.read() == content(name, blocks)
    return True


def used_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def cache_of(folder: Path, blocks: int | None) -> Cache:
    return Cache(str(folder), None if blocks is None else blocks * BLOCK, stall_timeout_s=30)


# --- one process -----------------------------------------------------------------------------------------------------
def test_the_least_recently_used_file_is_removed_first(tmp_path: Path) -> None:
    cache, log = cache_of(tmp_path, 3), list[bytes]()
    for name in ("a", "b", "c", "a", "d", "a", "c"):
        assert use(cache, name, log=log)
        assert used_bytes(tmp_path) <= 3 * BLOCK
    assert log == [content(name) for name in ("a", "b", "c", "d")]
    use(cache, "b", log=log)
    assert log[-1] == content("b"), "b was removed for d"
    assert use(cache, "big", blocks=3) and used_bytes(tmp_path) == 3 * BLOCK


def test_passes_over_more_files_than_fit_find_most_of_those_that_do(tmp_path: Path) -> None:
    cache, log = Cache(str(tmp_path), 4 * BLOCK, 30, evicts="newest"), list[bytes]()
    for _ in range(3):
        for name in "abcdef":
            use(cache, name, log=log)
    assert len(log) == 6 + 2 + 2  # all 18, if those used longest ago are removed, which are the next to be used
    assert used_bytes(tmp_path) <= 4 * BLOCK


def test_files_in_use_stay_and_files_without_space_are_rejected(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 2)
    first, second = get(cache, "a"), get(cache, "b")
    assert first and second and first.is_new
    assert get(cache, "c") is None
    mapped = mmap.mmap(first.file.fileno(), 0, access=mmap.ACCESS_READ)
    first.file.close(), second.file.close()
    assert use(cache, "c"), "b is not used any more"
    assert get(cache, "big", blocks=2) is None, "a is mapped"
    del mapped
    assert use(cache, "big", blocks=2)
    assert get(cache, "bigger", blocks=3) is None
    again = get(cache, "big", blocks=2)
    assert again and not again.is_new, "a file that can never fit removes no other"


def test_a_file_of_unknown_length_reserves_space_as_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_RESERVE_BYTES", 2 * BLOCK)
    cache = cache_of(tmp_path, 4)
    for name in ("a", "b", "c"):
        use(cache, name)
    lengths = []

    def fill(file: IO[bytes], grow: Callable[[int], None], blocks: int) -> str:
        for number in range(1, blocks + 1):
            grow(number * BLOCK)
            file.write(bytes(BLOCK))
            file.flush()
            lengths.append(used_bytes(tmp_path) // BLOCK)
        return "0" * 64

    assert cache.get("fits", -1, lambda file, grow: fill(file, grow, 4)).is_new
    assert max(lengths) == 4
    with pytest.raises(CacheFullError):
        cache.get("does not", -1, lambda file, grow: fill(file, grow, 5))
    assert max(lengths) == 4 and not list(tmp_path.glob("*.part"))


def test_without_a_limit_only_files_in_use_stay(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, None)
    entries = [get(cache, name) for name in "abc"]
    cache.trim()
    assert used_bytes(tmp_path) == 3 * BLOCK
    for entry in entries[:2]:
        assert entry
        entry.file.close()
    cache.trim()
    assert used_bytes(tmp_path) == BLOCK


def test_other_files_in_the_folder_are_not_touched(tmp_path: Path) -> None:
    for name in ("00000.tar", "train-000001.part", "notes.txt"):
        (tmp_path / name).write_bytes(bytes(9 * BLOCK))
    for blocks in (2, None):
        cache = cache_of(tmp_path, blocks)
        assert use(cache, "a") and use(cache, "b") and use(cache, "c")
        cache.trim()
        assert {"00000.tar", "train-000001.part", "notes.txt"} <= set(os.listdir(tmp_path))


def test_a_damaged_file_is_discarded_and_downloaded_again(tmp_path: Path) -> None:
    cache, log = cache_of(tmp_path, 3), list[bytes]()
    entry = get(cache, "a", log=log)
    assert entry and entry.sha256 == hashlib.sha256(content("a")).hexdigest()
    cache.discard(entry)
    assert used_bytes(tmp_path) == 0
    assert use(cache, "a", log=log) and len(log) == 2


def test_an_error_during_the_download_leaves_no_file(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 3)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", BLOCK, lambda file, grow: str(1 // 0))
    assert used_bytes(tmp_path) == 0 and use(cache, "a")


def test_concurrent_requests_share_one_download(tmp_path: Path) -> None:
    cache, log, go = cache_of(tmp_path, 3), list[bytes](), threading.Event()
    data = content("a")

    def slow(file: IO[bytes], grow: Callable[[int], None]) -> str:
        go.wait(30)
        return filling(data, log)(file, grow)

    entries: list[CacheEntry | None] = []
    threads = [threading.Thread(target=lambda: entries.append(cache.get("a", BLOCK, slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join()
    assert len(log) == 1 and sorted(entry.is_new for entry in entries if entry) == [False] * 3 + [True]


def test_waiting_for_a_stalled_download_times_out(tmp_path: Path) -> None:
    started, go = threading.Event(), threading.Event()

    def stuck(file: IO[bytes], grow: Callable[[int], None]) -> str:
        started.set()
        go.wait(60)
        return filling(content("a"))(file, grow)

    thread = threading.Thread(target=cache_of(tmp_path, 3).get, args=("a", BLOCK, stuck))
    thread.start()
    started.wait(30)
    with pytest.raises(StalledDownloadError):
        Cache(str(tmp_path), 3 * BLOCK, stall_timeout_s=0.2).get("a", BLOCK, filling(content("a")))
    go.set()
    thread.join()


# --- several processes -----------------------------------------------------------------------------------------------
PROCESS_IN_SIX_BLOCKS = """
import os, random, sys
sys.path.insert(0, {tests!r})
from test_cache import BLOCK, cache_of, content, get
from pathlib import Path
folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
cache, entries = cache_of(folder, 6), []
for turn in range(150):
    name = chance.choice("abcdefghij")
    blocks = 1 + ord(name) % 2
    entry = get(cache, name, blocks)
    if entry is not None:
        entry.file.seek(0)
        assert entry.file.read() == content(name, blocks), name
        entries.append(entry)
    if len(entries) > 1:
        entries.pop(0).file.close()
    if chance.random() < float(sys.argv[3]):
        os.kill(os.getpid(), 9)
print("done")
"""


def processes(folder: Path, count: int, killed_share: float) -> list[subprocess.Popen[str]]:
    code = PROCESS_IN_SIX_BLOCKS.format(tests=str(HELPERS))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(seed), str(killed_share)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )
        for seed in range(count)
    ]  # fmt: skip


def locked_total(folder: Path) -> int:
    """Return the bytes in a cache while it is locked against changes."""
    with open(folder / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return used_bytes(folder)


@pytest.mark.processes
@pytest.mark.parametrize("killed_share", [0.0, 0.02])
def test_many_processes_never_exceed_the_limit_or_lose_open_files(tmp_path: Path, killed_share: float) -> None:
    running = processes(tmp_path, 4, killed_share)
    most = 0
    while any(process.poll() is None for process in running):
        most = max(most, locked_total(tmp_path))
    for process in running:
        out, err = process.communicate()
        assert (process.returncode, out, err) == (0, "done\n", "") or (killed_share and process.returncode == -9), err
    assert 0 < most <= 6 * BLOCK
    assert use(cache_of(tmp_path, 6), "after", blocks=6), "no lock remains"
    assert [path.suffix for path in tmp_path.iterdir() if path.name != ".lock"] == [".tar"]


@pytest.mark.processes
def test_a_killed_download_releases_its_space_and_its_lock(tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(HELPERS)!r})
from test_cache import BLOCK, cache_of
from pathlib import Path
def fill(file, grow):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), 9)
cache_of(Path({str(tmp_path)!r}), 3).get("a", 3 * BLOCK, fill)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=env).returncode == -signal.SIGKILL
    (partial,) = tmp_path.glob("*.part")
    assert partial.stat().st_size == 3 * BLOCK
    assert use(cache_of(tmp_path, 3), "b", blocks=2), "its space is free again"
    assert not partial.exists()
    assert use(cache_of(tmp_path, 3), "a", blocks=3)
