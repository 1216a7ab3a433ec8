"""Expert parallelism trains, evaluates and compiles like plain FSDP on the same ranks, and like a single process.

test_layouts.py compares training without dropped tokens with a single process, test_elastic.py its checkpoints.
"""

from __future__ import annotations

from typing import Any

import expert_worker
import pytest
import torch
from model_helpers import small_model
from parity import on_ranks

from open_lm.config.layout import expert_shard_dim
from open_lm.config.sections import ParallelConfig
from open_lm.distributed.processes import init_runtime, shutdown
from open_lm.errors import ConfigError
from open_lm.parallel.expert_parallel import check_has_experts

FSDP, EXPERT_2 = {"fsdp": True}, {"fsdp": True, "expert_parallel": 2}
EXPERT_4 = {"fsdp": True, "expert_parallel": 4}
JOBS: dict[str, tuple[Any, ...]] = {
    "fsdp": (expert_worker.train, FSDP),
    "expert 2": (expert_worker.train, EXPERT_2),
    "expert 4": (expert_worker.train, EXPERT_4),
    "expert 2, nested groups": (expert_worker.train_nested, EXPERT_2),
    "fsdp amp": (expert_worker.train, {**FSDP, "fsdp_amp": True}),
    "expert 2 amp": (expert_worker.train, {**EXPERT_2, "fsdp_amp": True}),
    "many experts": (expert_worker.train, EXPERT_2, {"moe_num_experts": 8}),
    "many experts, fsdp": (expert_worker.train, FSDP, {"moe_num_experts": 8}),
    "uneven evaluation": (expert_worker.uneven_evaluation,),
    "unbounded": (expert_worker.unbounded_gradients, EXPERT_4),
    "full": (expert_worker.exchanges, "full"),
    "op": (expert_worker.exchanges, "op"),
    "indivisible": (expert_worker.indivisible,),
}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return dict(zip(JOBS, on_ranks(4, list(JOBS.values())), strict=True))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("layout", "expected", "tolerance"),
    [
        ("expert 2", "fsdp", 1e-5),
        ("expert 4", "fsdp", 1e-5),
        ("expert 2, nested groups", "fsdp", 1e-5),
        ("expert 2 amp", "fsdp amp", 1e-2),
        ("many experts", "many experts, fsdp", 1e-5),
    ],
)
def test_training_with_dropped_tokens_equals_that_of_fsdp(
    results: dict[str, Any], layout: str, expected: str, tolerance: float
) -> None:
    for step, expected_step in zip(results[layout]["steps"], results[expected]["steps"], strict=True):
        assert step == pytest.approx(expected_step, rel=tolerance)
    assert results[layout]["sums"] == pytest.approx(results[expected]["sums"], rel=tolerance)


@pytest.mark.processes
def test_each_rank_holds_an_equal_part_of_the_experts(results: dict[str, Any]) -> None:
    for name in ("fsdp", "expert 2", "expert 4", "many experts"):
        experts = 8 if name == "many experts" else 4
        assert set(results[name]["local_values"].values()) == {experts * 24 * 96 // 4}, name


@pytest.mark.processes
def test_evaluation_with_other_numbers_of_tokens_on_each_rank(results: dict[str, Any]) -> None:
    model = single_model()
    for block in model.layers:
        block.feed_forward.router.layer.weight.data.zero_()
    model.eval()
    expected = [model(expert_worker.sequences(count))[0].double().square().sum().item() for count in (1, 2, 3, 4)]
    assert results["uneven evaluation"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.processes
def test_a_rank_without_tokens_has_gradients_of_zeros(results: dict[str, Any]) -> None:
    assert results["unbounded"] == pytest.approx(expert_worker.unbounded_gradients({}), rel=1e-4, abs=1e-7)


@pytest.mark.processes
def test_equal_blocks_are_compiled_once() -> None:
    """Selective checkpointing saves what the exchanges return in compiled blocks too."""
    plain, selective, nested, unsupported = on_ranks(
        2,
        [
            *((expert_worker.compiled, policy) for policy in ("none", "op")),
            *((expert_worker.compiled, policy, True) for policy in ("none", "op")),
        ],
    )
    for found in (plain, selective, nested):
        assert found["compiled"] == pytest.approx(found["eager"], rel=1e-5)
        assert found["exchanges"] == {"forward": 4, "backward": 4}
    assert [(found["graphs"], found["graph_breaks"]) for found in (plain, selective)] == [(1, 0)] * 2
    assert 1 < nested["graphs"] <= 9 and nested["graph_breaks"] == 1  # hooks cut the block into pieces
    assert "needs torch 2.12 or newer" in unsupported["error"]


@pytest.mark.processes
def test_selective_checkpointing_does_not_repeat_the_exchange(results: dict[str, Any]) -> None:
    assert results["op"] == {"forward": 4, "backward": 4}
    assert results["full"]["backward"] > 4


@pytest.mark.processes
def test_experts_must_be_divisible_over_the_ranks(results: dict[str, Any]) -> None:
    assert results["indivisible"] == (
        "--expert-parallel 4: the model has 6 experts, which are divisible over 1, 2, 3, 6 ranks"
    )


def test_a_model_without_experts_is_rejected() -> None:
    with pytest.raises(ConfigError, match="--expert-parallel 2: the model has no mixture of experts; remove the flag"):
        check_has_experts(small_model(), 2)


def test_experts_are_sharded_along_a_dimension_that_the_ranks_divide() -> None:
    assert expert_shard_dim((8, 24, 96), 4) == 0
    assert expert_shard_dim((8, 24, 96), 12) == 1
    assert expert_shard_dim((8, 24, 96), 32) == 2
    assert expert_shard_dim((8, 24, 96), 5) == 0  # unevenly


def single_model() -> torch.nn.Module:
    runtime = init_runtime(ParallelConfig())
    model: torch.nn.Module = expert_worker.new_model(runtime, {})[0]
    shutdown(runtime)
    return model
