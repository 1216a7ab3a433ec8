"""Asynchronous tensor parallelism: overlap a matrix product with the exchange of its tokens.

Inductor replaces each all-gather of tokens that a product follows, and each reduce-scatter that follows a product, by
one operator (Wang et al. 2023, https://doi.org/10.1145/3567955.3567959). It computes the product of one part of the
tokens while another part is copied between devices, through symmetric memory: memory of a device that the others read
and write directly. `tensor_parallel` exchanges tokens through functional collectives, which is what inductor looks for.
This is the only module that depends on these prototype features of torch.
"""

from __future__ import annotations

import socket
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from open_lm.distributed.processes import run_on_all_ranks
from open_lm.errors import ConfigError


def enable_async_tensor_parallel(mesh: DeviceMesh, device: torch.device) -> None:
    """Let inductor overlap exchanges over the one-dimensional `mesh` with products. Collective.

    Only blocks that are compiled afterwards change.

    Raises:
        ConfigError: the devices of a group cannot read each other's memory.
    """
    group = mesh.get_group()
    places: list[tuple[str, str, int | None]] = [("", "", None)] * mesh.size()
    dist.all_gather_object(places, (socket.gethostname(), device.type, device.index), group=group)
    run_on_all_ranks(lambda: check_async_tensor_parallel(places))
    from torch._inductor import config as inductor
    from torch.distributed import _symmetric_memory

    with warnings.catch_warnings():  # torch warns that this call is unnecessary, but still needs it
        warnings.simplefilter("ignore", FutureWarning)
        _symmetric_memory.enable_symm_mem_for_group(group.group_name)
    inductor._micro_pipeline_tp = True


def check_async_tensor_parallel(places: list[tuple[str, str, int | None]]) -> None:
    """Raise ConfigError if the devices at these places (host, type of device, index) do not share memory."""
    flag = "--async-tensor-parallel"
    if kinds := sorted({kind for _, kind, _ in places} - {"cuda"}):
        raise ConfigError(f"{flag}: found ranks on {', '.join(kinds)}, expected CUDA devices; remove the flag")
    hosts = sorted({host for host, _, _ in places})
    if len(hosts) > 1:
        raise ConfigError(
            f"{flag}: found the {len(places)} ranks of a tensor-parallel group on the machines {', '.join(hosts)}, "
            "expected one machine; choose a --tensor-parallel that divides its devices, or remove the flag"
        )
    indices = [index for _, _, index in places if index is not None]
    for one in indices:
        for other in indices:
            if one != other and not torch.cuda.can_device_access_peer(one, other):
                raise ConfigError(
                    f"{flag}: device {one} cannot access the memory of device {other}, expected devices that NVLink "
                    "connects; remove the flag"
                )
