"""Indexes of raw text that are interrupted, shared by several runs, or whose files differ from what they describe."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
from datapreprocess_helpers import documents, write_jsonl
from raw_text_worker import prepare, read
from tokenizer_helpers import write_tokenizer

from open_lm.config.command_line import parse_args
from open_lm.config.no_effect import flags_without_effect
from open_lm.config.sections import Config, DataConfig
from open_lm.data import text_index
from open_lm.data.cache import Cache
from open_lm.data.fetch import FetchSettings
from open_lm.data.remote_shards import RemoteShards
from open_lm.data.sources import find_sources
from open_lm.data.text_folder import TextFolder
from open_lm.data.text_units import TextUnit, shard_bytes
from open_lm.data.tokenizers import load_tokenizer
from open_lm.data.verify import expected_files
from open_lm.errors import ConfigError, DataError
from open_lm.training import raw_text

pytestmark = pytest.mark.processes  # the units of an index are tokenized in processes


class Killed(BaseException):
    """In place of a signal that cannot be handled."""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Write a text of several units and two tokenizers, and return its path."""
    write_tokenizer(tmp_path / "a.json")
    write_tokenizer(tmp_path / "b.json", reverse=True)
    return write_jsonl(tmp_path / "a.jsonl", documents(80, seed=1))


def flags_of(text: Path, tokenizer: str = "a.json") -> list[str]:
    flags = ["--tokenizer", str(text.parent / tokenizer), "--text-index", str(text.parent / "index")]
    return ["--train-text", str(text), *flags, "--workers", "0"]


def index_of(text: Path) -> TextFolder:
    return text_index.text_folder(str(text.parent / "index"), str(text))


def opened(data: DataConfig, folder: Path) -> tuple[RemoteShards, dict[str, Any]]:
    """Return what opens the units of a text, and the expected size and checksum of each."""
    folder.mkdir()
    expected = {url: value for url, value in expected_files(find_sources(data)).items() if url.startswith("text:")}
    return RemoteShards(FetchSettings.from_config(data, str(folder))), expected


def test_an_index_that_is_killed_while_it_is_replaced_keeps_its_tokenizer(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(flags_of(text), str(tmp_path), 4, 3)
    write = text_index.write_copy

    def killed(folder: str, files: Any) -> None:
        write(folder, files)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(text_index, "write_copy", killed)
        prepare([*flags_of(text, "b.json"), "--allow-changed-data"], str(tmp_path))
    assert read(flags_of(text), str(tmp_path), 4, 3) == before
    copy = index_of(text).url("tokenizer")
    assert load_tokenizer(copy).fingerprint == load_tokenizer(str(tmp_path / "a.json")).fingerprint
    write_tokenizer(Path(copy) / "tokenizer.json", reverse=True)
    with pytest.raises(DataError, match="tokenizer: found another tokenizer, expected the one that the text index"):
        read([*flags_of(text), "--cache-dir", str(tmp_path / "empty")], str(tmp_path), 4, 1)


def test_an_index_that_another_run_finishes_meanwhile_is_not_replaced(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = raw_text._locked

    @contextlib.contextmanager
    def late(folder: TextFolder) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(raw_text, "_locked", locked)
            prepare(flags_of(text), str(tmp_path / "first"))
        with locked(folder):
            yield

    monkeypatch.setattr(raw_text, "_locked", late)
    with pytest.raises(DataError, match="split_documents was False, now it is True"):
        prepare([*flags_of(text), "--text-split-documents"], str(tmp_path / "second"))
    assert index_of(text).is_finished


def test_the_reports_of_all_nodes_are_saved(text: Path, tmp_path: Path) -> None:
    prepare(flags_of(text), str(tmp_path))
    folder = index_of(text)
    state = folder.state()
    assert state is not None
    reports = list(text_index._load_reports(folder))
    assert len(reports) > 2
    for name in ("units.jsonl", "dataset.json"):
        Path(folder.url(name)).unlink()
    progress = raw_text._Progress(text_index.plan_index(folder, state))
    Path(folder.url("progress.jsonl")).write_bytes(b'{"key": "cut')  # by a process that was killed
    progress.add([(reports[:1], 0, False), (reports[1:2], 0, False)], 1.0)
    assert list(text_index._load_reports(folder)) == reports[:2]


def test_a_cache_smaller_than_the_text_keeps_a_part_of_it(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepare(flags_of(text), str(tmp_path))
    made, write = list[str](), TextFolder.write_unit

    def spy(folder: TextFolder, unit: TextUnit, *arguments: Any) -> str:
        made.append(unit.key)
        return write(folder, unit, *arguments)

    monkeypatch.setattr(TextFolder, "write_unit", spy)
    source = next(iter(find_sources(data)))
    sizes = [size or 0 for url, size in zip(source.shards, source.num_bytes, strict=True) if url.startswith("text:")]
    limit = sum(-(-size // 4096) * 4096 for size in sizes) - max(sizes)
    small = replace(data, cache_dir=str(tmp_path / "small"), cache_limit=str(limit))
    shards, expected = opened(small, tmp_path / "fetch")
    counts = []
    for _ in range(3):
        made.clear()
        for url, value in expected.items():
            shards.open(url, value).close()
        counts.append(len(made))
    assert counts[0] == len(expected) > 4
    assert max(counts[1:]) < len(expected) - 1, "removing the units that are read next makes all of them in each pass"


def test_the_log_says_how_much_of_the_text_is_cached(
    text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    other = tmp_path / "cache" / f"{'0' * 32}-{'0' * 64}.tar"
    other.parent.mkdir()
    with other.open("wb") as file:
        file.truncate(104_990_000)
    prepare([*flags_of(text), "--cache-dir", str(other.parent), "--cache-limit", "105MB"], str(tmp_path))
    count = len(index_of(text).units)
    assert f"leave no space for {count} of its units, which each pass tokenizes again" in caplog.text
    caplog.clear()
    write_jsonl(text, documents(40, seed=2))
    prepare([*flags_of(text), "--allow-changed-data"], str(tmp_path))
    assert "is in the cache, so training does not tokenize it again" in caplog.text


def test_a_cached_unit_with_another_checksum_is_made_again(text: Path, tmp_path: Path) -> None:
    data = prepare(flags_of(text), str(tmp_path))
    shards, expected = opened(data, tmp_path / "fetch")
    url, value = next(iter(expected.items()))
    cache = Cache(str(data.cache_dir), None, 10)
    unit = next(iter(index_of(text).units.values()))

    def of_another_version(file: IO[bytes], _grow: Callable[[int], None]) -> str:
        content = b"".join(shard_bytes([]))
        file.write(content)
        file.flush()
        return hashlib.sha256(content).hexdigest()

    entry = cache.get(unit.identity, -1, of_another_version)
    assert entry.is_new, "a cache without a limit removes the unit that the index has made"
    entry.file.close()
    with shards.open(url, value) as file:
        file.seek(0)
        assert hashlib.sha256(file.read()).hexdigest() == value.sha256


def test_flags_and_tokenizers_without_use(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--text-add-bos: --tokenizer .*a\.json has no begin-of-text token"):
        prepare([*flags_of(text), "--text-add-bos"], str(tmp_path))
    args = parse_args([*flags_of(text), "--data-key", "json.gz", "--multiple-data-passes"])
    sentences = flags_without_effect(Config.from_namespace(args))
    assert [sentence.partition(" ")[0] for sentence in sentences] == ["--multiple-data-passes", "--data-key"]
