"""A training step on CUDA dispatches few operators and never waits for the device: counted with fake CUDA tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import step_counts
import torch
from fake_cuda import fake_device_problem, run_with_fake_device
from step_counts import StepCounter, StepCounts, is_wait

from open_lm.errors import ConfigError

# Operators of a forward and backward pass of one block, of both outside of the blocks, and of clipping and optimizer.
BUDGETS = {
    "amp_bfloat16": (75, 50, 47),
    "documents, op": (98, 113, 47),
    "experts": (117, 65, 47),
    "fsdp, muon, averagers": (113, 108, 115),
    "tensor, fsdp": (145, 156, 55),
    "expert parallel": (205, 107, 48),
}


@pytest.fixture(scope="module")
def counts() -> dict[str, StepCounts]:
    if problem := fake_device_problem():
        pytest.skip(problem)
    result = run_with_fake_device(Path(step_counts.__file__), ["--json", "--only", ";".join(BUDGETS)])
    assert result.returncode in (0, 1)
    return {name: StepCounts(**values) for name, values in json.loads(result.stdout).items()}


@pytest.mark.processes
def test_steps_stay_within_their_budget_and_never_wait(counts: dict[str, StepCounts]) -> None:
    assert counts.keys() == BUDGETS.keys()
    for name, (block, outside, optimizer) in BUDGETS.items():
        found = counts[name]
        assert found.waits == [], name
        assert found.block <= block, (name, found)
        assert found.outside <= outside, (name, found)
        assert found.optimizer + found.optimizer_block <= optimizer, (name, found)
        assert found.statistics <= (33 if name == "expert parallel" else 31), (name, found)
    assert counts["fsdp, muon, averagers"].averagers <= 2
    # One fused kernel updates all parameters, so more blocks do not need more operators.
    assert counts["amp_bfloat16"].optimizer_block == 0


def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert "found no no-such-compiler: install g++ or set CXX" in str(fake_device_problem())
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        run_with_fake_device(Path("program"), [])


def test_waits_are_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU's tensors, as if they were the device's."""
    x = torch.arange(4.0)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    waiting = (lambda: x.sum().item(), x.nonzero, lambda: x[x > 1], lambda: bool((x > 1).all()))
    for operation in waiting:
        counter = StepCounter()
        with counter:
            operation()
        assert counter.waits, operation
    with StepCounter() as counter:
        x[x > 1] = 0.0
        x.index_select(0, torch.tensor([1]))
        x.where(x > 1, 0.0).sum()
    # Here the number is the mask's tensor on the same "device"; on CUDA it stays on the host.
    assert all("index_put_" in wait for wait in counter.waits)
    copy = torch.ops.aten._to_copy.default
    assert is_wait(copy, (x,), {"device": torch.device("meta")})
    assert not is_wait(copy, (x,), {"device": torch.device("meta"), "non_blocking": True})
    assert not is_wait(copy, (x,), {"dtype": torch.float64})
