"""Ranks, devices, the process group and collectives on objects. All functions also work without a process group."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from open_lm.config.layout import MeshLayout, resolve_layout
from open_lm.config.sections import ParallelConfig
from open_lm.errors import RANK_NAMES, ConfigError, UserError, join_problems

T = TypeVar("T")

LOCAL_RANK_NAMES = ("LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
WORLD_SIZE_NAMES = ("WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
LOCAL_SIZE_NAMES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_STORE_TIMEOUT = timedelta(minutes=30)
_destroyed_groups: list[Any] = []  # see shutdown
_NAME_COUNTER = itertools.count()  # names are requested in the same order after a restart


@dataclass(frozen=True)
class Runtime:
    """Rank and device of this process, and whether it started the process group."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device: torch.device = torch.device("cpu")
    owns_group: bool = False

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return dist.is_available() and dist.is_initialized()


def world_info_from_env() -> tuple[int, int, int]:
    """Return (local_rank, rank, world_size) as set by torchrun, MPI, PMI, Slurm or Open MPI; default (0, 0, 1)."""
    return _int_from_env(LOCAL_RANK_NAMES, 0), _int_from_env(RANK_NAMES, 0), _int_from_env(WORLD_SIZE_NAMES, 1)


def init_runtime(cfg: ParallelConfig) -> Runtime:
    """Select this rank's device and join the process group: gloo on CPU, `cfg.dist_backend` on CUDA.

    A single process starts a group only for --fsdp or --force-distributed. A group that the caller has already started
    is used and not destroyed by `shutdown`. Raise ConfigError if the launcher's environment contradicts the flags.
    """
    local_rank, rank, world_size = world_info_from_env()
    if cfg.preset_world_size is not None and cfg.preset_world_size != world_size:
        raise ConfigError(
            f"--preset-world-size {cfg.preset_world_size}: the launcher started {world_size} ranks; start "
            f"{cfg.preset_world_size} ranks or remove the flag"
        )
    device = select_device(local_rank, use_first=cfg.no_set_device_rank)
    started = False
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    elif world_size > 1 or cfg.fsdp or cfg.force_distributed:
        _init_process_group(cfg, device, rank, world_size)
        _unbind_device()
        started = True
    local_size = _int_from_env(LOCAL_SIZE_NAMES, 0) or _default_local_size(device, world_size)
    return Runtime(rank, local_rank, world_size, local_size, device, started)


def init_distributed_device(args: Any) -> torch.device:
    """Call `init_runtime` for a Namespace; set its distributed, world_size, rank, local_rank and device attributes.

    Return the device.
    """
    runtime = init_runtime(ParallelConfig.from_object(args))
    args.distributed = runtime.distributed
    args.world_size, args.rank, args.local_rank = runtime.world_size, runtime.rank, runtime.local_rank
    args.device = str(runtime.device)
    return runtime.device


def shutdown(runtime: Runtime) -> None:
    """Destroy the process group if `init_runtime` started it.

    With several ranks, do nothing while an exception is being handled. Other ranks may be inside a collective:
    destroying the group could block, or end their connection before this rank has reported its error.
    Programs that start ranks call `end_process` afterwards.
    """
    if sys.exc_info()[0] is not None and runtime.world_size > 1:
        return
    if runtime.owns_group and dist.is_initialized():
        # Up to torch 2.7, the destructor of a gloo group joins its worker threads while it holds the GIL. A worker
        # that still has to release a tensor of the last collective waits for the GIL: a deadlock. The references keep
        # the destructors from running.
        _destroyed_groups.extend(dist.distributed_c10d._world.pg_map)
        dist.destroy_process_group()


def restart_count() -> int:
    """Return how often the launcher has restarted this run (torchrun --max-restarts)."""
    return _int_from_env(("TORCHELASTIC_RESTART_COUNT",), 0)


def agree_on_name(runtime: Runtime, make_name: Callable[[], str]) -> str:
    """Return the name that rank 0 generated with `make_name()` at the first start of the run. Collective.

    The name is kept in the store of torchrun's agent, which outlives the workers. Raise ConfigError if a restarted run
    has no such store.
    """
    number = next(_NAME_COUNTER)

    def stored_name() -> str:
        store = _agent_store()
        if store is not None:
            run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
            return str(store.compare_set(f"open_lm/{run_id}/name_{number}", "", make_name()).decode())
        if restart_count():
            raise ConfigError(
                f"--name: not set, and this is restart {restart_count()} of a run whose launcher does not store the "
                "generated name across restarts; set --name"
            )
        return make_name()

    return run_on_master(stored_name)


