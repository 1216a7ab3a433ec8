"""Mesh sizes and rank positions of `MeshLayout`, without processes."""

from __future__ import annotations

import pytest

from open_lm.config.command_line import parse_args
from open_lm.config.layout import MeshLayout, parse_mesh_dim, resolve_layout
from open_lm.config.sections import ParallelConfig
from open_lm.errors import ConfigError


@pytest.mark.parametrize(
    ("cfg", "world_size", "per_node", "expected"),
    [
        (ParallelConfig(), 8, 4, (8, 1, 1, 1)),
        (ParallelConfig(fsdp=True), 8, 4, (1, 8, 1, 1)),
        (ParallelConfig(fsdp=True, fsdp_hybrid=True), 8, 4, (2, 4, 1, 1)),
        (ParallelConfig(fsdp=True, fsdp_hybrid_o2=True, tensor_parallel=2), 8, 4, (2, 2, 1, 2)),
        (ParallelConfig(fsdp=True, context_parallel=2, tensor_parallel=2), 8, 8, (1, 2, 2, 2)),
        (ParallelConfig(context_parallel=4), 8, 8, (2, 1, 4, 1)),
        (ParallelConfig(mesh_dim="-1,2,4"), 32, 8, (4, 2, 1, 4)),
        (ParallelConfig(mesh_dim="2,-1,1", context_parallel=2), 16, 8, (2, 4, 2, 1)),
        (ParallelConfig(mesh_dim="1,2,2"), 4, 4, (1, 2, 1, 2)),
    ],
)
def test_sizes(cfg: ParallelConfig, world_size: int, per_node: int, expected: tuple[int, int, int, int]) -> None:
    layout = resolve_layout(cfg, world_size, per_node)
    assert (layout.replicate, layout.shard, layout.context, layout.tensor) == expected
    assert layout.gradient_ranks * layout.tensor == world_size


def test_expert_groups_divide_the_ranks_that_shard_parameters() -> None:
    cfg = ParallelConfig(fsdp=True, expert_parallel=4, mesh_dim="2,-1,1", context_parallel=2)
    layout = resolve_layout(cfg, 16, 8)
    assert (layout.shard_ranks, layout.expert, layout.expert_shard_ranks) == (8, 4, 2)
    assert layout.data_size == 8 and layout.gradient_ranks == 16


def test_ranks_that_share_sequences_are_neighbours_and_contribute_once() -> None:
    layouts = [MeshLayout(replicate=2, shard=2, context=2, tensor=3, rank=rank) for rank in range(24)]
    assert [layout.data_rank for layout in layouts] == [number for number in range(4) for _ in range(6)]
    positions = {(layout.data_rank, layout.context_rank, layout.tensor_rank) for layout in layouts}
    assert len(positions) == 24
    # Each rank draws other dropout masks; the first of a group those of a run without such groups.
    assert len({layout.seed_offset for layout in layouts}) == 24
    assert [layout.seed_offset for layout in layouts[::6]] == [0, 1, 2, 3]
    assert sum(layout.contributes_sequences for layout in layouts) == 4  # each sequence once
    assert sum(layout.contributes_tokens for layout in layouts) == 8  # each shard of a sequence once


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (ParallelConfig(tensor_parallel=3), "--tensor-parallel 3: found 8 ranks, expected a multiple of 3"),
        (ParallelConfig(tensor_parallel=2, context_parallel=8), "2 x --context-parallel 8: found 8 ranks"),
        (ParallelConfig(fsdp=True, fsdp_hybrid=True), "found 8 ranks, expected a multiple of the 3 ranks of a node"),
        (ParallelConfig(mesh_dim="-1,3,1"), "--mesh-dim -1,3,1 needs a multiple of 3 ranks, but 8 were started"),
        (ParallelConfig(mesh_dim="2,2,1"), "--mesh-dim 2,2,1 needs 4 ranks, but 8 were started"),
        (ParallelConfig(expert_parallel=2), "--expert-parallel 2 requires --fsdp"),
        (ParallelConfig(fsdp=True, expert_parallel=3), "sharded over 8 ranks, expected a multiple of 3"),
        (ParallelConfig(fsdp=True, expert_parallel=4, mesh_dim="4,2,1"), "over 2 ranks .of 8 in 4 replicas., expected"),
        (ParallelConfig(fsdp=True, expert_parallel=2, tensor_parallel=2), "does not support tensor parallelism"),
    ],
)
def test_indivisible_numbers_of_ranks_are_rejected(cfg: ParallelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_layout(cfg, 8, 3)


@pytest.mark.parametrize("text", ["2,2", "-1,-1,2", "0,1,1", "a,1,1", "1,2,3,4", "-2,1,1"])
def test_invalid_mesh_dims_are_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match="expected three numbers of ranks"):
        parse_mesh_dim(text)


def test_mesh_dim_on_the_command_line() -> None:
    args = parse_args(["--mesh-dim", "-1,2,4"])
    assert (args.mesh_dim, args.fsdp) == ("-1,2,4", True)
    assert not parse_args(["--mesh-dim=8,1,1"]).fsdp
    with pytest.raises(ConfigError, match=r"--mesh-dim and --tensor-parallel both define the device mesh"):
        parse_args(["--mesh-dim", "-1,2,4", "--tensor-parallel", "2"])
    with pytest.raises(ConfigError, match=r"--mesh-dim: found '1,2'"):
        parse_args(["--mesh-dim", "1,2"])
