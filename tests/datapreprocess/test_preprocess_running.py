"""Tests of preprocessing runs in this process: dry runs, memory limits, restarts, nested outputs, S3."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from datapreprocess_helpers import (
    EOT_ID,
    expected_tokens,
    make,
    read_shards,
    record_of,
    rejects_of,
    tokens_of,
    tree,
    write_bad_jsonl,
)

from open_lm import storage
from open_lm.datapreprocess import engine
from open_lm.datapreprocess.ray import tokenize_shuffle
from open_lm.datapreprocess.readers import Block, BrokenFile, PieceReader
from open_lm.datapreprocess.readers.base import UNREADABLE
from open_lm.datapreprocess.tasks import Call, Queue, Threads, raise_if_abandoned
from open_lm.errors import ConfigError

pytestmark = pytest.mark.usefixtures("in_process")
LENGTH = 33


def test_a_dry_run_writes_nothing(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    work = ["--work-dir", str(tmp_path / "work"), "--dry-run"]
    make(raw[0], tmp_path / "out", small_tokenizer, *work)
    message = capsys.readouterr().out
    total = sum(expected_tokens(raw[1], small_tokenizer, EOT_ID).values())
    for part in (f"{total:,} ±", f"{len(raw[1]):,} ±", f"{-(-total // LENGTH):,} sequences"):
        assert part in message
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ConfigError, match="--dry-run and --verify-tokenizer"):
        make(raw[0], tmp_path / "out", small_tokenizer, "--dry-run", "--verify-tokenizer", "3")


def test_memory_limits(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for limit, message in (("4 elephants", "expected a size such as 4GB"), ("100MB", "too small: one worker needs")):
        with pytest.raises(ConfigError, match=f"--memory-limit.*{message}"):
            make(raw[0], tmp_path / "out", small_tokenizer, "--memory-limit", limit)
    assert not (tmp_path / "out").exists()
    enter = engine.Cluster.__enter__

    def enter_with_four_workers(self: engine.Cluster) -> engine.Cluster:
        cluster = enter(self)
        cluster.workers = cluster.workers_per_node = 4
        return cluster

    monkeypatch.setattr(engine.Cluster, "__enter__", enter_with_four_workers)
    caplog.set_level("INFO")
    output = make(raw[0], tmp_path / "out", small_tokenizer, "--memory-limit", "1.5GiB") / "0"
    assert re.search("--memory-limit allows 2 of 4 workers", caplog.text)
    assert tokens_of(read_shards(output)) == expected_tokens(raw[1], small_tokenizer, EOT_ID)
    plain = make(raw[0], tmp_path / "plain", small_tokenizer)
    assert tree(plain) == tree(output.parent)


def test_restart_discards_unfinished_work(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_shards", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            make(raw[0], tmp_path / "out", small_tokenizer)
    assert list((tmp_path / "out").rglob("unit-*.json"))
    with pytest.raises(ConfigError, match=r"drop_tail was False, is now True.*--restart"):
        make(raw[0], tmp_path / "out", small_tokenizer, "--drop-tail")
    output = make(raw[0], tmp_path / "out", small_tokenizer, "--drop-tail", "--restart") / "0"
    assert record_of(output)["tail"]["fate"] == "dropped"
    with pytest.raises(ConfigError, match="finished data set with other settings or inputs"):
        make(raw[0], tmp_path / "out", small_tokenizer, "--restart")


def test_output_inside_the_input_folder(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder, texts = raw
    caplog.set_level("INFO")
    for number, flags in enumerate(
        ([], ["--num-consumers", "2"], ["--source", f"a={folder}/a*", "--output-per-source"])
    ):
        out = folder / f"out{number}"
        with monkeypatch.context() as patch:
            patch.setattr(engine, "write_manifests", lambda *_: (_ for _ in ()).throw(OSError("killed")))
            with pytest.raises(OSError, match="killed"):
                make(folder, out, small_tokenizer, *flags)
        output = make(folder, out, small_tokenizer, *flags)
        assert "resuming unfinished work" in caplog.text and "the inputs have changed" not in caplog.text
        assert tokens_of(read_shards(output)) == expected_tokens(texts, small_tokenizer, EOT_ID)
        make(folder, out, small_tokenizer, *flags)
        assert "already done" in caplog.text
        caplog.clear()
        shutil.rmtree(out)
    monkeypatch.chdir(folder)
    for _ in range(2):
        tokenize_shuffle.main(["--input", ".", "--output", ".", "--tokenizer", small_tokenizer, "--seqlen", "32"])
    assert "already done" in caplog.text


def test_input_and_output_on_s3(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, texts = raw
    write_bad_jsonl(folder / "more", 1, 1)
    for path in sorted(folder.rglob("*.*")):
        storage.upload(path, f"s3://{s3_bucket}/raw/{path.relative_to(folder)}")
    monkeypatch.setenv("S3_BASE", f"{s3_bucket}/made/")
    for _ in range(2):
        flags = ["--upload-to-s3", "--max-bad-fraction", "0.01"]
        make([f"s3://{s3_bucket}/raw/"], tmp_path / "work", small_tokenizer, *flags)
    output = f"s3://{s3_bucket}/made/32-v1"
    for url in storage.list_files(output, recursive=True):
        storage.download(url, tmp_path / "copy" / url.removeprefix(f"{output}/"))
    names = {path.name for path in (tmp_path / "copy").rglob("*.json*")}
    assert names == {"manifest.jsonl", "dataset.json", "rejects.jsonl", "tokenizer.json", "tokenizer_config.json"}
    expected = expected_tokens([*texts, "the 0"], small_tokenizer, EOT_ID)
    assert tokens_of(read_shards(tmp_path / "copy")) == expected
    assert rejects_of(tmp_path / "copy") == [("a.jsonl", 1, "invalid JSON")]
    assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    monkeypatch.setenv("S3_BASE", "")
    with pytest.raises(ConfigError, match="--upload-to-s3: the environment variable S3_BASE"):
        make(folder, tmp_path / "work", small_tokenizer, "--upload-to-s3")


def test_a_damaged_finished_data_set_is_an_error(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str
) -> None:
    make(raw[0], tmp_path / "out", small_tokenizer)
    output = tmp_path / "out" / "32-v1" / "0"
    shards = sorted(output.glob("*.tar"))
    shards[0].unlink()
    with pytest.raises(ConfigError, match=rf"of {len(shards)} shards, but only {len(shards) - 1} of them exist"):
        make(raw[0], tmp_path / "out", small_tokenizer)
    (output / "dataset.json").write_text('{"settings":')
    with pytest.raises(ConfigError, match=r"dataset\.json: damaged"):
        make(raw[0], tmp_path / "out", small_tokenizer)


def test_shards_are_rewritten_if_the_units_have_other_results(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    out, name = tmp_path / "out", sorted(path.name for path in raw[0].iterdir())[0]
    read = PieceReader.__iter__

    def read_or_fail(self: PieceReader) -> Iterator[Block]:
        if self.piece.url.endswith(name):
            raise BrokenFile(UNREADABLE, f"{name}: the store does not answer")
        return read(self)

    def stop(*_: object) -> None:
        raise RuntimeError("stopped after all shards")

    with monkeypatch.context() as patch:
        patch.setattr(PieceReader, "__iter__", read_or_fail)
        patch.setattr(engine, "write_manifests", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            make(raw[0], out, small_tokenizer, "--max-bad-fraction", "1")
    assert list(out.rglob("*.tar"))
    make(raw[0], out, small_tokenizer, "--max-bad-fraction", "1")
    assert "writing all shards again" in caplog.text
    assert tokens_of(read_shards(out)) == expected_tokens(raw[1], small_tokenizer, EOT_ID)


def test_closing_the_executor_ends_running_threads() -> None:
    started, threads = threading.Event(), Threads[None](1)

    def endless() -> None:
        while True:
            started.set()
            raise_if_abandoned()

    threads.fill(Queue([Call(endless, ())]))
    assert started.wait(10)
    threads.close()  # waits for the thread
    raise_if_abandoned()  # does not raise in this thread
