"""A small model with shapes that are difficult to shard, and its training, for test_sharded.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from open_lm.checkpoint.model_state import named_tensors, trained_params
from open_lm.checkpoint.sharded import ShardedWriter, TrainingState
from open_lm.distributed.sharded_tensor import full_tensor, fused_weight_parts
from open_lm.optim.averaging import ModelAverager

AVERAGERS = "ema_0.5,poly_2"


class Layer(nn.Module):
    """A layer with sizes that are not divisible by two or four, and a parameter with fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(6, 11, bias=True)
        self.out_proj = nn.Linear(11, 6, bias=False)
        self.gain = nn.Parameter(torch.ones(1, 6))
        self.register_buffer("calls", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.out_proj(torch.tanh(self.in_proj(x)))


class Net(nn.Module):
    def __init__(self, tied: bool = True, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.output = nn.Linear(6, 7, bias=False)
        if tied:
            self.output.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


def build(kind: str, seed: int, **changes: Any) -> TrainingState:
    """Return a run's objects; kind: "single" (one process), "ddp", "fsdp" or "hybrid" (two replicas of two shards)."""
    torch.manual_seed(seed)
    model: nn.Module = Net(**changes)
    if kind in ("fsdp", "hybrid"):
        mesh = _mesh(kind)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    wrapped = DistributedDataParallel(model) if kind == "ddp" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    return TrainingState(wrapped, optimizer, averagers=ModelAverager(model, AVERAGERS))


def tensor_parallel(model: nn.Module, mesh: DeviceMesh, dims: dict[str, int]) -> None:
    """Shard parameters over `mesh` ("tensor",), keeping their values; dims: the dimension to shard by name."""
    sharded: dict[int, nn.Parameter] = {}  # by the original parameter, so that tied weights stay tied
    for module_name, module in model.named_modules():
        for name, param in list(module.named_parameters(recurse=False)):
            full_name = f"{module_name}.{name}".removeprefix(".")
            if id(param) in sharded or full_name in dims:
                if id(param) not in sharded:
                    shards = distribute_tensor(param.detach(), mesh, [Shard(dims[full_name])], src_data_rank=None)
                    sharded[id(param)] = nn.Parameter(shards)
                setattr(module, name, sharded[id(param)])


def _mesh(kind: str) -> DeviceMesh:
    world_size = dist.get_world_size()
    if kind == "fsdp":
        return init_device_mesh("cpu", (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("replicate", "shard"))


def train(state: TrainingState, steps: range) -> list[float]:
    """Train on the same batch on every rank, so that the world size does not matter; return the losses."""
    losses = []
    for step in steps:
        ids = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(state.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        assert state.optimizer is not None and state.averagers is not None
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.averagers.step()
        losses.append(loss.item())
    return losses


def full_state(state: TrainingState) -> dict[str, Tensor]:
    """Return every full tensor of a run by the name under which it is stored. Collective."""
    assert state.optimizer is not None and state.averagers is not None
    parts = fused_weight_parts(state.model)
    tensors = named_tensors(state.model)
    full = {f"model/{name}": full_tensor(value, parts.get(name, 1)) for name, value in tensors.items()}
    for name, param in trained_params(state.model, state.optimizer).items():
        for moment, value in state.optimizer.state.get(param, {}).items():
            full[f"optimizer/{name}/{moment}"] = full_tensor(value, parts.get(name, 1))
    for averager_name, averager in state.averagers.avgs_dict.items():
        for name, value in averager.tensors().items():
            full[f"averager/{averager_name}/{name}"] = full_tensor(value, parts.get(name, 1))
    return {name: value.clone() for name, value in full.items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


def save(state: TrainingState, folder: Path | str, step: int = 3) -> ShardedWriter:
    """Save a sharded checkpoint, wait for it, and return the writer."""
    writer = ShardedWriter()
    writer.save(state, str(folder), step, wait=True)
    return writer


def trained(seed: int = 0, steps: int = 3, **changes: Any) -> TrainingState:
    """Return the state of one process after some steps."""
    state = build("single", seed, **changes)
    train(state, range(steps))
    return state


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of the byte at `position` of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
