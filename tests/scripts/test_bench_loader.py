"""A small run of the loader benchmark: ours and a peer are measured on the same tokens."""

from __future__ import annotations

from pathlib import Path

import bench_loader
import pytest

pytestmark = pytest.mark.processes


def test_ours_and_a_peer_are_measured_and_a_missing_peer_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPEN_LM_SHARED", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--sequences", "64", "--batch-size", "4", "--seconds", "0.01", "--rounds", "1", "--workers", "1"]
    arguments += ["--peer-python", str(tmp_path / "none")]
    bench_loader.main([*arguments, "--only", "ours, txt", "ours, npy", "webdataset npy", "litdata"])
    output = capsys.readouterr().out
    assert "MISSING litdata: " in output and "make install-bench" in output
    lines = output.splitlines()
    assert any("0.1 million tokens of random ids" in line and "warm page cache" in line for line in lines)
    rows = [line for line in lines if line.startswith(("ours", "webdataset"))]
    assert [row[:28].rstrip() for row in rows] == ["ours, npy", "ours, txt", "webdataset npy"]
    for row in rows:
        workers, median, least, greatest, speedup = row[28:].split()[:5]
        assert workers == "1" and float(median) == float(least) == float(greatest) and float(speedup) > 0
    assert rows[0].endswith("1.00 x")
