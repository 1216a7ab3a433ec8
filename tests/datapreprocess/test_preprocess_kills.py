"""The preprocessor killed (SIGKILL) at every kind of moment, and what the same command makes of what it left."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
from datapreprocess_helpers import (
    documents,
    expected_tokens,
    read_shards,
    small_tokenizer,
    tokens_of,
    tree,
    write_jsonl,
)

from open_lm import storage
from open_lm.data.shard_format import read_manifest
from open_lm.datapreprocess import engine, inputs
from open_lm.datapreprocess.make_2048 import main
from open_lm.datapreprocess.tokenization import DocumentEncoder

__all__ = ["small_tokenizer"]
EOT_ID = 3
NEVER = ""
WORK = ".work"

# Every start is a process of its own, forked from a server that has imported what it needs and started nothing.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([
    "pytest", "open_lm.datapreprocess.make_2048", "open_lm.datapreprocess.engine", "tokenizers", "fastokens",
    "zstandard", "boto3", "s3fs",
])  # fmt: skip


class Watched:
    """A file that tells when half of what is first written to it is written."""

    def __init__(self, file: IO[Any], reach: Any) -> None:
        self._file, self._reach, self._first = file, reach, True

    def write(self, data: Any) -> None:
        half = len(data) // 2
        self._file.write(data[:half])
        if self._first:
            self._first = False
            self._file.flush()
            self._reach("half")
        self._file.write(data[half:])


def start(arguments: Sequence[str], event: str, log: str) -> None:
    """Run the command in this process until `event`, and be killed by it; `log` gets a line for every event.

    An event is a moment and the name of a file: "open" (it is begun), "half", "full" (before it gets its name), "done".
    """
    engine._MIN_CHUNK_BYTES = engine._MAX_CHUNK_BYTES = 20_000
    inputs._MIN_UNIT_BYTES = 4_000  # many units, streamed ones among them
    engine._MIN_BUCKETS, engine._BUCKET_BYTES = 4, 1 << 14
    DocumentEncoder.self_check = lambda _: None  # type: ignore[assignment,method-assign]  # it takes longer than the job
    os.fsync = lambda _: None  # type: ignore[assignment]  # no power is cut here
    original, remove_tree = storage.atomic_write, shutil.rmtree
    out = arguments[arguments.index("--output-dir") + 1]

    def reach(moment: str, url: str) -> None:
        reached = f"{moment} {os.path.relpath(url, out)}"
        with open(log, "a") as file:
            print(reached, file=file)
        if reached == event:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def watched(url: str, mode: str = "wb") -> Iterator[Any]:
        with original(url, mode) as file:
            reach("open", url)
            yield Watched(file, lambda moment: reach(moment, url))
            reach("full", url)
        reach("done", url)

    def removed(folder: str, **options: Any) -> None:
        if os.path.basename(folder) == WORK and os.path.exists(os.path.join(folder, "plan.json")):
            os.unlink(os.path.join(folder, "plan.json"))
            reach("gone", os.path.join(folder, "plan.json"))
        remove_tree(folder, **options)

    storage.atomic_write, shutil.rmtree = watched, removed  # type: ignore[assignment]
    main(arguments)


class Command:
    """The command on small inputs of two sources, with its output in `out`."""

    def __init__(self, raw: Path, out: Path, tokenizer: str, *more: str) -> None:
        self.out, self.log = out, out.with_name(f"{out.name}.log")
        self.arguments = ["--input-files", str(raw), "--output-dir", str(out), "--tokenizer", tokenizer]
        self.arguments += ["--seqlen", "32", "--num-workers", "1", "--skip-bad-lines", *more]

    def start(self, event: str = NEVER, *more: str) -> list[str]:
        """Run it until it ends or is killed by the event; returns all events that it reached."""
        self.log.write_text("")
        process = _processes.Process(target=start, args=([*self.arguments, *more], event, str(self.log)))
        process.start()
        process.join()
        assert process.exitcode == (0 if event == NEVER else -signal.SIGKILL), event
        return self.log.read_text().splitlines()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Files to be cut, to be streamed and to share a unit, with lines that are rejected."""
    folder = tmp_path / "raw"
    write_jsonl(folder / "a" / "cut.jsonl", documents(150, seed=1))
    write_jsonl(folder / "a" / "streamed.jsonl.gz", documents(500, seed=2))
    for number in range(3):
        write_jsonl(folder / "b" / f"small{number}.jsonl.zst", documents(20, seed=3 + number))
    (folder / "b" / "bad.jsonl").write_text('{"text": "good"}\n{"text": bad}\n')
    return folder


def sources(raw: Path) -> list[str]:
    return ["--source", f"a={raw / 'a'}", "--source", f"b={raw / 'b'}"]


