"""A small run of the checkpoint benchmark."""

from __future__ import annotations

import re

import bench_checkpoint
import pytest
import torch


def test_every_method_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    num_threads = torch.get_num_threads()  # the benchmark sets it to 1
    # Run the only rank in this process, because a new process imports torch.
    monkeypatch.setattr(bench_checkpoint.mp, "spawn", lambda measure, args, nprocs: measure(0, *args))
    monkeypatch.setattr(bench_checkpoint, "_IDLE_STEPS", 3)
    try:
        bench_checkpoint.main(["--model", "open_lm_test_tiny", "--rounds", "1"])
    finally:
        torch.set_num_threads(num_threads)
    output = capsys.readouterr().out
    methods = ("torch.save", "torch dcp.save", "torch dcp.async_save", "ours, synchronous", "ours, in the background")
    for name in methods:
        assert re.search(rf"^{name}.* pause .* s, written after .* MB/s.*, peak ", output, re.MULTILINE), name
    assert len(re.findall(r"^ +load .* s \(.* MB/s\), peak ", output, re.MULTILINE)) == 2
    assert output.count("step time x ") == 2
