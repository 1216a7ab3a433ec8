"""Registry of input formats: a new format needs one new file, and suffix lists follow from the registry."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import zstandard
from datapreprocess_helpers import EOT_ID, documents, expected_tokens, read_shards, record_of, tokens_of

from open_lm.datapreprocess.readers import Format, describe_suffixes, formats, register_format, separator_suffixes
from open_lm.datapreprocess.readers.json_lines import line_separator, read_lines
from open_lm.datapreprocess.readers.texts import parse_texts

ROOT = Path(__file__).resolve().parents[2]
INTERNALS = ROOT / "docs" / "internals" / "preprocessing.md"


def documented_reader() -> str:
    """Return the example of a reader for `.pipe` files from the documentation."""
    section = INTERNALS.read_text(encoding="utf-8").partition("## Add an input format")[2]
    lines = section.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("    from "))
    end = next(number for number, line in enumerate(lines) if line.startswith("    register_format("))
    return textwrap.dedent("\n".join(lines[start : end + 1])) + "\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository whose `datapreprocess` is a copy with one added file; the rest of open_lm is linked."""
    folder = tmp_path / "repository"
    shutil.copytree(ROOT / "datapreprocess", folder / "datapreprocess", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "open_lm").mkdir()
    for path in (ROOT / "open_lm").iterdir():
        if path.name not in ("datapreprocess", "__pycache__"):
            (folder / "open_lm" / path.name).symlink_to(path.resolve())
    (folder / "open_lm" / "datapreprocess").symlink_to("../datapreprocess")
    (folder / "datapreprocess" / "readers" / "pipes.py").write_text(documented_reader())
    return folder


def run_command(repository: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "datapreprocess" / script), *arguments]
    env = {**os.environ, "COLUMNS": "10000"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=repository.parent, env=env, timeout=300
    )


def pipe_lines(texts: list[str]) -> bytes:
    return "".join(f"name {number}|{text}\n" for number, text in enumerate(texts)).encode()


@pytest.mark.processes
def test_a_new_format_needs_only_one_new_file(tmp_path: Path, repository: Path, small_tokenizer: str) -> None:
    texts = documents(300)
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.pipe").write_bytes(pipe_lines(texts[:100]))
    (raw / "b.pipe.zst").write_bytes(zstandard.compress(pipe_lines(texts[100:])))
    (raw / "notes.csv").write_text("not an input")
    usual = ["--output-dir", str(tmp_path / "out"), "--tokenizer", small_tokenizer, "--seqlen", "32"]
    result = run_command(repository, "make_2048.py", "--input-files", str(raw), *usual)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "out" / "32-v1" / "0"
    assert tokens_of(read_shards(folder)) == expected_tokens(texts, small_tokenizer, EOT_ID)
    assert [Path(item["url"]).name for item in record_of(folder)["inputs"]] == ["a.pipe", "b.pipe.zst"]

    (raw / "a.pipe").write_bytes(b"no bar\n")
    usual[1] = str(tmp_path / "bad")
    result = run_command(repository, "make_2048.py", "--input-files", str(raw / "a.pipe"), *usual)
    assert result.returncode == 2 and "no bar" in result.stderr
    for wrong in (raw / "notes.csv", tmp_path / "missing"):
        result = run_command(repository, "make_2048.py", "--input-files", str(wrong), *usual)
        assert result.returncode == 2 and ".parquet, .pipe, .tar" in result.stderr


@pytest.mark.processes
@pytest.mark.parametrize("script", ["make_2048.py", "ray/tokenize_shuffle.py"])
def test_help_lists_the_new_format(repository: Path, script: str) -> None:
    result = run_command(repository, script, "--help")
    assert result.returncode == 0 and ".parquet, .pipe, .tar" in result.stdout
    original = run_command(ROOT, script, "--help")
    assert original.returncode == 0 and ".parquet, .tar" in original.stdout and ".pipe" not in original.stdout


@pytest.mark.processes
def test_registering_formats_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from open_lm.datapreprocess.readers import formats\n"
        "assert '.parquet' in formats()\n"
        "heavy = {'numpy', 'pyarrow', 'datasets', 'zstandard', 'torch', 'ray', 'boto3'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_lists_of_suffixes() -> None:
    assert set(formats()) == {".arrow", ".json", ".jsonl", ".md", ".ndjson", ".parquet", ".tar", ".text", ".txt"}
    assert all(suffix in describe_suffixes() for suffix in formats())
    assert describe_suffixes().endswith("also compressed (.bz2, .gz, .xz, .zst, .zstd)")
    assert separator_suffixes() == [".md", ".text", ".txt"]


@pytest.mark.parametrize("suffix", ["csv", ".CSV", ".tar.gz", ".jsonl", ".gz"])
def test_suffixes_that_cannot_be_registered(suffix: str) -> None:
    with pytest.raises(ValueError, match="format suffix"):
        register_format(Format(read_lines), suffix)


def test_a_separator_needs_a_parser() -> None:
    for incomplete in (Format(read_lines, separator=line_separator), Format(read_lines, parse=parse_texts)):
        with pytest.raises(ValueError, match="must be given together"):
            register_format(incomplete, ".incomplete")
    assert ".incomplete" not in formats()
