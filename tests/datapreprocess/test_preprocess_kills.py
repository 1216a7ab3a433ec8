"""Kill the preprocessor (SIGKILL) at every kind of write, and resume it with the same command."""

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
from datapreprocess_helpers import EOT_ID, documents, expected_tokens, read_shards, tokens_of, tree, write_jsonl

from open_lm import storage
from open_lm.data.shard_format import read_manifest
from open_lm.datapreprocess import engine, inputs
from open_lm.datapreprocess.make_2048 import main
from open_lm.datapreprocess.tokenization import DocumentEncoder
from open_lm.storage import files

pytestmark = pytest.mark.processes

NEVER = ""
WORK = ".work"

# Each run is a separate process, forked from a server that has imported all modules but has started no threads.
_processes = multiprocessing.get_context("forkserver")


class WatchedFile:
    """A file that calls `on_event("half")` after half of the data of the first write."""

    def __init__(self, file: IO[Any], on_event: Any) -> None:
        self._file, self._on_event, self._first = file, on_event, True

    def write(self, data: Any) -> None:
        half = len(data) // 2
        self._file.write(data[:half])
        if self._first:
            self._first = False
            self._file.flush()
            self._on_event("half")
        self._file.write(data[half:])


def start(arguments: Sequence[str], event: str, log: str) -> None:
    """Run the command in this process, and kill the process at `event`. All events are written to the file `log`.

    An event is a state and the name of a file. The states are "open" (created), "half" (half written), "full" (written
    but not renamed yet), "done" (renamed) and, for the plan, "gone" (removed).
    """
    engine._MIN_CHUNK_BYTES = engine._MAX_CHUNK_BYTES = 20_000
    inputs._MIN_UNIT_BYTES = 4_000  # many units, streamed ones among them
    engine._MIN_BUCKETS, engine._BUCKET_BYTES = 4, 1 << 14
    DocumentEncoder.self_check = lambda _: None  # type: ignore[assignment,method-assign]  # slower than the job
    os.fsync = lambda _: None  # type: ignore[assignment]  # SIGKILL loses no written data
    original, remove_tree = storage.atomic_write, shutil.rmtree
    out = arguments[arguments.index("--output-dir") + 1]

    def on_event(state: str, url: str) -> None:
        current = f"{state} {os.path.relpath(url, out)}"
        with open(log, "a") as file:
            print(current, file=file)
        if current == event:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def watched_write(url: str, mode: str = "wb") -> Iterator[Any]:
        with original(url, mode) as file:
            on_event("open", url)
            yield WatchedFile(file, lambda state: on_event(state, url))
            on_event("full", url)
        on_event("done", url)

    def watched_rmtree(folder: str, **options: Any) -> None:
        if os.path.basename(folder) == WORK and os.path.exists(os.path.join(folder, "plan.json")):
            os.unlink(os.path.join(folder, "plan.json"))
            on_event("gone", os.path.join(folder, "plan.json"))
        remove_tree(folder, **options)

    storage.atomic_write = files.atomic_write = watched_write  # type: ignore[assignment]
    shutil.rmtree = watched_rmtree  # type: ignore[assignment]
    main(arguments)


