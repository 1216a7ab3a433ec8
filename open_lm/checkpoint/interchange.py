"""The interchange files, epoch_N.pt and its companions, which any program with torch reads (described in files.py).

They are made from a sharded checkpoint by one process, tensor by tensor, so that nobody ever holds the whole model.
They are loaded into one process, DDP and sharded models alike: rank 0 alone reads, and hands out to each rank its part.
Loading is collective: all ranks call it, and a failure on rank 0 is raised on all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from open_lm import storage
from open_lm.checkpoint import sharded
from open_lm.checkpoint.archive import LazyTensor, write_archive
from open_lm.checkpoint.files import (
    LATEST,
    average_states,
    file_name,
    read_file,
    read_model_state,
    sibling,
)
from open_lm.checkpoint.folders import step_number
from open_lm.checkpoint.model_state import (
    fitting,
    moments_by_name,
    set_moments,
    set_weights,
)
from open_lm.checkpoint.progress import Progress
from open_lm.checkpoint.tensor_index import StoredTensors
from open_lm.distributed.processes import run_on_master
from open_lm.distributed.rng import rng_state_from_tensors, set_rng_state
from open_lm.errors import BrokenCheckpoint, CheckpointError
from open_lm.optim.averaging import ModelAverager


# ---------------------------------------------------------------------------------------------- writing
def write_interchange(stored: StoredTensors, folder: str, name: str, keep_optimizer: bool = True) -> str:
    """Write the interchange files of a sharded checkpoint to a local or remote folder; returns epoch_N.pt's path.

    `name` is the run's. Each file appears whole or not at all, epoch_N.pt last. At most one chunk of a tensor is held,
    or the whole of one that tensor parallelism has divided along its columns.
    CheckpointError where the checkpoint is broken, StorageError where it cannot be read or the files not be written.
    """
    contents = _contents(stored, name)
    if not keep_optimizer:
        contents.pop("optimizer", None)
    epoch, path = contents["epoch"]["epoch"], ""
    for kind, content in contents.items():
        path = storage.join(folder, file_name(kind, epoch))
        _write(path, content)
    return path


def write_latest(stored: StoredTensors, folder: str, name: str) -> str:
    """Write epoch_latest.pt, one file with all that `write_interchange` writes: so the newest model never stands beside
    the optimizer of another step. Returns its path."""
    contents = _contents(stored, name)
    averages = {kind: content for kind, content in contents.items() if "av_model_sd" in content}
    path = storage.join(folder, file_name("epoch", LATEST))
    _write(path, {**contents.get("optimizer", {}), **contents["epoch"], "averagers": averages})
    return path


def _write(path: str, content: dict[str, Any]) -> None:
    try:
        with storage.atomic_write(path) as file:
            write_archive(file, content)
    except CheckpointError as error:
        raise type(error)(f"{path} could not be made: {error}") from error


def _contents(stored: StoredTensors, name: str) -> dict[str, dict[str, Any]]:
    """The content of each file by its kind, with LazyTensors for tensors; the order is the order of writing."""
    progress, extra = Progress.from_json(stored.extra["progress"]), stored.extra
    common, shared = progress.common_entries(name), progress.shared_entries()
    weights = _named(stored, "model/")
    contents: dict[str, dict[str, Any]] = {}
    if extra.get("param_groups"):
        optimizer = {
            "state": _moments(stored),
            "param_groups": [_as_torch_says(group) for group in extra["param_groups"]],
        }
        scaler = {"scaler": extra["scaler"]} if extra.get("scaler") else {}
        contents["optimizer"] = {**common, "optimizer": optimizer, "rng": _generators(stored), **scaler}
    for averager, counters in (extra.get("averagers") or {}).items():
        contents[averager] = {**counters, "av_model_sd": _averages(stored, averager, weights)}
    contents["stats"] = {
        **common,
        "is_final_checkpoint": progress.is_final,
        "percentage_of_data_seen": float(progress.percentage_of_data_seen),
        **shared,
    }
    if progress.train_data_string is not None:
        contents["stats"]["train_data_string"] = list(progress.train_data_string)
    contents["epoch"] = {**common, "state_dict": weights, **shared}
    return contents


def _named(stored: StoredTensors, prefix: str) -> dict[str, LazyTensor]:
    """The tensors below `prefix` by the rest of their names; all names of a tied weight share one."""
    lazy: dict[str, LazyTensor] = {}
    return {
        name.removeprefix(prefix): lazy.setdefault(stored.stored_name(name), _lazy(stored, name))
        for name in stored.names(prefix)
    }


def _averages(stored: StoredTensors, averager: str, weights: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """An averager's weights under the names that the model's have; what it does not average, such as buffers, is as in
    the model."""
    averages = _named(stored, f"averager/{averager}/")
    first_names = {name: stored.stored_name(f"model/{name}").removeprefix("model/") for name in weights}
    return {name: averages.get(first_names[name], tensor) for name, tensor in weights.items()}


def _generators(stored: StoredTensors) -> list[dict[str, Any]]:
    """The states of the random generators of each rank."""
    states: dict[int, dict[str, Tensor]] = {}
    for name in stored.names("rng/"):
        _, rank, generator = name.split("/", 2)
        states.setdefault(int(rank), {})[generator] = stored.read(name)
    return [_held(rng_state_from_tensors(states[rank])) for rank in sorted(states)]


def _held(value: Any) -> Any:
    """A content with tensors that are in memory as LazyTensors."""
    if isinstance(value, dict):
        return {key: _held(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_held(item) for item in value]
    return LazyTensor(tuple(value.shape), value.dtype, lambda: [value]) if isinstance(value, Tensor) else value


def _moments(stored: StoredTensors) -> dict[str, dict[str, LazyTensor]]:
    """The optimizer's state by parameter and moment."""
    moments: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in _named(stored, "optimizer/").items():
        param, _, moment = name.rpartition("/")
        moments.setdefault(param, {})[moment] = tensor
    return moments


