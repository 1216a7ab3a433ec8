"""Local shards of tensors: index arithmetic against torch.chunk, DTensors against what FSDP2 computes with."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_processes import on_ranks
from sharded_helpers import tensor_parallel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from open_lm.distributed.sharded_tensor import (
    copy_from_rank0,
    copy_local_shard,
    full_tensor,
    fused_weight_parts,
    local_blocks,
    replica_ranks,
    shard_range,
    stored_row_runs,
)
from open_lm.kernels.linear import FusedLinear
from open_lm.model.initialization import init_weights
from open_lm.model.transformer import Params, Transformer
from open_lm.optim.averaging import ModelAverager

NAMES = ("replicate", "shard", "tensor")
SPLIT_DIMS = {"fused.weight": 0, "odd.weight": 0, "few.weight": 0, "columns.weight": 1, "odd_columns.weight": 1}


# ---------------------------------------------------------------------------------------------- index arithmetic
def test_shards_equal_those_of_torch_chunk() -> None:
    for rows, counts in itertools.product(range(14), itertools.product((1, 2, 3, 5), repeat=2)):
        for indices in itertools.product(*map(range, counts)):
            shard = torch.arange(rows)
            for count, index in zip(counts, indices, strict=True):
                shard = chunk_of(shard, count, index)
            first, num_rows = shard_range(rows, list(zip(counts, indices, strict=True)))
            assert torch.arange(first, first + num_rows).tolist() == shard.tolist()


def chunk_of(full: Tensor, count: int, index: int, dim: int = 0) -> Tensor:
    chunks = full.chunk(count, dim)
    return chunks[index] if index < len(chunks) else full.narrow(dim, 0, 0)


@pytest.mark.parametrize(("parts", "ranks"), [(1, 4), (2, 1), (2, 3), (3, 2), (3, 4)])
def test_rank_major_rows_map_to_stored_rows(parts: int, ranks: int) -> None:
    stored = torch.arange(2 * parts * ranks)
    expected = rank_major(stored, parts, ranks)
    for first in range(len(stored)):
        for num_rows in range(1, len(stored) - first + 1):
            runs = stored_row_runs(first, num_rows, len(stored), parts, ranks)
            assert [local_row for _, local_row, _ in runs] == [sum(n for _, _, n in runs[:i]) for i in range(len(runs))]
            rows = torch.cat([stored[stored_row : stored_row + length] for stored_row, _, length in runs])
            assert torch.equal(rows, expected[first : first + num_rows])


def rank_major(stored: Tensor, parts: int, ranks: int) -> Tensor:
    """Return, for each rank, its shard of each of the fused matrices."""
    if parts == 1:
        return stored
    return torch.cat([matrix.chunk(ranks)[rank] for rank in range(ranks) for matrix in stored.chunk(parts)])


def test_indivisible_fused_matrices_are_rejected() -> None:
    with pytest.raises(ValueError, match="18 rows of 3 fused matrices are not divisible among 4 ranks"):
        stored_row_runs(0, 4, 18, 3, 4)


def test_a_tensor_of_a_single_process_is_one_block() -> None:
    tensor, full = torch.zeros(3, 2, requires_grad=True), torch.randn(3, 2)
    (block,) = local_blocks(tensor)
    assert (block.offsets, block.sizes) == ((0, 0), (3, 2)) and block.view.data_ptr() == tensor.data_ptr()
    copy_local_shard(tensor, full, parts=3)
    assert torch.equal(tensor, full) and torch.equal(full_tensor(tensor, parts=3), full)
    assert local_blocks(torch.tensor(2.0))[0].offsets == () and replica_ranks(tensor, None, 3) == (0, 1, 2)
    copy_from_rank0(tensor, full + 1)
    assert torch.equal(tensor, full + 1)


# ---------------------------------------------------------------------------------------------- ranks
class Net(nn.Module):
    """Every way of sharding: by fused and plain rows, by columns, replicated, and with indivisible sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = FusedLinear(3, 3 * 4 * 5, parts=3)
        self.odd = nn.Linear(3, 13, bias=False)
        self.few = nn.Linear(3, 2, bias=False)
        self.columns = nn.Linear(8, 7, bias=False)
        self.odd_columns = nn.Linear(5, 7, bias=False)
        self.norm = nn.LayerNorm(5)


def sharded_net(mesh: DeviceMesh, seed: int) -> Net:
    torch.manual_seed(seed)
    net = Net()
    if mesh.size(2) > 1:
        tensor_parallel(net, mesh["tensor"], SPLIT_DIMS)
    if mesh.size(0) * mesh.size(1) > 1:
        fully_shard(net, mesh=mesh["shard"] if mesh.size(0) == 1 else mesh["replicate", "shard"])
    return net


