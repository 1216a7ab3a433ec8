"""The cache of fetched shards: never above its limit, never without what is in use, whoever is killed in between."""

from __future__ import annotations

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

from open_lm.data import cache as room
from open_lm.data.cache import Cache, Fill, Held

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


def hold(cache: Cache, name: str, blocks: int = 1, log: list[bytes] | None = None) -> Held | None:
    data = content(name, blocks)
    return cache.hold(name, len(data), filling(data, log))


def use(cache: Cache, name: str, blocks: int = 1, log: list[bytes] | None = None) -> bool:
    """Whether a file was kept there; it is closed again."""
    held = hold(cache, name, blocks, log)
    if held is None:
        return False
    with held.file as file:
        file.seek(0)
        assert file.read() == content(name, blocks)
    return True


def used_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def cache_of(folder: Path, blocks: int | None) -> Cache:
    return Cache(str(folder), None if blocks is None else blocks * BLOCK, patience_s=30)


# --- one process -----------------------------------------------------------------------------------------------------
def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache, log = cache_of(tmp_path, 3), list[bytes]()
    for name in ("a", "b", "c", "a", "d", "a", "c"):
        assert use(cache, name, log=log)
        assert used_bytes(tmp_path) <= 3 * BLOCK
    assert log == [content(name) for name in ("a", "b", "c", "d")]
    use(cache, "b", log=log)
    assert log[-1] == content("b"), "it had to make room for d"
    assert use(cache, "big", blocks=3) and used_bytes(tmp_path) == 3 * BLOCK


def test_what_is_in_use_stays_and_what_finds_no_room_is_not_kept(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 2)
    first, second = hold(cache, "a"), hold(cache, "b")
    assert first and second and first.is_new
    assert hold(cache, "c") is None
    mapped = mmap.mmap(first.file.fileno(), 0, access=mmap.ACCESS_READ)
    first.file.close(), second.file.close()
    assert use(cache, "c"), "b is not used any more"
    assert hold(cache, "big", blocks=2) is None, "a is mapped"
    del mapped
    assert use(cache, "big", blocks=2)
    assert hold(cache, "bigger", blocks=3) is None
    again = hold(cache, "big", blocks=2)
    assert again and not again.is_new, "what cannot fit at all drives nothing out"


def test_a_file_of_unknown_length_is_given_room_as_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_STEP_BYTES", 2 * BLOCK)
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

    assert cache.hold("fits", -1, lambda file, grow: fill(file, grow, 4)) is not None
    assert max(lengths) == 4
    assert cache.hold("does not", -1, lambda file, grow: fill(file, grow, 5)) is None
    assert max(lengths) == 4 and not list(tmp_path.glob("*.part"))


def test_without_a_limit_only_what_is_in_use_stays(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, None)
    held = [hold(cache, name) for name in "abc"]
    cache.trim()
    assert used_bytes(tmp_path) == 3 * BLOCK
    for one in held[:2]:
        assert one
        one.file.close()
    cache.trim()
    assert used_bytes(tmp_path) == BLOCK


def test_files_of_others_in_the_folder_are_let_alone(tmp_path: Path) -> None:
    for name in ("00000.tar", "train-000001.part", "notes.txt"):
        (tmp_path / name).write_bytes(bytes(9 * BLOCK))
    for blocks in (2, None):
        cache = cache_of(tmp_path, blocks)
        assert use(cache, "a") and use(cache, "b") and use(cache, "c")
        cache.trim()
        assert {"00000.tar", "train-000001.part", "notes.txt"} <= set(os.listdir(tmp_path))


def test_a_damaged_file_is_discarded_and_fetched_anew(tmp_path: Path) -> None:
    cache, log = cache_of(tmp_path, 3), list[bytes]()
    held = hold(cache, "a", log=log)
    assert held and held.sha256 == hashlib.sha256(content("a")).hexdigest()
    cache.discard(held)
    assert used_bytes(tmp_path) == 0
    assert use(cache, "a", log=log) and len(log) == 2


