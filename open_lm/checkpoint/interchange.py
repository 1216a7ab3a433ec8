"""Write and load the interchange files, epoch_N.pt and its companions, which any program with torch can read.

files.py describes them. One process writes them from a sharded checkpoint, tensor by tensor, so that no process needs
memory for the full model. They can be loaded into a single process, DDP and sharded models: only rank 0 reads, and
sends each rank its local shards. Loading is collective: all ranks call it, and an error on rank 0 is raised on all.
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
from open_lm.checkpoint.adapters import KEY
from open_lm.checkpoint.archive import LazyTensor, write_archive
from open_lm.checkpoint.files import (
    LATEST,
    adapter_record,
    average_states,
    companion_path,
    file_name,
    read_adapters,
    read_file,
    read_meta,
    read_model_state,
)
from open_lm.checkpoint.folders import is_transformers_folder, step_number
from open_lm.checkpoint.model_state import (
    check_adapters,
    moments_by_name,
    select_weights,
    set_moments,
    set_weights,
)
from open_lm.checkpoint.parametrization import check_parametrization
from open_lm.checkpoint.progress import Progress
from open_lm.checkpoint.tensor_index import StoredTensors
from open_lm.config.architecture import MODEL_FILE, read_architecture, read_family
from open_lm.distributed.processes import run_on_master
from open_lm.distributed.rng import rng_state_from_tensors, set_rng_state
from open_lm.errors import BrokenCheckpoint, CheckpointError
from open_lm.model.quantization import quantized_layers
from open_lm.optim.averaging import ModelAverager
from open_lm.parallel.parallelize import unwrap


# ---------------------------------------------------------------------------------------------- writing
def write_interchange(stored: StoredTensors, folder: str, name: str, keep_optimizer: bool = True) -> str:
    """Write the interchange files of a sharded checkpoint to a local or remote folder; return epoch_N.pt's path.

    `name` is the run's name. Each file is written atomically, epoch_N.pt last. At most one chunk of a tensor is in
    memory, or one full tensor if tensor parallelism sharded it along its columns.

    Raises:
        CheckpointError: the checkpoint is broken.
        StorageError: the checkpoint cannot be read, or the files cannot be written.
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
    """Write epoch_latest.pt, one file with the content of all interchange files, and return its path.

    With a single file, the model and the optimizer always belong to the same step.
    """
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
        raise type(error)(f"{path} could not be written: {error}") from error


def _contents(stored: StoredTensors, name: str) -> dict[str, dict[str, Any]]:
    """Return the content of each file by kind, in the order of writing, with LazyTensors for tensors."""
    progress, extra = Progress.from_json(stored.extra["progress"]), stored.extra
    common, shared = progress.common_entries(name), progress.shared_entries()
    weights = _lazy_tensors(stored, "model/")
    record = {KEY: extra[KEY]} if extra.get(KEY) else {}  # the tensors are adapters
    contents: dict[str, dict[str, Any]] = {}
    if extra.get("param_groups"):
        optimizer = {
            "state": _moments(stored),
            "param_groups": [_with_tuples(group) for group in extra["param_groups"]],
        }
        scaler = {"scaler": extra["scaler"]} if extra.get("scaler") else {}
        contents["optimizer"] = {**common, "optimizer": optimizer, "rng": _rng_states(stored), **scaler}
    for averager, counters in (extra.get("averagers") or {}).items():
        contents[averager] = {**counters, **record, "av_model_sd": _averages(stored, averager, weights)}
    contents["stats"] = {
        **common,
        "is_final_checkpoint": progress.is_final,
        "percentage_of_data_seen": float(progress.percentage_of_data_seen),
        **shared,
    }
    if progress.train_data_string is not None:
        contents["stats"]["train_data_string"] = list(progress.train_data_string)
    contents["epoch"] = {**common, **record, "state_dict": weights, **shared}
    return contents


def _lazy_tensors(stored: StoredTensors, prefix: str) -> dict[str, LazyTensor]:
    """Return the tensors with a name prefix, by the rest of their names; all names of a tied weight share one."""
    lazy: dict[str, LazyTensor] = {}
    return {
        name.removeprefix(prefix): lazy.setdefault(
            stored.stored_name(name),
            LazyTensor(tuple(stored.shape(name)), stored.dtype(name), partial(_chunks_in_order, stored, name)),
        )
        for name in stored.names(prefix)
    }