def check_sharding(rank: int, folder: Path) -> None:
    torch.manual_seed(1)
    stored = {name: torch.randn_like(value) for name, value in Net().named_parameters()}
    for sizes in ((1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4), (4, 1, 1)):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=NAMES)
        net = sharded_net(mesh, seed=rank)
        parts = fused_weight_parts(net)
        assert parts == ({"fused.weight": 3} if sizes[2] > 1 else {})
        for name, value in net.named_parameters():
            copy_local_shard(value, stored[name], parts.get(name, 1))
            assert torch.equal(full_tensor(value, parts.get(name, 1)), stored[name]), (sizes, name)
            blocks = local_blocks(value, parts.get(name, 1))
            assert all(torch.equal(stored[name][block.index], block.view) for block in blocks)
            check_replica_ranks(value, parts.get(name, 1), mesh)
        check_torch_full_tensor(net, stored, parts)
        check_unsharded_weights(net, stored, mesh)
        for name, value in net.named_parameters():
            copy_from_rank0(value, stored[name] + 1 if rank == 0 else None, parts.get(name, 1))
            assert torch.equal(full_tensor(value, parts.get(name, 1)), stored[name] + 1)
    check_dtypes_and_scalars()


def check_torch_full_tensor(net: Net, stored: dict[str, Tensor], parts: dict[str, int]) -> None:
    """Compare with DTensor.full_tensor where it is correct: it misplaces rows of twice unevenly split tensors."""
    for name, value in net.named_parameters():
        if isinstance(value, DTensor) and name not in parts and len(value) % 4 == 0:
            assert torch.equal(value.full_tensor(), stored[name]), name


def check_unsharded_weights(net: Net, stored: dict[str, Tensor], mesh: DeviceMesh) -> None:
    """After FSDP2 has gathered them, a rank's weights are its tensor-parallel shards of each matrix."""
    if isinstance(net, FSDPModule):
        net.unshard()
    tensor_rank, ranks = mesh.get_local_rank("tensor"), mesh.size(2)
    for name, value in net.named_parameters():
        expected = stored[name]
        if name in SPLIT_DIMS:
            matrices = expected.chunk(3) if name.startswith("fused") else [expected]
            expected = torch.cat([chunk_of(matrix, ranks, tensor_rank, SPLIT_DIMS[name]) for matrix in matrices])
        local = value.to_local() if isinstance(value, DTensor) else value
        assert torch.equal(local, expected), name
    if isinstance(net, FSDPModule):
        net.reshard()


def check_replica_ranks(value: Tensor, parts: int, mesh: DeviceMesh) -> None:
    """`replica_ranks` are exactly the ranks that hold the same blocks, and all blocks together cover the tensor."""
    local = [(block.offsets, block.sizes) for block in local_blocks(value, parts)]
    by_rank: list[list[tuple[tuple[int, ...], tuple[int, ...]]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(by_rank, local)
    replicas = replica_ranks(value, mesh, dist.get_world_size())
    assert all(by_rank[rank] == local for rank in replicas)
    if local:
        assert [rank for rank, blocks in enumerate(by_rank) if blocks == local] == list(replicas)
    distinct = {block for blocks in by_rank for block in blocks}
    assert sum(torch.Size(sizes).numel() for _, sizes in distinct) == value.numel()


def check_dtypes_and_scalars() -> None:
    for dtype in (torch.bool, torch.bfloat16, torch.int64):
        value, full = torch.zeros(3, dtype=dtype), torch.tensor([1, 0, 1]).to(dtype)
        copy_from_rank0(value, full)
        assert torch.equal(value, full)
    scalar = torch.tensor(0.0)
    copy_from_rank0(scalar, torch.tensor(3.0))
    assert scalar == 3.0


def check_initialisation_and_averages(rank: int, folder: Path) -> None:
    """A Transformer's initial weights and averages are those of a single process, however they are sharded."""
    reference = Transformer(shape())
    init_weights(reference, seed=5)
    expected = reference.state_dict()
    for sizes in ((1, 2, 2), (2, 1, 2), (1, 1, 4)):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=NAMES)
        with torch.device("meta"):
            model = Transformer(shape())
        tensor_parallel(model, mesh["tensor"], split_dims(model))
        for block in model.layers:
            fully_shard(block, mesh=mesh["replicate", "shard"])
        fully_shard(model, mesh=mesh["replicate", "shard"])
        model.to_empty(device="cpu")
        init_weights(model, seed=5)
        averager = ModelAverager(model, "ema").avgs_dict["ema"]
        state = averager.state_dict()
        for name, value in expected.items() if rank == 0 else ():
            assert torch.equal(state["av_model_sd"][name], value), name
        for value in averager.tensors().values():
            value.zero_()
        averager.load_state_dict({**averager.counters(), "av_model_sd": state["av_model_sd"]})
        with averager.applied() as averaged:
            for name, value in averaged.named_parameters():
                assert torch.equal(full_tensor(value, fused_weight_parts(model).get(name, 1)), expected[name]), name


def shape() -> Params:
    return Params(dim=24, n_layers=1, n_heads=4, vocab_size=31, seq_len=8, weight_tying=True)


def split_dims(model: Transformer) -> dict[str, int]:
    """Split projections to heads, hidden units and logits along dimension 0, those from them along dimension 1."""
    columns = ("out_proj.weight", "w3.weight")
    weights = {name for name, value in model.named_parameters() if value.dim() == 2}
    return {name: int(name.endswith(columns)) for name in weights}


def ranks(rank: int, folder: Path) -> None:
    check_sharding(rank, folder)
    check_initialisation_and_averages(rank, folder)


@pytest.mark.processes
def test_every_layout_of_four_ranks(tmp_path: Path) -> None:
    on_ranks(ranks, tmp_path, 4)
