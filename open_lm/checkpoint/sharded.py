"""Save and load sharded checkpoints: each rank writes its local shards in the background; any world size can load.

Tensor names: model/<name>, optimizer/<parameter>/<moment>, averager/<averager>/<parameter>, rng/<rank>/<generator>,
with clean names (param_names.py). Everything else is JSON in `extra`. tensor_index.py describes the files.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.optim import Optimizer

from open_lm import storage
from open_lm.checkpoint.collective import reduce_scatter
from open_lm.checkpoint.folders import INDEX
from open_lm.checkpoint.model_state import (
    base_tensors,
    check_adapters,
    check_moments,
    empty_moment,
    select_weights,
    stored_tensors,
    trained_params,
)
from open_lm.checkpoint.planners import BlockPlanner, StagedPlanner
from open_lm.checkpoint.staging import HostCopies, chunks_to_write
from open_lm.checkpoint.tensor_index import (
    Index,
    StoredTensors,
    incomplete_reason,
    read_index_bytes,
)
from open_lm.checkpoint.tensor_store import TensorReader, TensorWriter
from open_lm.distributed.processes import run_on_all_ranks, run_on_master
from open_lm.distributed.rng import rng_state, rng_state_from_tensors, rng_state_to_tensors, set_rng_state
from open_lm.distributed.sharded_tensor import fused_weight_parts, local_blocks
from open_lm.errors import CheckpointError, StorageError, UserError, join_problems
from open_lm.model.adapters import has_adapters
from open_lm.optim.averaging import ModelAverager
from open_lm.parallel.parallelize import unwrap
from open_lm.storage.strict_json import to_json

__all__ = [
    "ShardedWriter", "StoredTensors", "TrainingState", "incomplete_reason", "load", "load_weights",
]  # fmt: skip
# Long enough for the slowest store. A rank that dies breaks the connection immediately.
_GROUP_TIMEOUT = timedelta(hours=6)


@dataclass
class TrainingState:
    """The live objects of a run. extra: JSON values, the same on all ranks; those of rank 0 are written."""

    model: nn.Module
    optimizer: Optimizer | None = None
    scaler: Any = None
    averagers: ModelAverager | None = None
    extra: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------- saving
class ShardedWriter:
    """A background writer of the checkpoints of one run, one at a time. All ranks create it and make the same calls.

    It has a separate process group, so that its thread's collectives do not interfere with those of training.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT) if dist.is_initialized() else None
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.last_pause_s = 0.0  # how long training paused for the copy to host memory
        self.last_write_s = 0.0  # how long the thread wrote until the checkpoint was complete

    @property
    def host_bytes(self) -> int:
        """Host memory allocated for copies, in bytes."""
        return self._copies.num_bytes

    @property
    def busy(self) -> bool:
        """Whether a background save is running."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self,
        state: TrainingState,
        folder: str,
        step: int,
        on_complete: Callable[[], None] | None = None,
        wait: bool = False,
    ) -> None:
        """Copy the state to host memory and write it to a local or remote `folder` in the background.

        First wait for the previous save and raise its error, if any. `on_complete` runs in rank 0's thread when the
        checkpoint is complete; if it fails, the save fails. With `wait`, return when everything is done.
        """
        self.wait()
        start_s = time.perf_counter()
        tensors, names = _tensors(state)
        rank = dist.get_rank() if dist.is_initialized() else 0
        rank_tensors = {f"rng/{rank}/{name}": value for name, value in rng_state_to_tensors(rng_state()).items()}
        chunks = chunks_to_write(tensors, rank_tensors, _fused_parts(state.model, tensors))
        planner = StagedPlanner([item for item, _ in chunks], self._copies.copy([view for _, view in chunks]))
        writer = TensorWriter(folder, step, _extra(state), names)
        self.last_pause_s = time.perf_counter() - start_s

        def work() -> None:
            start_s = time.perf_counter()
            self._write(planner, writer)
            self.last_write_s = time.perf_counter() - start_s
            self._run_on_master(folder, on_complete)

        self._start(folder, work)
        if wait:
            self.wait()

    def run_on_master(self, folder: str, action: Callable[[], None]) -> None:
        """Run an action for the complete checkpoint in `folder` in rank 0's thread, like `on_complete` of `save`."""
        self.wait()
        self._start(folder, lambda: self._run_on_master(folder, action))

    def check(self) -> None:
        """Raise the error of a failed background save, without waiting; ranks may raise it at different steps."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """Wait for the background save, and raise its error on all ranks."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def _start(self, folder: str, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except UserError as error:
                self._error = error
            except Exception as error:  # the connection to another rank broke
                self._error = StorageError(f"{_write_error(folder)} ({type(error).__name__}: {error})")

        # A daemon, so that an exiting process does not wait for it; it leaves an incomplete folder.
        self._thread = threading.Thread(target=run, name="checkpoint-write", daemon=True)
        self._thread.start()

    def _run_on_master(self, folder: str, action: Callable[[], None] | None) -> None:
        error_prefix = (
            f"{folder}: the checkpoint is complete, but the work after it (interchange files, removal) failed"
        )
        reduce_scatter(self._group, error_prefix, lambda: None, lambda _: action() if action is not None else None)

    def _write(self, planner: StagedPlanner, writer: TensorWriter) -> None:
        """Write like torch.distributed.checkpoint.save, but with this writer's group and readable errors."""
        error_prefix = _write_error(writer.folder)
        is_master = self._group is None or dist.get_rank() == 0
        planner.set_up_planner({}, None, is_master)
        metadata: Any = None

        def create_local_plan() -> SavePlan:
            return writer.prepare_local_plan(planner.create_local_plan())

        def create_global_plan(plans: list[SavePlan]) -> list[SavePlan]:
            nonlocal metadata
            plans, metadata = planner.create_global_plan(plans)
            return writer.prepare_global_plan(plans)

        def write() -> list[WriteResult]:
            return writer.write_data(planner.finish_plan(plan), planner).wait()

        try:
            plan = reduce_scatter(self._group, error_prefix, create_local_plan, create_global_plan)
            reduce_scatter(self._group, error_prefix, write, lambda results: writer.finish(metadata, results))
        except UserError:
            # Remove the partial checkpoint before any rank raises the error.
            reduce_scatter(self._group, error_prefix, lambda: _abandon(writer) if is_master else None, lambda _: None)
            raise