def test_what_a_fetch_raises_leaves_nothing(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 3)
    with pytest.raises(ZeroDivisionError):
        cache.hold("a", BLOCK, lambda file, grow: str(1 // 0))
    assert used_bytes(tmp_path) == 0 and use(cache, "a")


def test_one_fetch_serves_all_who_wait_for_it(tmp_path: Path) -> None:
    cache, log, go = cache_of(tmp_path, 3), list[bytes](), threading.Event()
    data = content("a")

    def slow(file: IO[bytes], grow: Callable[[int], None]) -> str:
        go.wait(30)
        return filling(data, log)(file, grow)

    found: list[Held | None] = []
    threads = [threading.Thread(target=lambda: found.append(cache.hold("a", BLOCK, slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join()
    assert len(log) == 1 and sorted(held.is_new for held in found if held) == [False] * 3 + [True]


def test_one_who_does_not_get_on_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    begun, go = threading.Event(), threading.Event()

    def stuck(file: IO[bytes], grow: Callable[[int], None]) -> str:
        begun.set()
        go.wait(60)
        return filling(content("a"))(file, grow)

    thread = threading.Thread(target=cache_of(tmp_path, 3).hold, args=("a", BLOCK, stuck))
    thread.start()
    begun.wait(30)
    assert Cache(str(tmp_path), 3 * BLOCK, patience_s=0.2).hold("a", BLOCK, filling(content("a"))) is None
    go.set()
    thread.join()


# --- several processes -----------------------------------------------------------------------------------------------
SIX_BLOCKS = """
import os, random, sys
sys.path.insert(0, {tests!r})
from test_cache import BLOCK, cache_of, content, hold
from pathlib import Path
folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
cache, held = cache_of(folder, 6), []
for turn in range(150):
    name = chance.choice("abcdefghij")
    blocks = 1 + ord(name) % 2
    found = hold(cache, name, blocks)
    if found is not None:
        found.file.seek(0)
        assert found.file.read() == content(name, blocks), name
        held.append(found)
    if len(held) > 1:
        held.pop(0).file.close()
    if chance.random() < float(sys.argv[3]):
        os.kill(os.getpid(), 9)
print("done")
"""


def processes(folder: Path, count: int, killed_share: float) -> list[subprocess.Popen[str]]:
    code = SIX_BLOCKS.format(tests=str(HELPERS))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(seed), str(killed_share)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )
        for seed in range(count)
    ]  # fmt: skip


def locked_total(folder: Path) -> int:
    """The bytes in a cache while nobody may change it."""
    with open(folder / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return used_bytes(folder)


@pytest.mark.parametrize("killed_share", [0.0, 0.02])
def test_many_processes_never_exceed_the_limit_nor_lose_what_they_read(tmp_path: Path, killed_share: float) -> None:
    running = processes(tmp_path, 4, killed_share)
    most = 0
    while any(process.poll() is None for process in running):
        most = max(most, locked_total(tmp_path))
    for process in running:
        out, err = process.communicate()
        assert (process.returncode, out, err) == (0, "done\n", "") or (killed_share and process.returncode == -9), err
    assert 0 < most <= 6 * BLOCK
    assert use(cache_of(tmp_path, 6), "after", blocks=6), "nothing is locked for ever"
    assert [path.suffix for path in tmp_path.iterdir() if path.name != ".lock"] == [".tar"]


def test_a_fetch_that_is_killed_leaves_room_and_a_claim_for_others(tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(HELPERS)!r})
from test_cache import BLOCK, cache_of
from pathlib import Path
def fill(file, grow):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), 9)
cache_of(Path({str(tmp_path)!r}), 3).hold("a", 3 * BLOCK, fill)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=env).returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("*.part")
    assert left.stat().st_size == 3 * BLOCK
    assert use(cache_of(tmp_path, 3), "b", blocks=2), "its room is free again"
    assert not left.exists()
    assert use(cache_of(tmp_path, 3), "a", blocks=3)
