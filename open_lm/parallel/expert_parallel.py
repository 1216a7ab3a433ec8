"""Expert parallelism: the ranks of a group divide the experts of every mixture (--expert-parallel).

The model needs no changes. The parameters of the experts become DTensors over the mesh dimension "expert", each rank
with E/N of the E experts. FSDP2 shards them over the dimension "expert_shard", the ranks that hold the same experts. A
mixture sends its tokens through `distributed.expert_exchange`.

Gradients: an expert receives the tokens of all N ranks of its group, so its gradient is the sum over the group. FSDP2
averages it over the N times fewer ranks of "expert_shard", where all other gradients are averaged over all ranks. The
backward pass therefore divides it by N.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from open_lm.config.layout import expert_shard_dim, indivisible_experts
from open_lm.distributed.expert_exchange import ExpertExchange
from open_lm.distributed.sharded_tensor import local_tensor
from open_lm.errors import ConfigError
from open_lm.model.mixture_of_experts import ExpertMLP, MixtureOfExperts
from open_lm.parallel.split_parameters import split_parameters


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    """Return the mixtures of experts of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def check_has_experts(model: nn.Module, ranks: int) -> None:
    """Raise ConfigError if --expert-parallel finds no experts to divide over `ranks` ranks."""
    if not mixtures(model):
        raise ConfigError(
            f"--expert-parallel {ranks}: the model has no mixture of experts; remove the flag, or set --moe-freq"
        )


def check_expert_parallel(model: nn.Module, ranks: int) -> None:
    """Raise ConfigError if the experts of a model cannot be divided over `ranks` ranks."""
    for network in mixtures(model):
        if network.num_experts % ranks:
            raise ConfigError(indivisible_experts(network.num_experts, ranks))


def apply_expert_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the experts of a model over the ranks of the one-dimensional `mesh`, in place."""
    exchange = ExpertExchange(mesh.get_group())
    for network in mixtures(model):
        network.exchange = exchange
        mlp: ExpertMLP = network.experts.mlp
        names = [name for name, _ in mlp.named_parameters(recurse=False)]
        split_parameters(mlp, mesh, dict.fromkeys(names, 0), gradient_scale=1 / mesh.size())


def expert_placements(model: nn.Module, mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard | None] | None:
    """Return the function that gives FSDP2 the placement of a parameter; None for a model without experts.

    `mesh` is the mesh of the experts' FSDP2 groups, whose last dimension shards; see `expert_shard_dim`. With tensor
    parallelism, which splits the other dimensions, experts are sharded along the first one.
    """
    experts = {id(parameter) for network in mixtures(model) for parameter in network.experts.parameters()}
    if not experts:
        return None
    ranks = mesh.shape[-1]

    def placement(parameter: nn.Parameter) -> Shard | None:
        is_split_inside = isinstance(parameter, DTensor) and parameter.placements != (Shard(0),)
        if id(parameter) not in experts or is_split_inside:
            return None
        return Shard(expert_shard_dim(local_tensor(parameter).shape, ranks))

    return placement
