"""A small run of the S3 benchmark: its server, the plain client and our loader, on the same shards."""

from __future__ import annotations

from pathlib import Path

import bench_s3
import pytest

pytestmark = pytest.mark.processes


def test_ours_is_compared_with_a_plain_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ENDPOINT_URL", "DEFAULT_REGION", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "")  # the benchmark sets them; restored after the test
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--shards", "4", "--sequences-in-shard", "32", "--rounds", "1", "--workers", "1"]
    bench_s3.main([*arguments, "--work-dir", str(tmp_path), "--line-mb", "50"])
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("4 shards of 0.2 MB from the server lean (limit 50 MB/s), 4 connections, ")
    names = ["download only", "in ranges, 1 workers", "whole shards, 1 workers"]
    assert [row[:26].rstrip() for row in rows] == names
    for row in rows:
        median, least, greatest, ratio, processor_s = map(float, row[26:].split())
        assert median == least == greatest <= 50 and ratio > 0 and processor_s > 0
    assert rows[0].split()[-2] == "1.00"
