"""The benchmark of a training step on a CUDA device, compared with torchtitan if it is installed."""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec
from pathlib import Path

import bench_train
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "flags",
    [
        ["--torchcompile"],
        ["--torchcompile", "--activation-checkpointing", "half-op", "--accum-freq", "2"],
        ["--precision", "bf16", "--activation-checkpointing", "full", "--torchcompile"],
        ["--fsdp", "--fsdp-amp", "--fsdp-cpu-offload", "--activation-checkpointing", "full"],
    ],
    ids=" ".join,
)
def test_a_step_is_measured_on_cuda(tmp_path: Path, flags: list[str]) -> None:
    result, trace = tmp_path / "result.json", tmp_path / "trace.json.gz"
    peers = ["torchtitan"] if find_spec("torchtitan") is not None else []
    arguments = ["--model", "open_lm_11m", "--device", "cuda", "--batch-size", "4", "--seq-len", "512", *flags]
    arguments += ["--steps", "3", "--warmup", "3", "--rounds", "1", "--ceiling", "--profile", "--trace", str(trace)]
    bench_train.main([*arguments, "--json", str(result), *(word for peer in peers for word in ("--against", peer))])
    measured = json.loads(result.read_text())["models"]["open_lm_11m"]
    assert set(measured["results"]) == {"ours", *peers}
    for values in measured["results"].values():
        assert len(values["speeds"]) == 3 and values["memory_bytes"][0] > 0
    assert sum(sum(passes.values()) for passes in measured["profiles"]["ours"]["profile"].values()) > 0
    with gzip.open(trace) as file:
        assert json.load(file)["traceEvents"]
