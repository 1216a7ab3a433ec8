"""Parts of tensors on ranks: the plain numbers against torch.chunk, live tensors against what FSDP2 computes with."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sharded_helpers import on_ranks, tensor_parallel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from open_lm.distributed.sharded_tensor import (
    local_blocks,
    copy_local_shard,
    copy_from_rank0,
    fused_weight_parts,
    replica_ranks,
    shard_range,
    stored_row_runs,
    full_tensor,
)
from open_lm.kernels.linear import FusedLinear
from open_lm.model.initialization import init_weights
from open_lm.model.transformer import Params, Transformer
from open_lm.optim.averaging import ModelAverager

NAMES = ("replicate", "shard", "tensor")
WAYS = {"fused.weight": 0, "odd.weight": 0, "few.weight": 0, "across.weight": 1, "odd_across.weight": 1}


# ---------------------------------------------------------------------------------------------- plain numbers
def test_cut_as_torch_chunks() -> None:
    for rows, counts in itertools.product(range(14), itertools.product((1, 2, 3, 5), repeat=2)):
        for places in itertools.product(*map(range, counts)):
            left = torch.arange(rows)
            for count, place in zip(counts, places, strict=True):
                left = chunk_of(left, count, place)
            first, number = shard_range(rows, list(zip(counts, places, strict=True)))
            assert torch.arange(first, first + number).tolist() == left.tolist()


def chunk_of(full_tensor: Tensor, count: int, place: int, dim: int = 0) -> Tensor:
    chunks = full_tensor.chunk(count, dim)
    return chunks[place] if place < len(chunks) else full_tensor.narrow(dim, 0, 0)


@pytest.mark.parametrize(("parts", "ranks"), [(1, 4), (2, 1), (2, 3), (3, 2), (3, 4)])
def test_rank_major_rows_stand_where_the_parts_have_them(parts: int, ranks: int) -> None:
    stored = torch.arange(2 * parts * ranks)
    ours = rank_major(stored, parts, ranks)
    for first in range(len(stored)):
        for number in range(1, len(stored) - first + 1):
            runs = stored_row_runs(first, number, len(stored), parts, ranks)
            assert [here for _, here, _ in runs] == [sum(n for _, _, n in runs[:i]) for i in range(len(runs))]
            found = torch.cat([stored[there : there + length] for there, _, length in runs])
            assert torch.equal(found, ours[first : first + number])


def rank_major(stored: Tensor, parts: int, ranks: int) -> Tensor:
    """The t-th of `ranks` pieces of each part for t = 0, 1, …"""
    if parts == 1:
        return stored
    return torch.cat([part.chunk(ranks)[t] for t in range(ranks) for part in stored.chunk(parts)])


def test_parts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="18 rows, 3 matrices in one, do not divide among 4 ranks"):
        stored_row_runs(0, 4, 18, 3, 4)


def test_a_tensor_of_one_process_is_one_box() -> None:
    tensor, full = torch.zeros(3, 2, requires_grad=True), torch.randn(3, 2)
    (box,) = local_blocks(tensor)
    assert (box.offsets, box.sizes) == ((0, 0), (3, 2)) and box.view.data_ptr() == tensor.data_ptr()
    copy_local_shard(tensor, full, parts=3)
    assert torch.equal(tensor, full) and torch.equal(full_tensor(tensor, parts=3), full)
    assert local_blocks(torch.tensor(2.0))[0].offsets == () and replica_ranks(tensor, None, 3) == (0, 1, 2)
    copy_from_rank0(tensor, full + 1)
    assert torch.equal(tensor, full + 1)


# ---------------------------------------------------------------------------------------------- ranks
class Net(nn.Module):
    """Every way of dividing: fused and plain rows, columns, not at all, rows and columns that nothing divides."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = FusedLinear(3, 3 * 4 * 5, parts=3)
        self.odd = nn.Linear(3, 13, bias=False)
        self.few = nn.Linear(3, 2, bias=False)
        self.across = nn.Linear(8, 7, bias=False)
        self.odd_across = nn.Linear(5, 7, bias=False)
        self.norm = nn.LayerNorm(5)


def divided(mesh: DeviceMesh, seed: int) -> Net:
    torch.manual_seed(seed)
    net = Net()
    if mesh.size(2) > 1:
        tensor_parallel(net, mesh["tensor"], WAYS)
    if mesh.size(0) * mesh.size(1) > 1:
        fully_shard(net, mesh=mesh["shard"] if mesh.size(0) == 1 else mesh["replicate", "shard"])
    return net


