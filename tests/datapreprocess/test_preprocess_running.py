"""Ways to run the preprocessor, in this process: dry, within a memory limit, again, among its inputs, in a bucket."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from datapreprocess_helpers import (
    alone,
    expected_tokens,
    make,
    raw,
    read_shards,
    record_of,
    rejects_of,
    small_tokenizer,
    spoil,
    tokens_of,
    tree,
)

from open_lm import storage
from open_lm.datapreprocess import engine
from open_lm.datapreprocess.ray import tokenize_shuffle
from open_lm.datapreprocess.readers import Block, BrokenFile, PieceReader
from open_lm.datapreprocess.tasks import Call, Queue, Threads, raise_if_abandoned
from open_lm.errors import ConfigError

__all__ = ["alone", "raw", "small_tokenizer"]
pytestmark = pytest.mark.usefixtures("alone")
EOT_ID, LENGTH = 3, 33


def test_a_dry_run_writes_nothing(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    work = ["--work-dir", str(tmp_path / "work"), "--dry-run"]
    make(raw[0], tmp_path / "out", small_tokenizer, *work)
    told = capsys.readouterr().out
    total = sum(expected_tokens(raw[1], small_tokenizer, EOT_ID).values())
    for part in (f"{total:,} ±", f"{len(raw[1]):,} ±", f"{-(-total // LENGTH):,} sequences"):
        assert part in told
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ConfigError, match="--dry-run and --verify-tokenizer"):
        make(raw[0], tmp_path / "out", small_tokenizer, "--dry-run", "--verify-tokenizer", "3")


def test_memory_limits(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for limit, told in (("4 elephants", "expected a size such as 4GB"), ("100MB", "too small: one worker needs")):
        with pytest.raises(ConfigError, match=f"--memory-limit.*{told}"):
            make(raw[0], tmp_path / "out", small_tokenizer, "--memory-limit", limit)
    assert not (tmp_path / "out").exists()
    enter = engine.Cluster.__enter__

    def four(self: engine.Cluster) -> engine.Cluster:
        found = enter(self)
        found.workers = found.workers_per_node = 4
        return found

    monkeypatch.setattr(engine.Cluster, "__enter__", four)
    caplog.set_level("INFO")
    place = make(raw[0], tmp_path / "out", small_tokenizer, "--memory-limit", "1.5GiB") / "0"
    assert re.search("2 of 4 workers .*fit into --memory-limit", caplog.text)
    assert tokens_of(read_shards(place)) == expected_tokens(raw[1], small_tokenizer, EOT_ID)
    plain = make(raw[0], tmp_path / "plain", small_tokenizer)
    assert tree(plain) == tree(place.parent)


def test_restart_throws_unfinished_work_away(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_shards", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            make(raw[0], tmp_path / "out", small_tokenizer)
    assert list((tmp_path / "out").rglob("unit-*.json"))
    with pytest.raises(ConfigError, match=r"drop_tail was False, is True.*--restart"):
        make(raw[0], tmp_path / "out", small_tokenizer, "--drop-tail")
    place = make(raw[0], tmp_path / "out", small_tokenizer, "--drop-tail", "--restart") / "0"
    assert record_of(place)["tail"]["fate"] == "dropped"
    with pytest.raises(ConfigError, match="finished data set made otherwise"):
        make(raw[0], tmp_path / "out", small_tokenizer, "--restart")


def test_an_output_may_lie_among_its_inputs(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder, texts = raw
    caplog.set_level("INFO")
    for number, more in enumerate(
        ([], ["--num-consumers", "2"], ["--source", f"a={folder}/a*", "--output-per-source"])
    ):
        out = folder / f"out{number}"
        with monkeypatch.context() as patch:
            patch.setattr(engine, "write_manifests", lambda *_: (_ for _ in ()).throw(OSError("killed")))
            with pytest.raises(OSError, match="killed"):
                make(folder, out, small_tokenizer, *more)
        place = make(folder, out, small_tokenizer, *more)
        assert "going on with unfinished work" in caplog.text and "not those of the unfinished" not in caplog.text
        assert tokens_of(read_shards(place)) == expected_tokens(texts, small_tokenizer, EOT_ID)
        make(folder, out, small_tokenizer, *more)
        assert "already done" in caplog.text
        caplog.clear()
        shutil.rmtree(out)
    monkeypatch.chdir(folder)
    for _ in range(2):
        tokenize_shuffle.main(["--input", ".", "--output", ".", "--tokenizer", small_tokenizer, "--seqlen", "32"])
    assert "already done" in caplog.text


def test_from_a_bucket_into_a_bucket(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, texts = raw
    spoil(folder / "more", 1, 1)
    for path in sorted(folder.rglob("*.*")):
        storage.upload(path, f"s3://{s3_bucket}/raw/{path.relative_to(folder)}")
    monkeypatch.setenv("S3_BASE", f"{s3_bucket}/made/")
    for _ in range(2):
        more = ["--upload-to-s3", "--max-bad-fraction", "0.01"]
        make([f"s3://{s3_bucket}/raw/"], tmp_path / "work", small_tokenizer, *more)
    place = f"s3://{s3_bucket}/made/32-v1"
    for url in storage.list_files(place, recursive=True):
        storage.download(url, tmp_path / "copy" / url.removeprefix(f"{place}/"))
    names = {path.name for path in (tmp_path / "copy").rglob("*.json*")}
    assert names == {"manifest.jsonl", "dataset.json", "rejects.jsonl"}
    expected = expected_tokens([*texts, "the 0"], small_tokenizer, EOT_ID)
    assert tokens_of(read_shards(tmp_path / "copy")) == expected
    assert rejects_of(tmp_path / "copy") == [("a.jsonl", 1, "invalid JSON")]
    assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    monkeypatch.setenv("S3_BASE", "")
    with pytest.raises(ConfigError, match="--upload-to-s3 needs the environment variable S3_BASE"):
        make(folder, tmp_path / "work", small_tokenizer, "--upload-to-s3")


def test_a_finished_data_set_that_was_damaged_since_is_no_finished_one(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str
) -> None:
    make(raw[0], tmp_path / "out", small_tokenizer)
    place = tmp_path / "out" / "32-v1" / "0"
    shards = sorted(place.glob("*.tar"))
    shards[0].unlink()
    with pytest.raises(ConfigError, match=rf"of {len(shards)} shards, of which only {len(shards) - 1} are there"):
        make(raw[0], tmp_path / "out", small_tokenizer)
    (place / "dataset.json").write_text('{"settings":')
    with pytest.raises(ConfigError, match=r"dataset\.json: damaged"):
        make(raw[0], tmp_path / "out", small_tokenizer)


def test_shards_of_units_that_came_to_something_else_are_written_again(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    out, name = tmp_path / "out", sorted(path.name for path in raw[0].iterdir())[0]
    fetch = PieceReader.__iter__

    def broken(self: PieceReader) -> Iterator[Block]:
        if self.piece.url.endswith(name):
            raise BrokenFile("unreadable", f"{name}: the store does not answer")
        return fetch(self)

    def stopped(*_: object) -> None:
        raise RuntimeError("stopped after all shards")

    with monkeypatch.context() as patch:
        patch.setattr(PieceReader, "__iter__", broken)
        patch.setattr(engine, "write_manifests", stopped)
        with pytest.raises(RuntimeError, match="stopped"):
            make(raw[0], out, small_tokenizer, "--max-bad-fraction", "1")
    assert list(out.rglob("*.tar"))
    make(raw[0], out, small_tokenizer, "--max-bad-fraction", "1")
    assert "its shards are written again" in caplog.text
    assert tokens_of(read_shards(out)) == expected_tokens(raw[1], small_tokenizer, EOT_ID)


def test_threads_that_nobody_waits_for_end() -> None:
    begun, threads = threading.Event(), Threads[None](1)

    def endless() -> None:
        while True:
            begun.set()
            raise_if_abandoned()

    threads.fill(Queue([Call(endless, ())]))
    assert begun.wait(10)
    threads.close()  # waits for the thread
    raise_if_abandoned()  # elsewhere nothing ends
