"""Optimizer updates of a small model with fixed gradients in any layout; runs under torchrun and inside pytest.

`python -m optim_worker OUT LAYOUT…`: rank 0 writes {(optimizer, layout): what `train` returns} with torch.save.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from open_lm.config.sections import OptimConfig
from open_lm.distributed.sharded_tensor import copy_local_shard, full_tensor
from open_lm.errors import end_process
from open_lm.kernels.linear import FusedLinear
from open_lm.optim import muon
from open_lm.optim.build import build_optimizer, gradient_norm, step_unless_skipped

STEPS, SKIPPED, LR, MAX_NORM = 4, 2, 0.02, 3.0
MATRICES = 2 * (3 + 1 + 2 + 1 + 3)  # in the two blocks
# Sizes of the mesh ("replicate", "shard", "tensor"); None for replicas without a mesh, like those of DDP.
LAYOUTS: dict[str, tuple[int, int, int] | None] = {
    "replicas": None,
    "fsdp": (1, 4, 1),
    "hybrid": (2, 2, 1),
    "tensor": (1, 2, 2),
    "hybrid_tensor": (2, 1, 2),
    "tensor_only": (1, 1, 4),
}


class Block(nn.Module):
    """All kinds of weights of a block, with sizes that are not divisible by the number of shards."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = FusedLinear(7, 3 * 12, parts=3)
        self.out_proj = nn.Linear(12, 7)
        self.w12 = FusedLinear(7, 2 * 12, parts=2)
        self.w3 = nn.Linear(12, 7, bias=False)
        self.w1 = nn.Parameter(torch.empty(3, 7, 9))
        self.norm = nn.LayerNorm(7)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(11, 7)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.output = nn.Linear(7, 11, bias=False)
        for name, param in self.named_parameters():
            param.data = values_for(param, name)

    def get_output_embeddings(self) -> nn.Module:
        return self.output


def values_for(like: Tensor, name: str) -> Tensor:
    """Return pseudorandom values of the shape of `like`, with a seed derived from the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def parts_of(model: nn.Module) -> dict[Tensor, int]:
    return {module.weight: module.parts for module in model.modules() if isinstance(module, FusedLinear)}


def shard(model: Model, mesh: DeviceMesh) -> None:
    """Shard the model in place like open_lm.parallel.parallelize.

    The values are copied again afterwards, because tensor parallelism expects fused weights in rank-major order.
    """
    full = {name: param.detach().clone() for name, param in model.named_parameters()}
    for block in model.layers:
        if mesh.size(2) > 1:
            styles = {"in_proj": ColwiseParallel(), "out_proj": RowwiseParallel()}
            parallelize_module(block, mesh["tensor"], {**styles, "w12": ColwiseParallel(), "w3": RowwiseParallel()})
        fully_shard(block, mesh=mesh["replicate", "shard"])
    fully_shard(model, mesh=mesh["replicate", "shard"])
    parts = parts_of(model)
    for name, param in model.named_parameters():
        copy_local_shard(param, full[name], parts.get(param, 1))


def config(optimizer: str) -> OptimConfig:
    return OptimConfig(optimizer=optimizer, lr=LR, wd=0.2, no_decay_norms=True)


def train(layout: str, cfg: OptimConfig) -> dict[str, Tensor]:
    """Run a few updates, one of which is skipped for NaN gradients; return all parameters, moments and norms."""
    model = Model()
    sizes = LAYOUTS[layout]
    if sizes is not None:
        shard(model, init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard", "tensor")))
    optimizer = build_optimizer(model, cfg)
    parts, results = parts_of(model), {}
    for step in range(STEPS):
        for name, param in model.named_parameters():
            param.grad = torch.empty_like(param)
            grad = values_for(param, f"{name} {step}") * (float("nan") if step == SKIPPED else 1.0)
            copy_local_shard(param.grad, grad, parts.get(param, 1))
        norm = gradient_norm(model.parameters())
        step_unless_skipped(optimizer, ~norm.isfinite(), norm, MAX_NORM)
        results[f"norm {step}"] = norm
    for name, param in model.named_parameters():
        tensors = {"": param, **optimizer.state[param]}
        results.update({f"{name} {key}": full_tensor(value, parts.get(param, 1)) for key, value in tensors.items()})
    return {name: value.detach().clone() for name, value in results.items()}


def is_equal_on_all_ranks(results: dict[str, Tensor]) -> bool:
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in results.values())).hexdigest()
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    return len(set(digests)) == 1


@contextmanager
def count_matrices() -> Iterator[list[int]]:
    """Record how many matrices this rank orthogonalizes in each update."""
    counts: list[int] = []

    def count(stacks: list[Tensor]) -> None:
        counts.append(sum(len(stack) for stack in stacks))
        orthogonalize_all(stacks)

    orthogonalize_all = muon._orthogonalize_all
    with mock.patch.object(muon, "_orthogonalize_all", count):
        yield counts


def main(argv: list[str]) -> None:
    out, layouts = argv[0], argv[1:]
    dist.init_process_group("gloo")
    results = {}
    for optimizer in ("adamw", "muon"):
        for layout in layouts:
            with count_matrices() as counts:
                results[optimizer, layout] = train(layout, config(optimizer))
            total = torch.tensor(sum(counts))
            dist.all_reduce(total)
            assert total == (STEPS * MATRICES if optimizer == "muon" else 0), "each matrix is orthogonalized once"
            assert is_equal_on_all_ranks(results[optimizer, layout]), layout
    if dist.get_rank() == 0:
        torch.save(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
    end_process(0)