def _averages(stored: StoredTensors, averager: str, weights: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return an averager's weights by model name; tensors that it does not average (buffers) are the model's."""
    averages = _lazy_tensors(stored, f"averager/{averager}/")
    first_names = {name: stored.stored_name(f"model/{name}").removeprefix("model/") for name in weights}
    return {name: averages.get(first_names[name], tensor) for name, tensor in weights.items()}


def _rng_states(stored: StoredTensors) -> list[dict[str, Any]]:
    """Return the random generator states of each rank."""
    states: dict[int, dict[str, Tensor]] = {}
    for name in stored.names("rng/"):
        _, rank, generator = name.split("/", 2)
        states.setdefault(int(rank), {})[generator] = stored.read(name)
    return [_with_lazy_tensors(rng_state_from_tensors(states[rank])) for rank in sorted(states)]


def _with_lazy_tensors(value: Any) -> Any:
    """Return nested dicts and lists with each in-memory tensor wrapped in a LazyTensor."""
    if isinstance(value, dict):
        return {key: _with_lazy_tensors(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_lazy_tensors(item) for item in value]
    return LazyTensor(tuple(value.shape), value.dtype, lambda: [value]) if isinstance(value, Tensor) else value


def _moments(stored: StoredTensors) -> dict[str, dict[str, LazyTensor]]:
    """Return the optimizer's state by parameter and moment."""
    moments: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in _lazy_tensors(stored, "optimizer/").items():
        param, _, moment = name.rpartition("/")
        moments.setdefault(param, {})[moment] = tensor
    return moments


def _with_tuples(group: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter group with pairs such as betas as tuples again, which JSON stores as lists."""
    return {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}


def _chunks_in_order(stored: StoredTensors, name: str) -> Iterator[Tensor]:
    """Yield a tensor's chunks in memory order if each consists of full rows; otherwise yield the full tensor."""
    row_shape, row = tuple(stored.shape(name))[1:], 0
    for offsets, chunk in stored.chunks(name):
        if tuple(chunk.shape[1:]) != row_shape or tuple(offsets[:1]) not in ((), (row,)):
            if row:
                raise BrokenCheckpoint(f"{name}: its chunks are not in order")
            yield stored.read(name)
            return
        yield chunk
        row += len(chunk) if chunk.dim() else 1


# ---------------------------------------------------------------------------------------------- loading
def load_model(args: Any, model: nn.Module, different_seed: bool = False) -> tuple[int, int | None, int | None]:
    """Load the weights of `args.resume` into `model`; return (epoch, step, seed) of the checkpoint.

    A file of weights only gives (0, 0, None); step or seed is None if an old checkpoint does not contain it. Raise
    CheckpointError if the weights do not fit, or if the checkpoint's seed is not `args.seed` (unless
    `different_seed`).
    """
    progress = load_weights(args.resume, model)
    seed = None if different_seed else progress.seed
    run_seed = getattr(args, "seed", seed)
    if seed is not None and run_seed != seed:
        raise CheckpointError(
            f"{args.resume}: trained with --seed {seed}, but this run has --seed {run_seed}, which gives another data "
            f"order; continue with --seed {seed}, or start a new run from it with --pretrained"
        )
    return progress.epoch, progress.step, seed


def load_weights(path: str, model: nn.Module) -> Progress:
    """Load weights into a (sharded) model in place, and return the progress of their checkpoint.

    path: an epoch_N.pt, a step_N folder or a folder in the format of transformers. Adapters in the checkpoint are
    merged into the weights of their base. Adapters of the model do not change, see `load_adapters`.
    """
    run_on_master(lambda: _check_imported(path, model))
    run_on_master(lambda: check_parametrization(path, model))
    is_read_by_ranks = step_number(path) is not None and not quantized_layers(model)
    if is_read_by_ranks and run_on_master(lambda: adapter_record(path)) is None:
        progress = Progress.from_json(sharded.load_weights(model, path)["progress"])
        logging.info(f"loaded {path} (epoch {progress.epoch}, step {progress.step})")
        return progress
    state: dict[str, Tensor] = {}

    def read() -> Progress:
        if is_transformers_folder(path):
            from open_lm.hf.native_weights import read_native_weights

            state.update(read_native_weights(path, unwrap(model).params))
            return Progress.from_meta({})
        weights, meta = read_model_state(path)
        state.update(select_weights(weights, model, path))
        return Progress.from_meta(meta)

    progress = run_on_master(read)
    set_weights(model, state)
    logging.info(f"loaded {path} (epoch {progress.epoch}, step {progress.step})")
    return progress


def load_adapters(path: str, model: nn.Module) -> Progress:
    """Load the adapters of a run's epoch_N.pt into a (sharded) model in place, and return the checkpoint's progress."""
    state: dict[str, Tensor] = {}

    def read() -> Progress:
        state.update(read_adapters(path)[0])
        check_adapters(state, model, path)
        return Progress.from_meta(read_meta(path))

    progress = run_on_master(read)
    set_weights(model, state)
    logging.info(f"loaded {path} (epoch {progress.epoch}, step {progress.step})")
    return progress


def _check_imported(path: str, model: nn.Module) -> None:
    """Raise CheckpointError if an imported model's rows are in the order of another position embedding.

    The weights of rotary and llama_rotary have the same names and shapes.
    """
    url = storage.join(path.rstrip("/").rpartition("/")[0] or ".", MODEL_FILE)
    if storage.info(url) is None or read_family(url) is None:
        return
    expected = read_architecture(url).get("positional_embedding_type")
    found = getattr(unwrap(model).params, "positional_embedding_type", None)
    if expected is not None and found != expected:
        raise CheckpointError(
            f"{path}: was imported for {expected}, but --model has {found}, whose weights have another order; use "
            f"--model {url}, or import the weights again with --model"
        )


def load_average(paths: list[str], coefficients: list[float] | None, model: nn.Module) -> None:
    """Load the weighted average of several checkpoints' weights (`--average`, `--average-coefficients`)."""
    state: dict[str, Tensor] = {}
    for path in paths:
        run_on_master(partial(check_parametrization, path, model))
    run_on_master(lambda: state.update(select_weights(average_states(paths, coefficients), model, " + ".join(paths))))
    set_weights(model, state)
    logging.info(f"loaded the average of {', '.join(paths)}")


def load_optimizer(args: Any, model: nn.Module, optimizer: Optimizer | None, scaler: Any = None) -> bool:
    """Load the optimizer's moments (and the loss scaler) of the checkpoint `args.resume`; return False if it has none.

    Only moments and step counts are loaded: learning rate, betas and weight decay come from the flags of this run.
    The stored states may have parameter names as keys, or numbers (as single processes used to write them).
    """
    path = args.resume
    if is_transformers_folder(path):
        raise CheckpointError(
            f"{path}: is an exported model without the state of the optimizer, so that training cannot resume from it; "
            "start a new run from its weights with --pretrained"
        )
    loaded: dict[str, Any] = {}

    def read() -> dict[str, Any] | None:
        content = _read_companion(path, "optimizer")
        if "optimizer" not in content:
            logging.warning(f"{path}: the checkpoint has no optimizer state; the optimizer starts without moments")
            return None
        loaded.update(content["optimizer"])
        if optimizer is not None:
            loaded["state"] = moments_by_name(loaded, model, optimizer, path)
        return {"scaler": content.get("scaler")}

    saved = run_on_master(read)
    if saved is None:
        if optimizer is not None:
            optimizer.state.clear()  # of a checkpoint that turned out to be broken
        return False
    if optimizer is not None:
        set_moments(model, optimizer, loaded.get("state", {}))
    if scaler is not None and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    return True


def _read_companion(path: str, kind: str) -> Any:
    """Return the content of a companion file of an epoch_N.pt if it exists, else of the file `path`."""
    companion = companion_path(path, kind)
    return read_file(companion if companion != path and storage.exists(companion) else path)


def load_averagers(path: str, averagers: ModelAverager) -> None:
    """Load the averagers of the checkpoint `path`; an averager that it does not contain restarts, with a warning."""
    for name, averager in averagers.avgs_dict.items():
        weights: dict[str, Any] = {}

        def read(name: str = name, weights: dict[str, Any] = weights) -> dict[str, Any] | None:
            companion = companion_path(path, name)
            if companion != path and storage.exists(companion):
                state = read_file(companion)
            else:
                state = (read_file(path).get("averagers") or {}).get(name)
            if state is None:
                logging.warning(f"{path}: has no averager {name}; it restarts from the loaded weights")
                return None
            weights.update(state["av_model_sd"])
            return {key: value for key, value in state.items() if key != "av_model_sd"}

        counters = run_on_master(read)
        if counters is None:
            averager.reset()
        else:
            averager.load_state_dict({**counters, "av_model_sd": weights})


def load_rng(path: str) -> bool:
    """Restore the random generators of all ranks; return False and do nothing if the world size differs."""

    def read() -> list[dict[str, Any]] | None:
        return _read_companion(path, "optimizer").get("rng")

    states = run_on_master(read)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if not states or len(states) != world_size:
        return False
    set_rng_state(states[rank])
    return True
