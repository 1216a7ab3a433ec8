"""Where a rank stands among all of them: how they are divided into replicas, shards, and parts of rows or matrices.

Rank = ((replicate * shard_size + shard) * context_size + context) * tensor_size + tensor: those that exchange most are
neighbours. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from open_lm.config.sections import ParallelConfig
from open_lm.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class MeshLayout:
    """How all ranks are divided, and where this one stands.

    Attributes:
        replicate: whole copies of the model. shard: ranks that one copy's parameters are sharded over (FSDP).
        context: ranks that share the rows of a batch, each with a part of every sequence. tensor: ranks that share
            rows and sequences, each with a part of every matrix. The four multiply to the number of ranks.
        rank: this one.
        mesh: ("replicate", "shard", "tensor"), what parameters are spread over; its dimension "shard" has
            shard * context ranks. None without a process group.
        context_group: the ranks that share this one's rows; None where context is 1.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    rank: int = 0
    mesh: DeviceMesh | None = None
    context_group: ProcessGroup | None = None

    @property
    def data_size(self) -> int:
        """Into how many parts the rows of the global batch are divided."""
        return self.replicate * self.shard

    @property
    def data_rank(self) -> int:
        """Which of these parts is this rank's."""
        return self.rank // (self.context * self.tensor)

    @property
    def context_rank(self) -> int:
        return self.rank // self.tensor % self.context

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def gradient_ranks(self) -> int:
        """Ranks over which gradients of the same weights are averaged."""
        return self.data_size * self.context

    @property
    def contributes_tokens(self) -> bool:
        """Whether what this rank says of its tokens counts in a sum over all ranks: others have the same ones."""
        return self.tensor_rank == 0

    @property
    def contributes_sequences(self) -> bool:
        """Whether what this rank says of its rows counts in a sum over all ranks."""
        return self.contributes_tokens and self.context_rank == 0


def resolve_layout(cfg: ParallelConfig, world_size: int, per_node: int, rank: int = 0) -> MeshLayout:
    """How `cfg` divides so many ranks, of which each node has `per_node`. ConfigError where they do not divide."""
    context = cfg.context_parallel
    if cfg.mesh_dim is not None:
        replicate, shard, tensor = _inferred(cfg.mesh_dim, world_size, context)
        return MeshLayout(replicate, shard, context, tensor, rank)
    tensor = cfg.tensor_parallel
    together = context * tensor
    flags = " x ".join(
        f"--{name}-parallel {size}" for name, size in (("tensor", tensor), ("context", context)) if size > 1
    )
    if world_size % together:
        raise ConfigError(
            f"{flags}: {world_size} ranks do not divide into groups of {together}; start a multiple of {together}"
        )
    if not cfg.fsdp:
        return MeshLayout(world_size // together, 1, context, tensor, rank)
    if not (cfg.fsdp_hybrid or cfg.fsdp_hybrid_o2):
        return MeshLayout(1, world_size // together, context, tensor, rank)
    if world_size % per_node:
        raise ConfigError(
            f"--fsdp-hybrid: {world_size} ranks do not divide into nodes of {per_node}; start the same number on every "
            "node"
        )
    if per_node % together:
        raise ConfigError(f"--fsdp-hybrid: the {per_node} ranks of a node do not divide into groups of {flags}")
    return MeshLayout(world_size // per_node, per_node // together, context, tensor, rank)


def parse_mesh_dim(text: str) -> tuple[int, int, int]:
    """(data, fsdp, tensor) of --mesh-dim, one of them perhaps -1; ConfigError for anything else."""
    words = [word.strip() for word in text.split(",")]
    try:
        sizes = [int(word) for word in words]
    except ValueError:
        sizes = []
    if len(sizes) != 3 or sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(
            f"--mesh-dim: found {text!r}, expected three numbers of ranks, data,fsdp,tensor, one of which may be -1 "
            "(all that are left), such as -1,2,4"
        )
    return sizes[0], sizes[1], sizes[2]


def _inferred(text: str, world_size: int, context: int) -> tuple[int, int, int]:
    sizes = parse_mesh_dim(text)
    known = context
    for size in sizes:
        known *= size if size > 0 else 1
    if world_size % known or (-1 not in sizes and known != world_size):
        times = f" x --context-parallel {context}" if context > 1 else ""
        expected = "a multiple of " if -1 in sizes else ""
        raise ConfigError(
            f"--mesh-dim {text}{times} needs {expected}{known} ranks, and {world_size} were started: change one of them"
        )
    replicate, shard, tensor = (world_size // known if size == -1 else size for size in sizes)
    return replicate, shard, tensor