class Command:
    """Runs the command on the inputs `raw` with the output folder `out`."""

    def __init__(self, raw: Path, out: Path, tokenizer: str, *flags: str) -> None:
        self.out, self.log = out, out.with_name(f"{out.name}.log")
        self.arguments = ["--input-files", str(raw), "--output-dir", str(out), "--tokenizer", tokenizer]
        self.arguments += ["--seqlen", "32", "--num-workers", "1", "--skip-bad-lines", *flags]

    def start(self, event: str = NEVER, *flags: str) -> list[str]:
        """Run the command until it ends or is killed at the event, and return all its events."""
        self.log.write_text("")
        process = _processes.Process(target=start, args=([*self.arguments, *flags], event, str(self.log)))
        process.start()
        process.join()
        assert process.exitcode == (0 if event == NEVER else -signal.SIGKILL), event
        return self.log.read_text().splitlines()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Write files that are split, streamed or share a unit, and one with a bad line."""
    folder = tmp_path / "raw"
    write_jsonl(folder / "a" / "split.jsonl", documents(150, seed=1))
    write_jsonl(folder / "a" / "streamed.jsonl.gz", documents(500, seed=2))
    for number in range(3):
        write_jsonl(folder / "b" / f"small{number}.jsonl.zst", documents(20, seed=3 + number))
    (folder / "b" / "bad.jsonl").write_text('{"text": "good"}\n{"text": bad}\n')
    return folder


def sources(raw: Path) -> list[str]:
    return ["--source", f"a={raw / 'a'}", "--source", f"b={raw / 'b'}"]


def select_events(events: Sequence[str], step: int) -> list[str]:
    """Return one event for each state of each kind of file, and of these every `step`th."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for event in events:
        state, _, name = event.partition(" ")
        kind = "-".join([os.path.dirname(name), *os.path.basename(name).split("-")[:1], os.path.splitext(name)[1]])
        kinds.setdefault((state, kind), []).append(event)
    return [group[number * len(group) // len(kinds)] for number, group in enumerate(kinds.values())][::step]


@pytest.mark.parametrize(("options", "step"), [("--num-consumers 2", 2), ("--output-per-source --split-documents", 4)])
def test_a_run_killed_at_any_write_is_completed_to_the_same_output(
    raw: Path, tmp_path: Path, small_tokenizer: str, options: str, step: int
) -> None:
    flags = options.split() + (sources(raw) if "per-source" in options else [])
    clean = Command(raw, tmp_path / "clean", small_tokenizer, *flags)
    events = clean.start()
    expected = tree(clean.out)
    kill_events = select_events(events, step)
    assert len({event for event in events if "rejects" in event}) > 4 and len(kill_events) > 10
    command = Command(raw, tmp_path / "out", small_tokenizer, *flags)
    for event in kill_events:
        command.start(event)
        resumed = command.start()
        assert tree(command.out) == expected, event
        before = events[: events.index(event)]
        reports = {line for line in before if line.startswith("done") and "/unit-" in line and line.endswith(".json")}
        assert len(reports & set(resumed)) <= 1, event  # only the last chunk is repeated
        shutil.rmtree(command.out)


def test_a_run_killed_many_times_completes(raw: Path, tmp_path: Path, small_tokenizer: str) -> None:
    clean = Command(raw, tmp_path / "clean", small_tokenizer, "--no-shuffle")
    events = clean.start()
    command = Command(raw, tmp_path / "out", small_tokenizer, "--no-shuffle")
    kills = 0
    for event in [line for line in events if line.startswith("full") and "plan.json" not in line][::4]:
        command.start(event)  # each run resumes the previous one
        kills += 1
    command.start()
    assert kills > 10 and tree(command.out) == tree(clean.out)


def test_missing_chunks_before_the_last_report_of_a_stream_are_processed(
    raw: Path, tmp_path: Path, small_tokenizer: str
) -> None:
    clean = Command(raw, tmp_path / "clean", small_tokenizer)
    clean.start()
    command = Command(raw, tmp_path / "out", small_tokenizer)
    command.start("open 32-v1/0/shard-0000000.tar")
    chunk_reports = sorted(
        path for path in (tmp_path / "out" / "32-v1" / WORK).glob("unit-*.json") if not path.match("*-000000.json")
    )
    assert len(chunk_reports) > 3 and len({path.name.rpartition("-")[0] for path in chunk_reports}) == 1
    for path in chunk_reports[1:3]:  # workers finish in any order, so reports of earlier chunks may be missing
        path.unlink()
    resumed = command.start()
    assert {f"done {path.relative_to(command.out)}" for path in chunk_reports[1:3]} < set(resumed)
    assert tree(command.out) == tree(clean.out)


def test_work_is_not_reused_if_the_run_was_killed_while_discarding_it(
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


def test_the_next_run_completes_an_interrupted_cleanup(raw: Path, tmp_path: Path, small_tokenizer: str) -> None:
    command = Command(raw, tmp_path / "out", small_tokenizer)
    command.start("gone 32-v1/.work/plan.json")
    before = tree(command.out)
    assert any(WORK in name for name in before)
    assert not command.start()  # writes no files
    assert tree(command.out) == {name: data for name, data in before.items() if WORK not in name}


def test_earlier_work_is_used_correctly_if_inputs_have_grown(raw: Path, tmp_path: Path, small_tokenizer: str) -> None:
    command = Command(raw, tmp_path / "out", small_tokenizer)
    command.start("open 32-v1/0/shard-0000000.tar")
    added = documents(800, seed=8)  # enough to increase the number of buckets
    write_jsonl(raw / "z.jsonl", added)
    command.start()
    clean = Command(raw, tmp_path / "clean", small_tokenizer)
    clean.start()
    assert tree(command.out) == tree(clean.out)
    texts = [*documents(150, seed=1), *documents(500, seed=2), "good", *added]
    texts += [text for number in range(3) for text in documents(20, seed=3 + number)]
    assert tokens_of(read_shards(command.out)) == expected_tokens(texts, small_tokenizer, EOT_ID)


def test_rejects_of_fixed_inputs_are_removed(raw: Path, tmp_path: Path, small_tokenizer: str) -> None:
    command = Command(raw, tmp_path / "out", small_tokenizer)
    command.start("done 32-v1/rejects.jsonl")
    (raw / "b" / "bad.jsonl").write_text('{"text": "good"}\n{"text": "fixed"}\n')
    command.start()
    assert (command.out / "32-v1" / "0" / "dataset.json").exists()
    assert not (command.out / "32-v1" / "rejects.jsonl").exists()
    assert read_manifest(str(command.out / "32-v1" / "0" / "manifest.jsonl"))
