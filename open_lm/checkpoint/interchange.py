"""Saving and loading a run's state: model, optimizer, averagers, random generators, progress and position in the data.

Works alike for one process, DDP and sharded models: whole tensors are gathered to rank 0, which writes them, and are
handed out from rank 0, which alone reads. Every function here is collective: all ranks call it, and a failure on rank 0
is raised on all. The files are described in files.py.
"""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from open_lm import storage
from open_lm.averaging import ModelAverager
from open_lm.checkpoint.files import (
    LATEST,
    average_states,
    file_name,
    numbered,
    plain,
    read_file,
    read_model_state,
    remove_checkpoint,
    sibling,
    write_file,
)
from open_lm.checkpoint.model_state import (
    fitting,
    gather_optimizer,
    gather_weights,
    moments_by_name,
    set_moments,
    set_weights,
)
from open_lm.checkpoint.progress import Progress
from open_lm.config import CheckpointConfig
from open_lm.distributed import gather_objects, on_master
from open_lm.errors import CheckpointError
from open_lm.rng import rng_state, set_rng_state
from open_lm.run_folder import RunPaths


# ---------------------------------------------------------------------------------------------- saving
class CheckpointWriter:
    """Writes the checkpoints of one run, and decides which epochs are kept.

    epochs: of the whole run; the last one is always kept. Beside it every `save_frequency`-th (0: none).
    """

    def __init__(self, paths: RunPaths, cfg: CheckpointConfig, epochs: int) -> None:
        self.paths = paths
        self.cfg = cfg
        self.epochs = epochs

    def save(
        self,
        progress: Progress,
        model: nn.Module,
        *,
        optimizer: Optimizer | None = None,
        scaler: Any = None,
        averagers: ModelAverager | None = None,
        failed: bool = False,
    ) -> str | None:
        """Write what is due after an epoch and return epoch_N.pt's path, or None where nothing was due.

        With `failed`, write to checkpoints_failed/ whatever the epoch. Raises StorageError where it cannot be written;
        then the earlier checkpoints are untouched.
        """
        keep = failed or self._is_kept(progress)
        if not self.paths.enabled or not (keep or self.cfg.save_most_recent):
            return None
        contents = self._gather(progress, model, optimizer, scaler, averagers)
        folder = self.paths.failed if failed else self.paths.checkpoints
        return on_master(lambda: self._write(folder, progress, contents, keep, failed))

    def _is_kept(self, progress: Progress) -> bool:
        frequency = self.cfg.save_frequency
        return progress.is_final or progress.epoch >= self.epochs or (frequency > 0 and progress.epoch % frequency == 0)

    def _gather(
        self,
        progress: Progress,
        model: nn.Module,
        optimizer: Optimizer | None,
        scaler: Any,
        averagers: ModelAverager | None,
    ) -> dict[str, dict[str, Any]]:
        """The content of each file by its kind, on rank 0; the order is the order of writing."""
        common = {
            "epoch": progress.epoch,
            "name": self.paths.name,
            "evaluation_metrics": plain(progress.evaluation_metrics),
        }
        contents: dict[str, dict[str, Any]] = {}
        if optimizer is not None:
            state = gather_optimizer(model, optimizer)
            contents["optimizer"] = {**common, "optimizer": plain(state), "rng": gather_objects(rng_state())}
            if scaler is not None:
                contents["optimizer"]["scaler"] = plain(scaler.state_dict())
        for name, averager in (averagers.avgs_dict if averagers is not None else {}).items():
            contents[name] = averager.state_dict()
        shared = plain(progress.shared_entries())
        contents["stats"] = {
            **common,
            "is_final_checkpoint": progress.is_final,
            "percentage_of_data_seen": float(progress.percentage_of_data_seen),
            **shared,
        }
        if progress.train_data_string is not None:
            contents["stats"]["train_data_string"] = list(progress.train_data_string)
        contents["epoch"] = {**common, "state_dict": gather_weights(model), **shared}
        return contents

    def _write(
        self, folder: str, progress: Progress, contents: dict[str, dict[str, Any]], keep: bool, failed: bool
    ) -> str | None:
        path = None
        if keep:
            for kind, content in contents.items():
                path = storage.join(folder, file_name(kind, progress.epoch))
                write_file(path, content)
            logging.info(f"saved checkpoint {path}")
        if failed:
            return path
        if self.cfg.save_most_recent:
            # One file, so that the newest model never stands beside the optimizer of another step.
            whole = {**contents.get("optimizer", {}), **contents["epoch"]}
            averages = {kind: content for kind, content in contents.items() if "av_model_sd" in content}
            latest = storage.join(folder, file_name("epoch", LATEST))
            write_file(latest, {**whole, "averagers": averages})
            path = path or latest
        if keep and self.cfg.delete_previous_checkpoint:
            previous = [epoch for epoch in numbered(folder) if epoch < progress.epoch]
            if previous:
                remove_checkpoint(folder, previous[-1], [kind for kind in contents if kind != "epoch"])
        return path


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
    """Load a checkpoint's weights into a (sharded) model in place; returns what else the checkpoint says."""
    state: dict[str, Tensor] = {}

    def read() -> Progress:
        weights, meta = read_model_state(path)
        state.update(fitting(weights, model, path))
        return Progress.from_meta(meta)

    progress = on_master(read)
    set_weights(model, state)
    logging.info(f"loaded {path} (epoch {progress.epoch}, step {progress.step})")
    return progress


def load_average(paths: list[str], coefficients: list[float] | None, model: nn.Module) -> None:
    """Load the weighted average of several checkpoints' weights (`--average`, `--average-coefficients`)."""
    state: dict[str, Tensor] = {}
    on_master(lambda: state.update(fitting(average_states(paths, coefficients), model, " + ".join(paths))))
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
            loaded["state"] = moments_by_name(loaded, model, path)
        return {"scaler": content.get("scaler")}

    found = on_master(read)
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

        counters = on_master(read)
        if counters is not None:
            averager.load_state_dict({**counters, "av_model_sd": weights})


def load_rng(path: str) -> bool:
    """Restore every rank's generators from the checkpoint `path`; False (and nothing done) at another world size."""

    def read() -> list[dict[str, Any]] | None:
        beside = sibling(path, "optimizer")
        content = read_file(beside if beside != path and storage.exists(beside) else path)
        return content.get("rng")

    states = on_master(read)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if not states or len(states) != world_size:
        return False
    set_rng_state(states[rank])
    return True
