"""The sharded checkpoint of a run: every rank writes its part while training goes on, and any number of ranks load it.

Names of tensors: model/<name>, optimizer/<parameter>/<moment>, averager/<averager>/<parameter>, rng/<rank>/<generator>,
with clean names (param_names.py). All else is JSON in `extra`. tensor_index.py describes the files.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
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
from open_lm.checkpoint.model_state import check_moments, empty_moment, fitting, named_tensors, trained
from open_lm.checkpoint.planners import BoxPlanner, StagedPlanner
from open_lm.checkpoint.staging import HostCopies, own_chunks
from open_lm.checkpoint.tensor_index import (
    Index,
    StoredTensors,
    incompleteness,
    read_index_bytes,
)
from open_lm.checkpoint.tensor_store import TensorReader, TensorWriter
from open_lm.distributed.processes import run_on_all_ranks, run_on_master
from open_lm.distributed.rng import rng_state_from_tensors, rng_state, set_rng_state, rng_state_to_tensors
from open_lm.distributed.sharded_tensor import local_blocks, fused_weight_parts
from open_lm.errors import CheckpointError, StorageError, UserError, join_problems
from open_lm.optim.averaging import ModelAverager
from open_lm.parallel.parallelize import unwrap

__all__ = [
    "ShardedWriter", "StoredTensors", "TrainingState", "incompleteness", "load", "load_weights",
]  # fmt: skip
# A rank that ends breaks the connection at once; this is for the slowest store.
_GROUP_TIMEOUT = timedelta(hours=6)


@dataclass
class TrainingState:
    """The live objects of a run. extra: JSON-able, the same on all ranks; rank 0's is written."""

    model: nn.Module
    optimizer: Optimizer | None = None
    scaler: Any = None
    averagers: ModelAverager | None = None
    extra: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------- saving
class ShardedWriter:
    """Writes the checkpoints of one run in the background, one after the other. All ranks make it and call it alike.

    It has a process group of its own, so that what its thread says to other ranks never mixes with what training says.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT) if dist.is_initialized() else None
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.last_pause_s = 0.0  # of training, for the copy to host memory
        self.last_write_s = 0.0  # of the thread, until the checkpoint was complete

    @property
    def host_bytes(self) -> int:
        """Host memory held for copies."""
        return self._copies.num_bytes

    @property
    def busy(self) -> bool:
        """Whether a save is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self,
        state: TrainingState,
        folder: str,
        step: int,
        then: Callable[[], None] | None = None,
        wait: bool = False,
    ) -> None:
        """Copy the state to host memory and have a thread write it to `folder`, local or remote.

        Waits for the save before and raises its error, if it had one. `then` runs in rank 0's thread when the
        checkpoint is complete; its error counts as the save's. With `wait`, return when all is done.
        """
        self.wait()
        started = time.perf_counter()
        tensors, names = _tensors(state)
        rank = dist.get_rank() if dist.is_initialized() else 0
        private = {f"rng/{rank}/{name}": value for name, value in rng_state_to_tensors(rng_state()).items()}
        chunks = own_chunks(tensors, private, _parts(state.model, tensors))
        planner = StagedPlanner([item for item, _ in chunks], self._copies.copy([view for _, view in chunks]))
        writer = TensorWriter(folder, step, _extra(state), names)
        self.last_pause_s = time.perf_counter() - started

        def work() -> None:
            begun = time.perf_counter()
            self._write(planner, writer)
            self.last_write_s = time.perf_counter() - begun
            self._follow_up(folder, then)

        self._start(folder, work)
        if wait:
            self.wait()

    def follow_up(self, folder: str, then: Callable[[], None]) -> None:
        """Have rank 0's thread do what is to follow the complete checkpoint in `folder`, as `save` has it done."""
        self.wait()
        self._start(folder, lambda: self._follow_up(folder, then))

    def check(self) -> None:
        """Raise the error of a background save that has failed. Does not wait; ranks may learn of it a step apart."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """Wait for the background save, and raise its error: the same on all ranks."""
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
            except Exception as error:  # another rank is gone
                self._error = StorageError(f"{_failure(folder)} ({type(error).__name__}: {error})")

        # A daemon: a process that has to end leaves an incomplete folder behind, and waits for no one.
        self._thread = threading.Thread(target=run, name="checkpoint-write", daemon=True)
        self._thread.start()

    def _follow_up(self, folder: str, then: Callable[[], None] | None) -> None:
        failed = f"{folder}: the checkpoint is complete, but what was to follow failed"
        reduce_scatter(self._group, failed, lambda: None, lambda _: then() if then is not None else None)

    def _write(self, planner: StagedPlanner, writer: TensorWriter) -> None:
        """What torch.distributed.checkpoint.save does, over the writer's own group and with errors that can be read."""
        failed = _failure(writer.folder)
        is_master = self._group is None or dist.get_rank() == 0
        planner.set_up_planner({}, None, is_master)
        metadata: Any = None

        def plan() -> SavePlan:
            return writer.prepare_local_plan(planner.create_local_plan())

        def plan_all(plans: list[SavePlan]) -> list[SavePlan]:
            nonlocal metadata
            plans, metadata = planner.create_global_plan(plans)
            return writer.prepare_global_plan(plans)

        def write() -> list[WriteResult]:
            return writer.write_data(planner.finish_plan(own_plan), planner).wait()

        try:
            own_plan = reduce_scatter(self._group, failed, plan, plan_all)
            reduce_scatter(self._group, failed, write, lambda results: writer.finish(metadata, results))
        except UserError:
            # Told to all only when nothing half-written is in the way any more.
            reduce_scatter(self._group, failed, lambda: _abandon(writer) if is_master else None, lambda _: None)
            raise