def build_layout(runtime: Runtime, cfg: ParallelConfig) -> MeshLayout:
    """Return the mesh layout of all ranks with its device mesh and context group. Collective.

    Raise ConfigError if the ranks cannot be divided as the flags specify.
    """
    layout = resolve_layout(cfg, runtime.world_size, runtime.local_world_size, runtime.rank)
    if not runtime.distributed:
        return layout
    device_type = runtime.device.type
    replicate, shard, context, tensor = layout.replicate, layout.shard, layout.context, layout.tensor
    names: tuple[str, ...] = ("replicate", "shard", "tensor")
    mesh = init_device_mesh(device_type, (replicate, shard * context, tensor), mesh_dim_names=names)
    groups = mesh.get_all_groups()
    context_group = None
    if context > 1:
        names = ("replicate", "shard", "context", "tensor")
        context_mesh = init_device_mesh(device_type, (replicate, shard, context, tensor), mesh_dim_names=names)
        context_group = context_mesh.get_group("context")
        groups.append(context_group)
    expert_mesh = None
    if layout.expert > 1:
        names = ("replicate", "expert_shard", "expert")
        sizes = (replicate, layout.expert_shard_ranks, layout.expert)
        expert_mesh = init_device_mesh(device_type, sizes, mesh_dim_names=names)
        groups += expert_mesh.get_all_groups()
    for group in groups:
        if group is not dist.group.WORLD:  # subgroups get torch's default timeout instead of the world group's
            _set_pg_timeout(timedelta(seconds=cfg.dist_timeout), group)
    return replace(layout, mesh=mesh, context_group=context_group, expert_mesh=expert_mesh)


def is_master(args: Any, local: bool = False) -> bool:
    """Return whether this is rank 0, or with `local` local rank 0. `args` has rank and local_rank, like a Runtime."""
    return getattr(args, "local_rank" if local else "rank", 0) == 0


def broadcast_object(args: Any, obj: T, src: int = 0) -> T:
    """Return rank `src`'s `obj`, a picklable object, on every rank. `args` is unused; existing callers pass it."""
    if not dist.is_initialized():
        return obj
    objects = [obj]
    dist.broadcast_object_list(objects, src=src)
    return objects[0]


