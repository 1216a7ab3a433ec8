"""Tests of the preprocessor with storage faults, unreadable files and a full disk, and of real text token by token."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datapreprocess_helpers import EOT_ID, documents, expected_tokens, read_shards, tokens_of, tree, write_jsonl
from faulty_proxy import FaultyProxy, Rule

from open_lm import storage

pytestmark = pytest.mark.processes


# Runs the command without pauses between retries. The first argument limits the size of a file in bytes (0: no limit).
COMMAND = """
import resource, sys
from open_lm import errors
from open_lm.storage import retries as storage_errors
from open_lm.storage import paths as storage_files
from open_lm.datapreprocess import engine, inputs, make_2048
limit = int(sys.argv.pop(1))
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
storage_errors._pause, storage_files.BLOCK_BYTES = lambda _: None, 5_000
engine._MIN_CHUNK_BYTES = engine._MAX_CHUNK_BYTES = 60_000
inputs._MIN_UNIT_BYTES = 8_000
raise SystemExit(errors.run_cli(make_2048.main))
"""


def run(tokenizer: str, source: str, out: str, *flags: str, limit: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COMMAND, str(limit), "--input-files", source, "--output-dir", out]
    command += ["--tokenizer", tokenizer, "--seqlen", "32", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, list[str]]:
    """Write files that are split, streamed or share a unit to `raw`, and return their texts."""
    counts = {"a.jsonl": 300, "b.jsonl.zst": 60, "c.jsonl.gz": 800, "d.jsonl.zst": 30, "e.jsonl": 20}
    texts = {name: documents(count, seed=count) for name, count in counts.items()}
    for name, part in texts.items():
        write_jsonl(tmp_path / "raw" / name, part)
    return texts


def upload(folder: Path, url: str) -> None:
    for path in folder.iterdir():
        storage.upload(path, storage.join(url, path.name))


def download(url: str, folder: Path) -> dict[str, bytes]:
    """Download every object below a URL, and return their contents."""
    for item in storage.list_files(url, recursive=True):
        storage.download(item, folder / item.removeprefix(url).lstrip("/"))
    return tree(folder)


def without_dataset_json(output: dict[str, bytes]) -> dict[str, bytes]:
    """Return an output without dataset.json, which contains the URLs of the inputs."""
    return {name: data for name, data in output.items() if not name.endswith("dataset.json")}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_job_from_s3_to_s3_survives_transient_faults(
    faulty_s3: FaultyProxy, texts: dict[str, list[str]], tmp_path: Path, small_tokenizer: str, seed: int
) -> None:
    clean = run(small_tokenizer, str(tmp_path / "raw"), str(tmp_path / "clean"))
    assert not clean.returncode, clean.stderr
    base = f"s3://{faulty_s3.bucket}"
    upload(tmp_path / "raw", f"{base}/raw")
    faulty_s3._rng.seed(seed)
    faulty_s3.rules += [Rule("500", times=3), Rule("truncate", method="GET", path="raw/", times=2)]
    faulty_s3.rules += [Rule("reset_after", method="PUT", path="tar", times=2), Rule("503", path="work", times=3)]
    faulty_s3.rules += [Rule(kind, rate=0.03) for kind in ("500", "503", "reset", "reset_after", "truncate")]
    done = run(small_tokenizer, f"{base}/raw", f"{base}/out", "--work-dir", f"{base}/work")
    assert not done.returncode, done.stderr
    injected = Counter(faulty_s3.injected)
    faulty_s3.rules.clear()
    assert all(injected[kind] > 4 for kind in ("500", "503", "reset_after", "truncate")) and injected["reset"], injected
    output = download(f"{base}/out", tmp_path / "copy")
    assert without_dataset_json(output) == without_dataset_json(tree(tmp_path / "clean"))
    assert not storage.list_files(f"{base}/work", recursive=True)
    all_texts = [text for part in texts.values() for text in part]
    assert tokens_of(read_shards(tmp_path / "copy")) == expected_tokens(all_texts, small_tokenizer, EOT_ID)


def test_a_permanently_unreadable_object_is_an_error_or_skipped(
    faulty_s3: FaultyProxy, texts: dict[str, list[str]], tmp_path: Path, small_tokenizer: str
) -> None:
    base = f"s3://{faulty_s3.bucket}"
    upload(tmp_path / "raw", f"{base}/raw")
    faulty_s3.rules += [Rule("500", path=r"raw/(b|c)\.jsonl")]
    failed = run(small_tokenizer, f"{base}/raw", str(tmp_path / "out"))
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    for name in ("b.jsonl.zst", "c.jsonl.gz"):
        assert f"{base}/raw/{name}" in failed.stderr
    assert "--max-bad-fraction" in failed.stderr and not list((tmp_path / "out").rglob("*.tar"))
    done = run(small_tokenizer, f"{base}/raw", str(tmp_path / "out"), "--max-bad-fraction", "1")
    assert not done.returncode, done.stderr
    record = json.loads((tmp_path / "out" / "32-v1" / "0" / "dataset.json").read_text())
    assert len(record["broken_files"]) == 2 and f"{base}/raw/c.jsonl.gz" in "".join(record["broken_files"])
    remaining = [text for name, part in texts.items() if name[0] not in "bc" for text in part]
    assert tokens_of(read_shards(tmp_path / "out")) == expected_tokens(remaining, small_tokenizer, EOT_ID)


def test_an_object_that_becomes_readable_is_read_by_the_next_run(
    faulty_s3: FaultyProxy, texts: dict[str, list[str]], tmp_path: Path, small_tokenizer: str
) -> None:
    base = f"s3://{faulty_s3.bucket}"
    upload(tmp_path / "raw", f"{base}/raw")
    faulty_s3.rules += [Rule("500", path=r"raw/b\.jsonl"), Rule("500", method="GET", path=r"raw/c\.jsonl", skip=3)]
    failed = run(small_tokenizer, f"{base}/raw", str(tmp_path / "out"))
    assert failed.returncode == 2 and f"{base}/raw/c.jsonl.gz" in failed.stderr
    assert len(list((tmp_path / "out").rglob("unit-*.json"))) > 5
    faulty_s3.rules.clear()
    done = run(small_tokenizer, f"{base}/raw", str(tmp_path / "out"))
    assert not done.returncode and "already done" in done.stderr, done.stderr
    all_texts = [text for part in texts.values() for text in part]
    assert tokens_of(read_shards(tmp_path / "out")) == expected_tokens(all_texts, small_tokenizer, EOT_ID)
    clean = run(small_tokenizer, f"{base}/raw", str(tmp_path / "clean"))
    assert not clean.returncode and tree(tmp_path / "out") == tree(tmp_path / "clean")


@pytest.mark.parametrize(("limit", "file", "kept"), [(400_000, "shard-", True), (7_000, ".run", False)])
def test_a_full_disk_is_an_error_and_the_next_run_resumes(  # noqa: PLR0917 - fixtures and parameters
    texts: dict[str, list[str]], tmp_path: Path, small_tokenizer: str, limit: int, file: str, kept: bool
) -> None:
    raw, out = str(tmp_path / "raw"), tmp_path / "out"
    failed = run(small_tokenizer, raw, str(out), "--shard-size", "2000", limit=limit)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr, failed.stderr
    assert (
        "File too large while writing in" in failed.stderr
        and file in failed.stderr
        and "free disk space" in failed.stderr
    )
    assert (not list(out.rglob("*.tar")) and list(out.rglob("unit-*.json"))) or not kept
    done = run(small_tokenizer, raw, str(out), "--shard-size", "2000")
    assert not done.returncode and ("already done" in done.stderr or not kept), done.stderr
    clean = run(small_tokenizer, raw, str(tmp_path / "clean"), "--shard-size", "2000")
    assert not clean.returncode and tree(out) == tree(tmp_path / "clean")


def test_real_text_token_by_token(shared_dir: Path, tmp_path: Path) -> None:
    import zstandard
    from tokenizers import Tokenizer

    tokenizer = str(shared_dir / "data" / "tokenizers" / "gpt-neox-20b.json")
    source = shared_dir / "data" / "raw" / "books-00.jsonl.zst"
    done = run(tokenizer, str(source), str(tmp_path / "out"))
    assert not done.returncode, done.stderr
    lines = zstandard.ZstdDecompressor().stream_reader(source.read_bytes()).read().splitlines()
    encoded = Tokenizer.from_file(tokenizer).encode_batch_fast([json.loads(line)["text"] for line in lines])
    expected = np.bincount([value for one in encoded for value in [*one.ids, 0]])
    tokens = [value for _, _, ids in read_shards(tmp_path / "out") for value in ids if value != -1]
    assert expected.sum() > 400_000 and np.array_equal(np.bincount(tokens), expected)
