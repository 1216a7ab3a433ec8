"""The Triton kernels of the loss, in Triton's interpreter on a CPU, compared with the CPU's code and with float64."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from eval_environment import EVAL_PYTHON, ROOT, needs_eval_environment

from open_lm.kernels import row_softmax
from open_lm.kernels.row_softmax import softmax_kernels, triton_problem


@pytest.mark.processes
@needs_eval_environment
def test_kernels_compile_and_equal_the_cpu(tmp_path: Path) -> None:
    worker = Path(__file__).parents[1] / "helpers" / "triton_worker.py"
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    compiled, results = (
        json.loads(subprocess.check_output([EVAL_PYTHON, str(worker)], env={**env, **mode}, text=True))
        for mode in ({}, {"TRITON_INTERPRET": "1"})
    )
    assert all(size > 1000 for sizes in compiled.values() for size in sizes)
    for name, (maximum, log_sum, probability) in results["kernels"].items():
        assert maximum == 0 and log_sum < 1e-6, name
        assert probability < (1e-6 if "float32" in name else 4e-3), name  # half precision rounds the result
    for name, errors in results["losses"].items():
        assert errors[0] < 1e-6, name
        assert all(error < (1e-6 if "float32" in name else 5e-3) for error in errors), name


def test_the_kernels_of_a_device_are_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(row_softmax.importlib.util, "find_spec", lambda name: None)
    assert triton_problem(torch.device("cuda", 0)) == "Triton is not installed"
    monkeypatch.setattr(row_softmax.importlib.util, "find_spec", lambda name: name)
    assert "below 8.0" in str(triton_problem(torch.device("cuda", 0)))
    assert softmax_kernels(torch.zeros(2, 3)) is None  # float32 on a CPU uses torch
    assert softmax_kernels(torch.zeros(2, 3, dtype=torch.float64)) is None