def run_on_master(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 only; every rank returns its result or raises its exception. Collective."""
    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        outcome[1].on_every_rank = True
        raise outcome[1]
    return cast(T, outcome[0])


def run_on_all_ranks(function: Callable[[], T]) -> T:
    """Call `function`, which must not contain collectives, on every rank. Collective.

    If it raises a UserError on any rank, raise it on all ranks: none then waits for a rank that has ended. Equal
    messages are reported once.
    """
    if not dist.is_initialized():
        return function()
    result, failure = None, None
    try:
        result = function()
    except UserError as error:
        failure = error
    failures: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    by_message = {str(error): error for error in failures if error is not None}
    if by_message:
        first = next(iter(by_message.values()))
        failure = first
        if len(by_message) > 1:
            failure = type(first)(join_problems(list(by_message), "the ranks found problems"))
        failure.on_every_rank = True
        raise failure
    return cast(T, result)


def gather_objects(obj: T) -> list[T]:
    """Return every rank's `obj`, in rank order, on rank 0, and an empty list on other ranks. Collective."""
    if not dist.is_initialized():
        return [obj]
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(obj, gathered)
    return gathered or []


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks in place and return it. Collective; asynchronous on CUDA like any kernel."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def select_device(
    local_rank: int, *, use_first: bool = False, first_flag: str = "--no-set-device-rank"
) -> torch.device:
    """Select and return the CUDA device of a rank of this node, or the first one; the CPU if there is none.

    Raise ConfigError if there are fewer devices than ranks; it names `first_flag`, which selects the first device.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    _prefer_expandable_segments()
    count = torch.cuda.device_count()
    needed = 1 if use_first else max(local_rank + 1, _int_from_env(LOCAL_SIZE_NAMES, 0))
    if needed > count:
        raise ConfigError(
            f"{needed} ranks on this node need one CUDA device each, but only {count} are visible: start at most "
            f"{count} ranks per node, or pass {first_flag} if each rank sees only its own device"
        )
    device = torch.device("cuda", 0 if use_first else local_rank)
    torch.cuda.set_device(device)
    return device


def _prefer_expandable_segments() -> None:
    """Let torch's allocator on CUDA grow its segments, which avoids fragmentation, unless the user configures it.

    Call before the device is initialized.
    """
    if torch.version.cuda is None or any(name in os.environ for name in ALLOCATOR_NAMES):
        return
    # torch 2.9 ignores the general name (https://github.com/pytorch/pytorch/issues/183387); from 2.11 on it has effect.
    has_general_name = torch.torch_version.TorchVersion(torch.__version__) >= "2.11"
    os.environ[ALLOCATOR_NAMES[0 if has_general_name else 1]] = "expandable_segments:True"


def _init_process_group(cfg: ParallelConfig, device: torch.device, rank: int, world_size: int) -> None:
    if device.type == "cuda":
        _record_collectives()
        # Objects and offloaded parameters are in host memory, so CPU tensors need a backend too.
        backend = f"cpu:gloo,cuda:{cfg.dist_backend}" if cfg.dist_backend != "gloo" else "gloo"
    else:
        backend = "gloo"
    options: dict[str, Any] = {"timeout": timedelta(seconds=cfg.dist_timeout)}
    if backend != "gloo":
        options["device_id"] = device  # NCCL then connects at once
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
        return
    if cfg.dist_url == "env://":
        for name, value in _slurm_master(os.environ).items():
            os.environ.setdefault(name, value)
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(_missing_master(world_size, missing))
    agent_store = _agent_store(options["timeout"]) if cfg.dist_url == "env://" else None
    if agent_store is not None:
        # After a restart the store still holds the addresses of the previous workers, so each start gets a prefix.
        store = dist.PrefixStore(f"restart_{restart_count()}", agent_store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, **options)
        return
    try:
        dist.init_process_group(backend, init_method=cfg.dist_url, rank=rank, world_size=world_size, **options)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        where = f"MASTER_PORT={os.environ['MASTER_PORT']}" if cfg.dist_url == "env://" else f"--dist-url {cfg.dist_url}"
        raise ConfigError(
            f"{where}: another process uses this port of rank 0's node; choose a free one, the same on all ranks"
        ) from error


def _unbind_device() -> None:
    """Let meshes create groups with all backends of the world group.

    From a world group that is bound to a device torch splits them instead. With several backends that fails, or the
    groups lack the CPU's backend, depending on torch's version (https://github.com/pytorch/pytorch/issues/159200).
    """
    world: Any = dist.group.WORLD
    world.bound_device_id = None


def _record_collectives() -> None:
    """Let NCCL record its last operations, which the watchdog writes when a run hangs. gloo always does."""
    name = "TORCH_FR_BUFFER_SIZE" if hasattr(_distributed_c10d, "_dump_fr_trace") else "TORCH_NCCL_TRACE_BUFFER_SIZE"
    os.environ.setdefault(name, "2000")


def _missing_master(world_size: int, missing: list[str]) -> str:
    """Return the message for ranks that cannot find rank 0. It names the variable that sets the number of ranks."""
    names = " and ".join(missing)
    if world_size == 1:
        return f"MASTER_ADDR is set without {names}: set both or none of MASTER_ADDR and MASTER_PORT"
    name = next(name for name in WORLD_SIZE_NAMES if name in os.environ)
    return (
        f"{name}={os.environ[name]} announces {world_size} ranks without {names}: start them with torchrun or srun, "
        "set the variables to the address and a free port of rank 0's node, or set --dist-url tcp://HOST:PORT; for a "
        f"single process, unset {name}"
    )


def _slurm_master(environment: Mapping[str, str]) -> dict[str, str]:
    """Return MASTER_ADDR and MASTER_PORT for ranks started by srun; an empty dict outside of Slurm's job steps.

    The address is the first node of the step, where rank 0 runs; the port is derived from the job id. Node lists look
    like gpu[003-010,12],cpu1.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])+", nodes)
    job, step = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "0")
    if first is None or not (job.isdecimal() and step.isdecimal()) or "SLURM_PROCID" not in environment:
        return {}
    port = 20000 + (int(job) + int(step)) % 10000
    return {"MASTER_ADDR": re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group()), "MASTER_PORT": str(port)}


def _agent_store(timeout: timedelta = _STORE_TIMEOUT) -> dist.TCPStore | None:
    """Connect to the store of torchrun's agent, which outlives the workers. Return None if there is no such store."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)


def _default_local_size(device: torch.device, world_size: int) -> int:
    """Return the number of ranks per node if the launcher does not set it: one per visible device."""
    return min(world_size, torch.cuda.device_count()) if device.type == "cuda" else world_size


def _int_from_env(names: tuple[str, ...], default: int) -> int:
    """Return the first of the environment variables that is set, as an integer."""
    for name in names:
        if name in os.environ:
            try:
                return int(os.environ[name])
            except ValueError:
                raise ConfigError(
                    f"environment variable {name}: found {os.environ[name]!r}, expected a number"
                ) from None
    return default
