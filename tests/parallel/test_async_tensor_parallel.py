"""Inductor overlaps the exchange of tensor parallelism with matrix products."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import async_tensor_worker
import pytest
import torch
from parity import on_ranks

from open_lm.errors import ConfigError
from open_lm.parallel.async_tensor_parallel import check_async_tensor_parallel

LAYOUT = {"tensor_parallel": 2}
COMPILED = ["--torchcompile", "--precision", "amp_bfloat16"]
OVERLAP = [*COMPILED, "--async-tensor-parallel"]


@pytest.mark.processes
def test_all_exchanges_of_a_compiled_block_are_part_of_its_products() -> None:
    plain, pipelined, error = on_ranks(
        2,
        [
            (async_tensor_worker.compiled_step, LAYOUT),
            (async_tensor_worker.compiled_step, {**LAYOUT, "async_tensor_parallel": True}),
            (async_tensor_worker.error_on_cpu, LAYOUT),
        ],
    )
    counts = (
        [tuple(graph.values()) for graph in plain["graphs"]],
        [tuple(graph.values()) for graph in pipelined["graphs"]],
    )
    assert counts == ([(2, 2, 0, 0)] * 2, [(0, 0, 2, 2)] * 2)  # the forward and the backward pass
    assert pipelined["values"] == pytest.approx(plain["values"], rel=1e-5)
    assert error == "--async-tensor-parallel: found ranks on cpu, expected CUDA devices; remove the flag"


def test_devices_must_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"4 ranks .* on the machines a, b, expected one machine"):
        check_async_tensor_parallel([(host, "cuda", index) for host in "ab" for index in (0, 1)])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: {one, other} != {1, 2})
    check_async_tensor_parallel([("a", "cuda", 0), ("a", "cuda", 1)])
    with pytest.raises(ConfigError, match="device 1 cannot access the memory of device 2"):
        check_async_tensor_parallel([("a", "cuda", index) for index in range(3)])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices that NVLink connects")
def test_training_with_overlap_gives_the_same_losses(tmp_path: Path) -> None:
    expected, found = (losses(tmp_path, name, flags) for name, flags in (("plain", COMPILED), ("overlap", OVERLAP)))
    assert len(found) == 4 and found == pytest.approx(expected, rel=1e-2)


def losses(folder: Path, name: str, flags: list[str]) -> list[float]:
    """Train 4 steps on two ranks and return their losses."""
    model = folder / "model.json"
    shape = {"hidden_dim": 256, "n_layers": 2, "n_heads": 4, "seq_len": 256, "vocab_size": 512}
    model.write_text(json.dumps({**shape, "post_embed_norm": False, "weight_tying": False}))
    train = f"--model {model} --dataset-type synthetic --train-num-samples 4096 --epochs 1 --global-batch-size 4"
    run = f"--logs {folder} --name {name} --log-every-n-steps 1 --tensor-parallel 2 --report none {' '.join(flags)}"
    command = f"-m open_lm.cli.launch --nproc-per-node 2 -m open_lm.main {train} {run}"
    subprocess.run([sys.executable, *command.split()], check=True)
    rows = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]