def _as_torch_says(group: dict[str, Any]) -> dict[str, Any]:
    """A group of parameters with its pairs of numbers, such as betas, as the tuples that JSON made lists of."""
    return {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}


def _lazy(stored: StoredTensors, name: str) -> LazyTensor:
    return LazyTensor(tuple(stored.shape(name)), stored.dtype(name), partial(_in_order, stored, name))


def _in_order(stored: StoredTensors, name: str) -> Iterator[Tensor]:
    """A tensor's chunks where each is some of its rows, one after the other; else the whole tensor."""
    width, row = tuple(stored.shape(name))[1:], 0
    for first, chunk in stored.chunks(name):
        if tuple(chunk.shape[1:]) != width or tuple(first[:1]) not in ((), (row,)):
            if row:
                raise BrokenCheckpoint(f"{name}: its chunks are not in order")
            yield stored.read(name)
            return
        yield chunk
        row += len(chunk) if chunk.dim() else 1


# ---------------------------------------------------------------------------------------------- loading
def load_model(args: Any, model: nn.Module, different_seed: bool = False) -> tuple[int, int | None, int | None]:
    """Load the weights of `args.resume` into `model`; returns (epoch, step, seed) of the checkpoint.

    Bare weights give (0, 0, None); step or seed is None where an old checkpoint does not say. Raises CheckpointError
    where the weights do not fit, or where the checkpoint's seed is not `args.seed` (unless `different_seed`).
    """
    progress = load_weights(args.resume, model)
    seed = None if different_seed else progress.seed
    wanted = getattr(args, "seed", seed)
    if seed is not None and wanted != seed:
        raise CheckpointError(
            f"{args.resume}: was trained with --seed {seed}, this run has --seed {wanted}, which orders the data "
            f"differently; continue with --seed {seed}, or start a new run from it with --pretrained"
        )
    return progress.epoch, progress.step, seed


def load_weights(path: str, model: nn.Module) -> Progress:
    """Load the weights of an epoch_N.pt or a step_N folder into a (sharded) model in place; returns what else the
    checkpoint says."""
    if step_number(path) is not None:
        progress = Progress.from_json(sharded.load_weights(model, path)["progress"])
        logging.info(f"loaded {path} (epoch {progress.epoch}, step {progress.step})")
        return progress
    state: dict[str, Tensor] = {}

    def read() -> Progress:
        weights, meta = read_model_state(path)
        state.update(fitting(weights, model, path))
        return Progress.from_meta(meta)

    progress = run_on_master(read)
    set_weights(model, state)
    logging.info(f"loaded {path} (epoch {progress.epoch}, step {progress.step})")
    return progress


def load_average(paths: list[str], coefficients: list[float] | None, model: nn.Module) -> None:
    """Load the weighted average of several checkpoints' weights (`--average`, `--average-coefficients`)."""
    state: dict[str, Tensor] = {}
    run_on_master(lambda: state.update(fitting(average_states(paths, coefficients), model, " + ".join(paths))))
    set_weights(model, state)
    logging.info(f"loaded the average of {', '.join(paths)}")


def load_optimizer(args: Any, model: nn.Module, optimizer: Optimizer | None, scaler: Any = None) -> bool:
    """Load the optimizer's moments (and the loss scaler) that belong to `args.resume`; False where there are none.

    The flags of this run decide on learning rate, betas and weight decay; only moments and step counts are loaded.
    Reads states keyed by name and those keyed by number, as single processes used to write them.
    """
    path = args.resume
    loaded: dict[str, Any] = {}

    def read() -> dict[str, Any] | None:
        beside = sibling(path, "optimizer")
        content = read_file(beside if beside != path and storage.exists(beside) else path)
        if "optimizer" not in content:
            logging.warning(f"{path}: there is no optimizer state beside it; the optimizer starts afresh")
            return None
        loaded.update(content["optimizer"])
        if optimizer is not None:
            loaded["state"] = moments_by_name(loaded, model, optimizer, path)
        return {"scaler": content.get("scaler")}

    found = run_on_master(read)
    if found is None:
        return False
    if optimizer is not None:
        set_moments(model, optimizer, loaded.get("state", {}))
    if scaler is not None and found["scaler"]:
        scaler.load_state_dict(found["scaler"])
    return True


def load_averagers(path: str, averagers: ModelAverager) -> None:
    """Load the averagers that belong to the checkpoint `path`; one without a file starts afresh and says so."""
    for name, averager in averagers.avgs_dict.items():
        weights: dict[str, Any] = {}

        def read(name: str = name, weights: dict[str, Any] = weights) -> dict[str, Any] | None:
            beside = sibling(path, name)
            if beside != path and storage.exists(beside):
                state = read_file(beside)
            else:
                state = (read_file(path).get("averagers") or {}).get(name)
            if state is None:
                logging.warning(f"{path}: has no averager {name}; it starts afresh from the loaded weights")
                return None
            weights.update(state["av_model_sd"])
            return {key: value for key, value in state.items() if key != "av_model_sd"}

        counters = run_on_master(read)
        if counters is not None:
            averager.load_state_dict({**counters, "av_model_sd": weights})


def load_rng(path: str) -> bool:
    """Restore every rank's generators from the checkpoint `path`; False (and nothing done) at another world size."""

    def read() -> list[dict[str, Any]] | None:
        beside = sibling(path, "optimizer")
        content = read_file(beside if beside != path and storage.exists(beside) else path)
        return content.get("rng")

    states = run_on_master(read)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if not states or len(states) != world_size:
        return False
    set_rng_state(states[rank])
    return True