def _write_error(folder: str) -> str:
    return f"{folder}: the checkpoint could not be written"


def _abandon(writer: TensorWriter) -> None:
    try:
        writer.abandon()
    except StorageError as error:  # the remaining files are incomplete; the next save to that folder removes them
        logging.warning(f"{writer.folder}: the files of the failed save could not be removed: {error}")


def _tensors(state: TrainingState) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors that the ranks write together, and a map from every tensor name to its stored name."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, value in stored_tensors(state.model).items():
        names[f"model/{name}"] = first = first_name.setdefault(id(value), f"model/{name}")
        tensors[first] = value
    if state.optimizer is not None:
        for name, param in trained_params(state.model, state.optimizer).items():
            moments = state.optimizer.state.get(param, {})
            tensors.update({f"optimizer/{name}/{key}": v for key, v in moments.items() if isinstance(v, Tensor)})
    for averager_name, averager in (state.averagers.avgs_dict if state.averagers else {}).items():
        tensors.update({f"averager/{averager_name}/{name}": v for name, v in averager.tensors().items()})
    return tensors, {**names, **{name: name for name in tensors if name not in names}}


def _fused_parts(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Return the number of parts of each tensor whose parameter `fused_weight_parts` lists.

    Moments and averages are sharded and ordered like their parameters.
    """
    fused = fused_weight_parts(unwrap(model))
    parts = {}
    for name in names if fused else ():
        kind, _, parameter = name.partition("/")
        if kind == "optimizer":
            parameter = parameter.rpartition("/")[0]
        elif kind == "averager":
            parameter = parameter.partition("/")[2]
        if parameter in fused:
            parts[name] = fused[parameter]
    return parts


def _extra(state: TrainingState) -> dict[str, Any]:
    """Return a copy of `extra` as JSON values, with the states of the other objects that are not tensors."""
    extra = dict(state.extra)
    extra["world_size"] = dist.get_world_size() if dist.is_initialized() else 1
    if state.optimizer is not None:
        names = {id(param): name for name, param in trained_params(state.model, state.optimizer).items()}
        extra["param_groups"] = [
            {**group, "params": [names[id(param)] for param in group["params"]]}
            for group in state.optimizer.param_groups
        ]
    if state.scaler is not None:
        extra["scaler"] = state.scaler.state_dict()
    if state.averagers is not None:
        extra["averagers"] = {name: averager.counters() for name, averager in state.averagers.avgs_dict.items()}
    copy: dict[str, Any] = json.loads(to_json(extra))
    return copy


# ---------------------------------------------------------------------------------------------- loading
def load(state: TrainingState, folder: str) -> dict[str, Any]:
    """Load a checkpoint into the live objects in place, at any world size and sharding; return its `extra`.

    Collective; each rank reads only its local shards. The optimizer's hyperparameters do not change, and a parameter
    without moments in the checkpoint has none afterwards. Random generators are restored if the world size is the
    same. Raise CheckpointError on all ranks: before any change if the checkpoint does not fit; possibly after some
    tensors are loaded if its data is broken (BrokenCheckpoint).
    """
    index = _read_index(folder)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    targets = run_on_all_ranks(lambda: _targets(state, index, folder))
    rng: dict[str, Tensor] = {}
    if index.extra.get("world_size") == world_size:
        rng = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in index.tensors.items()
            if name.startswith(f"rng/{rank}/")
        }
    run_on_all_ranks(lambda: _read_into({**targets, **rng}, _fused_parts(state.model, targets), index, folder))
    if state.scaler is not None and index.extra.get("scaler"):
        state.scaler.load_state_dict(index.extra["scaler"])
    if state.averagers is not None:
        _finish_averagers(state.averagers, index, folder)
    if rng:
        set_rng_state(rng_state_from_tensors({name.rpartition("/")[2]: value for name, value in rng.items()}))
    return index.extra


def load_weights(model: nn.Module, folder: str) -> dict[str, Any]:
    """Load only a checkpoint's weights, for evaluation or to start another run; return its `extra`. Collective."""
    index = _read_index(folder)

    def find_targets() -> dict[str, Tensor]:
        stored = _stored_weights(index)
        select_weights(stored, model, folder)
        return _by_stored_name(base_tensors(model), stored)

    targets = run_on_all_ranks(find_targets)
    run_on_all_ranks(lambda: _read_into(targets, _fused_parts(model, targets), index, folder))
    return index.extra


def _read_index(folder: str) -> Index:
    data = run_on_master(lambda: read_index_bytes(folder))
    return run_on_all_ranks(lambda: Index.from_bytes(data, storage.join(folder, INDEX)))


def _read_into(targets: dict[str, Tensor], parts: dict[str, int], index: Index, folder: str) -> None:
    """Read this rank's local shard of each target from the tensor with its name."""
    reader = TensorReader(folder, index)
    planner = BlockPlanner({name: local_blocks(tensor, parts.get(name, 1)) for name, tensor in targets.items()})
    planner.set_up_planner({}, reader.read_metadata(), is_coordinator=True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()


def _targets(state: TrainingState, index: Index, folder: str) -> dict[str, Tensor]:
    """Return the tensors to fill by stored name; raise CheckpointError before anything changes."""
    weights = _stored_weights(index)
    (check_adapters if has_adapters(state.model) else select_weights)(weights, state.model, folder)
    targets = _by_stored_name(stored_tensors(state.model), weights)
    if state.averagers is not None:
        for averager_name, averager in state.averagers.avgs_dict.items():
            prefix = f"averager/{averager_name}/"
            averages = averager.tensors() if averager_name in index.extra.get("averagers", {}) else {}
            stored = {name: index.tensors.get(prefix + name) for name in averages}
            problems = [
                f"{prefix}{name}: found {tensor.shape if tensor else 'nothing'}, the model has {tuple(value.shape)}"
                for (name, value), tensor in zip(averages.items(), stored.values(), strict=True)
                if tensor is None or tensor.shape != tuple(value.shape)
            ]
            if problems:
                raise CheckpointError(join_problems(problems[:8], f"{folder}: does not fit the model"))
            targets.update({prefix + name: value for name, value in averages.items()})
    if state.optimizer is not None:
        targets.update(_moments(state.model, state.optimizer, index, folder))
    return targets


def _stored_weights(index: Index) -> dict[str, Tensor]:
    """Return the stored tensors of the model by name, on the meta device."""
    return {
        name.removeprefix("model/"): torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in index.tensors.items()
        if name.startswith("model/")
    }


def _by_stored_name(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors to fill, of those of a model, by stored name."""
    targets: dict[int, tuple[str, Tensor]] = {}
    for name, value in tensors.items():
        if name in stored:
            targets.setdefault(id(value), (f"model/{name}", value.detach()))
    return dict(targets.values())


def _moments(model: nn.Module, optimizer: Optimizer, index: Index, folder: str) -> dict[str, Tensor]:
    """Return the optimizer's moments to fill by stored name; create missing ones, sharded like their parameters."""
    params = trained_params(model, optimizer)
    groups = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    stored: dict[str, dict[str, Any]] = {}
    for key, tensor in index.tensors.items():
        if key.startswith("optimizer/"):
            name, _, moment = key.removeprefix("optimizer/").rpartition("/")
            stored.setdefault(name, {})[moment] = tensor
    check_moments({name: moments.keys() for name, moments in stored.items()}, model, optimizer, folder)
    problems = [f"the optimizer has no parameter {name}" for name in stored if name not in params]
    problems += [
        f"optimizer/{name}/{moment}: found {tensor.shape}, the model has {tuple(params[name].shape)}"
        for name, moments in stored.items()
        for moment, tensor in moments.items()
        if name in params and tensor.shape not in ((), tuple(params[name].shape))
    ]
    if problems:
        raise CheckpointError(join_problems(problems[:8], f"{folder}: the optimizer state does not fit the model"))
    targets: dict[str, Tensor] = {}
    for name, param in params.items():
        if name not in stored:
            optimizer.state.pop(param, None)
            continue
        moments = optimizer.state[param]
        for moment, tensor in stored[name].items():
            if moment not in moments:
                moments[moment] = empty_moment(param, tensor.shape, tensor.dtype, groups[id(param)])
            targets[f"optimizer/{name}/{moment}"] = moments[moment]
    return targets


def _finish_averagers(averagers: ModelAverager, index: Index, folder: str) -> None:
    for name, averager in averagers.avgs_dict.items():
        counters = index.extra.get("averagers", {}).get(name)
        if counters is None:
            logging.warning(f"{folder}: has no averager {name}; it restarts from the loaded weights")
            averager.reset()
        else:
            averager.load_counters(counters)
