"""Tests of make_2048 as a script: S3, an existing Ray cluster, invalid arguments, --help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from datapreprocess_helpers import EOT_ID, expected_tokens, read_shards, tokens_of, write_jsonl

from open_lm import storage
from open_lm.data.shard_format import expand_shards, read_manifest
from open_lm.datapreprocess.make_2048 import s3_base
from open_lm.errors import ConfigError

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "datapreprocess" / "make_2048.py"


def run_script(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **env}, cwd=ROOT.parent, timeout=300
    )


def test_from_s3_to_s3_with_a_new_local_ray(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, s3_bucket: str
) -> None:
    for path in raw[0].rglob("*.*"):
        storage.upload(path, f"s3://{s3_bucket}/raw/{path.relative_to(raw[0])}")
    result = run_script(
        "--input-files", f"s3://{s3_bucket}/raw/*.jsonl*", f"s3://{s3_bucket}/raw/deep/", "--output-dir",
        str(tmp_path / "out"), "--tokenizer", small_tokenizer, "--seqlen", "32", "--num-workers", "1", "--upload-to-s3",
        "--ray-address", "local",
        S3_BASE=f"{s3_bucket}/some/prefix/",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "starting Ray" in result.stderr and "MB/s" in result.stderr and "left" in result.stderr
    output = f"s3://{s3_bucket}/some/prefix/32-v1/0"
    for url in storage.list_files(output):
        storage.download(url, tmp_path / "copy" / url.rpartition("/")[2])
    assert tokens_of(read_shards(tmp_path / "copy")) == expected_tokens(raw[1], small_tokenizer, EOT_ID)
    assert len(read_manifest(f"{output}/manifest.jsonl")) == len(expand_shards(f"{output}/"))
    assert not list((tmp_path / "out").rglob("*"))


def test_joins_a_running_ray_and_does_not_stop_it(
    raw: tuple[Path, list[str]], tmp_path: Path, small_tokenizer: str, local_ray: None
) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    out = tmp_path / "out"
    result = run_script(
        "--input-files", str(raw[0]), "--output-dir", str(out), "--tokenizer", small_tokenizer, "--seqlen", "32",
        "--ray-address", address,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "starting Ray" not in result.stderr
    assert tokens_of(read_shards(out)) == expected_tokens(raw[1], small_tokenizer, EOT_ID)
    assert ray.get(ray.remote(lambda: 5).remote()) == 5


def test_invalid_arguments_give_one_message_and_exit_code_2(tmp_path: Path, small_tokenizer: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    common = ["--input-files", str(path), "--output-dir", str(tmp_path / "out"), "--tokenizer"]
    for arguments, message in (
        ([*common, small_tokenizer, "--upload-to-s3"], "S3_BASE"),
        ([*common, str(tmp_path / "no.json")], "no.json"),
        ([*common, small_tokenizer, "--format", "csv"], "--format"),
        ([*common, small_tokenizer, "--ray-address", "127.0.0.1:1"], "no Ray cluster answers"),
        (["--output-dir", "x"], "--input-files"),
    ):
        result = run_script(*arguments, S3_BASE="")
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.tar"))


def test_s3_base_with_and_without_scheme() -> None:
    assert s3_base("s3://bucket/a/b/") == s3_base("bucket/a/b") == "s3://bucket/a/b"
    for wrong in (None, "", "s3://", "gs://bucket"):
        with pytest.raises(ConfigError, match="S3_BASE"):
            s3_base(wrong)


@pytest.mark.parametrize("script", ["make_2048.py", "ray/tokenize_shuffle.py"])
def test_help_does_not_import_large_packages(script: str) -> None:
    code = (
        "import runpy, sys; path = sys.argv[1]; sys.argv = [path, '--help']\n"
        "try: runpy.run_path(path, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "large = {'torch', 'ray', 'numpy', 'transformers', 'tokenizers', 'boto3'} & set(sys.modules)\n"
        "assert not large, large"
    )
    path = str(ROOT / "datapreprocess" / script)
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--tokenizer" in result.stdout