def chosen(events: Sequence[str], step: int) -> list[str]:
    """Of all events that concern one kind of file, one of each moment, and of these every `step`th."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for event in events:
        moment, _, name = event.partition(" ")
        kind = "-".join([os.path.dirname(name), *os.path.basename(name).split("-")[:1], os.path.splitext(name)[1]])
        kinds.setdefault((moment, kind), []).append(event)
    return [found[number * len(found) // len(kinds)] for number, found in enumerate(kinds.values())][::step]


@pytest.mark.parametrize(("more", "step"), [("--num-consumers 2", 2), ("--output-per-source --split-documents", 4)])
def test_killed_at_any_write_the_same_command_makes_the_same_bytes(
    raw: Path, tmp_path: Path, small_tokenizer: str, more: str, step: int
) -> None:
    flags = more.split() + (sources(raw) if "per-source" in more else [])
    clean = Command(raw, tmp_path / "clean", small_tokenizer, *flags)
    events = clean.start()
    expected = tree(clean.out)
    points = chosen(events, step)
    assert len({event for event in events if "rejects" in event}) > 4 and len(points) > 10
    command = Command(raw, tmp_path / "out", small_tokenizer, *flags)
    for event in points:
        command.start(event)
        again = command.start()
        assert tree(command.out) == expected, event
        done = events[: events.index(event)]
        kept = {line for line in done if line.startswith("done") and "/unit-" in line and line.endswith(".json")}
        assert len(kept & set(again)) <= 1, event  # the last stretch is done again
        shutil.rmtree(command.out)


def test_killed_again_and_again_it_gets_to_the_end(raw: Path, tmp_path: Path, small_tokenizer: str) -> None:
    clean = Command(raw, tmp_path / "clean", small_tokenizer, "--no-shuffle")
    events = clean.start()
    command = Command(raw, tmp_path / "out", small_tokenizer, "--no-shuffle")
    kills = 0
    for event in [line for line in events if line.startswith("full") and "plan.json" not in line][::4]:
        command.start(event)  # each goes on from where the one before was killed
        kills += 1
    command.start()
    assert kills > 10 and tree(command.out) == tree(clean.out)


def test_a_stream_whose_end_was_known_before_its_middle_is_completed(
    raw: Path, tmp_path: Path, small_tokenizer: str
) -> None:
    clean = Command(raw, tmp_path / "clean", small_tokenizer)
    clean.start()
    command = Command(raw, tmp_path / "out", small_tokenizer)
    command.start("open 32-v1/0/shard-0000000.tar")
    stretches = sorted(
        path for path in (tmp_path / "out" / "32-v1" / WORK).glob("unit-*.json") if not path.match("*-000000.json")
    )
    assert len(stretches) > 3 and len({path.name.rpartition("-")[0] for path in stretches}) == 1
    for path in stretches[1:3]:  # workers finish in any order: here two of them had not yet
        path.unlink()
    again = command.start()
    assert {f"done {path.relative_to(command.out)}" for path in stretches[1:3]} < set(again)
    assert tree(command.out) == tree(clean.out)


def test_killed_while_it_throws_away_other_work_it_takes_up_none_of_it(
    raw: Path, tmp_path: Path, small_tokenizer: str
) -> None:
    clean = Command(raw, tmp_path / "clean", small_tokenizer, "--seed", "4")
    clean.start()
    for event in ("open 32-v1/0/manifest.jsonl", "full 32-v1/1/dataset.json"):
        Command(raw, tmp_path / "out", small_tokenizer, "--num-consumers", "2").start(event)
        command = Command(raw, tmp_path / "out", small_tokenizer, "--seed", "4")
        command.start("gone 32-v1/.work/plan.json", "--restart")
        assert list((tmp_path / "out" / "32-v1" / WORK).glob("unit-*.json"))
        command.start()
        assert tree(command.out) == tree(clean.out)
        shutil.rmtree(command.out)


def test_killed_while_it_tidies_up_the_next_start_does_that(raw: Path, tmp_path: Path, small_tokenizer: str) -> None:
    command = Command(raw, tmp_path / "out", small_tokenizer)
    command.start("gone 32-v1/.work/plan.json")
    left = tree(command.out)
    assert any(WORK in name for name in left)
    assert not command.start()  # it writes nothing
    assert tree(command.out) == {name: data for name, data in left.items() if WORK not in name}


def test_inputs_that_grew_make_no_wrong_use_of_what_was_done(raw: Path, tmp_path: Path, small_tokenizer: str) -> None:
    command = Command(raw, tmp_path / "out", small_tokenizer)
    command.start("open 32-v1/0/shard-0000000.tar")
    more = documents(800, seed=8)  # so many that the shuffle takes more buckets
    write_jsonl(raw / "z.jsonl", more)
    command.start()
    clean = Command(raw, tmp_path / "clean", small_tokenizer)
    clean.start()
    assert tree(command.out) == tree(clean.out)
    texts = [*documents(150, seed=1), *documents(500, seed=2), "good", *more]
    texts += [text for number in range(3) for text in documents(20, seed=3 + number)]
    assert tokens_of(read_shards(command.out)) == expected_tokens(texts, small_tokenizer, EOT_ID)


def test_rejects_of_inputs_that_were_mended_are_not_kept(raw: Path, tmp_path: Path, small_tokenizer: str) -> None:
    command = Command(raw, tmp_path / "out", small_tokenizer)
    command.start("done 32-v1/rejects.jsonl")
    (raw / "b" / "bad.jsonl").write_text('{"text": "good"}\n{"text": "mended"}\n')
    command.start()
    assert (command.out / "32-v1" / "0" / "dataset.json").exists()
    assert not (command.out / "32-v1" / "rejects.jsonl").exists()
    assert read_manifest(str(command.out / "32-v1" / "0" / "manifest.jsonl"))