def _failure(folder: str) -> str:
    return f"{folder}: the checkpoint could not be written"


def _abandon(writer: TensorWriter) -> None:
    try:
        writer.abandon()
    except StorageError as error:  # what is left is incomplete, and the next save to that folder clears it away
        logging.warning(f"what was written of {writer.folder} could not be removed: {error}")


def _tensors(state: TrainingState) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What all ranks write together, and every name of it with the name under which it is stored."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, value in named_tensors(state.model).items():
        names[f"model/{name}"] = first = first_name.setdefault(id(value), f"model/{name}")
        tensors[first] = value
    if state.optimizer is not None:
        for name, param in trained(state.model, state.optimizer).items():
            moments = state.optimizer.state.get(param, {})
            tensors.update({f"optimizer/{name}/{key}": v for key, v in moments.items() if isinstance(v, Tensor)})
    for averager_name, averager in (state.averagers.avgs_dict if state.averagers else {}).items():
        tensors.update({f"averager/{averager_name}/{name}": v for name, v in averager.tensors().items()})
    return tensors, {**names, **{name: name for name in tensors if name not in names}}


def _parts(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Of how many parts those tensors are whose parameters `fused_weight_parts` names; a moment or an average is cut and
    ordered as its parameter."""
    fused = fused_weight_parts(unwrap(model))
    found = {}
    for name in names if fused else ():
        kind, _, parameter = name.partition("/")
        if kind == "optimizer":
            parameter = parameter.rpartition("/")[0]
        elif kind == "averager":
            parameter = parameter.partition("/")[2]
        if parameter in fused:
            found[name] = fused[parameter]
    return found


def _extra(state: TrainingState) -> dict[str, Any]:
    """A copy of `extra` as JSON knows it, with what the other objects of the run have beside their tensors."""
    extra = dict(state.extra)
    extra["world_size"] = dist.get_world_size() if dist.is_initialized() else 1
    if state.optimizer is not None:
        names = {id(param): name for name, param in trained(state.model, state.optimizer).items()}
        extra["param_groups"] = [
            {**group, "params": [names[id(param)] for param in group["params"]]}
            for group in state.optimizer.param_groups
        ]
    if state.scaler is not None:
        extra["scaler"] = state.scaler.state_dict()
    if state.averagers is not None:
        extra["averagers"] = {name: averager.counters() for name, averager in state.averagers.avgs_dict.items()}
    copy: dict[str, Any] = json.loads(json.dumps(extra, default=lambda value: value.item()))
    return copy


# ---------------------------------------------------------------------------------------------- loading
def load(state: TrainingState, folder: str) -> dict[str, Any]:
    """Load a checkpoint into the live objects in place, at any world size and sharding; returns its `extra`.

    Collective. Every rank reads its own part alone. The flags of this run decide on the optimizer's hyperparameters;
    a parameter without moments in the checkpoint has none afterwards. Random generators are restored where the number
    of ranks is the same. Raises CheckpointError on all ranks alike: where the checkpoint does not fit before anything
    has changed, where its bytes are broken (BrokenCheckpoint) with a part of them loaded.
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
    run_on_all_ranks(lambda: _read_into({**targets, **rng}, _parts(state.model, targets), index, folder))
    if state.scaler is not None and index.extra.get("scaler"):
        state.scaler.load_state_dict(index.extra["scaler"])
    if state.averagers is not None:
        _finish_averagers(state.averagers, index, folder)
    if rng:
        set_rng_state(rng_state_from_tensors({name.rpartition("/")[2]: value for name, value in rng.items()}))
    return index.extra


def load_weights(model: nn.Module, folder: str) -> dict[str, Any]:
    """Load a checkpoint's weights alone, for evaluation or to begin another run; returns its `extra`. Collective."""
    index = _read_index(folder)
    targets = run_on_all_ranks(lambda: _weights(model, index, folder))
    run_on_all_ranks(lambda: _read_into(targets, _parts(model, targets), index, folder))
    return index.extra


def _read_index(folder: str) -> Index:
    data = run_on_master(lambda: read_index_bytes(folder))
    return run_on_all_ranks(lambda: Index.from_bytes(data, storage.join(folder, INDEX)))


def _read_into(targets: dict[str, Tensor], parts: dict[str, int], index: Index, folder: str) -> None:
    """Fill this rank's part of each target with what is stored under its name."""
    reader = TensorReader(folder, index)
    planner = BoxPlanner({name: local_blocks(tensor, parts.get(name, 1)) for name, tensor in targets.items()})
    planner.set_up_planner({}, reader.read_metadata(), is_coordinator=True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()


def _targets(state: TrainingState, index: Index, folder: str) -> dict[str, Tensor]:
    """The tensors to fill by the names under which they are stored; CheckpointError before anything is changed."""
    targets = _weights(state.model, index, folder)
    if state.averagers is not None:
        for averager_name, averager in state.averagers.avgs_dict.items():
            prefix = f"averager/{averager_name}/"
            found = {name: value for name, value in averager.tensors().items() if prefix + name in index.tensors}
            problems = [
                f"{prefix}{name} is {index.tensors[prefix + name].shape}, the model's {tuple(value.shape)}"
                for name, value in found.items()
                if index.tensors[prefix + name].shape != tuple(value.shape)
            ]
            if problems:
                raise CheckpointError(join_problems(problems, f"{folder}: does not fit the model"))
            targets.update({prefix + name: value for name, value in found.items()})
    if state.optimizer is not None:
        targets.update(_moments(state.model, state.optimizer, index, folder))
    return targets


def _weights(model: nn.Module, index: Index, folder: str) -> dict[str, Tensor]:
    stored = {
        name.removeprefix("model/"): torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in index.tensors.items()
        if name.startswith("model/")
    }
    fitting(stored, model, folder)
    targets: dict[int, tuple[str, Tensor]] = {}
    for name, value in named_tensors(model).items():
        if name in stored:
            targets.setdefault(id(value), (f"model/{name}", value.detach()))
    return dict(targets.values())


def _moments(model: nn.Module, optimizer: Optimizer, index: Index, folder: str) -> dict[str, Tensor]:
    """The optimizer's moments that are to be filled; made, sharded as the parameters are, where it has none yet."""
    params = trained(model, optimizer)
    groups = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    stored: dict[str, dict[str, Any]] = {}
    for key, tensor in index.tensors.items():
        if key.startswith("optimizer/"):
            name, _, moment = key.removeprefix("optimizer/").rpartition("/")
            stored.setdefault(name, {})[moment] = tensor
    check_moments({name: moments.keys() for name, moments in stored.items()}, model, optimizer, folder)
    problems = [f"the optimizer has no parameter {name}" for name in stored if name not in params]
    problems += [
        f"optimizer/{name}/{moment} is {tensor.shape}, the model's {tuple(params[name].shape)}"
        for name, moments in stored.items()
        for moment, tensor in moments.items()
        if name in params and tensor.shape not in ((), tuple(params[name].shape))
    ]
    if problems:
        raise CheckpointError(join_problems(problems[:8], f"{folder}: its optimizer does not fit the model"))
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
            logging.warning(f"{folder}: has no averager {name}; it starts afresh from the loaded weights")
            averager.reset()
        else:
            averager.load_counters(counters)
