"""The mesh of ranks: its sizes along the replicate, shard, context and tensor dimensions, and this rank's position.

rank = ((replicate * shard_size + shard) * context_size + context) * tensor_size + tensor, so that the ranks that
communicate most are neighbours. Expert parallelism divides the ranks that shard the parameters, shard * context, into
groups of neighbours. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        expert: number of ranks of an expert-parallel group, each of which holds some of the experts of a mixture.
        mesh: the device mesh ("replicate", "shard", "tensor") of the parameters. Its dimension "shard" has
            shard * context ranks. None without a process group.
        context_group: the process group of this rank's context group; None if context is 1.
        expert_mesh: the device mesh ("replicate", "expert_shard", "expert") of the experts' parameters, in which the
            last two dimensions divide the dimension "shard" of `mesh`; None if expert is 1.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    rank: int = 0
    expert: int = 1
    mesh: DeviceMesh | None = None
    context_group: ProcessGroup | None = None
    expert_mesh: DeviceMesh | None = None

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
    def seed_offset(self) -> int:
        """The number that this rank adds to the run's seed, different on every rank.

        The ranks of a context or tensor group drop features of different tokens and heads (the activations between
        blocks are split over them, see parallel/tensor_parallel.py), so their masks must differ too.
        """
        return self.data_rank + self.data_size * (self.context_rank * self.tensor + self.tensor_rank)

    @property
    def gradient_ranks(self) -> int:
        """Number of ranks over which the gradient of a parameter is averaged."""
        return self.data_size * self.context

    @property
    def shard_ranks(self) -> int:
        """Number of ranks over which FSDP shards a parameter that is not an expert's."""
        return self.shard * self.context

    @property
    def expert_shard_ranks(self) -> int:
        """Number of ranks over which FSDP shards the experts that a rank holds."""
        return self.shard_ranks // self.expert

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
    layout = _resolve_dimensions(cfg, world_size, ranks_per_node, rank)
    expert = cfg.expert_parallel
    if expert == 1:
        return layout
    if not cfg.fsdp:
        raise ConfigError(
            f"--expert-parallel {expert} requires --fsdp, which shards all other parameters over the same ranks; add it"
        )
    if layout.tensor > 1:
        raise ConfigError(
            f"--expert-parallel {expert} does not support tensor parallelism, found {layout.tensor} ranks; remove one "
            "of them"
        )
    if layout.shard_ranks % expert:
        among = f" (of {world_size} in {layout.replicate} replicas)" if layout.replicate > 1 else ""
        raise ConfigError(
            f"--expert-parallel {expert}: the parameters are sharded over {layout.shard_ranks} ranks{among}, expected "
            f"a multiple of {expert}; use a divisor of {layout.shard_ranks}, or start a different number of ranks"
        )
    return replace(layout, expert=expert)


def indivisible_experts(experts: int, ranks: int) -> str:
    """Return the message of --expert-parallel for a number of experts that `ranks` does not divide."""
    valid = ", ".join(str(number) for number in range(1, experts + 1) if experts % number == 0)
    return f"--expert-parallel {ranks}: the model has {experts} experts, which are divisible over {valid} ranks"


def expert_shard_dim(shape: Sequence[int], ranks: int) -> int:
    """Return the dimension along which FSDP shards a stack of matrices (experts, in, out) over `ranks` ranks.

    That is the first one that the ranks divide evenly: fewer experts than ranks would leave ranks without parameters,
    and FSDP pads every shard to the size of the largest. If there is none, the experts are sharded unevenly.
    """
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


def _resolve_dimensions(cfg: ParallelConfig, world_size: int, ranks_per_node: int, rank: int) -> MeshLayout:
    """Return the mesh layout without expert parallelism."""
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