def four_ranks(rank: int, folder: Path) -> None:
    torch.manual_seed(1)
    stored = {name: torch.randn_like(value) for name, value in Net().named_parameters()}
    for sizes in ((1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4), (4, 1, 1)):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=NAMES)
        net = divided(mesh, seed=rank)
        parts = fused_weight_parts(net)
        assert parts == ({"fused.weight": 3} if sizes[2] > 1 else {})
        for name, value in net.named_parameters():
            copy_local_shard(value, stored[name], parts.get(name, 1))
            assert torch.equal(full_tensor(value, parts.get(name, 1)), stored[name]), (sizes, name)
            held = [stored[name][box.region] for box in local_blocks(value, parts.get(name, 1))]
            assert all(torch.equal(a, b.view) for a, b in zip(held, local_blocks(value, parts.get(name, 1)), strict=True))
            check_holders(value, parts.get(name, 1), mesh)
        against_full_tensor(net, stored, parts)
        computes_with(net, stored, mesh)
        for name, value in net.named_parameters():
            copy_from_rank0(value, stored[name] + 1 if rank == 0 else None, parts.get(name, 1))
            assert torch.equal(full_tensor(value, parts.get(name, 1)), stored[name] + 1)
    scalar_and_types(mesh)


def against_full_tensor(net: Net, stored: dict[str, Tensor], parts: dict[str, int]) -> None:
    """torch's own gathering, where it is right: it misplaces rows that two cuts have made uneven."""
    for name, value in net.named_parameters():
        if isinstance(value, DTensor) and name not in parts and len(value) % 4 == 0:
            assert torch.equal(value.full_tensor(), stored[name]), name


def computes_with(net: Net, stored: dict[str, Tensor], mesh: DeviceMesh) -> None:
    """What a rank of tensor parallelism has once FSDP2 has gathered it, is its share of each matrix."""
    if isinstance(net, FSDPModule):
        net.unshard()
    place, ranks = mesh.get_local_rank("tensor"), mesh.size(2)
    for name, value in net.named_parameters():
        expected = stored[name]
        if name in WAYS:
            parts = expected.chunk(3) if name.startswith("fused") else [expected]
            expected = torch.cat([chunk_of(part, ranks, place, WAYS[name]) for part in parts])
        local = value.to_local() if isinstance(value, DTensor) else value
        assert torch.equal(local, expected), name
    if isinstance(net, FSDPModule):
        net.reshard()


def check_holders(value: Tensor, parts: int, mesh: DeviceMesh) -> None:
    """Those that say they hold the same boxes are those, and only those, that do; nothing stands between boxes."""
    ours = [(box.offsets, box.sizes) for box in local_blocks(value, parts)]
    all_boxes: list[list[tuple[tuple[int, ...], tuple[int, ...]]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(all_boxes, ours)
    same = replica_ranks(value, mesh, dist.get_world_size())
    assert all(all_boxes[rank] == ours for rank in same)
    if ours:
        assert [rank for rank, theirs in enumerate(all_boxes) if theirs == ours] == list(same)
    different = {box for of_rank in all_boxes for box in of_rank}
    assert sum(torch.Size(sizes).numel() for _, sizes in different) == value.numel()


def scalar_and_types(mesh: DeviceMesh) -> None:
    for dtype in (torch.bool, torch.bfloat16, torch.int64):
        value, full = torch.zeros(3, dtype=dtype), torch.tensor([1, 0, 1]).to(dtype)
        copy_from_rank0(value, full)
        assert torch.equal(value, full)
    scalar = torch.tensor(0.0)
    copy_from_rank0(scalar, torch.tensor(3.0))
    assert scalar == 3.0


def initialised_alike(rank: int, folder: Path) -> None:
    """A Transformer's weights and averages are those of a single process, however they are divided."""
    alone = Transformer(shape())
    init_weights(alone, seed=5)
    expected = alone.state_dict()
    for sizes in ((1, 2, 2), (2, 1, 2), (1, 1, 4)):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=NAMES)
        with torch.device("meta"):
            model = Transformer(shape())
        tensor_parallel(model, mesh["tensor"], ways(model))
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


def ways(model: Transformer) -> dict[str, int]:
    """Rows of what makes heads, hidden units and logits; columns of what reads them."""
    columns = ("out_proj.weight", "w3.weight")
    weights = {name for name, value in model.named_parameters() if value.dim() == 2}
    return {name: int(name.endswith(columns)) for name in weights}


def ranks(rank: int, folder: Path) -> None:
    four_ranks(rank, folder)
    initialised_alike(rank, folder)


def test_every_layout_of_four_ranks(tmp_path: Path) -> None:
    on_ranks(ranks, tmp_path, 4)
