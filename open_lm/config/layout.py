"""The mesh of ranks: its sizes along the replicate, shard, context and tensor dimensions, and this rank's position.

rank = ((replicate * shard_size + shard) * context_size + context) * tensor_size + tensor, so that the ranks that
communicate most are neighbours. Does not import torch.
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
    """The sizes of the mesh of ranks and this rank's position in it.

    The product of replicate, shard, context and tensor is the number of ranks.

    Attributes:
        replicate: number of model replicas.
        shard: number of ranks over which the parameters of a replica are sharded (FSDP).
        context: number of ranks of a context group, each of which processes a shard of every sequence.
        tensor: number of ranks of a tensor-parallel group, each of which holds a shard of every matrix.
        rank: this rank.
        mesh: the device mesh ("replicate", "shard", "tensor") of the parameters. Its dimension "shard" has
            shard * context ranks. None without a process group.
        context_group: the process group of this rank's context group; None if context is 1.
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
        """Number of data-parallel ranks, over which the sequences of the global batch are divided."""
        return self.replicate * self.shard

    @property
    def data_rank(self) -> int:
        """This rank's data-parallel rank."""
        return self.rank // (self.context * self.tensor)

    @property
    def context_rank(self) -> int:
        return self.rank // self.tensor % self.context

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def gradient_ranks(self) -> int:
        """Number of ranks over which the gradient of a parameter is averaged."""
        return self.data_size * self.context

    @property
    def contributes_tokens(self) -> bool:
        """Whether this rank contributes its tokens to a sum over all ranks: one rank of each tensor-parallel group."""
        return self.tensor_rank == 0

    @property
    def contributes_sequences(self) -> bool:
        """Whether this rank contributes its sequences to a sum over all ranks: one rank per data-parallel rank."""
        return self.contributes_tokens and self.context_rank == 0


def resolve_layout(cfg: ParallelConfig, world_size: int, ranks_per_node: int, rank: int = 0) -> MeshLayout:
    """Return the mesh layout that `cfg` specifies for `world_size` ranks on nodes of `ranks_per_node` ranks.

    Raise ConfigError if the number of ranks is not divisible accordingly.
    """
    context = cfg.context_parallel
    if cfg.mesh_dim is not None:
        replicate, shard, tensor = _resolve_mesh_dim(cfg.mesh_dim, world_size, context)
        return MeshLayout(replicate, shard, context, tensor, rank)
    tensor = cfg.tensor_parallel
    group_size = context * tensor
    flags = " x ".join(
        f"--{name}-parallel {size}" for name, size in (("tensor", tensor), ("context", context)) if size > 1
    )
    if world_size % group_size:
        raise ConfigError(
            f"{flags}: found {world_size} ranks, expected a multiple of {group_size}; start a different number of ranks"
        )
    if not cfg.fsdp:
        return MeshLayout(world_size // group_size, 1, context, tensor, rank)
    if not (cfg.fsdp_hybrid or cfg.fsdp_hybrid_o2):
        return MeshLayout(1, world_size // group_size, context, tensor, rank)
    if world_size % ranks_per_node:
        raise ConfigError(
            f"--fsdp-hybrid: found {world_size} ranks, expected a multiple of the {ranks_per_node} ranks of a node; "
            "start the same number of ranks on every node"
        )
    if ranks_per_node % group_size:
        raise ConfigError(
            f"--fsdp-hybrid with {flags}: found {ranks_per_node} ranks per node, expected a multiple of {group_size}"
        )
    return MeshLayout(world_size // ranks_per_node, ranks_per_node // group_size, context, tensor, rank)


def parse_mesh_dim(text: str) -> tuple[int, int, int]:
    """Parse --mesh-dim into (data, fsdp, tensor), at most one of which is -1; raise ConfigError if it is invalid."""
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 3 or sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(
            f"--mesh-dim: found {text!r}, expected three numbers of ranks, data,fsdp,tensor, one of which may be -1 "
            "(all remaining ranks), such as -1,2,4"
        )
    return sizes[0], sizes[1], sizes[2]


def _resolve_mesh_dim(text: str, world_size: int, context: int) -> tuple[int, int, int]:
    """Return the sizes of --mesh-dim with -1 replaced by the number of remaining ranks."""
    sizes = parse_mesh_dim(text)
    known = context
    for size in sizes:
        known *= size if size > 0 else 1
    if world_size % known or (-1 not in sizes and known != world_size):
        context_flag = f" x --context-parallel {context}" if context > 1 else ""
        expected = "a multiple of " if -1 in sizes else ""
        raise ConfigError(
            f"--mesh-dim {text}{context_flag} needs {expected}{known} ranks, but {world_size} were started: change the "
            "flag or the number of ranks"
        )
    replicate, shard, tensor = (world_size // known if size == -1 else size for size in sizes)
    return replicate, shard, tensor
